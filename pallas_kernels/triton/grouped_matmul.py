"""How does a run of rows per expert meet that expert's weights on Ampere and Ada? Forward, and the gradient of both.

2*R*D*F FLOPs each, 2*(R*(D+F) + hit*D*F) bytes in bfloat16: arithmetic-bound from some hundred rows an expert on. XLA
cuts every run into tiles that begin where the run begins (no row is computed twice, no group is padded); the rows after
the last run form a group of no expert, whose tiles write zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.group_tiles import group_ends, num_tiles, tile_map
from pallas_kernels.target import INSTEAD, Declined, target
from pallas_kernels.triton.call import Launch, capability, triton_call
from pallas_kernels.tuning import bucket, op_name, tuned

Array = jax.Array

DTYPES = ("bfloat16", "float16", "float32")
SMALL_SMEM = (86, 89)
"""Capabilities whose blocks have 99 KB of shared memory; the others have 163 KB and more."""


@dataclass(frozen=True)
class Config:
    """How a product is cut into tiles and stages."""

    rows: int = 128
    """of a tile of the result"""
    columns: int = 128
    """of a tile of the result"""
    step: int = 64
    """of the contracted dim, a stage"""
    stages: int = 3
    warps: int = 8
    band: int = 8
    """row tiles whose columns are swept together"""


def grouped_matmul(
    x_RD: Array, w_EDF: Array, group_sizes_E: Array, *, transpose_w: bool = False, config: Config | None = None
) -> Array:
    """Multiply each expert's run of rows by its weights, summed in float32: [R, F]; rows after the last run give zeros.

    transpose_w: the weights are w_EFD, contracted in their last dim (the gradient of x). Raises Declined.
    """
    check_operands(x_RD, w_EDF, group_sizes_E, 2 if transpose_w else 1)
    width = w_EDF.shape[1 if transpose_w else 2]
    if config is None:
        default = default_config(x_RD.shape[0], w_EDF.shape[0], x_RD.dtype, capability())
        op = op_name("triton grouped_matmul", transpose_w=transpose_w)
        config = tuned(op, target().kind, bucket(x_RD, w_EDF), default)
    out = jax.ShapeDtypeStruct((x_RD.shape[0], width), x_RD.dtype)
    tiles_T3, _ = tile_map(group_sizes_E, x_RD.shape[0], config.rows)
    launch = forward_launch(x_RD.shape, width, w_EDF.shape[0], transpose_w, config)
    return triton_call("grouped_matmul_kernel", x_RD, w_EDF, tiles_T3, out=out, launch=launch)


def forward_launch(x_shape: Sequence[int], width: int, num_experts: int, transpose_w: bool, config: Config) -> Launch:
    """Say how the kernel is launched for these shapes."""
    tiles = num_tiles(num_experts, x_shape[0], config.rows)
    constants = {
        "depth": x_shape[1], "width": width, "num_experts": num_experts, "num_tiles": tiles, "transposed": transpose_w,
        "rows": config.rows, "columns": config.columns, "step": config.step, "band": config.band,
    }  # fmt: skip
    return Launch((tiles * -(-width // config.columns),), constants, config.warps, config.stages)


def grouped_matmul_dw(x_RD: Array, dy_RF: Array, group_sizes_E: Array, *, config: Config | None = None) -> Array:
    """Give the weights' gradient [E, D, F]: each expert's rows, transposed, times their gradients; zeros without rows.

    One program walks all rows of its expert: a fixed order, so the same bits each time. Raises Declined.
    """
    if x_RD.ndim != 2 or dy_RF.ndim != 2 or x_RD.shape[0] != dy_RF.shape[0] or x_RD.dtype != dy_RF.dtype:
        raise Declined(
            f"x {x_RD.shape} {x_RD.dtype} and dy {dy_RF.shape} {dy_RF.dtype} must have the same rows and dtype; "
            f"{INSTEAD}"
        )
    check_dtype(x_RD, group_sizes_E)
    if config is None:
        default = default_config(x_RD.shape[0], 1, x_RD.dtype, capability())
        operands = bucket(x_RD, dy_RF, group_sizes_E)
        config = tuned("triton grouped_matmul_dw", target().kind, operands, default)
    end_E = group_ends(group_sizes_E, x_RD.shape[0])
    out = jax.ShapeDtypeStruct((group_sizes_E.size, x_RD.shape[1], dy_RF.shape[1]), x_RD.dtype)
    launch = dw_launch(x_RD.shape[1], dy_RF.shape[1], group_sizes_E.size, config)
    first_E = jnp.concatenate([jnp.zeros((1,), jnp.int32), end_E[:-1]])
    return triton_call("grouped_matmul_dw_kernel", x_RD, dy_RF, first_E, end_E, out=out, launch=launch)


def dw_launch(depth: int, width: int, num_experts: int, config: Config) -> Launch:
    """Say how the gradient's kernel is launched: its tiles are of D by F."""
    constants = {"depth": depth, "width": width}
    constants |= {"rows": config.rows, "columns": config.columns, "step": config.step}
    grid = (-(-depth // config.rows) * -(-width // config.columns), num_experts)
    return Launch(grid, constants, config.warps, config.stages)


def default_config(num_rows: int, num_experts: int, dtype: jax.typing.DTypeLike, chip: int) -> Config:
    """Choose tiles by an expert's average rows; smaller ones for float32, which no tensor core multiplies."""
    share = 2 * -(-num_rows // num_experts)
    rows = next((r for r in (16, 32, 64) if r >= share), 128)
    if jnp.dtype(dtype) == jnp.float32:
        return Config(rows=min(rows, 64), columns=64, step=32, stages=2, warps=4)
    warps = 8 if rows == 128 else 4
    return Config(rows, 128, 32, 4, warps) if chip in SMALL_SMEM else Config(rows, 128, 64, 3, warps)


def check_operands(x_RD: Array, w_EDF: Array, group_sizes_E: Array, contract: int) -> None:
    """Raise Declined for operands that the kernel does not multiply; `contract` is the weights' contracted dim."""
    if x_RD.ndim != 2 or w_EDF.ndim != 3 or w_EDF.shape[contract] != x_RD.shape[1]:
        raise Declined(f"weights {w_EDF.shape} must contract x's columns {x_RD.shape} in dim {contract}; {INSTEAD}")
    if w_EDF.dtype != x_RD.dtype or group_sizes_E.shape != w_EDF.shape[:1]:
        raise Declined(
            f"weights {w_EDF.shape} {w_EDF.dtype} must have x's dtype ({x_RD.dtype}) and an expert for each of the "
            f"{group_sizes_E.size} groups; {INSTEAD}"
        )
    check_dtype(x_RD, group_sizes_E)


def check_dtype(x_RD: Array, group_sizes_E: Array) -> None:
    """Raise Declined for dtypes that the kernels do not know, and for nothing to do."""
    if jnp.dtype(x_RD.dtype).name not in DTYPES or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise Declined(
            f"dtype ({x_RD.dtype}) must be one of {', '.join(DTYPES)}, "
            f"and group sizes ({group_sizes_E.dtype}) integers: {INSTEAD}"
        )
    if not x_RD.size:
        raise Declined(f"x {x_RD.shape} must not be empty: {INSTEAD}")
