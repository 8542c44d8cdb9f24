"""How do rows reach their experts and come back? Three ways that give the same sum; the dense one is the oracle."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.compat import vary_like
from moejax.layers.context import Context
from moejax.moe.experts import Apart, Experts
from moejax.moe.router import Routing
from moejax.ops.permute import combine_rows, gather_rows, sort_by_expert
from moejax.parallel.plan import MeshPlan
from pallas_kernels.target import target


class Dispatched(NamedTuple):
    """The combined outputs, and which of the chosen slots an expert really processed."""

    y_BTD: Float[Array, "B T D"]
    kept_BTA: Bool[Array, "B T A"]


def _slot_numbers(routing: Routing, context: Context) -> Array:
    experts = routing.probs_BTE.shape[-1]
    return context.tokens_BT()[..., None] * jnp.uint32(experts) + routing.experts_BTA.astype(jnp.uint32)


def dispatch_dense(experts: Experts, x_BTD: Float[Array, "B T D"], routing: Routing, context: Context) -> Dispatched:
    """Run every expert on every token and weigh with zeros: E/A times the work, no permutation."""
    outputs_EBTD = expert_outputs(experts, x_BTD, context, routing.probs_BTE.shape[-1])
    hot_BTAE = jax.nn.one_hot(routing.experts_BTA, outputs_EBTD.shape[0], dtype=routing.weights_BTA.dtype)
    weights_BTA = jnp.where(routing.chosen_BTA, routing.weights_BTA, 0.0)
    weights_BTE = jnp.einsum("BTA,BTAE->BTE", weights_BTA, hot_BTAE)
    y_BTD = jnp.einsum("BTE,EBTD->BTD", weights_BTE, outputs_EBTD.astype(weights_BTE.dtype))
    return Dispatched(y_BTD.astype(x_BTD.dtype), routing.chosen_BTA)


def expert_outputs(
    experts: Experts, x_BTD: Float[Array, "B T D"], context: Context, num_experts: int
) -> Float[Array, "E B T D"]:
    """Give every expert's output for every token, uncombined."""
    batch, length, dim = x_BTD.shape
    plan = experts.plan
    # Over `expert`: every rank gets the group's tokens, runs its own experts on them, and sends each its outputs.
    token_M = plan.gather_local(context.tokens_BT().reshape(-1), "experts", 0)
    x_MD = plan.gather_local(x_BTD.reshape(-1, dim), "experts", 0)
    local = num_experts // plan.degree("experts")
    expert_e = plan.index("experts") * local + jnp.arange(local)
    slots_eM = token_M[None] * jnp.uint32(num_experts) + expert_e.astype(jnp.uint32)[:, None]
    outputs_EMD = plan.to_experts(experts.all_rows(x_MD, slots_eM, context), split=1, join=0)
    return outputs_EMD.reshape(num_experts, batch, length, dim)


def dispatch_sorted(experts: Experts, x_BTD: Float[Array, "B T D"], routing: Routing, context: Context) -> Dispatched:
    """Sort the slots by expert and run grouped matmuls: no slot is padded, none dropped."""
    batch, length, dim = x_BTD.shape
    active = routing.experts_BTA.shape[-1]
    order = sort_by_expert(
        routing.experts_BTA.reshape(-1, active), routing.probs_BTE.shape[-1], routing.chosen_BTA.reshape(-1, active)
    )
    x_RD = gather_rows(x_BTD.reshape(-1, dim), order, active, implementation=experts.implementation)
    slots_R = _slot_numbers(routing, context).reshape(-1)[order.rows_R]
    y_RD = experts.grouped(x_RD, order.group_sizes_E, slots_R, context)
    weights_MA = jnp.where(routing.chosen_BTA, routing.weights_BTA, 0.0).reshape(-1, active)
    y_MD = combine_rows(y_RD, weights_MA, order, implementation=experts.implementation)
    return Dispatched(y_MD.reshape(batch, length, dim).astype(x_BTD.dtype), routing.chosen_BTA)


FEW_TOKENS = 16
"""Up to so many tokens, running a chosen expert on all of them costs less than sorting and slicing does."""


def few_pays(num_tokens: int) -> bool:
    """Say whether `dispatch_few` is the faster way: few tokens, on a CPU (a GPU would wait for each condition)."""
    return num_tokens <= FEW_TOKENS and target().platform == "cpu"


def dispatch_few(experts: Apart, x_BTD: Float[Array, "B T D"], routing: Routing) -> Float[Array, "B T D"]:
    """Run every expert that a token chose on all tokens, and skip the others: for the few tokens of a decode step.

    Reads each chosen expert's weights once and copies none, given that they are arrays of their own (`Experts.apart`,
    before the loop): slicing them out of a stack costs more than the products. For inference alone.
    """
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    chosen_MA = (routing.experts_BTA * routing.chosen_BTA - ~routing.chosen_BTA).reshape(x_MD.shape[0], -1)
    weights_MA = routing.weights_BTA.reshape(chosen_MA.shape)
    like = (x_MD, weights_MA, jax.eval_shape(experts[0], x_MD))
    y_MD = vary_like(jnp.zeros(x_MD.shape, weights_MA.dtype), *like)
    for expert, feed_forward in enumerate(experts):
        mine_MA = chosen_MA == expert

        def run(y_MD: Array, feed_forward=feed_forward, mine_MA=mine_MA) -> Array:
            weight_M1 = jnp.where(mine_MA, weights_MA, 0).sum(1, keepdims=True)
            return y_MD + weight_M1 * feed_forward(x_MD).astype(y_MD.dtype)

        y_MD = lax.cond(mine_MA.any(), run, lambda y_MD: y_MD, y_MD)
    return y_MD.reshape(x_BTD.shape).astype(x_BTD.dtype)


