"""What keeps the experts' load even? Losses over all tokens of a microbatch, whatever the mesh."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.config.moe import RouterConfig
from moejax.moe.router import Routing
from moejax.parallel.plan import MeshPlan


def over_tokens(plan: MeshPlan, x_BTE: Float[Array, "B T *E"], valid_BT: Bool[Array, "B T"]) -> Float[Array, "*E"]:
    """Sum over the valid tokens of every device; equal on all of them."""
    mask = valid_BT.reshape(valid_BT.shape + (1,) * (x_BTE.ndim - 2))
    return plan.sum_over(jnp.where(mask, x_BTE, 0).sum((0, 1)), "batch", "seq")


def expert_load(plan: MeshPlan, routing: Routing, valid_BT: Bool[Array, "B T"]) -> Float[Array, " E"]:
    """Count the slots routed to each expert, before any capacity; no gradient."""
    experts = routing.probs_BTE.shape[-1]
    hot_BTAE = jax.nn.one_hot(routing.experts_BTA, experts, dtype=routing.probs_BTE.dtype)
    hot_BTE = (hot_BTAE * routing.chosen_BTA[..., None]).sum(2)
    return jax.lax.stop_gradient(over_tokens(plan, hot_BTE, valid_BT))


def load_balance(load_E: Float[Array, " E"], mean_prob_E: Float[Array, " E"]) -> Float[Array, ""]:
    """Give E * sum f_i P_i (arXiv 2101.03961, eq. 4): 1 when even, E when one expert takes all.

    f_i is the fraction of routed slots, so that the even value is 1 for every number of active experts.
    """
    fraction_E = load_E / jnp.maximum(load_E.sum(), 1.0)
    return load_E.shape[0] * jnp.sum(fraction_E * mean_prob_E)


class Balance(NamedTuple):
    """What one layer brings to the load-balancing loss over all layers; equal on all devices."""

    slots_E: Float[Array, "*L E"]
    """mean slots per token, as the logits alone would choose them"""
    prob_E: Float[Array, "*L E"]
    """mean softmax of the router's logits, whatever it routes by"""


class SequenceBalance(NamedTuple):
    """What one layer brings to its stack's losses: this device's sequences, each by itself."""

    slots_BE: Float[Array, "*L B E"]
    """mean slots per token; no gradient"""
    prob_BE: Float[Array, "*L B E"]
    """mean probabilities"""
    square_B: Float[Array, "*L B"]
    """mean of logsumexp(logits)^2"""


def layer_balance(plan: MeshPlan, active: int, logits_BTE: Float[Array, "B T E"], valid_BT: Array) -> Balance:
    """Give a layer's part of `model_balance`; a balancing bias and groups have no say in it, as in transformers."""
    tokens = jnp.maximum(over_tokens(plan, jnp.ones(valid_BT.shape, logits_BTE.dtype), valid_BT), 1.0)
    chosen_BTA = jax.lax.top_k(jax.lax.stop_gradient(logits_BTE), active)[1]
    slots_BTE = jax.nn.one_hot(chosen_BTA, logits_BTE.shape[-1], dtype=logits_BTE.dtype).sum(2)
    means = (over_tokens(plan, x_BTE, valid_BT) / tokens for x_BTE in (slots_BTE, jax.nn.softmax(logits_BTE)))
    return Balance(*(plan.agree(mean_E) for mean_E in means))


def model_balance(layers: Balance) -> Float[Array, ""]:
    """Give E * sum f_i P_i of means over all layers [L, E], as Hugging Face does: num_active when even."""
    return layers.slots_E.shape[-1] * jnp.sum(layers.slots_E.mean(0) * layers.prob_E.mean(0))


