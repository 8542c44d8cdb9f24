"""THE place for overlap of communication and arithmetic on GPUs: compiler flags, and matmuls that are their own ring.

XLA:GPU runs collectives asynchronously on its own; what it needs is a schedule that leaves work between a collective's
start and its end. `XLA_FLAGS` below ask for that (`experiments/process.py` sets them where a GPU is; your own come
after and win). Where the schedule finds nothing to put in between, as in tensor parallelism whose matmul waits for the
whole gather, `overlap_tensor = true` in the mesh file cuts gather and matmul into ring steps: while one part is
multiplied, the next one travels (arXiv 2302.05442, 3.1, Wang et al. ASPLOS 2023). The bytes stay the same.
"""

from collections.abc import Sequence
from typing import Final

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moejax.compat import vary, vary_like
from moejax.parallel.plan import MeshPlan

COMBINE_BYTES: Final = 128 * 2**20
XLA_FLAGS: Final = {
    # Schedule collectives early and their uses late, by an estimate of what each costs.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    # Let the next layer's weights be gathered, and the last one's gradients scattered, a scan step before or after.
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
    # Two buffers for what a loop carries: a copy less per layer, and room for the pipelining above.
    "xla_gpu_enable_while_loop_double_buffering": "true",
    # Few large messages instead of many small ones: norms' gradients travel with the matrices'.
    "xla_gpu_all_gather_combine_threshold_bytes": str(COMBINE_BYTES),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": str(COMBINE_BYTES),
    "xla_gpu_all_reduce_combine_threshold_bytes": str(COMBINE_BYTES),
}

AXIS = "tensor"


def flags(own: str) -> str:
    """Give XLA_FLAGS with ours before `own`: the last one of a name wins."""
    return " ".join([*(f"--{name}={value}" for name, value in XLA_FLAGS.items()), own]).strip()


def column_parallel(
    plan: MeshPlan, x_BtD: Float[Array, "B t D"], weights: Sequence[Float[Array, "D f"]]
) -> list[Float[Array, "B T f"]]:
    """Enter tensor and multiply by weights split by columns, as a ring of steps where the mesh asks for it."""
    if not plan.config.overlap_tensor:
        x_BTD = plan.enter_tensor(x_BtD)
        return [x_BTD @ w_Df for w_Df in weights]
    ranks, rank, length = plan.size(AXIS), lax.axis_index(AXIS), x_BtD.shape[1]
    x_BtD = vary(x_BtD, (AXIS,))
    whole = [
        vary_like(jnp.zeros((x_BtD.shape[0], ranks * length, w_Df.shape[1]), x_BtD.dtype), x_BtD, w_Df)
        for w_Df in weights
    ]
    for step in range(ranks):
        source = (rank - step) % ranks
        whole = [
            lax.dynamic_update_slice_in_dim(y_BTf, x_BtD @ w_Df, source * length, 1)
            for y_BTf, w_Df in zip(whole, weights, strict=True)
        ]
        if step < ranks - 1:
            x_BtD = _pass_on(ranks, x_BtD)
    return whole


def row_parallel(plan: MeshPlan, h_BTf: Float[Array, "B T f"], w_fD: Float[Array, "f D"]) -> Float[Array, "B t D"]:
    """Multiply by weights split by rows and leave tensor, as a ring of steps where the mesh asks for it."""
    if not plan.config.overlap_tensor:
        return plan.leave_tensor(h_BTf @ w_fD)
    ranks, rank = plan.size(AXIS), lax.axis_index(AXIS)
    length = h_BTf.shape[1] // ranks
    total_BtD: Array | None = None
    for step in range(ranks):  # a sum ends where it belongs: it meets each rank's part on the way
        target = (rank - 1 - step) % ranks
        part_BtD = lax.dynamic_slice_in_dim(vary(h_BTf, (AXIS,)), target * length, length, 1) @ w_fD
        total_BtD = part_BtD if total_BtD is None else _pass_on(ranks, total_BtD) + part_BtD
    assert total_BtD is not None
    return total_BtD


def _pass_on(ranks: int, x: Array) -> Array:
    return lax.ppermute(x, AXIS, [(r, (r + 1) % ranks) for r in range(ranks)])
