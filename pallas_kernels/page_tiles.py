"""Which tiles of paged keys do a block's query rows see? What the kernels of heads and of latents have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.mosaic import LOG2E, wgmma

Array = jax.Array

ROWS = 64
"""Query rows of a block: wgmma's M."""
NOTHING = -1e30
"""The running maximum and the log-sum-exp of a row that has seen nothing: finite, so that differences are numbers."""


@dataclass(frozen=True)
class Call:
    """What a kernel knows when it is compiled."""

    batch: int
    kv_heads: int
    group: int
    rows: int
    """query rows of a kv head, T * G, padded"""
    key_dim: int
    value_dim: int
    page: int
    num_splits: int
    """splits that the table has room for; one alone takes all tokens and writes the result itself"""
    split: int
    tile: int
    stages: int
    scale: float
    window: int | None
    softcap: float | None
    dtype: Any

    @property
    def direct(self) -> bool:
        """Say whether the attention kernel writes the result itself."""
        return self.num_splits == 1


def by_kv_head(q_BTNH: Array, kv_heads: int) -> Array:
    """Turn [B, T, N, H] into [B, K, T*G, H], the rows padded to whole copies (8) or, past one tile, to whole tiles."""
    batch, length, heads, dim = q_BTNH.shape
    rows = length * heads // kv_heads
    q_BKRH = q_BTNH.reshape(batch, length, kv_heads, -1, dim).swapaxes(1, 2).reshape(batch, kv_heads, rows, dim)
    padded = -(-rows // 8) * 8 if rows <= ROWS else -(-rows // ROWS) * ROWS
    return jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, padded - rows), (0, 0)))


def by_query(o_BKRU: Array, length: int, group: int) -> Array:
    """Undo `by_kv_head`."""
    batch, kv_heads, _, dim = o_BKRU.shape
    o_BKTGU = o_BKRU[:, :, : length * group].reshape(batch, kv_heads, length, group, dim)
    return o_BKTGU.swapaxes(1, 2).reshape(batch, length, kv_heads * group, dim)


