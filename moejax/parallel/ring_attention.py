"""How do queries meet keys that lie on other devices? Keys go round a ring, or heads are exchanged for positions.

Ring attention (arXiv 2310.01889) with a zig-zag order (arXiv 2311.09431): rank r holds the parts r and 2n-1-r of 2n, so
that under causality every rank scores half a square in every step. The backward goes round as well: plain autodiff
would keep every rotated key.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.compat import vary, vary_like
from moejax.ops.attention import attention, partial_attention, partial_attention_bwd
from moejax.ops.blockwise_attention import merge, sinks_bwd, with_sinks
from moejax.ops.mask import PLAIN, Mask, Scoring
from moejax.parallel.plan import MeshPlan

AXIS = "sequence"


def context_attention(
    plan: MeshPlan,
    q_BtNH: Float[Array, "B t N H"],
    k_BtKH: Float[Array, "B t K H"],
    v_BtKU: Float[Array, "B t K U"],
    segments_Bt: Int[Array, "B t"],
    window: int | None = None,
    implementation: str = "auto",
    scoring: Scoring = PLAIN,
    sinks_N: Float[Array, " N"] | None = None,
) -> Float[Array, "B t N U"]:
    """Attend causally within segments, each device holding `plan.sequence_index` of every sequence."""
    arrays = (q_BtNH, k_BtKH, v_BtKU, segments_Bt, sinks_N)
    if plan.config.context == "ring":
        return ring_attention(plan, *arrays, window, implementation, scoring)
    return all_to_all_attention(plan, *arrays, window, implementation, scoring)


def all_to_all_attention(
    plan: MeshPlan,
    q_BtNH: Array,
    k_BtKH: Array,
    v_BtKU: Array,
    segments_Bt: Array,
    sinks_N: Array | None,
    window: int | None,
    way: str,
    scoring: Scoring,
) -> Float[Array, "B t N U"]:
    """Give each device whole sequences of a part of the heads, attend, and change back (arXiv 2309.14509)."""

    def whole(x_BtNH: Array) -> Array:
        return lax.all_to_all(vary(x_BtNH, (AXIS,)), AXIS, 2, 1, tiled=True)

    q_BTnH, k_BTkH, v_BTkU = map(whole, (q_BtNH, k_BtKH, v_BtKU))
    segments_BT = lax.all_gather(vary(segments_Bt, (AXIS,)), AXIS, axis=1, tiled=True)
    mask, local = Mask.of_segments(segments_BT, window), q_BTnH.shape[2]
    if sinks_N is not None:
        sinks_N = lax.dynamic_slice_in_dim(vary(sinks_N, (AXIS,)), lax.axis_index(AXIS) * local, local)
    made = {"scoring": scoring, "sinks_N": sinks_N, "implementation": way}
    return lax.all_to_all(attention(q_BTnH, k_BTkH, v_BTkU, mask, **made), AXIS, 1, 2, tiled=True)


def ring_attention(
    plan: MeshPlan,
    q_BtNH: Array,
    k_BtKH: Array,
    v_BtKU: Array,
    segments_Bt: Array,
    sinks_N: Array | None = None,
    window: int | None = None,
    implementation: str = "auto",
    scoring: Scoring = PLAIN,
) -> Float[Array, "B t N U"]:
    """Attend to every rank's keys as they come by, merging the partial results."""
    leaves, tree = jax.tree.flatten((q_BtNH, k_BtKH, v_BtKU, segments_Bt, sinks_N))
    leaves = [vary(vary_like(x, *leaves), (AXIS,)) for x in leaves]
    return _ring(plan, window, implementation, scoring, *jax.tree.unflatten(tree, leaves))


def _shift(plan: MeshPlan, *arrays: Array) -> list[Array]:
    """Send arrays to the next rank of the ring."""
    ranks = plan.size(AXIS)
    return [lax.ppermute(x, AXIS, [(r, (r + 1) % ranks) for r in range(ranks)]) for x in arrays]


