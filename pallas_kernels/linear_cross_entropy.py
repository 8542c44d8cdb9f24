"""How does Hopper sum exp(x @ w) over the vocabulary without writing a logit? The forward pass of the linear loss.

A persistent matmul over tiles of 128 rows x 256 of the vocabulary, operands by TMA through a ring of slots; each of
two computing warpgroups reduces its 64 x 256 accumulators to three numbers per row: the largest logit, the sum of
exp(logit - largest) and the target's logit where it lies here. XLA joins the tiles' numbers (12 bytes for 256 logits).

Roofline: 2 M D V FLOPs, bound by arithmetic; a tile's exponentials take 2048 cycles of the special units where its
products take 16 D of the tensor cores: 3 % at D = 4096, not overlapped but with the next tile's loads.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.grouped_tiles import Ring, place_of
from pallas_kernels.target import INSTEAD, Declined, target
from pallas_kernels.tuning import bucket, op_name, tuned

Array = jax.Array

ROWS, CONSUMERS, DEPTH = 64, 2, 64
"""A warpgroup's rows; warpgroups that compute; how much of D a slot holds."""


@dataclass(frozen=True)
class Config:
    """How the product is cut."""

    columns: int = 256
    """of the vocabulary in a tile"""
    stages: int = 4
    """slots: 4 of 48 KiB are 192 of 227 KiB"""
    band: int = 16
    """row tiles that sweep the vocabulary together: 2048 rows of x stay in L2 meanwhile"""
    num_blocks: int = mosaic.NUM_SMS


