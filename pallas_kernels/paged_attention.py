"""How does the GPU attend to keys that lie in pages? Split-KV attention through a block table, and its merge.

Decode moves 2 * (H + U) bytes a token and key/value head and does G FLOPs a byte, G query heads to a kv head:
the pages' bytes bind it. So tensor cores may be wasted: the query rows of a group (and of a few speculative tokens)
share one wgmma of 64 rows: at H = 128 a tile of 64 tokens costs 2.1 MFLOP (0.3 us of an SM's tensor cores) and 32 KB
(1 us of its share of 4.3 TB/s). Two blocks live on an SM, each with its own ring of asynchronous copies, 192 KB in
flight together; while one block starts, ends or takes a softmax, the other one's copies run. No warp only copies.

Splits have a fixed size in tokens and lie at fixed positions, partial results are joined in the order of positions in
groups of a fixed size, a row never sees another row's numbers: a query's result has the same bits whatever else is in
the batch, however long the table, and however many tokens come at once (while they fit one tile of 64 rows).
The merge is a kernel and no XLA reduction: XLA would read the partials of splits that nobody wrote and would choose
the order of its sums by the array's shape. (Flash-decoding; arXiv 2205.14135, 2309.06180.)
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.merge_splits import merge
from pallas_kernels.mosaic import LOG2E, matrix, run_state, wgmma
from pallas_kernels.page_tiles import (
    ROWS,
    Call,
    by_kv_head,
    clear,
    columns,
    fetch,
    finish,
    masked_scores,
    nothing,
    pages_of,
    place,
    scores_of,
    span_of,
)
from pallas_kernels.target import INSTEAD, Declined, target
from pallas_kernels.tuning import bucket, tuned

Array = jax.Array

HALF_SM = 113 * 1024
"""Bytes of shared memory a block may use when two are to live on an SM."""


@dataclass(frozen=True)
class Config:
    """Block sizes. `split` and `fan_in` are part of the result's rounding: one value for a whole service."""

    split: int = 256
    """tokens of a split, a multiple of the tile"""
    tile: int = 64
    """tokens of a step"""
    stages: int = 0
    """tiles in flight; 0: as many as let two blocks live on an SM"""
    fan_in: int = 32
    """partial results that one block of the merge joins"""


def paged_attention(
    q_BTNH: Array,
    k_PZKH: Array,
    v_PZKU: Array,
    tables_BI: Array,
    lengths_B: Array,
    query_lengths_B: Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: Array | None = None,
    config: Config | None = None,
) -> Array:
    """Attend to the pages that each sequence's table names; rows past query_lengths and empty sequences give zeros.

    Query t of sequence b stands at lengths[b] - query_lengths[b] + t and sees the keys up to there, the last `window`.
    Raises Declined for shapes, pages and dtypes that it has no tiles for.
    """
    config = config or tuned_stages("paged_attention", Config(), q_BTNH, k_PZKH, v_PZKU)
    _check(q_BTNH, k_PZKH, v_PZKU, config)
    _, length, heads, _ = q_BTNH.shape
    kv_heads, group = k_PZKH.shape[2], heads // k_PZKH.shape[2]
    q_BKRH = by_kv_head(q_BTNH, kv_heads)
    call = _call(q_BKRH, k_PZKH, v_PZKU, tables_BI, group, config, scale, window, softcap)
    tables_BI, lengths_B, query_lengths_B = (x.astype(jnp.int32) for x in (tables_BI, lengths_B, query_lengths_B))
    sinks_N = None if sinks_N is None else sinks_N.astype(jnp.float32) * LOG2E
    o, lse_BKSR = _attend(call, q_BKRH, k_PZKH, v_PZKU, tables_BI, lengths_B, query_lengths_B, sinks_N)
    return merge(call, o, lse_BKSR, lengths_B, query_lengths_B, sinks_N, length=length, fan_in=config.fan_in)


def tuned_stages(op: str, default: Config, *operands: Array) -> Config:
    """Look up the stages, for any batch and pool of pages; raise ValueError for an entry that would change results."""
    shapes = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in operands]
    config = tuned(op, target().kind, bucket(*shapes), default)
    if replace(config, stages=default.stages) != default:
        raise ValueError(
            f"tuned config of {op} ({config}) must differ from {default} in its stages alone: others round"
        )
    return config


