"""What keeps the experts' load even? Losses over all tokens of a microbatch, whatever the mesh."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.config.model import RouterConfig
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
    weights = {"z_loss": config.z_loss}
    if config.kind == "top_k":
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
