"""How does linear attention see positions that lie on other devices? By the states that earlier runs left behind.

Each device holds runs of a sequence, one or (for a ring's zig-zag) two. It takes each by itself; then all exchange what
their runs added to the state and by how much they let it fade, each adds up what came before its own, and every token
reads from that sum what the run before it did not know (as LASP-2 does, arXiv 2502.07563).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.compat import vary, vary_like
from moejax.ops.linear_attention import linear_attention
from moejax.parallel.plan import MeshPlan

AXIS = "sequence"


def context_linear_attention(
    plan: MeshPlan,
    q_BtNH: Float[Array, "B t N H"],
    k_BtNH: Float[Array, "B t N H"],
    v_BtNU: Float[Array, "B t N U"],
    decay_N: Float[Array, " N"],
    segments_Bt: Int[Array, "B t"],
    implementation: str = "auto",
) -> Float[Array, "B t N U"]:
    """Attend to the whole fading past, each device holding `plan.sequence_index` of every sequence."""
    runs, ranks = 2 if plan.config.context == "ring" else 1, plan.size(AXIS)
    arrays = (q_BtNH, k_BtNH, v_BtNU, segments_Bt)
    q, k, v, segments = (vary(vary_like(x, *arrays), (AXIS,)) for x in arrays)
    parts = list(zip(*(jnp.split(x, runs, axis=1) for x in (q, k, v, segments)), strict=True))
    done = [linear_attention(q, k, v, decay_N, None, s, implementation=implementation) for q, k, v, s in parts]
    # What each run of the whole sequence is to the others: what it added, where it starts and how it ends.
    states_XBNHU = _gather(jnp.stack([state for _, state in done]))
    first_XB = _gather(jnp.stack([s[:, 0] for *_, s in parts]))
    last_XB = _gather(jnp.stack([s[:, -1] for *_, s in parts]))
    place_X = jnp.concatenate([plan.sequence_index(runs, jnp.int32(rank)) for rank in range(ranks)])
    order = jnp.argsort(place_X)
    before = _prefixes(states_XBNHU[order], first_XB[order], last_XB[order], decay_N, parts[0][0].shape[1])
    outputs = []
    for run, (q, _, _, s) in enumerate(parts):
        state_BNHU = jnp.take(before, plan.sequence_index(runs)[run], axis=0)
        outputs.append(done[run][0] + _read(q, s, decay_N, state_BNHU).astype(q.dtype))
    return jnp.concatenate(outputs, axis=1)


def _gather(x: Array) -> Array:
    """Join [runs, ...] of all devices, rank by rank."""
    return lax.all_gather(vary(x, (AXIS,)), AXIS, axis=0, tiled=True)


def _prefixes(states_XBNHU: Array, first_XB: Array, last_XB: Array, decay_N: Array, length: int) -> Array:
    """Give the state before each run, in order: what is left where the document goes on, else nothing."""
    left_N = jnp.exp(lax.stop_gradient(decay_N) * length)[:, None, None].astype(states_XBNHU.dtype)
    state = jnp.zeros_like(states_XBNHU[0])
    before = []
    for run in range(states_XBNHU.shape[0]):
        if run:
            goes_on_B = first_XB[run] == last_XB[run - 1]
            state = jnp.where(goes_on_B[:, None, None, None], state, 0)
        before.append(state)
        one_document_B = first_XB[run] == last_XB[run]
        state = states_XBNHU[run] + jnp.where(one_document_B[:, None, None, None], left_N * state, 0)
    return jnp.stack(before)


def _read(q_BtNH: Array, segments_Bt: Array, decay_N: Array, state_BNHU: Array) -> Array:
    """Give what a run's tokens read from the state before it; those of later documents read nothing."""
    wide = state_BNHU.dtype
    token_t = jnp.arange(1, q_BtNH.shape[1] + 1, dtype=wide)
    left_tN = jnp.exp(lax.stop_gradient(decay_N).astype(wide) * token_t[:, None])
    same_Bt = jnp.cumsum(segments_Bt != segments_Bt[:, :1], axis=1) == 0
    read_BtNU = jnp.einsum("BtNH,BNHU->BtNU", q_BtNH, state_BNHU.astype(q_BtNH.dtype), preferred_element_type=wide)
    return read_BtNU * left_tN[..., None] * same_Bt[..., None, None]
