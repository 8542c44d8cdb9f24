"""Which experts see a token, with what weight?"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.config.model import Precision
from moejax.config.moe import MoEConfig, RouterConfig
from moejax.layers.context import PURPOSE_ROUTER, Context
from moejax.layers.param import make_param, read
from moejax.ops.random import normal_at, uniform_at
from moejax.parallel.plan import MeshPlan


class RouterBias(nnx.Variable):
    """The loss-free balancing bias b_E (arXiv 2408.15664): moved by the load, never by a gradient."""


class Routing(NamedTuple):
    """What every router returns, for B sequences of T tokens and A slots each.

    A slot that is not `chosen` (padding, or a token that expert choice left out) reaches no expert. Expert choice and
    soft mixtures have a slot for every expert: A = E, in the experts' order.
    """

    experts_BTA: Int[Array, "B T A"]
    weights_BTA: Float[Array, "B T A"]
    chosen_BTA: Bool[Array, "B T A"]
    logits_BTE: Float[Array, "B T E"]
    probs_BTE: Float[Array, "B T E"]
    smooth_load_BTE: Float[Array, "B T E"] | None = None


class Router(nnx.Module):
    """Scores every expert in the router's own precision and picks by the configured rule."""

    def __init__(self, plan: MeshPlan, rngs: nnx.Rngs, dim: int, moe: MoEConfig, precision: Precision) -> None:
        experts, config = moe.num_experts, moe.router
        made = {"shape": (dim, experts), "axes": ("embed", None), "dtype": precision.params, "fan_in": dim}
        self.weight = make_param(plan, rngs, **made)
        self.noise = make_param(plan, rngs, **made) if config.noise == "gaussian" else None
        self.logit_bias = (
            make_param(plan, rngs, (experts,), (None,), precision.params, fill=0.0) if config.bias else None
        )
        balanced = config.bias_update_rate is not None
        self.bias = RouterBias(jnp.zeros(experts, precision.router)) if balanced else None
        self.plan, self.config, self.dtype = plan, config, precision.router
        self.moe = moe

    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> Routing:
        """Route the tokens; padding (segment 0) is not chosen, unless the config says so."""
        x_BTD = x_BTD.astype(self.dtype)
        valid_BT = routed(self.config, context)
        if self.config.noise == "jitter" and context.training:
            x_BTD = x_BTD * self._jitter(x_BTD, context)
        logits_BTE = x_BTD @ read(self.weight, self.dtype)
        if self.logit_bias is not None:
            logits_BTE = logits_BTE + read(self.logit_bias, self.dtype)
        if self.config.kind == "soft":
            return _all_experts(logits_BTE, valid_BT)
        if self.config.kind == "expert_choice":
            if not context.training and context.index_BT.shape[1] == 1:
                raise ValueError("expert choice sees whole sequences: it is for training, and cannot generate")
            return _expert_choice(self.plan, logits_BTE, valid_BT, self.moe.num_slots(context.length))
        noisy_BTE, std_BTE = self._noise(x_BTD, logits_BTE, context)
        return self._top_k(noisy_BTE, logits_BTE, std_BTE, valid_BT)

    def _jitter(self, x_BTD: Array, context: Context) -> Array:
        column = jnp.arange(x_BTD.shape[-1], dtype=jnp.uint32)
        u_BTD = uniform_at(context.draw(PURPOSE_ROUTER), context.tokens_BT()[..., None], column)
        return (1.0 + self.config.jitter * (2.0 * u_BTD - 1.0)).astype(x_BTD.dtype)

    def _noise(self, x_BTD: Array, logits_BTE: Array, context: Context) -> tuple[Array, Array | None]:
        """Add N(0, softplus(x W_noise)^2) to the logits (arXiv 1701.06538)."""
        if self.noise is None or not context.training:
            return logits_BTE, None
        std_BTE = jax.nn.softplus(x_BTD @ read(self.noise, self.dtype))
        column = jnp.arange(logits_BTE.shape[-1], dtype=jnp.uint32)
        draw_BTE = normal_at(context.draw(PURPOSE_ROUTER), context.tokens_BT()[..., None], column, self.dtype)
        return logits_BTE + draw_BTE * std_BTE, std_BTE

    def _top_k(self, noisy_BTE: Array, clean_BTE: Array, std_BTE: Array | None, valid_BT: Array) -> Routing:
        active = self.config.num_active
        # In logs, so that no score underflows: a normalised weight is a softmax over the kept ones.
        log_BTE = jax.nn.log_softmax(noisy_BTE) if self.config.score == "softmax" else jax.nn.log_sigmoid(noisy_BTE)
        score_BTE = jnp.exp(log_BTE) if self.bias is None else jnp.exp(log_BTE) + self.bias[...]
        ranked_BTE = log_BTE if self.bias is None else score_BTE
        ranked_BTE = _limit_groups(self.config, *lax.stop_gradient((ranked_BTE, score_BTE)))
        _, experts_BTA = lax.top_k(ranked_BTE, active)
        kept_BTA = jnp.take_along_axis(log_BTE, experts_BTA, axis=-1)
        weights_BTA = jax.nn.softmax(kept_BTA) if self.config.normalize else jnp.exp(kept_BTA)
        weights_BTA = weights_BTA if self.config.scale == 1.0 else self.config.scale * weights_BTA
        probs_BTE = jax.nn.softmax(log_BTE)
        chosen_BTA = jnp.broadcast_to(valid_BT[..., None], experts_BTA.shape)
        load_BTE = None if std_BTE is None else _smooth_load(noisy_BTE, clean_BTE, std_BTE, active)
        return Routing(experts_BTA, weights_BTA, chosen_BTA, noisy_BTE, probs_BTE, load_BTE)

    def update_bias(self, load_LE: Float[Array, "*L E"]) -> None:
        """Move the bias one step towards the experts that saw less than the mean (arXiv 2408.15664)."""
        if self.bias is not None and self.config.bias_update_rate:
            error = load_LE.mean(-1, keepdims=True) - load_LE
            self.bias[...] += (self.config.bias_update_rate * jnp.sign(error)).astype(self.dtype)


