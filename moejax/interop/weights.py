"""How do a model's weights get from files to their devices, and back?

Each device asks for its own part of each weight, and that part alone is read: no weight is ever whole on the host
unless a device holds it whole. Stacked layers are as many tensors of a file as there are layers.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from moejax.interop import layout, names
from moejax.interop.files import WeightFiles
from moejax.interop.layout import Stored
from moejax.interop.model_types import family_of
from moejax.models import FAMILIES, ModelParts
from moejax.models.decoder import periods
from moejax.models.parts import MTP, STACKS, path_name

Tree = Any

ALWAYS_IGNORED = (r"\.rotary_emb\.inv_freq$", r"^lm_head\.weight$")
"""Tables that are computed anew; and the head, where it is the embedding table (else it is used, and asked for)."""


@dataclass(frozen=True)
class Leaf:
    """One weight or buffer of ours, and where its layers lie in files."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    layers: tuple[Stored, ...]
    """of each stacked layer, in the order of the first dim; a single one of what is not stacked"""
    stacked: bool

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Give one layer's shape."""
        return self.shape[1:] if self.stacked else self.shape

    def read(self, files: WeightFiles, index: tuple[slice, ...]) -> np.ndarray:
        """Read a part of the leaf and cast it to our dtype."""
        if not self.stacked:
            return layout.read(files, self.layers[0], self.shape, index).astype(self.dtype)
        first, *rest = index
        chosen = self.layers[first]
        out = np.empty(
            (len(chosen), *(len(range(*s.indices(n))) for s, n in zip(rest, self.shape[1:], strict=True))), self.dtype
        )
        for row, stored in zip(out, chosen, strict=True):
            row[...] = layout.read(files, stored, self.shape[1:], tuple(rest))
        return out

    def numbers(self, value: Array, dtype: Any = None) -> Iterator[tuple[Stored, "LayerOf"]]:
        """Give each layer's numbers of a whole array, fetched when they are written, in `dtype` if one is given."""
        value = value if dtype is None else value.astype(dtype)
        for at, stored in enumerate(self.layers):
            yield stored, LayerOf(value, at if self.stacked else None)

    def dtype_in(self, files: WeightFiles) -> Any:
        """Give the dtype in which a file holds it."""
        return files.tensors[layout.file_names(self.layers[0], self.own_shape)[0]].dtype


@dataclass(frozen=True)
class LayerOf:
    """One layer of a stacked array, fetched expert by expert or whole."""

    value: Array
    layer: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The layer's own shape."""
        return self.value.shape if self.layer is None else self.value.shape[1:]

    @property
    def dtype(self) -> Any:
        """The array's dtype."""
        return self.value.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        if self.layer is None:
            return np.asarray(self.value[index])
        return np.asarray(self.value[self.layer] if index is ... else self.value[self.layer, index])


def leaves_of(parts: ModelParts) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Say of every weight and every buffer, by its path, where it lies in files.

    Low-rank updates and what predicts further tokens lie in none.
    """
    family, config = family_of(parts.config), parts.config
    layers = FAMILIES[config.name].layers(config)
    runs, order = periods(layers), parts.stage_order()
    firsts = np.cumsum([0, *(len(period) * repeats for period, repeats in runs)])
    outside = family.model(config) if hasattr(family, "model") else names.model(config)
    prefix = family.prefix if hasattr(family, "prefix") else names.prefix

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> Leaf:
        keys = [str(key.key) for key in path]
        name = ".".join(keys)
        if keys[0] != STACKS:
            return Leaf(name, shape.shape, shape.dtype, (outside[name],), False)
        run, offset, inner = int(keys[1]), int(keys[3]), ".".join(keys[4:]).removesuffix(".base")
        period, repeats = runs[run]
        stored = family.layer(config, period[offset])[inner]
        numbers = [int(firsts[run]) + repeat * len(period) + offset for repeat in range(repeats)]
        numbers = numbers if order is None else [numbers[repeat] for repeat in order]
        placed = tuple(Stored(prefix(config, number) + stored.name, stored.dims, stored.pick) for number in numbers)
        return Leaf(name, shape.shape, shape.dtype, placed, True)

    def flat(tree: Tree) -> dict[str, Leaf]:
        found = jax.tree_util.tree_leaves_with_path(tree)
        return {path_name(path): leaf(path, shape) for path, shape in found if str(path[0].key) != MTP}

    return {} if config.lora else flat(parts.shapes), flat(parts.buffer_shapes)


class Loaded(NamedTuple):
    """What a folder gave."""

    params: Tree
    buffers: Tree
    left_out: list[str]
    """tensors that this architecture does not use"""
    buffer_dtypes: dict[str, Any]
    """by path: buffers are held in the router's precision, and written as they were"""