def place(call: Call) -> tuple[Array, Array, Array, Array]:
    """Say which split, sequence, kv head and row tile this block has; splits vary slowest, so the empty ones end."""
    row_tiles = -(-call.rows // ROWS)
    rest = lax.axis_index("block")
    rest, row_tile = divide(rest, row_tiles)
    rest, head = divide(rest, call.kv_heads)
    split, b = divide(rest, call.batch)
    return split, b, head, row_tile


def divide(x: Array, by: int) -> tuple[Array, Array]:
    """Give the quotient and the rest."""
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


@dataclass(frozen=True)
class Span:
    """The tiles that a block's rows see: [first, last), of which all before `masked` are seen whole by each row."""

    length: Array
    queries: Array
    position: Array
    """of query 0"""
    first: Array
    masked: Array
    last: Array


def span_of(call: Call, split: Array, row_tile: Array, length: Array, queries: Array) -> Span:
    """Find the tiles of a split that the rows of a row tile see."""
    position = length - queries
    t_low = lax.div(row_tile * ROWS, jnp.int32(call.group))
    t_high = jnp.minimum(lax.div(row_tile * ROWS + (ROWS - 1), jnp.int32(call.group)), queries - 1)
    end = jnp.minimum(jnp.minimum((split + 1) * call.split, length), position + t_high + 1)
    end = jnp.where(t_low < queries, end, 0)
    start = split * call.split
    whole = position + t_low + 1  # tokens before this one are seen by each row that there is
    if call.window is not None:
        start = jnp.maximum(start, position + t_low + 1 - call.window)
        whole = jnp.int32(0)
    first = lax.div(start, jnp.int32(call.tile))
    last = jnp.maximum(lax.div(end + (call.tile - 1), jnp.int32(call.tile)), first)
    masked = jnp.clip(lax.div(jnp.maximum(whole, 0), jnp.int32(call.tile)), first, last)
    return Span(length, queries, position, first, masked, last)


def pages_of(call: Call, span: Span, tables_ref: Any, b: Array, i: Array) -> list[Array]:
    """Name the pages of the span's tile i; past the sequence's end name its last page: what stands there is never read.

    Entries past the end may hold anything, so they are not even read.
    """
    per_tile, tiles_of_page = max(1, call.tile // call.page), max(1, call.page // call.tile)
    last_page = jnp.clip(lax.div(span.length - 1, jnp.int32(call.page)), 0, tables_ref.shape[1] - 1)
    entry = lax.div((span.first + i) * per_tile, jnp.int32(tiles_of_page))
    return [tables_ref[b, jnp.minimum(entry + n, last_page)] for n in range(per_tile)]


def fetch(call: Call, span: Span, source: Callable, ring: Any, bars: Any, i: Array, pages: list[Array]) -> None:
    """Start the copies of the span's tile i, one a page, into its slot; source(page, tokens) is a matrix."""
    slot = lax.rem(i, jnp.int32(call.stages))
    size = min(call.page, call.tile)
    start = lax.rem(span.first + i, jnp.int32(max(1, call.page // call.tile))) * call.tile
    for n, page in enumerate(pages):
        tile = source(page, pl.ds(start, size))
        plgpu.copy_gmem_to_smem(tile, ring.at[slot, pl.ds(n * size, size)], bars.at[slot])


def columns(x: Array, width: int) -> Array:
    """Repeat a number for each row over `width` columns."""
    return lax.broadcast_in_dim(x, (x.shape[0], width), [0])


def nothing(width: int) -> tuple[Array, Array, Array]:
    """Give the sum of values, the maximum and the sum of weights of rows that have seen nothing."""
    layout = plgpu.Layout.WGMMA
    acc = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), layout)
    m = plgpu.layout_cast(jnp.full((ROWS,), NOTHING, jnp.float32), layout.reduce(1))
    return acc, m, plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1))


def scores_of(call: Call, q_smem: Any, k_smem: Any) -> Array:
    """Give q @ k.T in units of log2, scaled and capped."""

    def product(acc: Any) -> Array:
        wgmma(acc, q_smem, k_smem.transpose((1, 0)))
        return acc[...]

    s = pl.run_scoped(product, plgpu.ACC((ROWS, k_smem.shape[0]), jnp.float32))
    if call.softcap is None:
        return s * (call.scale * LOG2E)
    return mosaic.tanh(s * (call.scale / call.softcap)) * (call.softcap * LOG2E)


def masked_scores(call: Call, span: Span, row_tile: Array, token: Array, s: Array) -> Array:
    """Hide the keys after a row's own position, and those before its window."""
    layout = plgpu.Layout.WGMMA
    row = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=layout) + row_tile * ROWS
    key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=layout) + token
    behind = lax.div(row, jnp.full_like(row, call.group)) + span.position - key
    seen = (behind >= 0) & (key < span.length)
    if call.window is not None:
        seen &= behind < call.window
    return jnp.where(seen, s, -jnp.inf)


def clear(v_smem: Any, num_tokens: Array) -> None:
    """Put zeros where a page holds no token yet: a weight of zero does not undo a NaN. 64 columns at a time."""
    layout = plgpu.Layout.WGMMA
    for start in range(0, v_smem.shape[1], 64):
        part = v_smem.at[:, pl.ds(start, 64)]
        v = plgpu.load(part, layout=layout)
        token = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=layout)
        part[...] = jnp.where(token < num_tokens, v, jnp.zeros_like(v))
    plgpu.commit_smem()


def finish(call: Call, span: Span, row_tile: Array, acc: Array, m: Array, total: Array) -> tuple[Array, Array]:
    """Give the output and log-sum-exp; rows past the valid queries saw nothing."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout) + row_tile * ROWS
    seen = (total > 0) & (row < span.queries * call.group)
    lse = jnp.where(seen, m + jnp.log2(jnp.where(seen, total, 1.0)), NOTHING)
    inverse = jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)
    return acc * columns(inverse, acc.shape[1]), lse
