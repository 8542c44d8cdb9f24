"""How wrong is the model on a batch, and what do its routers add?"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.config.moe import MoEConfig
from moejax.layers.context import Context
from moejax.models.decoder import Decoder, Output
from moejax.models.mtp import ahead
from moejax.moe.balance import model_balance
from moejax.moe.stats import RouterStats
from moejax.ops.cross_entropy import linear_cross_entropy, mixture_cross_entropy
from moejax.parallel.plan import MeshPlan


def token_losses(model: Decoder, output: Output, targets_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Give each target's cross-entropy in nats; of a competitive mixture, -log of the mixed probability."""
    targets_M = targets_BT.reshape(-1)
    if output.log_gate_EBT is None:
        return _cross_entropy(model, output.hidden, targets_M).reshape(targets_BT.shape)
    # One expert's logits at a time: E of them would not fit.
    loss_EM = lax.map(jax.checkpoint(lambda x_BTD: _cross_entropy(model, x_BTD, targets_M)), output.hidden)
    log_gate_EM = output.log_gate_EBT.reshape(loss_EM.shape)
    loss_M = mixture_cross_entropy(log_gate_EM.astype(loss_EM.dtype), loss_EM)
    return loss_M.reshape(targets_BT.shape)


def _cross_entropy(model: Decoder, x_BTD: Array, targets_M: Array) -> Array:
    plan = model.plan
    w, vocab_dim = model.head.matrix(model.embedding)
    return linear_cross_entropy(
        model.head.scaled(x_BTD.reshape(-1, x_BTD.shape[-1])),
        w,
        targets_M,
        plan.index("vocab") * w.shape[vocab_dim],
        vocab_dim=vocab_dim,
        sum_over=lambda x: plan.sum_over(x, "vocab"),
        max_over=lambda x: plan.max_over(x, "vocab"),
    )


def further_losses(
    model: Decoder, output: Output, batch: dict[str, Array], context: Context
) -> tuple[Float[Array, "B T"], list[RouterStats]]:
    """Give the weighted cross-entropies of further tokens, their mean over the depths, and what their routers did.

    Position i's tokens and targets lie in its own document: what lies beyond has no weight.
    """
    depths = range(1, len(model.mtp) + 1)
    tokens = [ahead(batch["targets"], depth - 1) for depth in depths]
    total_BT, routers = jnp.zeros_like(batch["weights"]), []
    for depth, (found, stats) in zip(depths, model.further(output, tokens, context), strict=True):
        same_BT = ahead(batch["segments"], depth) == batch["segments"]
        weights_BT = jnp.where(same_BT, ahead(batch["weights"], depth), 0)
        total_BT = total_BT + token_losses(model, found, ahead(batch["targets"], depth)) * weights_BT
        routers += [] if stats is None else [stats]
    return total_BT / len(model.mtp), routers


def sum_tokens(plan: MeshPlan, x_BT: Float[Array, "B T"]) -> Float[Array, ""]:
    """Sum over all tokens of all devices."""
    return plan.sum_over(x_BT.sum(), "batch", "seq")


def router_loss(stats: list[list[RouterStats]], config: MoEConfig | None) -> Float[Array, ""] | float:
    """Sum what the sparse layers add to the training loss, and what their load adds over all of them."""
    layers = [layer for stack in stats for layer in stack]
    total = sum((jnp.sum(layer.loss) for layer in layers), 0.0)
    balances = [layer.balance for layer in layers if layer.balance is not None]
    if config is None or not balances:
        return total
    return total + config.router.load_balance * model_balance(jax.tree.map(lambda *x: jnp.concatenate(x), *balances))


def in_layer_order(stats: list[list[RouterStats]]) -> RouterStats | None:
    """Join the stacks' stats: leaves [sparse layers, ...], repeats outermost within a stack; None if there are none."""
    stacks = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves, 1).reshape(-1, *leaves[0].shape[1:]), *stack)
        for stack in stats
        if stack
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks) if stacks else None
