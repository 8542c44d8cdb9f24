"""How does a weight of ours lie in a file's tensor: which name, which order of dims, which part?

A `Stored` says it once, for both directions. Numbers are moved, never computed: they come back bit for bit.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from moejax.interop.files import WeightFiles
from moejax.interop.transpose import contiguous
from moejax.interop.writer import NewTensor

EXPERT = "{expert}"
_DIM = re.compile(r"\(([^()]*)\)|(\S+)")


@dataclass(frozen=True)
class Stored:
    """Where a leaf lies: `Stored("layers.0.q_proj.weight", "(N H) D -> D N H")`.

    `name` is the tensor's; with "{expert}" in it the leaf's first dim is stacked from one tensor per expert, and `dims`
    tells of the others. `dims` has the file's dims on the left, parentheses around those that it holds as one, and ours
    on the right. `pick` ("g", 0, 2) says that the file's factor g has size 2, of which this leaf is number 0.
    """

    name: str
    dims: str
    pick: tuple[str, int, int] | None = None

    def __post_init__(self) -> None:
        factors = [factor for dim in self.file_dims for factor in dim]
        picked = [self.pick[0]] if self.pick else []
        assert sorted(factors) == sorted([*self.our_dims, *picked]), f"{self}: dims differ between left and right"
        assert len(set(factors)) == len(factors), f"{self}: a dim stands twice"
        assert self.pick is None or 0 <= self.pick[1] < self.pick[2], f"{self}: no such number to pick"

    @cached_property
    def file_dims(self) -> tuple[tuple[str, ...], ...]:
        """The file's dims, outermost first, each as its factors."""
        left = self.dims.split("->")[0]
        return tuple(tuple((group or single).split()) for group, single in _DIM.findall(left))

    @cached_property
    def our_dims(self) -> tuple[str, ...]:
        """Our dims, without the experts' where the file has a tensor for each."""
        return tuple(self.dims.split("->")[1].split())

    @property
    def per_expert(self) -> bool:
        """Whether the file has a tensor per expert."""
        return EXPERT in self.name

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Give each factor's size for a leaf of `shape`."""
        ours = shape[1:] if self.per_expert else shape
        assert len(ours) == len(self.our_dims), f"{self} cannot hold a leaf of shape {shape}"
        return dict(zip(self.our_dims, ours, strict=True)) | ({self.pick[0]: self.pick[2]} if self.pick else {})


def file_shape(stored: Stored, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give the shape of the file's tensor (of each expert's) that holds a leaf of `shape`."""
    sizes = stored.sizes(shape)
    return tuple(math.prod(sizes[factor] for factor in dim) for dim in stored.file_dims)


def file_names(stored: Stored, shape: tuple[int, ...]) -> list[str]:
    """List the tensors that hold a leaf of `shape`: one, or one per expert."""
    experts = range(shape[0]) if stored.per_expert else range(1)
    return [stored.name.replace(EXPERT, str(expert)) for expert in experts]


def read(files: WeightFiles, stored: Stored, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """Read the part `index` (in our dims) of the leaf of `shape`, in the file's dtype, and little of the file beside.

    Raises ValueError where a tensor is missing, or has another shape than `shape` implies.
    """
    assert len(index) == len(shape), f"{stored} of shape {shape} needs as many slices, got {index}"
    whole = [slice(*part.indices(extent)) for part, extent in zip(index, shape, strict=True)]
    assert all(part.step == 1 for part in whole), f"steps must be 1, got {index}"
    expected, names = file_shape(stored, shape), file_names(stored, shape)
    if not stored.per_expert:
        files.require(stored.name, expected)
        return _read_one(files, stored, stored.name, shape, whole)
    first = files.require(names[0], expected)
    experts, *rest = whole
    out = np.empty([max(0, part.stop - part.start) for part in whole], first.dtype)
    for row, expert in enumerate(range(experts.start, experts.stop)):
        info = files.require(names[expert], expected)
        if info.dtype != first.dtype:
            raise ValueError(f"{info.file}: {names[expert]} is {info.dtype}, must be as {names[0]}, {first.dtype}")
        out[row] = _read_one(files, stored, names[expert], shape, rest)
    return out


@dataclass(frozen=True)
class Part:
    """A leaf's share of a tensor of a file: all of it, or one of the numbers to pick from."""

    name: str
    shape: tuple[int, ...]
    values: np.ndarray
    """In the order of the file's factors, of size 1 where one is picked."""
    spread: tuple[int, ...]
    """The tensor's shape with its composite dims taken apart."""
    index: tuple[slice, ...]
    """Where `values` stand in the tensor of shape `spread`."""

    def put(self, tensor: np.ndarray) -> None:
        """Write the share into the (contiguous) tensor of `shape`."""
        tensor.reshape(self.spread, copy=False)[self.index] = self.values


def to_file(stored: Stored, leaf: Any) -> Iterator[Part]:
    """Give a leaf's share of each tensor that it lies in, in the order of `file_names`.

    `leaf` is an array of numpy or of jax, or anything with `shape` that gives an array for `leaf[expert]`, or for
    `leaf[...]` where the file has no tensor per expert.
    """
    for at, name in enumerate(file_names(stored, leaf.shape)):
        yield _part(stored, name, leaf.shape, np.asarray(leaf[at if stored.per_expert else ...]))


