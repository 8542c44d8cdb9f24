"""Measure the block sizes that each kernel offers, and write the fastest right ones to pallas_kernels/tuned.json.

    python -m scripts.tune_kernels --table OUT/tuned.json    on the GPU that is to be tuned for
    python -m scripts.tune_kernels --dry                     anywhere: says what would be tried

A kernel's file offers `candidates(*operands) -> list[Config]`, the default first; the kernel itself takes `config=`. A
candidate must give what the default gives before it is timed. Needs jax and numpy alone; no config is invented.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernels import machine, runner, sweep
from experiments.kernels.timing import Timing, measure
from pallas_kernels import tuning


@dataclass(frozen=True)
class Op:
    """A kernel at a shape."""

    module: str
    """of pallas_kernels; its `candidates` are tried"""
    function: str
    make: Callable[[jax.Array], tuple[jax.Array, ...]]
    """operands from a key"""
    static: Mapping[str, Any] = field(default_factory=dict)
    """keywords beside `config`"""

    @property
    def name(self) -> str:
        """Name the op as the table does; what is static chooses the code, so it belongs to the name."""
        said = "".join(f" {key}={value}" for key, value in sorted(self.static.items()))
        return f"{self.module}.{self.function}{said}"


def normal(*shapes: tuple[int, ...]) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """Make normal bfloat16 operands of these shapes."""

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, len(shapes))
        return tuple(jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True))

    return make


def routed(experts: int, *shapes: tuple[int, ...]) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """Make operands and the group sizes of their rows, routed at random."""

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        expert_R = jax.random.randint(jax.random.fold_in(key, 1), shapes[0][:1], 0, experts)
        sizes_E = (expert_R[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
        return (*normal(*shapes)(key), sizes_E)

    return make


def ops() -> Iterator[Op]:
    """Yield what is tuned: the shapes of the benchmark's rows that matter most."""
    for length in (4096, 16384):
        for heads, kv_heads, dim in ((16, 16, 128), (64, 8, 128), (16, 16, 64)):
            shapes = [(16384 // length, length, n, dim) for n in (heads, kv_heads, kv_heads)]
            for causal in (True, False):
                yield Op("flash_attention", "flash_attention", normal(*shapes), {"causal": causal})
    for dim, hidden, experts, active in ((2048, 1024, 64, 8), (2048, 768, 128, 8), (4096, 14336, 8, 2)):
        for tokens in (32, 8192):
            rows = tokens * active
            forward = routed(experts, (rows, dim), (experts, dim, hidden))
            backward = routed(experts, (rows, hidden), (experts, dim, hidden))
            for module in ("grouped_matmul", "triton.grouped_matmul"):
                yield Op(module, "grouped_matmul", forward)
                yield Op(module, "grouped_matmul", backward, {"transpose_w": True})
            gradient = routed(experts, (rows, dim), (rows, hidden))
            yield Op("grouped_matmul_dw", "grouped_matmul_dw", gradient)
            yield Op("triton.grouped_matmul", "grouped_matmul_dw", gradient)
            yield Op("grouped_swiglu", "grouped_swiglu", routed(experts, (rows, dim), *[(experts, dim, hidden)] * 2))


def candidates(op: Op) -> list[Any]:
    """Ask the kernel's file what is worth trying; nothing where it offers no `candidates` or is not there."""
    name = f"pallas_kernels.{op.module}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return []
    offered = getattr(module, "candidates", None)
    return list(offered(*jax.eval_shape(op.make, jax.random.key(0)))) if offered else []


def bucket_of(op: Op) -> str:
    """Name the bucket of the op's operands, as the kernel's own lookup does."""
    return tuning.bucket(*jax.eval_shape(op.make, jax.random.key(0)))


def tune(op: Op, configs: list[Any]) -> tuple[Any, dict[Any, Timing]] | None:
    """Time every right candidate, printing the others' reasons; give the fastest and all times, or None."""
    function = getattr(importlib.import_module(f"pallas_kernels.{op.module}"), op.function)
    case = runner.Case("tuning", op.name, op.make, {}, 0, 0)
    sets = runner.input_sets(case, None)
    runs, expected = {}, None
    for config in configs:
        try:
            made = runner.make(functools.partial(function, config=config, **op.static), sets)
            runner.compare(made.out, made.out if expected is None else expected)
        except Exception as error:
            if runner.is_fatal(error):
                raise sweep.Lost(f"{op.name} {config}: {runner.in_a_line(error)}") from error
            print(f"    {config}: {runner.in_a_line(error)}")
            continue
        expected = made.out if expected is None else expected
        runs[str(config)] = (config, made.run)
    if not runs:
        return None
    found = measure({name: run for name, (_, run) in runs.items()})
    times = {config: found[name] for name, (config, _) in runs.items()}
    return min(times, key=lambda config: times[config].median), times


def entry_of(best: Any, times: Mapping[Any, Timing], default: Any) -> dict[str, Any]:
    """Write down a measurement: the config, its time and the default's, and on what."""
    described = machine.describe()
    return {
        "config": dataclasses.asdict(best),
        "us": round(times[best].median * 1e6, 2),
        "default_us": round(times[default].median * 1e6, 2) if default in times else None,
        "tried": len(times),
        "clock": times[best].clock,
        "device": described["device"],
        "versions": {name: described["versions"][name] for name in ("jax", "triton") if name in described["versions"]},
    }


def main(argv: list[str]) -> int:
    """Tune, or say what would be tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", metavar="TEXT", help="only ops whose name or bucket holds this text")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds after which no further op is begun")
    parser.add_argument(
        "--table", type=Path, default=tuning.TABLE, help=f"file to write (default: {tuning.TABLE.name})"
    )
    parser.add_argument("--dry", action="store_true", help="say what would be tried")
    options = parser.parse_args(argv)
    if not options.dry and not machine.on_gpu():
        print("error: no NVIDIA GPU here: --dry says what would be tried", file=sys.stderr)
        return 2
    deadline = sweep.Deadline(options.budget)
    chip = jax.devices()[0].device_kind
    for op in ops():
        bucket = bucket_of(op)
        if options.match not in f"{op.name} {bucket}":
            continue
        configs = candidates(op)
        print(f"{op.name}: {bucket}: {len(configs) or 'no'} candidates")
        if options.dry:
            print(*(f"    {config}" for config in configs), sep="\n", end="\n" if configs else "")
        elif configs and deadline.allows_another():
            with deadline.piece():
                found = tune(op, configs)
            if found is not None:
                entry = entry_of(*found, default=configs[0])
                tuning.write(options.table, tuning.key(op.name, chip, bucket), entry)
                print(f"  {json.dumps(entry)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