def sequence_balance(routing: Routing, valid_BT: Bool[Array, "B T"]) -> SequenceBalance:
    """Give a layer's part of `stack_losses`."""
    hot_BTAE = jax.nn.one_hot(routing.experts_BTA, routing.probs_BTE.shape[-1], dtype=routing.probs_BTE.dtype)
    slots_BTE = (hot_BTAE * routing.chosen_BTA[..., None]).sum(2)
    square_BT = jnp.square(jax.nn.logsumexp(routing.logits_BTE, axis=-1))
    tokens_B = jnp.maximum(valid_BT.sum(1), 1).astype(square_BT.dtype)

    def mean(x: Array) -> Array:
        valid = valid_BT.reshape(valid_BT.shape + (1,) * (x.ndim - 2))
        return jnp.where(valid, x, 0).sum(1) / tokens_B.reshape(-1, *(1,) * (x.ndim - 2))

    return SequenceBalance(mean(slots_BTE), mean(routing.probs_BTE), mean(square_BT))


def stack_losses(plan: MeshPlan, layers: SequenceBalance) -> dict[str, Float[Array, ""]]:
    """Give E^2 * mean over (sequences, experts) of f * P, each a mean over the tokens of all layers [L, B, E], and the
    mean of the squares: as Hugging Face's Switch does for its encoder, and for its decoder."""

    def over_sequences(x_B: Array) -> Array:
        return plan.agree(plan.sum_over(x_B.sum(), "batch") / (x_B.shape[0] * plan.degree("batch")))

    experts = layers.slots_BE.shape[-1]
    shares_B = (layers.slots_BE.mean(0) * layers.prob_BE.mean(0)).sum(-1)
    return {"load_balance": experts * over_sequences(shares_B), "z_loss": over_sequences(layers.square_B.mean(0))}


def squared_variation(x_E: Float[Array, " E"]) -> Float[Array, ""]:
    """Give the squared coefficient of variation, var / mean^2."""
    return x_E.var() / jnp.square(x_E.mean())


def router_losses(
    plan: MeshPlan, config: RouterConfig, routing: Routing, load_E: Float[Array, " E"], valid_BT: Bool[Array, "B T"]
) -> tuple[dict[str, Float[Array, ""]], Float[Array, ""]]:
    """Give the unweighted losses by name, and their weighted sum: what this layer adds to the training loss.

    The means are taken over all tokens first and multiplied then, so that no split of the batch changes them.
    """
    tokens = jnp.maximum(over_tokens(plan, jnp.ones(valid_BT.shape, load_E.dtype), valid_BT), 1.0)
    square_BT = jnp.square(jax.nn.logsumexp(routing.logits_BTE, axis=-1))
    losses = {"z_loss": over_tokens(plan, square_BT, valid_BT) / tokens}
    weights = {"z_loss": config.z_loss if config.balance_over != "stack" else 0.0}
    if config.kind == "top_k" and config.balance_over == "layer":
        mean_prob_E = over_tokens(plan, routing.probs_BTE, valid_BT) / tokens
        losses["load_balance"], weights["load_balance"] = load_balance(load_E, mean_prob_E), config.load_balance
    if config.importance_loss:
        losses["importance"] = squared_variation(over_tokens(plan, _gates(routing), valid_BT))
        weights["importance"] = config.importance_loss
    if config.load_loss and routing.smooth_load_BTE is not None:
        losses["load"] = squared_variation(over_tokens(plan, routing.smooth_load_BTE, valid_BT))
        weights["load"] = config.load_loss
    # Every tensor rank routes the same tokens: one of them speaks for all, and each carries its part of the gradient.
    losses = {name: plan.agree(value) for name, value in losses.items()}
    return losses, sum((weights[name] * losses[name] for name in losses if weights[name]), jnp.zeros((), load_E.dtype))


def _gates(routing: Routing) -> Array:
    hot_BTAE = jax.nn.one_hot(routing.experts_BTA, routing.probs_BTE.shape[-1], dtype=routing.weights_BTA.dtype)
    return (hot_BTAE * routing.weights_BTA[..., None]).sum(2)
