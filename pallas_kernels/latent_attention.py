"""How does the GPU attend to latent pages? DeepSeek's absorbed decode: one key head, the values are its first columns.

All N query heads share one key of J = 576 numbers, of which the first U = 512 are the value: 2 * J bytes and
2 * N * (J + U) FLOPs a token, 242 FLOPs a byte at N = 128 (either limit of an H200), 30 at N = 16 (bytes).
A block has 64 rows (heads, then tokens). Its two computing warpgroups each score half of a tile's 64 tokens, trade
maxima and weights through shared memory, and own half of the value columns each, so that no product is done twice and
an accumulator is 128 registers; a third warpgroup copies the next tile as soon as both have let go of a slot. A page is
read once for keys and values. Splits and their merge are those of paged_attention. (arXiv 2405.04434; the idea of the
column halves is FlashMLA's.)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.merge_splits import merge
from pallas_kernels.mosaic import matrix, run_state, wgmma
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
from pallas_kernels.paged_attention import Config, tuned_stages
from pallas_kernels.target import INSTEAD, Declined

Array = jax.Array

MOST_SPLIT_QUERIES = 16
"""Tokens of a sequence past which the queries alone fill the GPU and keys are not split."""
WARPGROUPS = 2
"""Warpgroups that compute."""
CONFIG = Config(split=1024, stages=2)
"""Longer splits than for pages of heads: a partial result has up to 64 rows of 512 numbers."""


def latent_attention(
    q_BTNJ: Array,
    latent_PZJ: Array,
    tables_BI: Array,
    lengths_B: Array,
    query_lengths_B: Array,
    *,
    value_dim: int,
    scale: float,
    config: Config | None = None,
) -> Array:
    """Attend to latent pages, each query head to the same keys; gives [B, T, N, value_dim].

    Raises Declined for shapes, pages and dtypes that it has no tiles for.
    """
    config = config or tuned_stages("latent_attention", CONFIG, q_BTNJ, latent_PZJ)
    _check(q_BTNJ, latent_PZJ, value_dim, config)
    batch, length, heads, dim = q_BTNJ.shape
    capacity = tables_BI.shape[1] * latent_PZJ.shape[1]
    q_BKRJ = by_kv_head(q_BTNJ, 1)
    split = config.split if length <= MOST_SPLIT_QUERIES else -(-capacity // config.tile) * config.tile
    call = Call(
        batch=batch,
        kv_heads=1,
        group=heads,
        rows=q_BKRJ.shape[2],
        key_dim=dim,
        value_dim=value_dim,
        page=latent_PZJ.shape[1],
        num_splits=-(-capacity // split),
        split=split,
        tile=config.tile,
        stages=config.stages or 2,
        scale=scale,
        window=None,
        softcap=None,
        dtype=q_BTNJ.dtype,
    )
    tables_BI, lengths_B, query_lengths_B = (x.astype(jnp.int32) for x in (tables_BI, lengths_B, query_lengths_B))
    o, lse_BKSR = _attend(call, q_BKRJ, latent_PZJ, tables_BI, lengths_B, query_lengths_B)
    return merge(call, o, lse_BKSR, lengths_B, query_lengths_B, None, length=length, fan_in=config.fan_in)


def _check(q_BTNJ: Array, latent_PZJ: Array, value_dim: int, config: Config) -> None:
    dim, page = latent_PZJ.shape[2], latent_PZJ.shape[1]
    if q_BTNJ.dtype != latent_PZJ.dtype or q_BTNJ.dtype not in (jnp.bfloat16, jnp.float16):
        names = f"{q_BTNJ.dtype}, {latent_PZJ.dtype}"
        raise Declined(f"dtypes of q and pages ({names}) must be one, bfloat16 or float16; {INSTEAD}")
    if value_dim not in (128, 256, 512) or dim % 64 or not value_dim <= dim <= 576:
        rule = "must be 128, 256 or 512, the latent a multiple of 64 from there to 576"
        raise Declined(f"value dim ({value_dim}) of latent dim ({dim}) {rule}; {INSTEAD}")
    if page % config.tile and (config.tile % page or page % 8):
        raise Declined(f"page size ({page}) must be 8, 16, 32 or a multiple of the tile ({config.tile}); {INSTEAD}")
    if config.tile != 64 or config.split % config.tile:
        raise Declined(f"tile ({config.tile}) must be 64 and divide the split ({config.split}); use Config()")


def _attend(call: Call, q: Array, latent: Array, tables: Array, lengths: Array, queries: Array) -> tuple[Array, Array]:
    """Give the outputs [B, 1, S, R, U] over each split alone and their log-sum-exps (base 2) [B, 1, S, R]."""
    row_tiles = -(-call.rows // ROWS)
    tile_rows, half = min(call.rows, ROWS), call.tile // WARPGROUPS
    out_dtype = call.dtype if call.direct else jnp.float32
    out_shape = (call.batch, 1, call.num_splits, call.rows, call.value_dim)
    kernel = mosaic.kernel(
        functools.partial(_kernel, call, tile_rows),
        out_type=(jax.ShapeDtypeStruct(out_shape, out_dtype), jax.ShapeDtypeStruct(out_shape[:-1], jnp.float32)),
        scratch_types=[
            matrix((ROWS, call.key_dim), call.dtype),
            plgpu.RefUnion(
                matrix((call.stages, call.tile, call.key_dim), call.dtype),
                matrix((WARPGROUPS, ROWS, call.value_dim // WARPGROUPS), out_dtype),
            ),
            matrix((WARPGROUPS, ROWS, half), call.dtype),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=max(1, call.tile // call.page), num_barriers=call.stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=call.stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        grid=(call.num_splits * call.batch * row_tiles,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="latent_attention",
    )
    return kernel(q, latent, tables, lengths, queries)


def _kernel(call: Call, tile_rows: int, *refs: Any) -> None:
    q_ref, latent_ref, tables_ref, lengths_ref, queries_ref, o_ref, lse_ref, *scratch = refs
    q_smem, (ring, o_smem), p_smem, row_smem, lse_smem, q_bar, full_bars, free_bars, both_bar = scratch
    wg = lax.axis_index("wg")
    split, b, head, row_tile = place(call)
    span = span_of(call, split, row_tile, lengths_ref[b], queries_ref[b])
    num_tiles = span.last - span.first
    rows = pl.ds(row_tile * ROWS, tile_rows)
    half, half_dim = call.tile // WARPGROUPS, call.value_dim // WARPGROUPS
    my_tokens, my_columns = pl.ds(wg * half, half), pl.ds(wg * half_dim, half_dim)
    by_row = plgpu.Layout.WGMMA.reduce(1)

    def meet() -> None:
        plgpu.barrier_arrive(both_bar)
        plgpu.barrier_wait(both_bar)

    def copy() -> None:
        plgpu.copy_gmem_to_smem(q_ref.at[b, head, rows], q_smem.at[pl.ds(0, tile_rows)], q_bar)

        def free(i: Array) -> Any:
            return free_bars.at[lax.rem(i, jnp.int32(call.stages))]

        @pl.loop(0, num_tiles)
        def _(i: Array) -> None:
            pages = pages_of(call, span, tables_ref, b, i)
            pl.when(i >= call.stages)(lambda: plgpu.barrier_wait(free(i)))
            fetch(call, span, lambda page, tokens: latent_ref.at[page, tokens], ring, full_bars, i, pages)

        @pl.loop(jnp.maximum(num_tiles - call.stages, 0), num_tiles)
        def _(i: Array) -> None:
            plgpu.barrier_wait(free(i))

    def step(i: Array, carry: tuple) -> tuple:
        acc, m, total = carry
        slot = lax.rem(i, jnp.int32(call.stages))
        latent = ring.at[slot]
        token = (span.first + i) * call.tile
        plgpu.barrier_wait(full_bars.at[slot])
        s = scores_of(call, q_smem, ring.at[slot, my_tokens])
        s = masked_scores(call, span, row_tile, token + wg * half, s)
        mine = s.max(axis=1)
        row_smem[wg] = mine
        meet()  # both have read the keys
        other = plgpu.load(row_smem.at[1 - wg], layout=by_row, optimized=False)
        m_new = jnp.maximum(m, jnp.maximum(mine, other))
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s - columns(m_new, half))
        total = total * alpha + p.sum(axis=1)
        p_smem[wg] = p.astype(call.dtype)

        @pl.when(token + call.tile > span.length)
        def _() -> None:
            clear(latent.at[:, my_columns], span.length - token)  # the values that this warpgroup will read

        meet()
        halves = [plgpu.load(p_smem.at[n], layout=plgpu.Layout.WGMMA) for n in range(WARPGROUPS)]
        p = lax.concatenate(halves, 1)
        acc = acc * columns(alpha, half_dim)
        acc = run_state(lambda ref: wgmma(ref, p, latent.at[:, my_columns]))(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(free_bars.at[slot])
        return acc, m_new, total

    def compute() -> None:
        plgpu.barrier_wait(q_bar)
        # Masking is 16 numbers a thread: a second loop without it would cost more in registers than it saves.
        acc, m, total = lax.fori_loop(0, num_tiles, step, nothing(half_dim))
        row_smem[wg] = total
        meet()  # nobody reads the ring any more: the output may take its place
        total = [plgpu.load(row_smem.at[n], layout=by_row, optimized=False) for n in range(WARPGROUPS)]
        o, lse = finish(call, span, row_tile, acc, m, total[0] + total[1])
        o_smem[wg] = o.astype(o_smem.dtype)

        @pl.when(wg == 0)
        def _() -> None:
            lse_smem[...] = lse

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_smem.at[wg, pl.ds(0, tile_rows)], o_ref.at[b, head, split, rows, my_columns])

        @pl.when(wg == 0)
        def _() -> None:
            plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, tile_rows)], lse_ref.at[b, head, split, rows])

        plgpu.wait_smem_to_gmem(0)

    there = num_tiles >= 0 if call.direct else num_tiles > 0

    @pl.when(wg < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        pl.when(there)(compute)

    @pl.when(wg == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        pl.when(there)(copy)
