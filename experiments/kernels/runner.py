"""How is one row measured? Every way made, compared with the reference, and only then timed against the others.

Whatever a way raises is its line in the row; a wrong result is its line too, and is not timed.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernels.case import Case, Way
from experiments.kernels.machine import on_gpu, smi
from experiments.kernels.timing import Runnable, measure, number_of_sets, one_call

OURS = ("mosaic", "triton")
"""The names of our own ways; all others are peers."""
REFERENCES = ("xla", "reference")
"""Whom the others are compared with; where these cannot run, the first peer that can."""
LARGEST_ERROR = {"bfloat16": 2e-2, "float16": 2e-2, "float32": 1e-3}
"""of the norm of the difference, relative: two roundings of bfloat16, or tensor cores' own float32"""
LONGEST_CALL = 0.5
"""seconds: a way slower than that is not worth forty calls"""

TIMING = "timing"

Row = dict[str, Any]


@dataclass(frozen=True)
class Made:
    """A way that gave a result."""

    run: Runnable
    out: Any


NamedMaker = tuple[str, Callable[[], Made]]


class Wrong(ArithmeticError):
    """A way's result is not the reference's: the message says by how much."""


@contextlib.contextmanager
def unwatched(name: str) -> Iterator[None]:
    """Watch nothing: what `run_case` does around each way unless told otherwise."""
    yield


def run_case(
    case: Case, dry: bool = False, watched: Callable[[str], Any] = unwatched, dead: Mapping[str, str] | None = None
) -> Row:
    """Measure a case; `dry` compares the ways on the CPU and times nothing.

    `watched(way)` is entered around everything that one way does first, and as `watched(TIMING)` around the timing.
    `dead` names ways that must not be tried, and why.
    """
    row: Row = {"family": case.family, "name": case.name, "flops": case.flops, "bytes": case.bytes}
    row |= {"target": case.target, "measured": not dry, "ways": {}}
    try:
        sets = input_sets(case, 1 if dry else None)
        row["sets"] = len(sets)
        runs = checked_runs(row, makers(case, sets, dry), dry, watched, dead or {})
        if not dry and runs:
            if dead and TIMING in dead:
                raise RuntimeError(f"timing: {dead[TIMING]}")
            with watched(TIMING):
                for name, timing in measure(runs).items():
                    row["ways"][name] |= asdict(timing)
                row["sm_clock"] = smi().get("clocks.sm")  # it falls when the card meets its power limit
        row["reads_mostly"] = reads_mostly(case)
    except Exception as error:  # the process may be lost with it: see is_fatal
        row |= {"failed": in_a_line(error), "fatal": is_fatal(error)}
    return row


def checked_runs(
    row: Row, ways: Iterator[NamedMaker], dry: bool, watched: Callable[[str], Any], dead: Mapping[str, str]
) -> dict[str, Runnable]:
    """Make each way and compare it; give those to be timed, and write about all into the row."""
    runs, reference = {}, None
    row["against"] = None
    for name, maker in ways:
        if name in dead:
            row["ways"][name] = {"skipped": dead[name]}
            continue
        with watched(name):
            try:
                made = maker()
                error = compare(made.out, made.out if reference is None else reference)  # NaN differs from itself
                row["ways"][name] = {"error": None if reference is None else error}
                if not dry and (seconds := one_call(made.run)) > LONGEST_CALL:
                    row["ways"][name]["skipped"] = f"{seconds:.2f} s a call: not timed (limit {LONGEST_CALL:g} s)"
                else:
                    runs[name] = made.run
                if reference is None and name not in OURS:
                    row["against"], reference = name, made.out
            except Exception as error:
                if is_fatal(error):
                    raise
                row["ways"][name] = {"wrong" if isinstance(error, Wrong) else "skipped": in_a_line(error)}
    return runs


def makers(case: Case, sets: list[tuple[jax.Array, ...]], dry: bool) -> Iterator[NamedMaker]:
    """Yield each way's name and what makes it, those first with which the others are compared."""

    def jax_way(way: Way, name: str) -> Callable[[], Made]:
        if dry:
            return lambda: interpret(way, name, sets)
        return lambda: make(way, sets)

    def torch_way(way: Way) -> Callable[[], Made]:
        return lambda: make_torch(way, sets)

    ordered = sorted(case.ways, key=lambda name: (REFERENCES.index(name) if name in REFERENCES else 9, name in OURS))
    peers = [(name, jax_way(case.ways[name], name)) for name in ordered if name not in OURS]
    torch_peers = [(f"torch {name}", torch_way(way)) for name, way in case.torch_ways.items()]
    yield from peers
    yield from ((name, jax_way(case.ways[name], name)) for name in ordered if name in OURS)
    yield from torch_peers if not dry else ((name, _needs_gpu) for name, _ in torch_peers)


def _needs_gpu() -> Made:
    raise RuntimeError("not run without a GPU")


def input_sets(case: Case, number: int | None) -> list[tuple[jax.Array, ...]]:
    """Make sets of inputs, each from a key of its own, so many that together they are larger than the cache."""
    make_set = jax.jit(case.make)
    if number is None:
        shapes = jax.tree.leaves(jax.eval_shape(case.make, jax.random.key(0)))
        number = number_of_sets(sum(x.size * x.dtype.itemsize for x in shapes))
    return jax.block_until_ready([make_set(jax.random.key(seed)) for seed in range(number)])