def linear_cross_entropy_statistics(
    x_MD: Array,
    w: Array,
    columns_M: Array,
    *,
    vocab_dim: int = 1,
    softcap: float | None = None,
    config: Config | None = None,
) -> tuple[Array, Array, Array]:
    """Give each row's largest logit of x @ w, its sum of exp(logit - largest) and the logit of its column, float32.

    w is [D, V], or [V, D] with vocab_dim = 0. A row whose column lies outside 0..V-1 gives 0 for that logit. Raises
    Declined for what is not bfloat16, or rows that the copy engine cannot take.
    """
    _check(x_MD, w, vocab_dim)
    op = op_name("linear_cross_entropy_statistics", vocab_dim=vocab_dim)
    config = config or tuned(op, target().kind, bucket(x_MD, w), Config())
    num_rows, vocab = x_MD.shape[0], w.shape[vocab_dim]
    num_v = pl.cdiv(vocab, config.columns)
    padded = pl.cdiv(num_rows, ROWS * CONSUMERS) * ROWS * CONSUMERS
    num_tiles = num_v * padded // (ROWS * CONSUMERS)
    config = replace(config, num_blocks=min(config.num_blocks, num_tiles))
    columns_M = jnp.pad(columns_M.astype(jnp.int32), (0, padded - num_rows))
    if num_rows % 8:  # the copy engine wants whole tiles of 8 rows
        x_MD = jnp.pad(x_MD, ((0, -num_rows % 8), (0, 0)))
    tile = (config.columns, DEPTH)[:: -1 if vocab_dim else 1]
    (statistics_V3M,) = mosaic.kernel(
        partial(_block, config, vocab_dim, softcap),
        out_type=[jax.ShapeDtypeStruct((num_v, 3, padded), jnp.float32)],
        scratch_types=[
            mosaic.matrix((config.stages, CONSUMERS * ROWS, DEPTH), jnp.bfloat16),
            mosaic.matrix((config.stages, *tile), jnp.bfloat16),
            plgpu.SMEM((CONSUMERS, 3, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.stages),
        ],
        grid=(config.num_blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        kernel_name="linear_cross_entropy",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x_MD, w, columns_M)
    max_VM, total_VM, target_VM = (statistics_V3M[:, i, :num_rows] for i in range(3))
    max_M = max_VM.max(0)
    return max_M, (total_VM * jnp.exp(max_VM - max_M)).sum(0), target_VM.sum(0)


def _check(x_MD: Array, w: Array, vocab_dim: int) -> None:
    if x_MD.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        raise Declined(f"linear cross-entropy: dtypes {x_MD.dtype}, {w.dtype} must be bfloat16; {INSTEAD}")
    sizes = (("D", x_MD.shape[1], 64), ("w's last dim", w.shape[1], 64), ("V", w.shape[vocab_dim], 8))
    for name, extent, tile in sizes:
        if extent % tile:
            raise Declined(f"linear cross-entropy: {name} ({extent}) must divide by {tile}, a tile; {INSTEAD}")


def _block(config: Config, vocab_dim: int, softcap: float | None, *refs: Any) -> None:
    """Take every num_blocks-th tile: the last warpgroup copies, the others compute."""
    x_ref, w_ref, columns_ref, out_ref, x_smem, w_smem, out_smem, ready, free = refs
    block, wg = lax.axis_index("block"), lax.axis_index("wg")
    num_m, num_v = out_ref.shape[2] // (ROWS * CONSUMERS), out_ref.shape[0]
    tiles = lax.div(num_m * num_v - block + (config.num_blocks - 1), jnp.int32(config.num_blocks))
    steps = pl.cdiv(x_ref.shape[1], DEPTH)
    ring = Ring(config.stages, ready, free)

    def place(tile: Array) -> tuple[Array, Array]:
        return place_of(block + tile * config.num_blocks, num_m, num_v, config.band)

    @pl.when(wg == CONSUMERS)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, tiles)
        def _tile(tile: Array) -> None:
            m, v = place(tile)
            rows = pl.ds(m * (ROWS * CONSUMERS), ROWS * CONSUMERS)
            words = pl.ds(v * config.columns, config.columns)

            @pl.loop(0, steps)
            def _step(k: Array) -> None:
                slot, depth = ring.acquire(tile * steps + k), pl.ds(k * DEPTH, DEPTH)
                where = (depth, words) if vocab_dim else (words, depth)
                plgpu.copy_gmem_to_smem(x_ref.at[rows, depth], x_smem.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(w_ref.at[where], w_smem.at[slot], ready.at[slot])

        ring.drain(tiles * steps)

    @pl.when(wg < CONSUMERS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")

        @pl.loop(0, tiles)
        def _tile(tile: Array) -> None:
            m, v = place(tile)
            rows = pl.ds((m * CONSUMERS + wg) * ROWS, ROWS)
            row_layout = plgpu.Layout.WGMMA.reduce(1)
            target = plgpu.load(columns_ref.at[rows], layout=row_layout, optimized=False) - v * config.columns
            logits = _product(
                config, vocab_dim, ring, x_smem.at[:, pl.ds(wg * ROWS, ROWS)], w_smem, tile * steps, steps
            )
            found = _reduce(
                logits, target, w_ref.shape[vocab_dim] - v * config.columns, softcap, w_ref.shape[vocab_dim]
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i, numbers in enumerate(found):
                out_smem.at[wg, i][...] = numbers
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[v, :, rows])

        plgpu.wait_smem_to_gmem(0)


def _product(config: Config, vocab_dim: int, ring: Ring, x_smem: Any, w_smem: Any, first: Array, steps: int) -> Array:
    """Multiply this warpgroup's rows of a tile; a slot is released one step late, when its product is done."""

    def run(acc: Any) -> Array:
        @pl.loop(0, steps)
        def _step(k: Array) -> None:
            slot = ring.receive(first + k)
            w = w_smem.at[slot]
            plgpu.wgmma(acc, x_smem.at[slot], w if vocab_dim else w.transpose((1, 0)))
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: ring.release(first + k - 1))

        value = acc[...]
        ring.release(first + steps - 1)
        return value

    return pl.run_scoped(run, plgpu.ACC((ROWS, config.columns), jnp.float32))


def _reduce(
    logits: Array, target: Array, remaining: Array, softcap: float | None, vocab: int
) -> tuple[Array, Array, Array]:
    """Reduce a warpgroup's logits to three numbers a row; columns from `remaining` on are not of the vocabulary."""
    columns = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
    if softcap is not None:
        logits = softcap * mosaic.tanh(logits / softcap)
    wide = partial(lax.broadcast_in_dim, shape=logits.shape, broadcast_dimensions=[0])
    of_target = jnp.where(columns == wide(target), logits, 0.0).sum(axis=1)
    if vocab % logits.shape[1]:  # zeros were copied there
        logits = jnp.where(columns < remaining, logits, -jnp.inf)
    highest = logits.max(axis=1)
    total = jnp.exp2(logits * mosaic.LOG2E - wide(highest * mosaic.LOG2E)).sum(axis=1)
    return highest, total, of_target
