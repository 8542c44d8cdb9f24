"""How do the parts of a split sequence become one result? In the order of positions, a fixed number at a time."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.page_tiles import NOTHING, Call, by_query, divide

Array = jax.Array


@dataclass(frozen=True)
class _Level:
    """One step of the merge: which partial results become one."""

    split: int
    """tokens of a partial result"""
    fan_in: int
    window: int | None
    group: int
    rows: int
    """query rows of a kv head to join, padding left out at the last level"""
    together: int
    """rows that a block joins: as many as give each of its threads a number"""
    dtype: Any


def merge(
    call: Call,
    o_BKSRU: Array,
    lse_BKSR: Array,
    lengths_B: Array,
    query_lengths_B: Array,
    sinks_N: Array | None,
    *,
    length: int,
    fan_in: int,
) -> Array:
    """Join the splits' outputs into [B, T, N, U], `fan_in` at a time in the order of positions; sinks come last.

    Log-sum-exps and sinks are in base 2. What stands in splits that a sequence does not have is not used. One split
    alone is the result already.
    """
    if call.direct:
        return by_query(o_BKSRU[:, :, 0], length, call.group)
    together = 128 // math.gcd(128, o_BKSRU.shape[4])
    lengths, split = (lengths_B, query_lengths_B), call.split
    while o_BKSRU.shape[2] > fan_in:
        level = _Level(split, fan_in, call.window, call.group, o_BKSRU.shape[3], together, jnp.float32)
        o_BKSRU, lse_BKSR = _merge_level(level, o_BKSRU, lse_BKSR, *lengths, None)
        split *= fan_in
    rows = -(-length * call.group // together) * together
    level = _Level(split, fan_in, call.window, call.group, rows, together, call.dtype)
    o_BKSRU, _ = _merge_level(level, o_BKSRU, lse_BKSR, *lengths, sinks_N)
    return by_query(o_BKSRU[:, :, 0], length, call.group)


def _merge_level(
    level: _Level, o: Array, lse: Array, lengths: Array, queries: Array, sinks_N: Array | None
) -> tuple[Array, Array]:
    """Join each `fan_in` splits: outputs [B, K, S, R, U] and log-sum-exps [B, K, S, R] with fewer S."""
    batch, kv_heads, splits, rows, dim = o.shape
    groups, vectors = -(-splits // level.fan_in), level.rows // level.together
    width = level.together * dim
    o = o.reshape(batch, kv_heads, splits, rows // level.together, width)
    sinks = [] if sinks_N is None else [sinks_N]
    kernel = mosaic.kernel(
        functools.partial(_merge_kernel, level, (batch, kv_heads, splits, vectors), bool(sinks)),
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, groups, vectors, width), level.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, groups, level.rows), jnp.float32),
        ),
        grid=(groups * batch * kv_heads * vectors,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="merge_splits",
    )
    o, lse = kernel(o, lse, lengths, queries, *sinks)
    return o.reshape(batch, kv_heads, groups, level.rows, dim), lse


def _merge_kernel(level: _Level, sizes: tuple[int, ...], has_sinks: bool, *refs: Any) -> None:
    o_ref, lse_ref, lengths_ref, queries_ref, *others = refs
    sinks_ref = others.pop(0) if has_sinks else None
    out_ref, out_lse_ref = others
    batch, kv_heads, splits, vectors = sizes
    width, together = out_ref.shape[-1], level.together
    rest, vector = divide(lax.axis_index("block"), vectors)
    rest, head = divide(rest, kv_heads)
    joined, b = divide(rest, batch)
    layout = plgpu.Layout.WG_STRIDED((width,), width // 128)
    first, last = _valid_splits(level, joined, lengths_ref[b], queries_ref[b])
    ahead = min(8, level.fan_in)

    def spread(numbers: list[Array]) -> Array:
        """Give each element the number of its row."""
        wide = [plgpu.layout_cast(jnp.full((width,), x), layout) for x in numbers]
        column = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout)
        return functools.reduce(
            lambda y, n: jnp.where(column < n * (width // together), y, wide[n]), range(1, together), wide[0]
        )

    def chunk(c: Array, carry: tuple) -> tuple:
        """Join the next splits; all their loads start before the first is used."""
        acc, ms, totals = carry
        at = [first + c * ahead + n for n in range(ahead)]
        place = [jnp.minimum(s, splits - 1) for s in at]
        values = [plgpu.load(o_ref.at[b, head, s, vector], layout=layout) for s in place]
        lses = [[lse_ref[b, head, s, vector * together + r] for r in range(together)] for s in place]
        for s, value, row_lses in zip(at, values, lses, strict=True):
            row_lses = [jnp.where(s < last, x, NOTHING) for x in row_lses]
            news = [jnp.maximum(m, x) for m, x in zip(ms, row_lses, strict=True)]
            alphas = [jnp.exp2(m - new) for m, new in zip(ms, news, strict=True)]
            weights = [jnp.where(x > NOTHING, jnp.exp2(x - new), 0.0) for x, new in zip(row_lses, news, strict=True)]
            totals = [x * alpha + weight for x, alpha, weight in zip(totals, alphas, weights, strict=True)]
            weight = spread(weights)
            acc = acc * spread(alphas) + jnp.where(weight > 0.0, value * weight, 0.0)
            ms = news
        return acc, ms, totals

    acc = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
    start = (acc, [jnp.float32(NOTHING)] * together, [jnp.float32(0.0)] * together)
    chunks = lax.div(last - first + (ahead - 1), jnp.int32(ahead))
    acc, ms, totals = lax.fori_loop(0, chunks, chunk, start)
    totals = [jnp.where(x > 0.0, x, 1.0) for x in totals]
    acc = acc / spread(totals)
    for r in range(together):
        lse = ms[r] + jnp.log2(totals[r])
        out_lse_ref[b, head, joined, vector * together + r] = lse
        ms[r] = lse
    if sinks_ref is not None:
        row = vector * together
        of_row = [head * level.group + lax.rem(row + r, jnp.int32(level.group)) for r in range(together)]
        acc = acc / spread([1.0 + jnp.exp2(sinks_ref[n] - lse) for n, lse in zip(of_row, ms, strict=True)])
    out_ref[b, head, joined, vector] = acc.astype(level.dtype)


def _valid_splits(level: _Level, joined: Array, length: Array, queries: Array) -> tuple[Array, Array]:
    """Say which partial results of this group exist: [first, last)."""
    low = jnp.int32(0)
    if level.window is not None:
        low = lax.div(jnp.maximum(length - queries + 1 - level.window, 0), jnp.int32(level.split))
    end = jnp.where(queries > 0, lax.div(length + (level.split - 1), jnp.int32(level.split)), 0)
    first = jnp.maximum(joined * level.fan_in, low)
    return first, jnp.maximum(jnp.minimum((joined + 1) * level.fan_in, end), first)
