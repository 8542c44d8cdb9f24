"""The experts' weights, stacked, and the three shapes in which rows reach them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from moejax.config.model import Precision
from moejax.config.moe import MoEConfig
from moejax.layers.context import PURPOSE_EXPERT, Context
from moejax.layers.param import make_param, read
from moejax.ops.grouped_matmul import expert_swiglu, grouped_matmul
from moejax.ops.random import dropout
from moejax.ops.swiglu import clamped_swiglu, swiglu
from moejax.parallel.exchange import exchange_rows
from moejax.parallel.plan import MeshPlan

Slots = UInt32[Array, "*X"]
"""Each row's (token, expert) number in the global batch: token * E + expert. It decides the row's dropout."""


class Weights(NamedTuple):
    """The local experts' matrices (no gate where there is none) and, where there are any, their biases."""

    gate_EDF: Float[Array, "E D F"] | None
    up_EDF: Float[Array, "E D F"]
    down_EFD: Float[Array, "E F D"]
    gate_EF: Float[Array, "E F"] | None = None
    up_EF: Float[Array, "E F"] | None = None
    down_ED: Float[Array, "E D"] | None = None


class Activation(NamedTuple):
    """What joins gate and up: swiglu, or its clamped kind under a limit; relu where there is no gate."""

    limit: float | None

    def __call__(self, gate: Array | None, up: Array) -> Array:
        """Give the hidden units."""
        if gate is None:
            return jax.nn.relu(up)
        return swiglu(gate, up) if self.limit is None else clamped_swiglu(gate, up, self.limit)


class Experts(nnx.Module):
    """E feed-forwards, gated or not, over `expert`; each one's hidden dim over tensor; results are partial sums."""

    def __init__(
        self, plan: MeshPlan, rngs: nnx.Rngs, dim: int, moe: MoEConfig, precision: Precision, scale: float = 1.0
    ) -> None:
        e, f, dtype = moe.num_experts, moe.expert_ffn, precision.params
        wide, down = ("experts", "embed", "expert_ffn"), ("experts", "expert_ffn", "embed")
        gated = moe.activation != "relu"
        self.gate = make_param(plan, rngs, (e, dim, f), wide, dtype, fan_in=dim, scale=scale) if gated else None
        self.up = make_param(plan, rngs, (e, dim, f), wide, dtype, fan_in=dim, scale=scale)
        self.down = make_param(plan, rngs, (e, f, dim), down, dtype, fan_in=f, scale=scale)

        def vector(size: int, axis: str) -> nnx.Param | None:
            return make_param(plan, rngs, (e, size), ("experts", axis), dtype, fill=0.0) if moe.bias else None

        self.gate_bias = vector(f, "expert_ffn") if gated else None
        self.up_bias = vector(f, "expert_ffn")
        self.down_bias = vector(dim, "embed")
        self.plan, self.rate, self.dtype = plan, moe.dropout, precision.compute
        self.implementation = moe.implementation
        self.activation = Activation(moe.limit if moe.activation == "clamped_swiglu" else None)

    def all_rows(self, x_MD: Float[Array, "M D"], slots_EM: Slots, context: Context) -> Float[Array, "E M D"]:
        """Run every local expert on every row."""
        return self._einsum("MD,EDF->EMF", x_MD, slots_EM, context)

    def batched(self, x_ECD: Float[Array, "E C D"], slots_EC: Slots, context: Context) -> Float[Array, "E C D"]:
        """Run each local expert on its own C rows."""
        return self._einsum("ECD,EDF->ECF", x_ECD, slots_EC, context)

    def _einsum(self, first: str, x: Array, slots: Slots, context: Context) -> Array:
        w = self._weights()
        gate = None if w.gate_EDF is None else _plus(jnp.einsum(first, x, w.gate_EDF), w.gate_EF)
        hidden = self.activation(gate, _plus(jnp.einsum(first, x, w.up_EDF), w.up_EF))
        if self.dropping(context):
            key = (context.draw(PURPOSE_EXPERT), self.plan.index("expert_ffn"))
            hidden = _drop_hidden(hidden, self.rate, key, slots)
        return _plus(jnp.einsum("ECF,EFD->ECD", hidden, w.down_EFD), w.down_ED)

    def grouped(
        self, x_RD: Float[Array, "R D"], group_sizes_E: Int[Array, " E"], slots_R: Slots, context: Context
    ) -> Float[Array, "R D"]:
        """Run each expert on its group of consecutive rows, on the device where it lies; E is the global number."""
        key = (context.draw(PURPOSE_EXPERT), self.plan.index("expert_ffn")) if self.dropping(context) else ()
        run, weights = partial(_run_groups, self.rate, self.implementation, self.activation), self._weights()
        ranks = self.plan.size("expert")
        here = weights.up_EDF.shape[0]
        assert here * ranks == group_sizes_E.shape[0], f"{here} experts on each of {ranks} ranks: rows go to others"
        if ranks == 1:
            return run(weights, key, x_RD, group_sizes_E, slots_R)
        return exchange_rows(self.plan, run, weights, key, x_RD, slots_R, group_sizes_E, self.implementation)

    def dropping(self, context: Context) -> bool:
        """Say whether rows' slot numbers are asked for."""
        return self.rate > 0.0 and context.training

    def _weights(self) -> Weights:
        gate, up, down = (None if p is None else read(p, self.dtype) for p in (self.gate, self.up, self.down))
        assert up is not None and down is not None
        if self.up_bias is None or self.down_bias is None:
            return Weights(gate, up, down)
        up_EF, down_ED = read(self.up_bias, self.dtype), read(self.down_bias, self.dtype)
        gate_EF = None if self.gate_bias is None else read(self.gate_bias, self.dtype)
        # The output is a sum over tensor ranks: the first one alone adds its bias.
        return Weights(gate, up, down, gate_EF, up_EF, jnp.where(self.plan.index("expert_ffn") == 0, down_ED, 0))

    def apart(self) -> "Apart":
        """Give each expert as a function of rows, its weights as arrays of their own, for `dispatch_few`."""
        weights = self._weights()
        one = [jax.tree.map(lambda w, e=e: w[e], weights) for e in range(weights.up_EDF.shape[0])]
        return [_alone(self.activation, w) for w in one]


