"""The experts' weights, stacked, and the three shapes in which rows reach them."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from moejax.config.model import MoEConfig, Precision
from moejax.layers.context import PURPOSE_EXPERT, Context
from moejax.layers.param import make_param, read
from moejax.ops.grouped_matmul import expert_swiglu, grouped_matmul
from moejax.ops.random import dropout
from moejax.ops.swiglu import swiglu
from moejax.parallel.exchange import exchange_rows
from moejax.parallel.plan import MeshPlan

Slots = UInt32[Array, "*X"]
"""Each row's (token, expert) number in the global batch: token * E + expert. It decides the row's dropout."""


class Experts(nnx.Module):
    """E SwiGLU layers: experts over `expert`, each one's hidden dim over tensor; results are partial sums."""

    def __init__(
        self, plan: MeshPlan, rngs: nnx.Rngs, dim: int, moe: MoEConfig, precision: Precision, scale: float = 1.0
    ) -> None:
        e, f, dtype = moe.num_experts, moe.expert_ffn, precision.params
        wide, down = ("experts", "embed", "expert_ffn"), ("experts", "expert_ffn", "embed")
        self.gate = make_param(plan, rngs, (e, dim, f), wide, dtype, fan_in=dim, scale=scale)
        self.up = make_param(plan, rngs, (e, dim, f), wide, dtype, fan_in=dim, scale=scale)
        self.down = make_param(plan, rngs, (e, f, dim), down, dtype, fan_in=f, scale=scale)
        self.plan, self.rate, self.dtype = plan, moe.dropout, precision.compute
        self.implementation = moe.implementation

    def all_rows(self, x_MD: Float[Array, "M D"], slots_EM: Slots, context: Context) -> Float[Array, "E M D"]:
        """Run every local expert on every row."""
        gate, up, down = self._weights()
        h_EMF = swiglu(jnp.einsum("MD,EDF->EMF", x_MD, gate), jnp.einsum("MD,EDF->EMF", x_MD, up))
        return jnp.einsum("EMF,EFD->EMD", self._drop(h_EMF, slots_EM, context), down)

    def batched(self, x_ECD: Float[Array, "E C D"], slots_EC: Slots, context: Context) -> Float[Array, "E C D"]:
        """Run each local expert on its own C rows."""
        gate, up, down = self._weights()
        h_ECF = swiglu(jnp.einsum("ECD,EDF->ECF", x_ECD, gate), jnp.einsum("ECD,EDF->ECF", x_ECD, up))
        return jnp.einsum("ECF,EFD->ECD", self._drop(h_ECF, slots_EC, context), down)

    def grouped(
        self, x_RD: Float[Array, "R D"], group_sizes_E: Int[Array, " E"], slots_R: Slots, context: Context
    ) -> Float[Array, "R D"]:
        """Run each expert on its group of consecutive rows, on the device where it lies; E is the global number."""
        key = (context.draw(PURPOSE_EXPERT), self.plan.index("expert_ffn")) if self.dropping(context) else ()
        run, weights = partial(_run_groups, self.rate, self.implementation), self._weights()
        ranks = self.plan.size("expert")
        here = weights[0].shape[0]
        assert here * ranks == group_sizes_E.shape[0], f"{here} experts on each of {ranks} ranks: rows go to others"
        if ranks == 1:
            return run(weights, key, x_RD, group_sizes_E, slots_R)
        return exchange_rows(self.plan, run, weights, key, x_RD, slots_R, group_sizes_E)

    def dropping(self, context: Context) -> bool:
        """Say whether rows' slot numbers are asked for."""
        return self.rate > 0.0 and context.training

    def _weights(self) -> tuple[Array, Array, Array]:
        return read(self.gate, self.dtype), read(self.up, self.dtype), read(self.down, self.dtype)

    def _drop(self, h: Array, slots: Slots, context: Context) -> Array:
        if not self.dropping(context):
            return h
        return _drop_hidden(h, self.rate, (context.draw(PURPOSE_EXPERT), self.plan.index("expert_ffn")), slots)

    def apart(self) -> list[tuple[Array, Array]]:
        """Give each expert's (gate beside up [D, 2F], down [F, D]) as arrays of its own, for `dispatch_few`."""
        gate, up, down = self._weights()
        return [(jnp.concatenate([gate[e], up[e]], axis=1), down[e]) for e in range(gate.shape[0])]


def _run_groups(
    rate: float, way: str, weights: tuple[Array, ...], key: Any, x_RD: Array, group_sizes_E: Array, slots_R: Array
) -> Array:
    """Run groups of rows; `key` (with the tensor rank) is there where dropout is."""
    gate, up, down = weights
    if not key:
        return expert_swiglu(x_RD, gate, up, down, group_sizes_E, implementation=way)
    matmul = partial(grouped_matmul, group_sizes_E=group_sizes_E, implementation=way)
    h_RF = swiglu(matmul(x_RD, gate), matmul(x_RD, up))
    return matmul(_drop_hidden(h_RF, rate, key, slots_R), down)


def _drop_hidden(h: Array, rate: float, key: tuple[Array, Array], slots: Slots) -> Array:
    bits, rank = key
    column = (rank * h.shape[-1] + jnp.arange(h.shape[-1])).astype(jnp.uint32)
    return dropout(h, rate, bits, slots[..., None], column)