def _meet(
    plan: MeshPlan,
    window: int | None,
    segments_Bt: Array,
    k_segments_Bs: Array,
    source: Array,
    part: Callable[..., Any],
) -> Any:
    """Run `part(queries, keys, mask)` on the slices that causality leaves, when rank `source`'s keys are here.

    Keys from a lower rank: only their front half can be seen, by all queries; from a higher one: only by the back half
    of the queries; from this rank: the square's own lower triangle.
    """
    rank, local = plan.index("seq"), segments_Bt.shape[1]
    half = local // 2
    q_starts, k_starts = _starts(plan, local), _starts(plan, local, source)

    def run(queries: slice, keys: slice) -> Any:
        starts = q_starts[queries.start // half :], k_starts[: keys.stop // half]
        return part(queries, keys, Mask(segments_Bt[:, queries], k_segments_Bs[:, keys], *starts, window))

    every, front, back = slice(0, local), slice(0, half), slice(half, local)
    return lax.cond(source < rank, lambda: run(every, front), lambda: run(back, every))


def _starts(plan: MeshPlan, local: int, rank: Array | None = None) -> tuple[Array, Array]:
    """Give the first index of each of the two runs that a rank (this one, if none) holds of a sequence."""
    index_t = plan.sequence_index(local, rank)
    return index_t[0], index_t[local // 2]


def _own(plan: MeshPlan, window: int | None, segments_Bt: Array) -> Mask:
    starts = _starts(plan, segments_Bt.shape[1])
    return Mask(segments_Bt, segments_Bt, starts, starts, window)


def _add(x_BtNH: Array, part: Array, where: slice) -> Array:
    # x.at[:, where].add(part) is a scatter, and one in this loop crashes XLA:CPU's compiler (jaxlib 0.11.2).
    return lax.dynamic_update_slice_in_dim(x_BtNH, x_BtNH[:, where] + part, where.start, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _ring(plan: MeshPlan, window: int | None, way: str, scoring: Scoring, *arrays: Any) -> Array:
    return _ring_fwd(plan, window, way, scoring, *arrays)[0]


def _ring_fwd(
    plan: MeshPlan,
    window: int | None,
    way: str,
    scoring: Scoring,
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    sinks: Array | None,
) -> tuple[Array, tuple[Any, ...]]:
    attend = partial(partial_attention, scoring=scoring, implementation=way)
    ranks, rank = plan.size(AXIS), plan.index("seq")

    def step(carry: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], None]:
        k_i, v_i, segments_i = _shift(plan, *carry[:3])
        done = carry[3:]

        def part(queries: slice, keys: slice, mask: Mask) -> tuple[Array, Array]:
            found = attend(q[:, queries], k_i[:, keys], v_i[:, keys], mask)
            new = merge((done[0][:, queries], done[1][:, queries]), found)
            return tuple(
                lax.dynamic_update_slice_in_dim(x, y, queries.start, 1) for x, y in zip(done, new, strict=True)
            )  # type: ignore[return-value]

        source = (rank - i) % ranks
        return (k_i, v_i, segments_i, *_meet(plan, window, segments, segments_i, source, part)), None

    start = (k, v, segments, *attend(q, k, v, _own(plan, window, segments)))
    (_, _, _, o, lse), _ = lax.scan(step, start, jnp.arange(1, ranks))
    o, lse = with_sinks((o, lse), sinks)
    return o.astype(q.dtype), (q, k, v, segments, sinks, o, lse)


def _ring_bwd(
    plan: MeshPlan, window: int | None, way: str, scoring: Scoring, saved: tuple[Any, ...], do: Array
) -> tuple[Any, ...]:
    """Let keys and their gradients go round together; after the last step the gradients have one step to go home."""
    q, k, v, segments, sinks, o, lse = saved
    attend_bwd = partial(partial_attention_bwd, scoring=scoring, implementation=way)
    ranks, rank = plan.size(AXIS), plan.index("seq")
    delta = (do.astype(o.dtype) * o).sum(-1)

    def step(carry: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], None]:
        k_i, v_i, segments_i, dk, dv = _shift(plan, *carry[:5])
        dq = carry[5]

        def part(queries: slice, keys: slice, mask: Mask) -> tuple[Array, Array, Array]:
            new = attend_bwd(
                q[:, queries], k_i[:, keys], v_i[:, keys], mask, lse[:, queries], do[:, queries], delta[:, queries]
            )
            return _add(dk, new[1], keys), _add(dv, new[2], keys), _add(dq, new[0], queries)

        source = (rank - i) % ranks
        return (k_i, v_i, segments_i, *_meet(plan, window, segments, segments_i, source, part)), None

    dq, dk, dv = attend_bwd(q, k, v, _own(plan, window, segments), lse, do, delta)
    (_, _, _, dk, dv, dq), _ = lax.scan(step, (k, v, segments, dk, dv, dq), jnp.arange(1, ranks))
    dk, dv = _shift(plan, dk, dv)
    dsinks = None if sinks is None else sinks_bwd(sinks, lse, delta)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, dsinks


_ring.defvjp(_ring_fwd, _ring_bwd)
