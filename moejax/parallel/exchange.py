"""How do routed rows reach their experts' devices, and come back? Dropless, in a buffer that does not grow with skew.

Rows are sorted by expert, so what one peer is to get is one run of them. In a round each rank sends each peer at most
`quota` rows of its run; a hot expert takes more rounds, not more memory. The number of rounds is the same on all
devices of a stage. The ragged way sends the rows alone (GPU); the padded one, its twin for CPUs, sends whole quotas.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.compat import vary, vary_like
from moejax.ops.permute import combine_rows, gather_rows, move_rows, sort_by_expert
from moejax.parallel.plan import MeshPlan

AXIS = "expert"
Tree = Any
Run = Callable[[Tree, Tree, Array, Array, Array], Array]
"""(weights, constants, rows [X, D], rows per local expert [e], their slot numbers [X]) -> rows [X, D]."""


def quota(plan: MeshPlan, num_rows: int) -> int:
    """Give the rows that a rank sends one peer in a round: exchange_factor times the even share."""
    return min(num_rows, math.ceil(plan.config.exchange_factor * num_rows / plan.size(AXIS)))


def uses_ragged(plan: MeshPlan) -> bool:
    """Say whether rows travel alone; XLA:CPU has no ragged all-to-all."""
    if plan.config.exchange == "auto":
        return plan.mesh.devices.flat[0].platform != "cpu"
    return plan.config.exchange == "ragged"


def exchange_rows(
    plan: MeshPlan,
    run: Run,
    weights: Tree,
    constants: Tree,
    x_RD: Float[Array, "R D"],
    slots_R: Int[Array, "R"],
    group_sizes_E: Int[Array, "E"],
    implementation: str = "auto",
) -> Float[Array, "R D"]:
    """Run each row, sorted by expert, through its expert, wherever that one lies; rows beyond the groups give zeros.

    `weights` get gradients, `constants` none; `run` must not hold arrays of its own. `implementation` is the experts'
    name of who computes, which says who moves rows.
    """
    leaves, tree = jax.tree.flatten((x_RD, slots_R, group_sizes_E, weights, constants))
    leaves = [vary(vary_like(leaf, *leaves), (AXIS,)) for leaf in leaves]
    x_RD, slots_R, group_sizes_E, weights, constants = jax.tree.unflatten(tree, leaves)
    return _exchange(plan, run, implementation, x_RD, weights, (slots_R, group_sizes_E, constants))


class _Traffic(NamedTuple):
    """How many rows go from where to where; W is a rank of `expert`."""

    start_W: Array
    """first row of what this rank has for each peer"""
    send_WW: Array
    """rows from one rank to another, over all rounds"""
    local_We: Array
    """rows from each rank for each of this rank's experts"""
    rounds: Array | int


