"""What did the compiler make of a program? Its collectives, by mesh axes, read from the compiled HLO text."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_WIDTH = {"pred": 1, "bf16": 2, "f8e4m3fn": 1, "f8e5m2": 1}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


@dataclass(frozen=True)
class Collective:
    """One collective instruction of one device's program."""

    axes: tuple[str, ...]
    kind: str
    payload: float
    """bytes of the whole, joined array on one device: the result, of a reduce-scatter the operand"""
    ranks: int
    times: float
    """executions in a step; of one in a loop of unknown length, in one turn of it"""
    dynamic: bool
    """inside a loop whose length is known only at run time"""
    scope: str
    """the path of the code that it comes from"""

    @property
    def sent(self) -> float:
        """Give the bytes that a device sends in one execution, by ring algorithms (arXiv 2104.04473)."""
        part = (self.ranks - 1) / self.ranks
        if self.kind == "collective-permute":
            return self.payload
        return self.payload * part * (2 if self.kind == "all-reduce" else 1)


def collectives(hlo: str, mesh: Mapping[str, int], ticks: int = 0, work: int = 0) -> list[Collective]:
    """List the collectives of a compiled program, loops counted, both branches of a condition taken.

    A pipeline's outermost loop of `ticks` turns counts as its `work` pieces: bubbles are taken out.
    """
    computations, entry = _split(hlo)
    found = []
    for line, times, dynamic in _walk(computations, entry, 1.0, False, (ticks, work)):
        match = _INSTRUCTION.match(line)
        assert match
        kind = match[3].removesuffix("-start")
        axes, ranks = _axes(line, mesh)
        payload = float(_bytes(match[2], started=match[3].endswith("-start") and kind != "all-reduce"))
        if kind == "reduce-scatter":
            payload *= ranks
        scope = re.search(r'op_name="([^"]*)"', line)
        found.append(
            Collective(axes, kind.removeprefix("ragged-"), payload, ranks, times, dynamic, scope[1] if scope else "")
        )
    return [c for c in found if c.ranks > 1]


def _split(hlo: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif current and line.startswith("  "):
            computations[current].append(line.strip())
    return computations, entry


def _walk(
    computations: dict[str, list[str]], name: str, times: float, dynamic: bool, pipeline: tuple[int, int]
) -> Iterator[tuple[str, float, bool]]:
    for line in computations.get(name, ()):
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        op = match[3]
        if op.removesuffix("-start") in KINDS:
            yield line, times, dynamic
        elif op == "while":
            known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', line)
            count, inside = (int(known[1]) if known else 1), pipeline
            if known and count == pipeline[0]:
                count, inside = pipeline[1], (0, 0)
            body = re.search(r"body=%?([\w.\-]+)", line)
            assert body
            yield from _walk(computations, body[1], times * count, dynamic or not known, inside)
        else:
            for called in _called(line, op):
                yield from _walk(computations, called, times, dynamic, pipeline)


def _called(line: str, op: str) -> list[str]:
    if op == "conditional":
        names = re.findall(r"(?:true_computation|false_computation)=%?([\w.\-]+)", line)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return names
    if op in ("call", "fusion", "async-start", "custom-call"):
        return re.findall(r"(?:to_apply|calls|called_computations=\{)=?%?([\w.\-]+)", line)
    return []


def _bytes(shapes: str, started: bool) -> float:
    """Add up the arrays of a result; an asynchronous start gives its operands first, its results after them."""
    found = [(name, dims) for name, dims in _SHAPE.findall(shapes) if _width(name)]
    if started:
        found = [(name, dims) for name, dims in found if (name, dims) != ("u32", "")]  # what a permute waits on
        found = found[len(found) // 2 :]
    return sum(math.prod(int(d) for d in dims.split(",") if d) * _width(name) for name, dims in found)


def _width(name: str) -> float:
    if name in _WIDTH:
        return _WIDTH[name]
    digits = re.fullmatch(r"[a-z]+(\d+)", name)
    return int(digits[1]) / 8 if digits else 0


def _axes(line: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """Name the mesh axes that a collective joins, and count the ranks of a group."""
    if named := re.search(r"replica_groups=mesh\[[^\]]*\][^{]*?\{([^}]*)\}", line):
        axes = tuple(axis for axis in re.findall(r"'([^']+)'", named[1]) if mesh[axis] > 1)
        return axes, math.prod(mesh[axis] for axis in axes)
    if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", line):
        ids = [int(i) for i in re.findall(r"\d+", pairs[1])]
        groups = np.asarray(ids).reshape(-1, 2)
        axes = _differing(groups, mesh)
        return axes, math.prod(mesh[axis] for axis in axes)
    groups = _groups(line)
    if groups is None:
        return tuple(axis for axis, size in mesh.items() if size > 1), math.prod(mesh.values())
    return _differing(groups, mesh), groups.shape[1]


def _groups(line: str) -> np.ndarray | None:
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims = ([int(i) for i in iota[k].split(",")] for k in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose([int(i) for i in iota[3].split(",")])
        return ids.reshape(shape)
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return np.asarray([[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    return None


def _differing(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())), -1)  # [groups, ranks, axes]
    differs = (places != places[:, :1]).any((0, 1))
    return tuple(axis for axis, differ in zip(mesh, differs, strict=True) if differ)
