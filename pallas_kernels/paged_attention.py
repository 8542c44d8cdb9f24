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
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.mosaic import LOG2E, matrix, run_state, wgmma
from pallas_kernels.target import INSTEAD, Declined, target
from pallas_kernels.tuning import bucket, tuned

Array = jax.Array

ROWS = 64
"""Query rows of a block: wgmma's M."""
NOTHING = -1e30
"""The running maximum and the log-sum-exp of a row that has seen nothing: finite, so that differences are numbers."""
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
    if call.direct:
        return by_query(o[:, :, 0], length, group)
    return merge(
        o,
        lse_BKSR,
        lengths_B,
        query_lengths_B,
        sinks_N,
        length=length,
        group=group,
        split=call.split,
        window=window,
        fan_in=config.fan_in,
        dtype=q_BTNH.dtype,
    )


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


def _add_values(acc: Array, p: Array, v_smem: Any) -> Array:
    return run_state(lambda ref: wgmma(ref, p, v_smem))(plgpu.ACC.init(acc))


def finish(call: Call, span: Span, row_tile: Array, acc: Array, m: Array, total: Array) -> tuple[Array, Array]:
    """Give the output and log-sum-exp; rows past the valid queries saw nothing."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout) + row_tile * ROWS
    seen = (total > 0) & (row < span.queries * call.group)
    lse = jnp.where(seen, m + jnp.log2(jnp.where(seen, total, 1.0)), NOTHING)
    inverse = jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)
    return acc * columns(inverse, acc.shape[1]), lse


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
    o_BKSRU: Array,
    lse_BKSR: Array,
    lengths_B: Array,
    query_lengths_B: Array,
    sinks_N: Array | None,
    *,
    length: int,
    group: int,
    split: int,
    window: int | None,
    fan_in: int,
    dtype: Any,
) -> Array:
    """Join the splits' outputs into [B, T, N, U], `fan_in` at a time in the order of positions; sinks come last.

    Log-sum-exps and sinks are in base 2. What stands in splits that a sequence does not have is not used.
    """
    together = 128 // math.gcd(128, o_BKSRU.shape[4])
    lengths = (lengths_B, query_lengths_B)
    while o_BKSRU.shape[2] > fan_in:
        level = _Level(split, fan_in, window, group, o_BKSRU.shape[3], together, jnp.float32)
        o_BKSRU, lse_BKSR = _merge_level(level, o_BKSRU, lse_BKSR, *lengths, None)
        split *= fan_in
    rows = -(-length * group // together) * together
    level = _Level(split, fan_in, window, group, rows, together, dtype)
    o_BKSRU, _ = _merge_level(level, o_BKSRU, lse_BKSR, *lengths, sinks_N)
    return by_query(o_BKSRU[:, :, 0], length, group)


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