def slot_positions(
    plan: MeshPlan, experts_BTA: Int[Array, "B T A"], chosen_BTA: Bool[Array, "B T A"], num_experts: int
) -> Int[Array, "B T A"]:
    """Number each expert's slots of a sequence 0, 1, 2 ...: first choices before second ones, then token order."""
    position_BTA, count_BAE = _count_before(experts_BTA, chosen_BTA, num_experts)
    if plan.size("sequence") == 1:
        return position_BTA
    # Each device holds runs of a sequence (two for a ring): what stands in earlier runs comes before.
    runs = 2 if plan.config.context == "ring" else 1
    split = [x.reshape(x.shape[0], runs, -1, x.shape[2]) for x in (experts_BTA, chosen_BTA)]
    counted = [_count_before(e, c, num_experts) for e, c in zip(*(jnp.moveaxis(x, 1, 0) for x in split), strict=True)]
    counts = jnp.stack([count for _, count in counted])
    all_counts = plan.gather_local(counts, "seq", 0)
    ranks = plan.size("sequence")
    order = jnp.concatenate([plan.sequence_index(runs, rank) for rank in range(ranks)])
    mine = plan.sequence_index(runs)
    parts = []
    for run, (position, count_BAE) in enumerate(counted):
        earlier = (order < mine[run])[:, None, None, None]
        same_BAE = jnp.where(earlier, all_counts, 0).sum(0)
        total_BAE = all_counts.sum(0)
        # `position` counts this run's earlier choices; the whole sequence's take their place.
        own_BAE = jnp.cumsum(count_BAE, axis=1) - count_BAE
        base_BAE = jnp.cumsum(total_BAE, axis=1) - total_BAE + same_BAE - own_BAE
        hot_BTAE = jax.nn.one_hot(split[0][:, run], num_experts, dtype=jnp.int32)
        parts.append(position + (hot_BTAE * base_BAE[:, None]).sum(-1))
    return jnp.concatenate(parts, axis=1)


def _count_before(experts_BTA: Array, chosen_BTA: Array, num_experts: int) -> tuple[Array, Array]:
    """Give each slot's number among these tokens' slots of its expert, and how many each choice has of each expert."""
    batch, length, active = experts_BTA.shape
    hot_BATE = jax.nn.one_hot(experts_BTA.swapaxes(1, 2), num_experts, dtype=jnp.int32)
    hot_BATE = hot_BATE * chosen_BTA.swapaxes(1, 2)[..., None]
    hot_BIE = hot_BATE.reshape(batch, active * length, num_experts)
    before_BIE = jnp.cumsum(hot_BIE, axis=1) - hot_BIE
    position_BTA = (before_BIE * hot_BIE).sum(-1).reshape(batch, active, length).swapaxes(1, 2)
    return position_BTA, hot_BATE.sum(2, dtype=jnp.int32)


def dispatch_capacity(
    experts: Experts, x_BTD: Float[Array, "B T D"], routing: Routing, context: Context, slots: int
) -> Dispatched:
    """Give each expert `slots` places per sequence; what overflows is left to the residual (arXiv 2101.03961)."""
    batch, length, dim = x_BTD.shape
    active, num_experts = routing.experts_BTA.shape[-1], routing.probs_BTE.shape[-1]
    plan = experts.plan
    position_BTA = slot_positions(plan, routing.experts_BTA, routing.chosen_BTA, num_experts)
    kept_BTA = routing.chosen_BTA & (position_BTA < slots)
    if plan.size("sequence") > 1:  # this device's part of a sequence fills places of its own
        slots = min(slots, length)
        position_BTA = _count_before(routing.experts_BTA, kept_BTA, num_experts)[0]
    # One place past the end takes what is dropped; its token is T, a row of zeros.
    place_BTA = jnp.where(kept_BTA, routing.experts_BTA * slots + position_BTA, num_experts * slots)
    token_BTA = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :, None], place_BTA.shape)
    sequence_B = jnp.arange(batch)[:, None]

    def fill(values_BTA: Array, empty: int) -> Array:
        places = jnp.full((batch, num_experts * slots + 1), empty, values_BTA.dtype)
        flat = (batch, length * active)
        return places.at[sequence_B, place_BTA.reshape(flat)].set(values_BTA.reshape(flat))[:, :-1]

    def by_expert(x: Array) -> Array:
        return x.reshape(batch, num_experts, slots, *x.shape[2:]).swapaxes(0, 1).reshape(num_experts, -1, *x.shape[2:])

    padded_BTD = jnp.pad(x_BTD, ((0, 0), (0, 1), (0, 0)))
    x_BPD = jnp.take_along_axis(padded_BTD, fill(token_BTA, length)[..., None], axis=1)
    x_eCD = plan.to_experts(by_expert(x_BPD), split=0, join=1)
    slots_EC = by_expert(fill(_slot_numbers(routing, context), 0))
    slots_eC = plan.to_experts(slots_EC, split=0, join=1) if experts.dropping(context) else slots_EC
    y_ECD = plan.to_experts(experts.batched(x_eCD, slots_eC, context), split=1, join=0)
    y_BPD = y_ECD.reshape(num_experts, batch, slots, dim).swapaxes(0, 1).reshape(batch, -1, dim)
    rows_BTAD = jnp.pad(y_BPD, ((0, 0), (0, 1), (0, 0)))[sequence_B[..., None], place_BTA]
    weights_BTA = jnp.where(kept_BTA, routing.weights_BTA, 0.0)
    y_BTD = jnp.einsum("BTA,BTAD->BTD", weights_BTA, rows_BTAD.astype(weights_BTA.dtype))
    return Dispatched(y_BTD.astype(x_BTD.dtype), kept_BTA)