Apart = Sequence[Callable[[Array], Array]]
"""Each expert by itself, rows [M, D] to rows [M, D]."""


def _alone(activation: Activation, w: Weights) -> Callable[[Array], Array]:
    """Make one expert's function; gate and up lie beside each other, so that rows are read once."""
    if w.gate_EDF is None:
        return lambda x_MD: _shift(activation(None, _shift(x_MD @ w.up_EDF, w.up_EF)) @ w.down_EFD, w.down_ED)
    gate_up_DF = jnp.concatenate([w.gate_EDF, w.up_EDF], axis=1)

    def run(x_MD: Array) -> Array:
        gate_MF, up_MF = jnp.split(x_MD @ gate_up_DF, 2, axis=1)
        return _shift(activation(_shift(gate_MF, w.gate_EF), _shift(up_MF, w.up_EF)) @ w.down_EFD, w.down_ED)

    return run


def _shift(x_MF: Array, bias_F: Array | None) -> Array:
    return x_MF if bias_F is None else x_MF + bias_F


def _plus(x_ECF: Array, bias_EF: Array | None) -> Array:
    return x_ECF if bias_EF is None else x_ECF + bias_EF[:, None]


def _run_groups(
    rate: float,
    way: str,
    activation: Activation,
    w: Weights,
    key: Any,
    x_RD: Array,
    group_sizes_E: Array,
    slots_R: Array,
) -> Array:
    """Run groups of rows; `key` (with the tensor rank) is there where dropout is."""
    if not key and activation.limit is None and w.gate_EDF is not None and w.up_EF is None:
        return expert_swiglu(x_RD, w.gate_EDF, w.up_EDF, w.down_EFD, group_sizes_E, implementation=way)
    expert_R = (jnp.arange(x_RD.shape[0])[:, None] >= jnp.cumsum(group_sizes_E)).sum(-1)

    def product(x: Array, matrix: Array, bias: Array | None) -> Array:
        y = grouped_matmul(x, matrix, group_sizes_E, implementation=way)
        # Rows behind the last group meet no expert, and no bias.
        return y if bias is None else y + jnp.take(bias, expert_R, axis=0, mode="fill", fill_value=0)

    gate_RF = None if w.gate_EDF is None else product(x_RD, w.gate_EDF, w.gate_EF)
    h_RF = activation(gate_RF, product(x_RD, w.up_EDF, w.up_EF))
    if key:
        h_RF = _drop_hidden(h_RF, rate, key, slots_R)
    return product(h_RF, w.down_EFD, w.down_ED)


def _drop_hidden(h: Array, rate: float, key: tuple[Array, Array], slots: Slots) -> Array:
    bits, rank = key
    column = (rank * h.shape[-1] + jnp.arange(h.shape[-1])).astype(jnp.uint32)
    return dropout(h, rate, bits, slots[..., None], column)
