"""Measure the block sizes that each kernel offers, and write the fastest right ones to pallas_kernels/tuned.json.

    python -m scripts.tune_kernels --table OUT/tuned.json    on the GPU that is to be tuned for
    python -m scripts.tune_kernels --dry                     anywhere: says what would be tried

A kernel takes `config=` and looks up one where none is given; pallas_kernels/candidates.py lists what may be better. A
candidate must give what the default gives before it is timed. Needs jax and numpy alone; no config is invented.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernels import attention, decode, lightning, machine, moe, runner, sweep
from experiments.kernels.timing import Timing, measure
from pallas_kernels import candidates, tuning
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention_bwd import flash_attention_bwd
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_matmul_pair
from pallas_kernels.grouped_matmul_dw import grouped_matmul_dw
from pallas_kernels.grouped_swiglu import grouped_swiglu, grouped_swiglu_bwd
from pallas_kernels.latent_attention import latent_attention
from pallas_kernels.lightning_attention import lightning_attention, lightning_attention_bwd
from pallas_kernels.linear_cross_entropy import linear_cross_entropy_statistics
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.rms_norm import rms_norm_bwd
from pallas_kernels.triton import grouped_matmul as triton

DRY_CHIP = "NVIDIA H200"
"""What is said to be there where no GPU is."""


@dataclass(frozen=True)
class Op:
    """A kernel at a shape; its own lookup says how the table calls both."""

    kernel: Callable[..., Any]
    """of the operands and `config`"""
    make: Callable[[jax.Array], tuple[jax.Array, ...]]
    """operands from a key"""
    candidates: Callable[..., list[Any]]
    """of the default and the operands' shapes"""

    @cached_property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Give the operands' shapes."""
        return jax.eval_shape(self.make, jax.random.key(0))

    def lookup(self) -> tuning.Lookup:
        """Ask the kernel what it looks up for these operands."""
        return tuning.lookup_of(self.kernel, *self.shapes)

    def configs(self) -> list[Any]:
        """List what is tried, the default first."""
        return self.candidates(self.lookup().default, *self.shapes)


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


def labelled(x: tuple[int, int], w: tuple[int, ...]) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """Make rows, a table of words and each row's word; logits are about normal."""

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        rows, words = normal(x, w)(key)
        return rows, words * jnp.bfloat16(x[1] ** -0.5), jax.random.randint(key, x[:1], 0, max(w), jnp.int32)

    return make


def ops() -> Iterator[Op]:
    """Yield what is tuned: the shapes of the benchmark's rows that matter most."""
    yield from attention_ops()
    yield from decode_ops()
    for layer in moe.LAYERS:
        if layer.ffn >= 768:  # OLMoE, Qwen3-30B-A3B and Mixtral
            yield from training_ops(layer)
            yield from few_rows_ops(layer)
    yield from other_ops()


def attention_ops() -> Iterator[Op]:
    """Yield whole sequences, causal, full and packed, forward and backward."""
    kinds: tuple[dict[str, Any], ...] = ({}, {"causal": False}, {"documents": 6})
    for length, (heads, kv_heads, dim) in product((4096, 16384), ((16, 16, 128), (64, 8, 128), (16, 16, 64))):
        for kind in kinds:
            yield from _attention(attention.Shape(length, heads, kv_heads, dim, dim, **kind))
    yield from _attention(attention.Shape(4096, dim=192))


def _attention(shape: attention.Shape) -> Iterator[Op]:
    def options(*ids: jax.Array) -> dict[str, Any]:
        segments = {"q_segments_BT": ids[0], "k_segments_BS": ids[0]} if ids else {}
        return {"causal": shape.causal, **segments}

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array, config: Any = None) -> Any:
        return flash_attention(q, k, v, **options(*ids), config=config)

    def backward(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, *ids: jax.Array, config: Any = None) -> Any:
        lse = jnp.full(q.shape[:3], jnp.log(float(shape.length)), jnp.float32)  # about what the forward would give
        return flash_attention_bwd(q, k, v, do, lse, jnp.zeros_like(lse), **options(*ids), config=config)

    yield Op(forward, partial(attention.make_inputs, shape, False), candidates.flash_attention)
    yield Op(backward, partial(attention.make_inputs, shape, True), candidates.flash_attention_bwd)


def decode_ops() -> Iterator[Op]:
    """Yield paged keys and latents: a token, a few (verified drafts), a chunk of a prompt."""
    batches = ((32, 4096, 1), (32, 4096, 4), (4, 8192, 512))
    for kv_heads, page, (batch, length, queries) in product((8, 4), (16, 64, 128), batches):
        shape = decode.Shape((length,) * batch, kv_heads=kv_heads, page=page, queries=queries)
        yield Op(paged_attention, partial(decode.make_inputs, shape, True), candidates.paged_attention)
    latents = partial(latent_attention, value_dim=decode.VALUES, scale=192**-0.5)
    for heads, queries in product((128, 16), (1, 4)):
        shape = decode.Shape((4096,) * 32, heads, 1, decode.LATENT, queries=queries)
        yield Op(latents, partial(decode.make_inputs, shape, False), candidates.latent_attention)