def load(parts: ModelParts, folder: Path, seed: int = 0) -> Loaded:
    """Give weights and buffers, each device's part read for itself; low-rank updates, which no file has, are drawn.

    Raises ValueError naming file and tensor where one is missing, of another shape, or of no use to this model.
    """
    files = WeightFiles.open(folder, quantized_dtype=parts.config.precision.params)
    params, buffers = leaves_of(parts)
    paths = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(parts.shapes)}
    drawn = parts.init_some(seed, paths - set(params)) if paths - set(params) else {}
    left_out = _left_out(parts, files, [*params.values(), *buffers.values()], folder)
    for each in (*params.values(), *buffers.values()):
        for stored in each.layers:
            for name in layout.file_names(stored, each.own_shape):
                files.require(name, layout.file_shape(stored, each.own_shape))
    total = sum(int(np.prod(each.shape)) * jnp.dtype(each.dtype).itemsize for each in params.values())
    with tqdm(total=total, desc=f"reading {folder}", unit="B", unit_scale=True, delay=2.0, leave=False) as bar:

        def place(leaf: Leaf, spec: Any) -> Array:
            sharding = parts.plan.place(spec)
            array = jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf.read(files, index or ()))
            bar.update(array.nbytes)
            return array

        def fill(leaves: Mapping[str, Leaf], specs: Tree) -> Tree:
            def one(path: Any, spec: Any) -> Array:
                name = path_name(path)
                return drawn[name] if name in drawn else place(leaves[name], spec)

            return jax.tree_util.tree_map_with_path(one, specs)

        dtypes = {path: leaf.dtype_in(files) for path, leaf in buffers.items()}
        return Loaded(fill(params, parts.weight_specs()), fill(buffers, parts.buffer_specs()), left_out, dtypes)


def _left_out(parts: ModelParts, files: WeightFiles, leaves: list[Leaf], folder: Path) -> list[str]:
    """List tensors that the family ignores; raise ValueError for one that nobody knows."""
    used = {name for each in leaves for stored in each.layers for name in layout.file_names(stored, each.own_shape)}
    family = family_of(parts.config)
    ignored = family.ignored(parts.config) if hasattr(family, "ignored") else []
    patterns = [re.compile(pattern) for pattern in (*ignored, *ALWAYS_IGNORED)]
    for copy, original in _copies(parts).items():
        if copy in files.tensors:
            _check_copy(files, copy, original)
            used.add(copy)
    rest = sorted(set(files.tensors) - used)
    for name in rest:
        if not any(pattern.search(name) for pattern in patterns):
            raise ValueError(
                f"{files.tensors[name].file}: {name} is no weight of a {family.MODEL_TYPES[0]} with this config.json: "
                "its config does not fit its files"
            )
    return rest


def _copies(parts: ModelParts) -> dict[str, str]:
    """Name the tensors that repeat another one."""
    family = family_of(parts.config)
    return family.copies(parts.config) if hasattr(family, "copies") else {}


def _check_copy(files: WeightFiles, copy: str, original: str) -> None:
    """Raise ValueError where a tensor does not repeat the one that it should."""
    shape = files.require(original).shape
    whole = (slice(None),) * len(shape)
    files.require(copy, shape)
    if not np.array_equal(files.read(copy, whole), files.read(original, whole)):
        raise ValueError(
            f"{files.tensors[copy].file}: {copy} differs from {original}: this model has one table for both, and was "
            "trained with several"
        )


def tensors(
    parts: ModelParts, params: Tree, buffers: Tree, buffer_dtypes: Mapping[str, Any] | None = None
) -> Iterator[layout.NewTensor]:
    """Give the tensors of a file that holds these weights; numbers are fetched one tensor at a time."""
    found, dtypes = [], buffer_dtypes or {}
    for leaves, tree in zip(leaves_of(parts), (params, buffers), strict=True):
        for path, value in jax.tree_util.tree_leaves_with_path(tree):
            if (name := path_name(path)) in leaves:
                found += leaves[name].numbers(value, dtypes.get(name))
    copies = {} if parts.config.tie_embeddings else _copies(parts)
    for tensor in layout.file_tensors(found):
        yield tensor
        yield from ((copy, *tensor[1:]) for copy, original in copies.items() if original == tensor[0])