def _count(plan: MeshPlan, group_sizes_E: Array, per_round: int, num_rows: int) -> _Traffic:
    ranks = plan.size(AXIS)
    sizes_WWe = lax.all_gather(group_sizes_E, AXIS).reshape(ranks, ranks, -1)
    send_WW = sizes_WWe.sum(-1)
    mine = lax.axis_index(AXIS)
    start_W = jnp.cumsum(send_WW[mine]) - send_WW[mine]
    rounds = 1 if per_round == num_rows else plan.max_over(-(-send_WW.max() // per_round), "batch", "seq")
    return _Traffic(start_W, send_WW, sizes_WWe[:, mine], rounds)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _exchange(plan: MeshPlan, run: Run, way: str, x_RD: Array, weights: Tree, rest: Tree) -> Array:
    return _exchange_fwd(plan, run, way, x_RD, weights, rest)[0]


def _exchange_fwd(plan: MeshPlan, run: Run, way: str, x_RD: Array, weights: Tree, rest: Tree) -> tuple[Array, Tree]:
    """Keep what the first round's backward needs; later rounds are recomputed."""
    traffic = _count(plan, rest[1], quota(plan, x_RD.shape[0]), x_RD.shape[0])
    one = partial(_round, plan, run, way, rest, traffic)
    y_RD, first_vjp = jax.vjp(partial(one, 0), x_RD, weights)
    y_RD = _later_rounds(traffic.rounds, lambda i, y_RD: y_RD + one(i, x_RD, weights), y_RD)
    return y_RD, (first_vjp, x_RD, weights, rest, traffic)


def _exchange_bwd(plan: MeshPlan, run: Run, way: str, saved: Tree, dy_RD: Array) -> Tree:
    first_vjp, x_RD, weights, rest, traffic = saved

    def again(i: Array, grads: Tree) -> Tree:
        _, vjp = jax.vjp(partial(_round, plan, run, way, rest, traffic, i), x_RD, weights)
        return jax.tree.map(jnp.add, grads, vjp(dy_RD))

    return *_later_rounds(traffic.rounds, again, first_vjp(dy_RD)), None


_exchange.defvjp(_exchange_fwd, _exchange_bwd)


def _later_rounds(rounds: Array | int, body: Callable[[Array, Tree], Tree], carry: Tree) -> Tree:
    return carry if isinstance(rounds, int) else lax.fori_loop(1, rounds, body, carry)


def _round(
    plan: MeshPlan, run: Run, way: str, rest: Tree, traffic: _Traffic, number: Array | int, x_RD: Array, weights: Tree
) -> Float[Array, "R D"]:
    """Send one quota, run it, bring it back; rows of other rounds give zeros."""
    slots_R, group_sizes_E, constants = rest
    num_rows, local_experts = x_RD.shape[0], group_sizes_E.shape[0] // plan.size(AXIS)
    per_round = quota(plan, num_rows)
    first = jnp.asarray(number) * per_round
    move = (_Ragged if uses_ragged(plan) else _Padded)(plan, traffic, first, per_round, num_rows)
    x_XD = move.out(x_RD)
    slots_X = move.out(slots_R[:, None].astype(jnp.int32))[:, 0].astype(slots_R.dtype) if constants else slots_R[:0]
    # Its place in the sender's run says whose row it is: runs are sorted by expert.
    ends_We = jnp.cumsum(traffic.local_We, axis=1)
    expert_X = (move.position_X[:, None] >= ends_We[move.source_X]).sum(-1).clip(max=local_experts - 1)
    order = sort_by_expert(expert_X[:, None], local_experts, move.valid_X[:, None])
    rows_XD = gather_rows(x_XD, order, 1, implementation=way)
    y_XD = run(weights, constants, rows_XD, order.group_sizes_E, slots_X[order.rows_R] if constants else slots_X)
    y_XD = combine_rows(y_XD, jnp.ones((y_XD.shape[0], 1), y_XD.dtype), order, implementation=way)
    return move.home(y_XD)


class _Padded:
    """Equal parts for all peers: place p * quota + j holds the j-th row of this round for, and then from, peer p."""

    def __init__(self, plan: MeshPlan, traffic: _Traffic, first: Array, per_round: int, num_rows: int) -> None:
        ranks, mine = plan.size(AXIS), lax.axis_index(AXIS)
        offset_WX = jnp.broadcast_to(first + jnp.arange(per_round), (ranks, per_round))
        peer_WX = jnp.broadcast_to(jnp.arange(ranks)[:, None], offset_WX.shape)
        self.source_X, self.position_X = peer_WX.reshape(-1), offset_WX.reshape(-1)
        self.valid_X = (offset_WX < traffic.send_WW[:, mine][:, None]).reshape(-1)
        sent_W = traffic.send_WW[mine]
        self._take_X = (traffic.start_W[:, None] + offset_WX).reshape(-1)
        self._taken_X = (offset_WX < sent_W[:, None]).reshape(-1)
        row_R = jnp.arange(num_rows)
        peer_R = (row_R[:, None] >= jnp.cumsum(sent_W)).sum(-1).clip(max=ranks - 1)
        place_R = row_R - traffic.start_W[peer_R] - first
        self._back_R = peer_R * per_round + place_R
        self._kept_R = (place_R >= 0) & (place_R < per_round) & (row_R < sent_W.sum())

    def out(self, x_RD: Array) -> Array:
        x_XD = move_rows(x_RD, self._take_X, self._taken_X, self._back_R, self._kept_R)
        return lax.all_to_all(x_XD, AXIS, 0, 0, tiled=True)

    def home(self, y_XD: Array) -> Array:
        y_XD = lax.all_to_all(y_XD, AXIS, 0, 0, tiled=True)
        return move_rows(y_XD, self._back_R, self._kept_R, self._take_X, self._taken_X)


class _Ragged:
    """The rows alone: what comes stands close together, in the order of the ranks that sent it."""

    def __init__(self, plan: MeshPlan, traffic: _Traffic, first: Array, per_round: int, num_rows: int) -> None:
        ranks, self._mine = plan.size(AXIS), lax.axis_index(AXIS)
        self._num_rows, self._num_places = num_rows, ranks * per_round
        self._moved_WW = (traffic.send_WW - first).clip(0, per_round)
        come_W = self._moved_WW[:, self._mine]
        place_X = jnp.arange(self._num_places)
        self.source_X = (place_X[:, None] >= jnp.cumsum(come_W)).sum(-1).clip(max=ranks - 1)
        self.position_X = first + place_X - (jnp.cumsum(come_W) - come_W)[self.source_X]
        self.valid_X = place_X < come_W.sum()
        # Where rank p's rows begin, at p for q and at q from p.
        self._at_sender_WW = jnp.cumsum(traffic.send_WW, axis=1) - traffic.send_WW + first
        self._at_receiver_WW = jnp.cumsum(self._moved_WW, axis=0) - self._moved_WW

    def _send(self, x: Array, size: int, starts: Array, sizes: Array, lands: Array, comes: Array) -> Array:
        room = vary_like(jnp.zeros((size, x.shape[1]), x.dtype), x)
        arguments = (a.astype(jnp.int32) for a in (starts, sizes, lands, comes))
        return lax.ragged_all_to_all(x, room, *arguments, axis_name=AXIS)

    def out(self, x_RD: Array) -> Array:
        mine, moved = self._mine, self._moved_WW
        starts, lands = self._at_sender_WW[mine], self._at_receiver_WW[mine]
        return self._send(x_RD, self._num_places, starts, moved[mine], lands, moved[:, mine])

    def home(self, y_XD: Array) -> Array:
        mine, moved = self._mine, self._moved_WW
        starts, lands = self._at_receiver_WW[:, mine], self._at_sender_WW[:, mine]
        return self._send(y_XD, self._num_rows, starts, moved[:, mine], lands, moved[mine])