def training_ops(layer: moe.Shape) -> Iterator[Op]:
    """Yield a layer's products, forward and backward."""
    make = partial(layer_operands, replace(layer, tokens=8192))
    yield Op(grouped_matmul, make("x", "dn"), candidates.grouped_matmul)
    yield Op(grouped_matmul, make("h", "nd"), candidates.grouped_matmul)
    yield Op(partial(grouped_matmul, transpose_w=True), make("h", "dn"), candidates.grouped_matmul)
    yield Op(grouped_matmul_pair, make("hh", "dn", "dn"), candidates.grouped_matmul)
    yield Op(partial(grouped_swiglu, save=True), make("x", "dn", "dn"), candidates.grouped_swiglu)
    yield Op(_swiglu_bwd, make("xhh", "nd"), candidates.grouped_swiglu_bwd)
    yield Op(triton.grouped_matmul, make("x", "dn"), candidates.triton_grouped_matmul)
    yield Op(triton.grouped_matmul, make("h", "nd"), candidates.triton_grouped_matmul)
    yield Op(partial(triton.grouped_matmul, transpose_w=True), make("h", "dn"), candidates.triton_grouped_matmul)
    yield Op(partial(triton.grouped_matmul, transpose_w=True), make("x", "nd"), candidates.triton_grouped_matmul)
    for rows in ("xh", "hx"):
        yield Op(grouped_matmul_dw, make(rows), candidates.grouped_matmul_dw)
        yield Op(triton.grouped_matmul_dw, make(rows), candidates.triton_grouped_matmul)


def few_rows_ops(layer: moe.Shape) -> Iterator[Op]:
    """Yield a layer's products in decode."""
    make = partial(layer_operands, replace(layer, tokens=32))
    yield Op(grouped_swiglu, make("x", "dn", "dn"), candidates.grouped_swiglu)
    for rows, weights in (("x", "dn"), ("h", "nd")):
        yield Op(grouped_matmul, make(rows, weights), candidates.grouped_matmul)
        yield Op(triton.grouped_matmul, make(rows, weights), candidates.triton_grouped_matmul)


def layer_operands(layer: moe.Shape, rows: str, *weights: str) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """Make rows (x: dim wide, h: ffn wide), weights ("dn": [E, dim, ffn]) and the group sizes."""
    size = {"x": layer.dim, "h": layer.ffn, "d": layer.dim, "n": layer.ffn}
    shapes = [(layer.rows, size[name]) for name in rows]
    return routed(layer.experts, *shapes, *((layer.experts, size[a], size[b]) for a, b in weights))


def _swiglu_bwd(dy: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, *sizes: jax.Array, **given: Any) -> Any:
    return grouped_swiglu_bwd(dy, down, gate, up, *sizes, **given)


def other_ops() -> Iterator[Op]:
    """Yield lightning attention, the loss without its logits, and the norm's backward."""
    for dim, length in product((64, 128), (4096, 65536)):
        make = partial(lightning.make_inputs, (lightning.TOKENS // length, length, lightning.HEADS, dim))
        yield Op(lightning_attention, partial(make, False, False), candidates.lightning_attention)
        yield Op(_lightning_bwd, partial(make, True, False), candidates.lightning_attention)
    for rows, vocab in product((2048, 8192), (131072, 152064)):
        for vocab_dim, w in ((1, (4096, vocab)), (0, (vocab, 4096))):
            kernel = partial(linear_cross_entropy_statistics, vocab_dim=vocab_dim)
            yield Op(kernel, labelled((rows, 4096), w), candidates.linear_cross_entropy_statistics)
    for x in ((16384, 4096), (8192, 8192)):
        yield Op(_norm_bwd, normal(x, x[1:], x), candidates.rms_norm_bwd)


def _lightning_bwd(
    q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, state: jax.Array, *gradients: Any, **given: Any
) -> Any:
    return lightning_attention_bwd(q, k, v, decay, state, None, *gradients, **given)


def _norm_bwd(x: jax.Array, scale: jax.Array, dy: jax.Array, config: Any = None) -> Any:
    return rms_norm_bwd(x, scale, dy, 1e-6, config)


def aimed() -> contextlib.AbstractContextManager[Any]:
    """Say for which chip kernels are looked up: the one that is here, or DRY_CHIP."""
    if machine.on_gpu():
        return contextlib.nullcontext()
    chip = jax.sharding.AbstractDevice(device_kind=DRY_CHIP, num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=chip))


def tune(op: Op, configs: list[Any]) -> tuple[Any, dict[Any, Timing]] | None:
    """Time every right candidate, printing the others' reasons; give the fastest and all times, or None."""
    name = op.lookup().op
    case = runner.Case("tuning", name, op.make, {}, 0, 0)
    sets = runner.input_sets(case, None)
    runs, expected = {}, None
    for config in configs:
        try:
            made = runner.make(partial(op.kernel, config=config), sets)
            runner.compare(made.out, made.out if expected is None else expected)
        except Exception as error:
            if runner.is_fatal(error):
                raise sweep.Lost(f"{name} {config}: {runner.in_a_line(error)}") from error
            print(f"    {config}: {runner.in_a_line(error)}")
            if expected is None:
                return None  # the default itself: nothing says what is right
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


def tune_or_say(op: Op, chip: str, options: argparse.Namespace, deadline: sweep.Deadline) -> None:
    """Tune an op that is asked for, or say what would be tried."""
    name, bucket, default = op.lookup()
    if options.match not in f"{name} {bucket}":
        return
    configs = op.configs()
    print(f"{name}: {bucket}: {len(configs)} candidates")
    if options.dry:
        print(*(f"    {config}" for config in configs), sep="\n")
    elif deadline.allows_another():
        with deadline.piece():
            found = tune(op, configs)
        if found is not None:
            entry = entry_of(*found, default=default)
            tuning.write(options.table, tuning.key(name, chip, bucket), entry)
            print(f"  {json.dumps(entry)}", flush=True)


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
    with aimed():
        for op in ops():
            tune_or_say(op, chip, options, deadline)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
