"""How does Hopper differentiate a root-mean-square norm in one pass over memory? (arXiv 1910.07467)

XLA reads x and dy twice, for the rows' sums and for dx (tests/ops/test_fused_on_h200.py). Here a block, one warpgroup,
has a whole row in shared memory: it sums, then reads it again there; its part of the scale's gradient stays in
registers until the end. Two blocks share a multiprocessor, and hide each other's waiting.

Roofline: 6 M D bytes, some 15 FLOPs for each value: bound by memory. One warpgroup a
block, since Mosaic reduces over a whole warpgroup (by shared memory) where it is alone.
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
from pallas_kernels.target import INSTEAD, Declined, target
from pallas_kernels.tuning import bucket, tuned

Array = jax.Array

LINE, CHUNK = 256, 1024
"""What a copy's box may be wide; values that a warpgroup takes at once, 16 bytes a thread."""


@dataclass(frozen=True)
class Config:
    """How the rows are shared out."""

    stages: int = 3
    """rows on their way to a block at a time"""
    num_blocks: int = 2 * mosaic.NUM_SMS

    @classmethod
    def of(cls, dim: int) -> "Config":
        """Take as many slots as fit beside a second block; two fit for every D that `check` lets through."""
        return cls(stages=3 if 2 * smem_bytes(dim, 3) <= mosaic.SMEM_LIMIT else 2)


def smem_bytes(dim: int, stages: int) -> int:
    """Count the bytes of shared memory that a block needs, those of alignment and of reductions too."""
    return 2 * dim * (2 * stages + 2) + 2048


def check(x: Array, scale_D: Array) -> None:
    """Raise Declined for what the kernel cannot take: x [..., D]."""
    dim = x.shape[-1]
    if x.dtype != jnp.bfloat16 or scale_D.dtype != jnp.bfloat16:
        raise Declined(f"RMSNorm backward: dtypes {x.dtype}, {scale_D.dtype} must be bfloat16; {INSTEAD}")
    if dim % CHUNK or dim > 8192:
        raise Declined(f"RMSNorm backward: D ({dim}) must be a multiple of {CHUNK} up to 8192; {INSTEAD}")
    if not x.size:
        raise Declined(f"RMSNorm backward: x {x.shape} must have rows; {INSTEAD}")


def rms_norm_bwd(
    x_MD: Array, scale_D: Array, dy_MD: Array, eps: float, config: Config | None = None
) -> tuple[Array, Array]:
    """Give the gradients of x and scale of y = x / rms(x) * scale.

    Raises Declined for what is not bfloat16 or rows that are not whole chunks.
    """
    for x in (x_MD, dy_MD):
        check(x, scale_D)
    num_rows, dim = x_MD.shape
    config = config or tuned("rms_norm_bwd", target().kind, bucket(x_MD, dy_MD), Config.of(dim))
    config = replace(config, num_blocks=min(config.num_blocks, num_rows))
    lines = (dim // LINE, LINE)
    rows = jax.ShapeDtypeStruct((num_rows, *lines), jnp.bfloat16)
    parts = jax.ShapeDtypeStruct((config.num_blocks, *lines), jnp.float32)
    dx_MCL, dscale_BCL = mosaic.kernel(
        partial(_block, config, eps),
        out_type=[rows, parts],
        scratch_types=[
            plgpu.SMEM(lines, jnp.bfloat16),
            plgpu.SMEM(lines, jnp.bfloat16),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            *[plgpu.SMEM((config.stages, *lines), jnp.bfloat16)] * 2,
        ],
        grid=(config.num_blocks,),
        grid_names=("block",),
        kernel_name="rms_norm_bwd",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(scale_D.reshape(lines), x_MD.reshape(rows.shape), dy_MD.reshape(rows.shape))
    return dx_MCL.reshape(x_MD.shape), dscale_BCL.sum(0).reshape(dim).astype(scale_D.dtype)


def _block(config: Config, eps: float, *refs: Any) -> None:
    """Take every num_blocks-th row."""
    scale_ref, x_ref, dy_ref, dx_ref, dscale_ref, scale_smem, dx_smem, scale_ready, ready, *slots = refs
    block = lax.axis_index("block")
    rows = lax.div(dx_ref.shape[0] - block + (config.num_blocks - 1), jnp.int32(config.num_blocks))
    lines = CHUNK // LINE
    layout = plgpu.Layout.WG_STRIDED((lines, LINE), vec_size=8)
    chunks = [pl.ds(i * lines, lines) for i in range(dx_ref.shape[1] // lines)]
    dim = dx_ref.shape[1] * LINE

    def fetch(row: Array) -> None:
        slot = lax.rem(row, jnp.int32(config.stages))
        for source, held in zip((x_ref, dy_ref), slots, strict=True):
            place = block + row * config.num_blocks
            plgpu.copy_gmem_to_smem(source.at[place], held.at[slot], ready.at[slot])

    def load(ref: Any, chunk: Any) -> Array:
        return plgpu.load(ref.at[chunk], layout=layout, optimized=False).astype(jnp.float32)

    def differentiate(row: Array, dscale: tuple[Array, ...]) -> tuple[Array, ...]:
        slot = lax.rem(row, jnp.int32(config.stages))
        plgpu.barrier_wait(ready.at[slot])
        x_smem, dy_smem = (x.at[slot] for x in slots)
        squares = products = zeros
        for chunk in chunks:
            x = load(x_smem, chunk)
            squares += x * x
            products += x * load(dy_smem, chunk) * load(scale_smem, chunk)
        inverse = lax.rsqrt(jnp.sum(squares) / dim + eps)
        drift = jnp.sum(products) * inverse * inverse * inverse / dim
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        found = []
        for chunk, so_far in zip(chunks, dscale, strict=True):
            x, dy = load(x_smem, chunk), load(dy_smem, chunk)
            dx = dy * load(scale_smem, chunk) * inverse - x * drift
            dx_smem.at[chunk][...] = dx.astype(jnp.bfloat16)
            found.append(so_far + dy * x * inverse)
        plgpu.commit_smem()  # dx before it is copied out, and what was read before it is copied over
        plgpu.copy_smem_to_gmem(dx_smem, dx_ref.at[block + row * config.num_blocks])
        pl.when(row + config.stages < rows)(lambda: fetch(row + config.stages))
        return tuple(found)

    plgpu.copy_gmem_to_smem(scale_ref, scale_smem, scale_ready)
    for stage in range(config.stages):
        pl.when(stage < rows)(lambda stage=stage: fetch(jnp.int32(stage)))
    plgpu.barrier_wait(scale_ready)
    zeros = plgpu.layout_cast(jnp.zeros((lines, LINE), jnp.float32), layout)
    dscale = lax.fori_loop(0, rows, differentiate, (zeros,) * len(chunks))
    for chunk, total in zip(chunks, dscale, strict=True):
        dscale_ref.at[block, chunk][...] = total
    plgpu.wait_smem_to_gmem(0)
