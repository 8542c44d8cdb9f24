"""What did the router do? Its flight recorder: counted on the device, read at log steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.layers.context import Context
from moejax.moe.balance import (
    Balance,
    SequenceBalance,
    expert_load,
    layer_balance,
    over_tokens,
    router_losses,
    sequence_balance,
)
from moejax.moe.router import Router, Routing, routed
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
    balance: Balance | SequenceBalance | None = None
    """for the losses over all layers, or over a stack's, which have a gradient"""
    logits_BTE: Float[Array, "B T E"] | None = None
    """the router's logits, where the context asks for them"""


def record(plan: MeshPlan, router: Router, routing: Routing, kept_BTA: Array, context: Context) -> RouterStats:
    """Count what was routed and kept, and compute the balance losses."""
    valid_BT = routed(router.config, context)
    load_E = expert_load(plan, routing, valid_BT)
    losses, total = router_losses(plan, router.config, routing, load_E, valid_BT)
    lost_BT = (routing.chosen_BTA & ~kept_BTA).sum(-1).astype(load_E.dtype)
    entropy_BT = -jnp.sum(jax.scipy.special.xlogy(routing.probs_BTE, routing.probs_BTE), axis=-1)
    tokens = jnp.maximum(over_tokens(plan, jnp.ones(valid_BT.shape, load_E.dtype), valid_BT), 1.0)
    owner_BTA = routing.experts_BTA // (load_E.shape[0] // plan.degree("experts"))
    away_BT = (kept_BTA & (owner_BTA != plan.index("experts"))).sum(-1).astype(load_E.dtype)
    counts = [over_tokens(plan, count_BT, valid_BT) for count_BT in (lost_BT, entropy_BT, away_BT)]
    dropped, entropy, sent = counts[0], counts[1] / tokens, counts[2]
    balance = None
    if router.config.balance_over == "model" and router.config.load_balance > 0:
        balance = layer_balance(plan, router.config.num_active, routing.logits_BTE, valid_BT)
    elif router.config.balance_over == "stack":
        balance = sequence_balance(routing, valid_BT)
    load_E, dropped, entropy, sent = (plan.agree(jax.lax.stop_gradient(x)) for x in (load_E, dropped, entropy, sent))
    logits_BTE = routing.logits_BTE if context.keep_logits else None
    return RouterStats(total, losses, load_E, dropped, entropy, sent, balance, logits_BTE)


def imbalance(load_E: Float[Array, "*L E"]) -> Float[Array, "*L"]:
    """Give max / mean of the load: 1 when even, E when one expert takes all."""
    return load_E.max(-1) / jnp.maximum(load_E.mean(-1), 1e-9)
