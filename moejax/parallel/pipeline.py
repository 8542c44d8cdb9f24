"""How do stages work side by side? One executor for every schedule table, inside the one manual program.

In a tick a device runs one piece of work forward and one backward, then hands the results on. It keeps a stage's inputs
alone and recomputes the stage backward. A piece that is not due is skipped by `cond`; where a stage holds a ring
(`ppermute` must not stand in a branch that devices take differently) it is run on zeros instead and left out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moejax.compat import vary, vary_like
from moejax.parallel.plan import MeshPlan
from moejax.parallel.schedules import Schedule

AXIS = "pipeline"
Tree = Any


class Work(NamedTuple):
    """What a device does in a tick."""

    microbatch: Array
    chunk: Array
    first: Array
    """whether this chunk begins with the embedding"""
    last: Array
    """whether this chunk ends with the head"""
    due: Array
    """whether there is anything to do"""


class Stage(Protocol):
    """What the executor asks of a model; `x` is the residual stream between stages."""

    def forward(self, params: Tree, x: Array, work: Work) -> Array:
        """Run a chunk's layers, after the embedding if it is the first."""
        ...

    def loss(self, params: Tree, x: Array, work: Work) -> tuple[tuple[Array, Array], Tree]:
        """Run a chunk's layers; give what it hands on, what it adds to the loss, and metrics to be summed."""
        ...

    def part(self, tree: Tree, chunk: Array) -> Tree:
        """Take the weights of one chunk, and those that all chunks share."""
        ...

    def add(self, total: Tree, part: Tree, chunk: Array) -> Tree:
        """Add one chunk's gradients to the whole."""
        ...

    def record(self, total: Tree, metrics: Tree, chunk: Array) -> Tree:
        """Add one chunk's metrics to the whole."""
        ...


def work_of(plan: MeshPlan, piece: Array) -> Work:
    """Decode a table's entry for this device."""
    chunks, stages, rank = plan.config.chunks, plan.size(AXIS), lax.axis_index(AXIS)
    due = piece >= 0
    microbatch, chunk = jnp.maximum(piece, 0) // chunks, jnp.maximum(piece, 0) % chunks
    return Work(microbatch, chunk, (rank == 0) & (chunk == 0), (rank == stages - 1) & (chunk == chunks - 1), due)


def hand_on(plan: MeshPlan, x: Array, step: int) -> Array:
    """Send to the next stage (step 1) or the one before (-1), round from the last to the first."""
    stages = plan.size(AXIS)
    return lax.ppermute(x, AXIS, [(s, (s + step) % stages) for s in range(stages)])


def masks(plan: MeshPlan) -> bool:
    """Say whether pieces that are not due are run and masked, since a stage holds a ring."""
    return (plan.size("sequence") > 1 and plan.config.context == "ring") or plan.config.overlap_tensor


def value_and_grad(
    plan: MeshPlan, schedule: Schedule, stage: Stage, params: Tree, zeros: tuple[Array, Tree, Tree]
) -> tuple[Tree, Tree]:
    """Give the gradients, still local, and the summed metrics of all microbatches.

    `zeros` are an empty message, gradients and metrics.
    """
    empty, grads, totals = zeros
    masked = masks(plan)
    rank = lax.axis_index(AXIS)
    put, take, num_slots = schedule.slots
    stash = vary_like(jnp.zeros((num_slots + 1, *empty.shape), empty.dtype), empty)

    def tick(carry: tuple[Any, ...], rows: tuple[Array, ...]) -> tuple[tuple[Any, ...], None]:
        came, back, stash, grads, totals = carry
        forward, backward, put, take = (row[rank] for row in rows)
        ahead, behind = work_of(plan, forward), work_of(plan, backward)
        stash = lax.dynamic_update_index_in_dim(stash, came, put, 0)

        def run() -> Array:
            return stage.forward(stage.part(params, ahead.chunk), came, ahead)

        # The last chunk's forward is part of its backward, which comes in the same tick or later.
        sent = run() if masked else lax.cond(ahead.due & ~ahead.last, run, lambda: empty)
        x = lax.dynamic_index_in_dim(stash, take, keepdims=False)

        def differentiate() -> tuple[Array, Tree, Tree]:
            return _backward(stage, params, x, back, behind, grads, totals)

        dx, grads, totals = (
            differentiate() if masked else lax.cond(behind.due, differentiate, lambda: (empty, grads, totals))
        )
        return (hand_on(plan, sent, 1), hand_on(plan, dx, -1), stash, grads, totals), None

    tables = tuple(jnp.asarray(table, jnp.int32) for table in (schedule.forward, schedule.backward, put, take))
    (_, _, _, grads, totals), _ = lax.scan(tick, (empty, empty, stash, grads, totals), tables)
    return grads, totals


def _backward(
    stage: Stage, params: Tree, x: Array, back: Array, work: Work, grads: Tree, totals: Tree
) -> tuple[Array, Tree, Tree]:
    """Recompute a piece from its input and differentiate it; a piece that is not due adds zeros."""

    def run(part: Tree, x: Array) -> tuple[tuple[Array, Array], Tree]:
        return stage.loss(part, x, work)

    (_, loss), vjp, metrics = jax.vjp(run, stage.part(params, work.chunk), x, has_aux=True)
    dy = jnp.where(work.due & ~work.last, back, 0)
    dloss = vary_like(jnp.where(work.due, 1.0, 0.0).astype(loss.dtype), loss)
    dparams, dx = vjp((dy, dloss))
    metrics = jax.tree.map(lambda m: jnp.where(work.due, m, 0), metrics)
    return dx, stage.add(grads, dparams, work.chunk), stage.record(totals, metrics, work.chunk)


def forward_once(plan: MeshPlan, run: Callable[[Array, Work], tuple[Array, Tree]], empty: Array, totals: Tree) -> Tree:
    """Take one microbatch through all stages, one at a time, and sum what `run` gives beside the message."""
    chunks, stages, masked = plan.config.chunks, plan.size(AXIS), masks(plan)
    rank = lax.axis_index(AXIS)

    def tick(carry: tuple[Array, Tree], number: Array) -> tuple[tuple[Array, Tree], None]:
        came, totals = carry
        work = work_of(plan, jnp.where(number % stages == rank, number // stages, -1))

        def due() -> tuple[Array, Tree]:
            y, metrics = run(came, work)
            return y, jax.tree.map(lambda total, m: total + jnp.where(work.due, m, 0), totals, metrics)

        sent, totals = due() if masked else lax.cond(work.due, due, lambda: (empty, totals))
        return (hand_on(plan, sent, 1), totals), None

    return lax.scan(tick, (empty, totals), jnp.arange(stages * chunks, dtype=jnp.int32))[0][1]


def empty_message(plan: MeshPlan, rows: int, length: int, dim: int, dtype: str) -> Float[Array, "B t D"]:
    """Make zeros of the shape that stages hand on: `rows` and `length` local, before sequence parallelism."""
    if plan.config.sequence_parallel:
        length //= plan.size("tensor")
    return vary(jnp.zeros((rows, length, dim), dtype), plan.stream_axes())