def file_tensors(leaves: Iterable[tuple[Stored, Any]]) -> Iterator[NewTensor]:
    """Merge leaves (see `to_file`, with `dtype` too) into the tensors that a file shall have, for `write_weights`.

    A leaf is asked for its numbers only when the tensor is written, and once for each tensor.
    """
    shares: dict[str, list[tuple[Stored, Any, Any]]] = {}
    for stored, leaf in leaves:
        for at, name in enumerate(file_names(stored, leaf.shape)):
            shares.setdefault(name, []).append((stored, leaf, at if stored.per_expert else ...))
    for name, group in shares.items():
        shapes = {file_shape(stored, leaf.shape) for stored, leaf, _ in group}
        dtypes = {np.dtype(leaf.dtype) for _, leaf, _ in group}
        picks = sorted(stored.pick[1:] if stored.pick else (0, 1) for stored, _, _ in group)
        complete = picks == [(number, len(group)) for number in range(len(group))]
        assert len(shapes) == len(dtypes) == 1 and complete, f"{name}: its leaves do not make one tensor: {group}"
        yield name, shapes.pop(), dtypes.pop(), partial(_merged, name, group)


def _merged(name: str, group: list[tuple[Stored, Any, Any]]) -> np.ndarray:
    stored, leaf, _ = group[0]
    tensor = np.empty(file_shape(stored, leaf.shape), leaf.dtype)
    for stored, leaf, at in group:
        _part(stored, name, leaf.shape, np.asarray(leaf[at])).put(tensor)
    return tensor


def _part(stored: Stored, name: str, shape: tuple[int, ...], values: np.ndarray) -> Part:
    sizes = stored.sizes(shape)
    factors = [factor for dim in stored.file_dims for factor in dim]
    picked = {stored.pick[0]: stored.pick[1]} if stored.pick else {}
    order = [stored.our_dims.index(factor) for factor in factors if factor not in picked]
    ordered = contiguous(values.transpose(order))
    index = tuple(slice(picked[factor], picked[factor] + 1) if factor in picked else slice(None) for factor in factors)
    expanded = np.expand_dims(ordered, tuple(at for at, factor in enumerate(factors) if factor in picked))
    return Part(name, file_shape(stored, shape), expanded, tuple(sizes[factor] for factor in factors), index)


def _read_one(files: WeightFiles, stored: Stored, name: str, shape: tuple[int, ...], index: list[slice]) -> np.ndarray:
    """Read a part of one tensor of a file, in our order of dims."""
    sizes = stored.sizes(shape)
    ranges = dict(zip(stored.our_dims, ((part.start, max(part.start, part.stop)) for part in index), strict=True))
    if stored.pick:
        ranges[stored.pick[0]] = (stored.pick[1], stored.pick[1] + 1)
    cuts = [_cut([(sizes[factor], *ranges[factor]) for factor in dim]) for dim in stored.file_dims]
    values = files.read(name, tuple(cut for cut, _, _ in cuts))
    values = values.reshape([extent for _, extents, _ in cuts for extent in extents])
    values = values[tuple(part for _, _, parts in cuts for part in parts)]
    factors = [factor for dim in stored.file_dims for factor in dim]
    order = [factors.index(factor) for factor in stored.our_dims]
    picked = [factors.index(stored.pick[0])] if stored.pick else []
    ours = values.transpose(order + picked)
    return contiguous(ours.reshape(ours.shape[: len(order)]))


def _cut(factors: list[tuple[int, int, int]]) -> tuple[slice, list[int], list[slice]]:
    """Cut one dim of a file by its factors' (size, start, stop), outermost first.

    Gives the slice of the file to read, what it has of each factor, and what to keep of that in memory. Factors of one
    number outside the first range narrow the slice, such factors inside it give its step; any others are read whole.
    """
    strides = [math.prod(size for size, _, _ in factors[at + 1 :]) for at in range(len(factors))]
    if any(start == stop for _, start, stop in factors):
        return slice(0, 0), [stop - start for _, start, stop in factors], [slice(None)] * len(factors)
    single = [stop - start == 1 for _, start, stop in factors]
    ranged = single.index(False) if False in single else len(factors) - 1
    offset = sum(start * stride for (_, start, _), stride in zip(factors[:ranged], strides, strict=False))
    _, start, stop = factors[ranged]
    stride = strides[ranged]
    inner = list(zip(factors, strides, strict=True))[ranged + 1 :]
    if all(single[ranged + 1 :]):
        offset += sum(begin * step for (_, begin, _), step in inner)
        part = slice(offset + start * stride, offset + (stop - 1) * stride + 1, stride)
        return part, [stop - start for _, start, stop in factors], [slice(None)] * len(factors)
    extents = [1] * ranged + [stop - start] + [size for (size, _, _), _ in inner]
    kept = [slice(None)] * (ranged + 1) + [slice(begin, end) for (_, begin, end), _ in inner]
    return slice(offset + start * stride, offset + stop * stride), extents, kept