def _call(
    q_BKRH: Array,
    k_PZKH: Array,
    v_PZKU: Array,
    tables_BI: Array,
    group: int,
    config: Config,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Call:
    """Choose splits and stages: keys are split while the queries of a kv head fit one tile of rows."""
    batch, kv_heads, rows, dim = q_BKRH.shape
    page, value_dim = k_PZKH.shape[1], v_PZKU.shape[3]
    capacity = tables_BI.shape[1] * page
    split = config.split if rows <= ROWS else -(-capacity // config.tile) * config.tile
    return Call(
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        rows=rows,
        key_dim=dim,
        value_dim=value_dim,
        page=page,
        num_splits=-(-capacity // split),
        split=split,
        tile=config.tile,
        stages=config.stages or _stages(config.tile, dim, value_dim),
        scale=dim**-0.5 if scale is None else scale,
        window=window,
        softcap=softcap,
        dtype=q_BKRH.dtype,
    )


def _check(q_BTNH: Array, k_PZKH: Array, v_PZKU: Array, config: Config) -> None:
    """Raise Declined for what the kernel has no tiles for."""
    dtypes = {q_BTNH.dtype, k_PZKH.dtype, v_PZKU.dtype}
    heads, kv_heads, page = q_BTNH.shape[2], k_PZKH.shape[2], k_PZKH.shape[1]
    if len(dtypes) > 1 or q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        names = ", ".join(sorted(d.name for d in dtypes))
        raise Declined(f"dtypes of q, k, v ({names}) must be one, bfloat16 or float16; {INSTEAD}")
    for name, dim in (("key", k_PZKH.shape[3]), ("value", v_PZKU.shape[3])):
        if dim not in (64, 128, 192, 256):
            raise Declined(f"{name} head dim ({dim}) must be 64, 128, 192 or 256; {INSTEAD}")
    if heads % kv_heads:
        raise Declined(f"query heads ({heads}) must divide by key/value heads ({kv_heads}); {INSTEAD}")
    if page % config.tile and (config.tile % page or page % 8):
        raise Declined(f"page size ({page}) must be 8, 16, 32 or a multiple of the tile ({config.tile}); {INSTEAD}")
    if config.split % config.tile or config.tile % 64:
        raise Declined(f"split ({config.split}) must divide by tile ({config.tile}), the tile by 64; use Config()")
    if v_PZKU.shape[3] < 128 and heads % 2:
        raise Declined(f"query heads ({heads}) must be even at value head dim {v_PZKU.shape[3]}; {INSTEAD}")


def _stages(tile: int, key_dim: int, value_dim: int) -> int:
    """Fill half an SM with tiles, but let the ring not grow past what hides the latency."""
    left = HALF_SM - 1024 - 2 * ROWS * key_dim
    return max(2, min(left // (2 * tile * (key_dim + value_dim)), 6))


def _attend(
    call: Call, q: Array, k: Array, v: Array, tables: Array, lengths: Array, queries: Array, sinks_N: Array | None
) -> tuple[Array, Array]:
    """Give the outputs [B, K, S, R, U] over each split alone and their log-sum-exps (base 2) [B, K, S, R]."""
    row_tiles = -(-call.rows // ROWS)
    tile_rows = min(call.rows, ROWS)
    out_dtype = call.dtype if call.direct else jnp.float32
    out_shape = (call.batch, call.kv_heads, call.num_splits, call.rows, call.value_dim)
    ring = [
        matrix((ROWS, call.key_dim), call.dtype),
        matrix((call.stages, call.tile, call.key_dim), call.dtype),
        matrix((call.stages, call.tile, call.value_dim), call.dtype),
    ]
    copies = max(1, call.tile // call.page)
    barriers = [plgpu.Barrier()] + [plgpu.Barrier(num_arrivals=copies, num_barriers=call.stages)] * 2
    sinks = [] if sinks_N is None or not call.direct else [_row_sinks(call, sinks_N)]
    kernel = mosaic.kernel(
        functools.partial(_attend_kernel, call, tile_rows, bool(sinks)),
        out_type=(jax.ShapeDtypeStruct(out_shape, out_dtype), jax.ShapeDtypeStruct(out_shape[:-1], jnp.float32)),
        scratch_types=[
            plgpu.RefUnion(ring, matrix((ROWS, call.value_dim), out_dtype)),
            plgpu.SMEM((ROWS,), jnp.float32),
            *barriers,
        ],
        grid=(call.num_splits * call.batch * call.kv_heads * row_tiles,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="paged_attention",
    )
    return kernel(q, k, v, tables, lengths, queries, *sinks)


def _row_sinks(call: Call, sinks_N: Array) -> Array:
    """Give each padded query row of a kv head its sink [K, R]."""
    rows = -(-call.rows // ROWS) * ROWS
    sinks_KG = sinks_N.reshape(call.kv_heads, call.group)
    return sinks_KG[:, jnp.arange(rows) % call.group]


def _attend_kernel(call: Call, tile_rows: int, has_sinks: bool, *refs: Any) -> None:
    q_ref, k_ref, v_ref, tables_ref, lengths_ref, queries_ref, *others = refs
    sinks_ref = others.pop(0) if has_sinks else None
    o_ref, lse_ref, union, lse_smem, q_bar, k_bars, v_bars = others
    (q_smem, k_smem, v_smem), o_smem = union
    split, b, head, row_tile = place(call)
    span = span_of(call, split, row_tile, lengths_ref[b], queries_ref[b])
    num_tiles = span.last - span.first
    rows = pl.ds(row_tile * ROWS, tile_rows)

    def fetch_keys(i: Array, pages: list[Array]) -> None:
        fetch(call, span, lambda page, tokens: k_ref.at[page, tokens, head], k_smem, k_bars, i, pages)

    def fetch_values(i: Array, pages: list[Array]) -> None:
        fetch(call, span, lambda page, tokens: v_ref.at[page, tokens, head], v_smem, v_bars, i, pages)

    def start() -> list[Array]:
        """Start the copies of the first tiles; give the pages of the first tile that has to wait for its slot."""
        pages = [pages_of(call, span, tables_ref, b, jnp.int32(i)) for i in range(call.stages + 1)]
        plgpu.copy_gmem_to_smem(q_ref.at[b, head, rows], q_smem.at[pl.ds(0, tile_rows)], q_bar)
        for i in range(call.stages):

            @pl.when(i < num_tiles)
            def _(i: int = i) -> None:
                fetch_keys(jnp.int32(i), pages[i])
                fetch_values(jnp.int32(i), pages[i])

        return pages[-1]

    def step(masked: bool, i: Array, carry: tuple) -> tuple:
        acc, m, total, pages = carry
        slot = lax.rem(i, jnp.int32(call.stages))
        ahead = i + call.stages
        later = pages_of(call, span, tables_ref, b, ahead + 1)  # long before it is needed
        plgpu.barrier_wait(k_bars.at[slot])
        s = scores_of(call, q_smem, k_smem.at[slot])
        pl.when(ahead < num_tiles)(lambda: fetch_keys(ahead, pages))
        token = (span.first + i) * call.tile
        s = masked_scores(call, span, row_tile, token, s) if masked else s
        m_new = jnp.maximum(m, s.max(axis=1))
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s - columns(m_new, call.tile))
        total = total * alpha + p.sum(axis=1)
        plgpu.barrier_wait(v_bars.at[slot])
        if masked:
            pl.when(token + call.tile > span.length)(lambda: clear(v_smem.at[slot], span.length - token))
        acc = _add_values(acc * columns(alpha, call.value_dim), p.astype(call.dtype), v_smem.at[slot])
        pl.when(ahead < num_tiles)(lambda: fetch_values(ahead, pages))
        return acc, m_new, total, later

    def body() -> None:
        pages = start()
        plgpu.barrier_wait(q_bar)
        carry = (*nothing(call.value_dim), pages)
        # Wide values leave no registers for a loop of their own for the tiles that need no mask.
        middle = jnp.int32(0) if call.value_dim > 192 else span.masked - span.first
        carry = lax.fori_loop(0, middle, functools.partial(step, False), carry)
        acc, m, total, _ = lax.fori_loop(middle, num_tiles, functools.partial(step, True), carry)
        o, lse = finish(call, span, row_tile, acc, m, total)
        if sinks_ref is not None:
            sink = plgpu.load(
                sinks_ref.at[head, pl.ds(row_tile * ROWS, ROWS)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
            )
            o = o / columns(1.0 + jnp.exp2(sink - lse), call.value_dim)
        o_smem[...] = o.astype(o_smem.dtype)
        lse_smem[...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_smem.at[pl.ds(0, tile_rows)], o_ref.at[b, head, split, rows])
        plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, tile_rows)], lse_ref.at[b, head, split, rows])
        plgpu.wait_smem_to_gmem(0)

    if call.direct:
        body()  # zeros must be written too
    else:
        pl.when(num_tiles > 0)(body)


def _add_values(acc: Array, p: Array, v_smem: Any) -> Array:
    return run_state(lambda ref: wgmma(ref, p, v_smem))(plgpu.ACC.init(acc))
