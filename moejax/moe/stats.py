"""What did the router do? Its flight recorder: counted on the device, read at log steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.moe.balance import expert_load, over_tokens, router_losses
from moejax.moe.router import Router, Routing
from moejax.parallel.plan import MeshPlan


class RouterStats(NamedTuple):
    """One layer's routing over all devices; equal on each of them."""

    loss: Float[Array, ""]
    """what this layer adds to the training loss"""
    losses: dict[str, Float[Array, ""]]
    """the unweighted losses by name"""
    load_E: Float[Array, " E"]
    """slots routed to each expert, before any capacity"""
    dropped: Float[Array, ""]
    """slots lost to a capacity"""
    entropy: Float[Array, ""]
    """mean entropy of the router's probabilities, nats"""
    sent: Float[Array, ""]
    """slots whose expert lies on another device of the `expert` axis"""


def record(plan: MeshPlan, router: Router, routing: Routing, kept_BTA: Array, valid_BT: Array) -> RouterStats:
    """Count what was routed and kept, and compute the balance losses."""
    load_E = expert_load(plan, routing, valid_BT)
    losses, total = router_losses(plan, router.config, routing, load_E, valid_BT)
    lost_BT = (routing.chosen_BTA & ~kept_BTA).sum(-1).astype(load_E.dtype)
    entropy_BT = -jnp.sum(jax.scipy.special.xlogy(routing.probs_BTE, routing.probs_BTE), axis=-1)
    tokens = jnp.maximum(over_tokens(plan, jnp.ones(valid_BT.shape, load_E.dtype), valid_BT), 1.0)
    owner_BTA = routing.experts_BTA // (load_E.shape[0] // plan.degree("experts"))
    away_BT = (kept_BTA & (owner_BTA != plan.index("experts"))).sum(-1).astype(load_E.dtype)
    counts = [over_tokens(plan, count_BT, valid_BT) for count_BT in (lost_BT, entropy_BT, away_BT)]
    dropped, entropy, sent = counts[0], counts[1] / tokens, counts[2]
    seen = jax.tree.map(lambda x: plan.agree(jax.lax.stop_gradient(x)), (load_E, dropped, entropy, sent))
    return RouterStats(total, losses, *seen)


def imbalance(load_E: Float[Array, "*L E"]) -> Float[Array, "*L"]:
    """Give max / mean of the load: 1 when even, E when one expert takes all."""
    return load_E.max(-1) / jnp.maximum(load_E.mean(-1), 1e-9)