def routed(config: RouterConfig, context: Context) -> Bool[Array, "B T"]:
    """Say which tokens are routed and count in the losses."""
    return jnp.ones_like(context.segments_BT, bool) if config.padding else context.segments_BT > 0


def _limit_groups(config: RouterConfig, ranked_BTE: Array, score_BTE: Array) -> Array:
    """Put the experts of all but a token's best groups last: those groups whose best few score highest together."""
    if config.groups_kept == config.num_groups:
        return ranked_BTE
    groups = (*ranked_BTE.shape[:2], config.num_groups, -1)
    few = config.group_best or max(config.num_active // config.groups_kept, 1)
    group_scores = lax.top_k(score_BTE.reshape(groups), few)[0].sum(-1)
    kept_groups = jax.nn.one_hot(
        lax.top_k(group_scores, config.groups_kept)[1], config.num_groups, dtype=jnp.bool_
    ).any(-2)
    return jnp.where(kept_groups[..., None], ranked_BTE.reshape(groups), -jnp.inf).reshape(ranked_BTE.shape)


def _all_experts(logits_BTE: Array, valid_BT: Array) -> Routing:
    probs_BTE = jax.nn.softmax(logits_BTE)
    experts = jnp.broadcast_to(jnp.arange(probs_BTE.shape[-1], dtype=jnp.int32), probs_BTE.shape)
    chosen = jnp.broadcast_to(valid_BT[..., None], probs_BTE.shape)
    return Routing(experts, probs_BTE, chosen, logits_BTE, probs_BTE)


def _expert_choice(plan: MeshPlan, logits_BTE: Array, valid_BT: Array, slots: int) -> Routing:
    """Let every expert pick its `slots` best tokens of each whole sequence (arXiv 2202.09368)."""
    probs_BTE = jax.nn.softmax(logits_BTE)
    wanted_BET = jnp.where(valid_BT[:, None], lax.stop_gradient(probs_BTE).swapaxes(1, 2), -1.0)
    local = wanted_BET.shape[-1]
    wanted_BES = plan.gather_local(wanted_BET, "seq", 2)
    _, tokens_BEC = lax.top_k(wanted_BES, slots)
    picked_BES = jax.nn.one_hot(tokens_BEC, wanted_BES.shape[-1], dtype=jnp.bool_).any(axis=2)
    picked_BET = lax.dynamic_slice_in_dim(picked_BES, plan.index("seq") * local, local, 2)
    chosen_BTE = picked_BET.swapaxes(1, 2) & valid_BT[..., None]
    routing = _all_experts(logits_BTE, valid_BT)
    return routing._replace(weights_BTA=jnp.where(chosen_BTE, probs_BTE, 0.0), chosen_BTA=chosen_BTE)


def _smooth_load(noisy_BTE: Array, clean_BTE: Array, std_BTE: Array, active: int) -> Array:
    """Give the probability that each expert would be chosen if its own noise were drawn again (1701.06538, eq. 9)."""
    top = lax.top_k(noisy_BTE, min(active + 1, noisy_BTE.shape[-1]))[0]
    inside = noisy_BTE >= top[..., active - 1 : active]
    threshold = jnp.where(inside, top[..., -1:], top[..., active - 1 : active])
    return jax.scipy.special.ndtr((clean_BTE - threshold) / std_BTE)
