"""The sparse layer: route -> dispatch -> experts -> combine (+ shared experts)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.config.model import Precision
from moejax.config.moe import MoEConfig
from moejax.layers.context import Context
from moejax.layers.ffn import FeedForward
from moejax.layers.param import make_param, read
from moejax.moe.dispatch import (
    Dispatched,
    dispatch_capacity,
    dispatch_dense,
    dispatch_few,
    dispatch_sorted,
    expert_outputs,
)
from moejax.moe.experts import Apart, Experts
from moejax.moe.router import Router, Routing
from moejax.moe.stats import RouterStats, record
from moejax.parallel.plan import MeshPlan


class MoELayer(nnx.Module):
    """A feed-forward layer of routed experts; x has entered tensor, the caller leaves it."""

    def __init__(
        self, plan: MeshPlan, rngs: nnx.Rngs, dim: int, config: MoEConfig, precision: Precision, scale: float = 1.0
    ) -> None:
        self.router = Router(plan, rngs, dim, config, precision)
        self.experts = Experts(plan, rngs, dim, config, precision, scale)
        width, dtype = config.shared_ffn, precision.params
        self.shared = FeedForward(plan, rngs, dim, width, precision, scale) if width else None
        gated = width and config.shared_gate
        self.shared_gate = make_param(plan, rngs, (dim, 1), ("embed", None), dtype, fan_in=dim) if gated else None
        self.plan, self.config, self.dtype = plan, config, precision.compute

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context, apart: Apart | None = None
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Give this tensor rank's part of the output, and what the router did; `apart` is for decoding few tokens."""
        routing = self.router(x_BTD, context)
        if apart is None:
            done = self._dispatch(x_BTD, routing, context)
        else:
            done = Dispatched(dispatch_few(apart, x_BTD, routing), routing.chosen_BTA)
        y_BTD = done.y_BTD if self.shared is None else done.y_BTD + self._shared_part(x_BTD, self.shared)
        return y_BTD, record(self.plan, self.router, routing, done.kept_BTA, context)

    def _shared_part(self, x_BTD: Array, shared: FeedForward) -> Array:
        """Give this tensor rank's part of what the shared experts say, gated or not."""
        part_BTD = shared.part(x_BTD)
        if self.shared_gate is None:
            return part_BTD
        return part_BTD * jax.nn.sigmoid(x_BTD @ read(self.shared_gate, self.dtype))

    def apart(self) -> Apart | None:
        """Take the experts apart for decoding; None where each token sees all of them anyway."""
        return None if self.config.router.kind == "soft" else self.experts.apart()

    def uncombined(
        self, x_BTD: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "E B T D"], Float[Array, "E B T"], RouterStats]:
        """Give every expert's part of the output by itself and the log of its gate: for the competitive loss."""
        routing = self.router(x_BTD, context)
        outputs_EBTD = expert_outputs(self.experts, x_BTD, context, self.config.num_experts)
        stats = record(self.plan, self.router, routing, routing.chosen_BTA, context)
        # The gate meets whole predictions, not parts of a sum over tensor: one rank speaks for all.
        log_gate_EBT = self.plan.mean_over(jnp.moveaxis(jax.nn.log_softmax(routing.logits_BTE), -1, 0), "expert_ffn")
        return outputs_EBTD, log_gate_EBT, stats

    def _dispatch(self, x_BTD: Array, routing: Routing, context: Context) -> Dispatched:
        config, way = self.config, self.config.way(context.training)
        if config.slots is not None and context.one_by_one:
            way = "sorted"
        if way == "dense":
            return dispatch_dense(self.experts, x_BTD, routing, context)
        if way == "sorted":
            return dispatch_sorted(self.experts, x_BTD, routing, context)
        return dispatch_capacity(self.experts, x_BTD, routing, context, config.num_slots(context.length))