def make(way: Way, sets: list[tuple[jax.Array, ...]]) -> Made:
    """Compile a JAX way and call it once."""
    compiled = jax.jit(way).lower(*sets[0]).compile()
    out = jax.block_until_ready(compiled(*sets[0]))
    return Made(Runnable(lambda i: compiled(*sets[i % len(sets)]), jax.block_until_ready), out)


def make_torch(way: Way, sets: list[tuple[jax.Array, ...]]) -> Made:
    """Call a torch way once, on the same memory."""
    import torch  # pyright: ignore[reportMissingImports]

    tensors = [tuple(torch.from_dlpack(x) for x in each) for each in sets]

    def wait(_: Any) -> None:
        torch.cuda.synchronize()

    out = way(*tensors[0])
    torch.cuda.synchronize()
    leaves = out if isinstance(out, (tuple, list)) else [out]
    arrays = [jnp.from_dlpack(x.detach().contiguous()) for x in leaves]
    return Made(Runnable(lambda i: way(*tensors[i % len(tensors)]), wait, torch=True), arrays)


def interpret(way: Way, name: str, sets: list[tuple[jax.Array, ...]]) -> Made:
    """Call a way once on the CPU: ours through Mosaic's interpreter, the references as they are."""
    if name not in (*REFERENCES, *OURS):
        return _needs_gpu()
    with interpreter() if name == "mosaic" else contextlib.nullcontext():  # ours in Triton declines, in its own words
        out = jax.block_until_ready(jax.jit(way)(*sets[0]))
    return Made(Runnable(lambda i: None, lambda out: None), out)


def interpreter() -> Any:
    """Give the context in which Mosaic's kernels run on the CPU; raise NotImplementedError where there is none."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        raise NotImplementedError(f"Mosaic's interpreter wants Python 3.12 and jax 0.11.2 (here jax {jax.__version__})")
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())


def compare(out: Any, reference: Any) -> float:
    """Give the largest relative error of a leaf, in the norm; raise Wrong over the limit, for NaN or another shape."""
    leaves, expected = jax.tree.leaves(out), jax.tree.leaves(reference)
    shapes, wanted = ([tuple(x.shape) for x in each] for each in (leaves, expected))
    if shapes != wanted:
        raise Wrong(f"shapes {shapes} instead of {wanted}")
    worst = 0.0
    for x, y in zip(leaves, expected, strict=True):
        error = float(relative_error(x, y))
        limit = max(LARGEST_ERROR.get(jnp.dtype(z.dtype).name, 0.0) for z in (x, y))
        if not error <= limit:
            raise Wrong(f"relative error {error:.1e} (limit {limit:.0e})")
        worst = max(worst, error)
    return worst


@jax.jit
def relative_error(x: jax.Array, y: jax.Array) -> jax.Array:
    """Give |x - y| / |y| in float32; NaN where either holds one."""
    a, b = (z.astype(jnp.float32) for z in (x, y))
    norm = jnp.linalg.norm(b.ravel())
    return jnp.linalg.norm((a - b).ravel()) / jnp.where(norm == 0, 1.0, norm)


def reads_mostly(case: Case) -> bool:
    """Say whether a case reads 19 of 20 bytes that it must move: then reads alone are its ceiling."""
    shapes = jax.tree.leaves(jax.eval_shape(case.make, jax.random.key(0)))
    return sum(x.size * x.dtype.itemsize for x in shapes) > 0.95 * case.bytes


def floor_seconds(row: Row, ceilings: Mapping[str, Any]) -> float | None:
    """Give the shortest time that the measured ceilings allow; None where none was measured."""
    bandwidth = ceilings.get("read_bandwidth" if row.get("reads_mostly") else "copy_bandwidth")
    if not bandwidth or not ceilings.get("matmul_flops"):
        return None
    return max(row["flops"] / ceilings["matmul_flops"], row["bytes"] / bandwidth)


def is_fatal(error: Exception) -> bool:
    """Say whether the GPU's context is lost with this error, so that whatever follows would fail too."""
    words = ("ILLEGAL_ADDRESS", "illegal memory access", "LAUNCH_FAILED", "unspecified launch failure", "MISALIGNED")
    return on_gpu() and any(word in str(error) for word in words)


def in_a_line(error: Exception) -> str:
    """Say what went wrong in one line of bearable length."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__


def seconds_of(row: Row, name: str) -> float | None:
    """Give a way's median time; None if it was not timed."""
    found = row["ways"].get(name, {}).get("median")
    return found if found is not None and math.isfinite(found) else None


def own_ways(row: Row) -> list[str]:
    """Name a row's own ways: our kernels, or XLA's fusion where no kernel is owed."""
    return [name for name in row["ways"] if name in OURS] or [name for name in row["ways"] if name == "xla"]


def fastest(row: Row, ours: bool) -> tuple[str, float] | None:
    """Give the fastest of our ways, or of the peers, and its time."""
    own = own_ways(row)
    timed = [(name, t) for name in row["ways"] if (name in own) == ours and (t := seconds_of(row, name)) is not None]
    return min(timed, key=lambda pair: pair[1], default=None)
