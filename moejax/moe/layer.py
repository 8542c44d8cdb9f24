"""The sparse layer: route -> dispatch -> experts -> combine (+ shared experts)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.config.model import MoEConfig, Precision
from moejax.layers.context import Context
from moejax.layers.ffn import FeedForward
from moejax.moe.dispatch import (
    Apart,
    Dispatched,
    dispatch_capacity,
    dispatch_dense,
    dispatch_few,
    dispatch_sorted,
    expert_outputs,
)
from moejax.moe.experts import Experts
from moejax.moe.router import Router, Routing, num_slots
from moejax.moe.stats import RouterStats, record
from moejax.parallel.plan import MeshPlan


class MoELayer(nnx.Module):
    """A feed-forward layer of routed experts; x has entered tensor, the caller leaves it."""

    def __init__(
        self, plan: MeshPlan, rngs: nnx.Rngs, dim: int, config: MoEConfig, precision: Precision, scale: float = 1.0
    ) -> None:
        self.router = Router(plan, rngs, dim, config, precision)
        self.experts = Experts(plan, rngs, dim, config, precision, scale)
        width = config.num_shared_experts * config.expert_ffn
        self.shared = FeedForward(plan, rngs, dim, width, precision, scale) if width else None
        self.plan, self.config = plan, config

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context, apart: Apart | None = None
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Give this tensor rank's part of the output, and what the router did; `apart` is for decoding few tokens."""
        routing = self.router(x_BTD, context)
        if apart is None:
            done = self._dispatch(x_BTD, routing, context)
        else:
            done = Dispatched(dispatch_few(apart, x_BTD, routing), routing.chosen_BTA)
        y_BTD = done.y_BTD if self.shared is None else done.y_BTD + self.shared.part(x_BTD)
        return y_BTD, record(self.plan, self.router, routing, done.kept_BTA, context.segments_BT > 0)

    def apart(self) -> Apart | None:
        """Take the experts apart for decoding; None where each token sees all of them anyway."""
        return None if self.config.router.kind == "soft" else self.experts.apart()

    def uncombined(
        self, x_BTD: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "E B T D"], Float[Array, "E B T"], RouterStats]:
        """Give every expert's part of the output by itself and the log of its gate: for the competitive loss."""
        routing = self.router(x_BTD, context)
        outputs_EBTD = expert_outputs(self.experts, x_BTD, context, self.config.num_experts)
        stats = record(self.plan, self.router, routing, routing.chosen_BTA, context.segments_BT > 0)
        # The gate meets whole predictions, not parts of a sum over tensor: one rank speaks for all.
        log_gate_EBT = self.plan.mean_over(jnp.moveaxis(jax.nn.log_softmax(routing.logits_BTE), -1, 0), "expert_ffn")
        return outputs_EBTD, log_gate_EBT, stats

    def _dispatch(self, x_BTD: Array, routing: Routing, context: Context) -> Dispatched:
        config, way = self.config, self.config.way(context.training)
        if way == "dense":
            return dispatch_dense(self.experts, x_BTD, routing, context)
        if way == "sorted":
            return dispatch_sorted(self.experts, x_BTD, routing, context)
        factor = config.capacity_factor or 1.0
        slots = num_slots(context.length, config.router.num_active, config.num_experts, factor)
        return dispatch_capacity(self.experts, x_BTD, routing, context, slots)
