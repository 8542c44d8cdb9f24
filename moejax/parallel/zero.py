"""ZeRO 0-3 (arXiv 1910.02054): which of weights, gradients and optimizer state is split over the batch axes?

A weight's *ZeRO dim* is one dim that no other mesh axis splits. Stages 1 and 2 keep weights whole, reduce-scatter
gradients (1: once a step; 2: every microbatch) and update the local slice; stage 3 stores only that slice and gathers a
weight where it is used. All functions but `place` run inside the manual program.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from moejax.axes import BATCH_AXES
from moejax.compat import vary, varying_axes
from moejax.parallel.plan import MeshPlan

Tree = Any


@dataclass(frozen=True)
class Placement:
    """Where one weight lies. Dims count from the end, so that stacking layers in front changes nothing."""

    axes: tuple[str | None, ...]
    dim: int | None
    over: tuple[str, ...]
    stage: int
    is_vector: bool = False
    """a scale or a bias: no matrix, whatever its dims"""

    def weight_spec(self, plan: MeshPlan, ndim: int) -> PartitionSpec:
        """Give the spec of the stored weight."""
        return self._spec(plan, ndim, self.stage == 3)

    def state_spec(self, plan: MeshPlan, ndim: int) -> PartitionSpec:
        """Give the spec of its reduced gradient and of its optimizer state."""
        return self._spec(plan, ndim, self.stage >= 1)

    def stacked_over(self, plan: MeshPlan, ndim: int) -> tuple[str, ...]:
        """Give the mesh axes that split the dim of stacked layers, the innermost before the weight's own dims."""
        return plan.axes_of("layers") if ndim > len(self.axes) else ()

    def _spec(self, plan: MeshPlan, ndim: int, split: bool) -> PartitionSpec:
        front: list[Any] = [None] * (ndim - len(self.axes))
        if stacked := self.stacked_over(plan, ndim):
            front[-1] = stacked
        spec = front + list(plan.spec(*self.axes))
        if split and self.dim is not None:
            spec[self.dim] = self.over
        return PartitionSpec(*spec)


def place(
    plan: MeshPlan,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    replicas: tuple[str, ...] = BATCH_AXES,
    is_vector: bool = False,
) -> Placement:
    """Choose the ZeRO dim of a weight: its largest dim that no mesh axis splits and that divides by its replicas.

    A weight without such a dim (a norm's scale, say) stays whole on every rank.
    """
    stage = plan.config.zero_stage
    taken = plan.axes_of(*axes)
    over = tuple(a for a in replicas if plan.size(a) > 1 and a not in taken)
    degree = math.prod(plan.size(a) for a in over)
    free = [k - len(shape) for k, (name, n) in enumerate(zip(axes, shape, strict=True)) if _free(plan, name, n, degree)]
    if stage == 0 or degree == 1 or not free:
        return Placement(axes, None, (), stage, is_vector)
    return Placement(axes, max(free, key=lambda k: shape[k]), over, stage, is_vector)


def place_outside_stages(plan: MeshPlan, placement: Placement, shape: tuple[int, ...]) -> Placement:
    """Split the optimizer state of what every stage holds (embedding, head) over the stages too: ZeRO 1."""
    if placement.stage != 1 or plan.size("pipeline") == 1:
        return placement
    wider = place(plan, placement.axes, shape, ("pipeline", *BATCH_AXES), placement.is_vector)
    return wider if wider.dim is not None else placement


def _free(plan: MeshPlan, name: str | None, size: int, degree: int) -> bool:
    return not plan.axes_of(name) and size % degree == 0


def whole_weight(w: jax.Array, placement: Placement) -> jax.Array:
    """Gather a stage-3 weight where it is used (transpose: reduce-scatter); any other comes back as it is."""
    if placement.stage != 3 or placement.dim is None:
        return w
    return lax.all_gather(w, placement.over, axis=w.ndim + placement.dim, tiled=True)


def all_but_gathered_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """Remat policy: save everything but what `whole_weight` gathers; copies of it (a cast, a transpose) are saved.

    By primitive, not by name: `save_anything_except_these_names` would still save the array that is named.
    """
    return primitive.name != "all_gather" or not set(params["axis_name"]) <= set(BATCH_AXES)


def localize(plan: MeshPlan, params: Tree) -> Tree:
    """Mark weights as varying: gradients then stay local until `reduce_gradients`."""
    return jax.tree.map(lambda w: vary(w, plan.gradient_axes()), params)


def reduce_gradients(plan: MeshPlan, grads: Tree, placements: Tree) -> Tree:
    """Sum local gradients over tokens and stages: all-reduce, or reduce-scatter where the optimizer state is split."""

    def reduce(g: jax.Array, p: Placement) -> jax.Array:
        done = plan.axes_of(*p.axes) + p.stacked_over(plan, g.ndim)
        if p.dim is not None:
            done += p.over
            if p.stage < 3:
                g = lax.psum_scatter(g, p.over, scatter_dimension=g.ndim + p.dim, tiled=True)
        rest = tuple(a for a in plan.gradient_axes() if a not in done)
        return lax.psum(g, rest) if rest else g

    return jax.tree.map(reduce, grads, placements)


def gradient_buffers(plan: MeshPlan, params: Tree, placements: Tree, dtype: str, reduced: bool) -> Tree:
    """Make the zeros that gradients accumulate on: local ones, or (stage 2) this device's reduced slices."""

    def zeros(w: jax.Array, p: Placement) -> jax.Array:
        shape, axes = list(w.shape), varying_axes(w)
        if reduced:
            axes = frozenset(plan.axes_of(*p.axes) + p.over + p.stacked_over(plan, w.ndim))
            if p.dim is not None:
                shape[p.dim] //= math.prod(plan.size(a) for a in p.over)
        return vary(jnp.zeros(shape, jnp.promote_types(w.dtype, dtype)), sorted(axes))

    return jax.tree.map(zeros, params, placements)


def global_norm(grads: Tree) -> jax.Array:
    """Give the L2 norm of the whole gradient from its local parts: each leaf is summed over the axes it varies on."""
    squares: dict[frozenset[str], jax.Array] = {}
    for g in jax.tree.leaves(grads):
        axes, square = varying_axes(g), jnp.sum(jnp.square(g.astype(jnp.promote_types(g.dtype, jnp.float32))))
        squares[axes] = squares[axes] + square if axes in squares else square
    return jnp.sqrt(sum(lax.psum(s, tuple(sorted(a))) if a else s for a, s in squares.items()))


def update_slices(plan: MeshPlan, update: Callable[[Tree], Tree], params: Tree, placements: Tree) -> Tree:
    """Run `update` on this device's slice of each weight and join the slices again (stages 1 and 2: all-gather)."""

    def take(w: jax.Array, p: Placement) -> jax.Array:
        if p.dim is None or p.stage == 3:
            return w
        axis = w.ndim + p.dim
        size = w.shape[axis] // math.prod(plan.size(a) for a in p.over)
        return lax.dynamic_slice_in_dim(w, lax.axis_index(p.over) * size, size, axis)

    def join(w: jax.Array, p: Placement) -> jax.Array:
        if p.dim is None or p.stage == 3:
            return w
        return lax.all_gather(w, p.over, axis=w.ndim + p.dim, tiled=True, to="invarying")

    return jax.tree.map(join, update(jax.tree.map(take, params, placements)), placements)
