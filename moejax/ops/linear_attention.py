"""What does a query read from a running sum of keys and values that fades? Lightning attention (arXiv 2501.08313).

    S_t = exp(decay) S_{t-1} + k_t^T v_t,    o_t = q_t S_t

The decay comes before the sum: a token's own key and value enter whole, as in the paper's blocked form (lam^(i-j), with
i = j at 1) and in transformers. No softmax, no 1/sqrt(H). The state, float32 or wider, is all that the past leaves.

Documents that were packed into one row carry ascending segment ids; where the id changes, the state starts from zero.
The state that comes in belongs to the first token's document, the one that goes out to the last token's.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.ops.backend import call, choose, to_common_axes
from pallas_kernels.target import Target

CHUNK = 128
"""Tokens that the chunked way takes at once: its scores (C per token and head) weigh as much as its states (H*U/C)."""


def linear_attention_reference(
    q_BTNH: Float[Array, "B T N H"],
    k_BTNH: Float[Array, "B T N H"],
    v_BTNU: Float[Array, "B T N U"],
    decay_N: Float[Array, " N"],
    state_BNHU: Float[Array, "B N H U"] | None = None,
    segments_BT: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N H U"]]:
    """Run the recurrence token by token: the oracle."""
    state_BNHU, fresh_BT = _start(q_BTNH, v_BTNU, state_BNHU, segments_BT)
    decay_N = lax.stop_gradient(decay_N)

    def step(state_BNHU: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q_BNH, k_BNH, v_BNU, fresh_B = token
        state_BNHU = jnp.where(fresh_B[:, None, None, None], 0, state_BNHU)
        o_BNU, state_BNHU = linear_attention_step(q_BNH, k_BNH, v_BNU, decay_N, state_BNHU)
        return state_BNHU, o_BNU

    tokens = (q_BTNH, k_BTNH, v_BTNU, fresh_BT)
    state_BNHU, o_TBNU = lax.scan(step, state_BNHU, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(o_TBNU, 0, 1), state_BNHU


def linear_attention_step(
    q_BNH: Float[Array, "B N H"],
    k_BNH: Float[Array, "B N H"],
    v_BNU: Float[Array, "B N U"],
    decay_N: Float[Array, " N"],
    state_BNHU: Float[Array, "B N H U"],
) -> tuple[Float[Array, "B N U"], Float[Array, "B N H U"]]:
    """Take one token: what decoding does."""
    wide = state_BNHU.dtype
    kv_BNHU = k_BNH.astype(wide)[..., :, None] * v_BNU.astype(wide)[..., None, :]
    state_BNHU = jnp.exp(decay_N.astype(wide))[:, None, None] * state_BNHU + kv_BNHU
    o_BNU = (q_BNH.astype(wide)[..., None] * state_BNHU).sum(-2)
    return o_BNU.astype(q_BNH.dtype), state_BNHU


def linear_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTNH: Float[Array, "B T N H"],
    v_BTNU: Float[Array, "B T N U"],
    decay_N: Float[Array, " N"],
    state_BNHU: Float[Array, "B N H U"] | None = None,
    segments_BT: Int[Array, "B T"] | None = None,
    *,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N H U"]]:
    """Attend to a fading past; give the outputs and the state after the last token.

    `decay` is the log of what a head keeps of its state per token, finite and <= 0. It belongs to the architecture: no
    gradient flows to it; to all else, the states included. Products take operands in the inputs' dtype; sums and the
    state are float32 or wider. Raises ValueError for an implementation that is not "auto", "mosaic" or "xla".
    """
    state_BNHU, fresh_BT = _start(q_BTNH, v_BTNU, state_BNHU, segments_BT)
    document_BT = None if segments_BT is None else jnp.cumsum(fresh_BT, axis=1, dtype=jnp.int32)
    arrays = [q_BTNH, k_BTNH, v_BTNU, lax.stop_gradient(decay_N).astype(state_BNHU.dtype), state_BNHU]
    if document_BT is not None:
        arrays.append(document_BT)
    q, k, v, decay, state, *document = to_common_axes(*arrays)
    return _linear_attention(implementation, q, k, v, decay, state, document[0] if document else None)


def _start(q_BTNH: Array, v_BTNU: Array, state_BNHU: Array | None, segments_BT: Array | None) -> tuple[Array, Array]:
    """Give the state to start from, and whether a token is the first of a document other than the row's first."""
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    batch, length, heads, dim = q_BTNH.shape
    fresh_BT = jnp.zeros((batch, length), bool)
    if segments_BT is not None:
        fresh_BT = fresh_BT.at[:, 1:].set(segments_BT[:, 1:] != segments_BT[:, :-1])
    if state_BNHU is None:
        state_BNHU = jnp.zeros((batch, heads, dim, v_BTNU.shape[-1]), wide)
    state_BNHU, fresh_BT, *_ = to_common_axes(state_BNHU.astype(wide), fresh_BT, q_BTNH, v_BTNU)
    return state_BNHU, fresh_BT


def _order(chip: Target) -> tuple[str, ...]:
    return ("mosaic", "xla") if chip.is_hopper else ("xla",)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_attention(implementation: str, q: Array, k: Array, v: Array, decay: Array, state: Array, document: Any):
    ways = {"mosaic": _mosaic, "xla": _chunked}
    return choose("linear_attention", implementation, ways, _order, q, k, v, decay, state, document)


def _linear_attention_fwd(implementation: str, *args: Any) -> tuple:
    return _linear_attention(implementation, *args), args


def _linear_attention_bwd(implementation: str, args: tuple, cotangents: tuple[Array, Array]) -> tuple:
    ways = {"mosaic": _mosaic_bwd, "xla": _chunked_bwd}
    do, dstate = cotangents
    dq, dk, dv, dstate = choose("linear_attention backward", implementation, ways, _order, *args, do, dstate)
    return dq, dk, dv, jnp.zeros_like(args[3]), dstate, None


_linear_attention.defvjp(_linear_attention_fwd, _linear_attention_bwd)


def _mosaic(q: Array, k: Array, v: Array, decay: Array, state: Array, document: Array | None) -> tuple[Array, Array]:
    from pallas_kernels.lightning_attention import lightning_attention  # Mosaic is slow to import

    return call(lightning_attention, q, k, v, decay, state, document)


def _mosaic_bwd(*args: Any) -> tuple[Array, Array, Array, Array]:
    from pallas_kernels.lightning_attention import lightning_attention_bwd

    return call(lightning_attention_bwd, *args)


def _chunked_bwd(
    q: Array, k: Array, v: Array, decay: Array, state: Array, document: Array | None, do: Array, dstate: Array
) -> tuple[Array, Array, Array, Array]:
    _, pullback = jax.vjp(lambda q, k, v, state: _chunked(q, k, v, decay, state, document), q, k, v, state)
    return pullback((do, dstate))


def _chunked(
    q_BTNH: Array, k_BTNH: Array, v_BTNU: Array, decay_N: Array, state_BNHU: Array, document_BT: Array | None
) -> tuple[Array, Array]:
    """Take chunks of C tokens: what each adds to the state at once, the states by a scan, the outputs at once.

    Every exponent is a distance between tokens, >= 0, so that nothing overflows however long the row.
    """
    dtype, wide = q_BTNH.dtype, state_BNHU.dtype
    batch, length, heads, _ = q_BTNH.shape
    size = min(CHUNK, length)
    num_chunks = -(-length // size)

    def chunks(x: Array, **kwargs: Any) -> Array:
        missing = ((0, 0), (0, num_chunks * size - length), *((0, 0),) * (x.ndim - 2))
        return jnp.pad(x, missing, **kwargs).reshape(batch, num_chunks, size, *x.shape[2:])

    def fade(tokens: Array, same: Array | None) -> Array:
        """Give what is left after some tokens, of every head (last dim); nothing where the documents differ."""
        left = jnp.exp(decay_N * tokens[..., None])
        return left if same is None else left * same[..., None]

    # What is added behind the row's end adds nothing (k = 0) and lets nothing fade.
    end_XC = jnp.minimum(jnp.arange(1, num_chunks * size + 1), length).reshape(num_chunks, size)
    begin_X = jnp.arange(num_chunks) * size
    same_past = same_own = same_end = same_all = None
    if document_BT is not None:
        d_BXC = chunks(document_BT, mode="edge")
        last_BX = d_BXC[:, :, -1]
        before_BX = jnp.concatenate([d_BXC[:, 0, :1], last_BX[:, :-1]], axis=1)
        same_past, same_end = d_BXC == before_BX[..., None], d_BXC == last_BX[..., None]
        same_own, same_all = d_BXC[..., :, None] == d_BXC[..., None, :], before_BX == last_BX
    past_BXCN = fade(end_XC - begin_X[:, None], same_past)
    until_end_BXCN = fade(end_XC[:, -1:] - end_XC, same_end)
    distance_CC = jnp.arange(size)[:, None] - jnp.arange(size)
    own_BXCCN = jnp.where(distance_CC[..., None] >= 0, fade(jnp.maximum(distance_CC, 0), same_own), 0)
    all_BXN = jnp.broadcast_to(fade(end_XC[:, -1] - begin_X, same_all), (batch, num_chunks, heads))

    q, k, v = chunks(q_BTNH), chunks(k_BTNH), chunks(v_BTNU)
    faded_v = (v * until_end_BXCN[..., None]).astype(dtype)
    added = jnp.einsum("bxcnh,bxcnu->xbnhu", k, faded_v, preferred_element_type=wide)

    def step(state_BNHU: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        added_BNHU, kept_BN = chunk
        return kept_BN[..., None, None] * state_BNHU + added_BNHU, state_BNHU

    state_BNHU, states_XBNHU = lax.scan(step, state_BNHU, (added, jnp.moveaxis(all_BXN, 1, 0)))
    scores = jnp.einsum("bxinh,bxjnh->bxijn", q, k, preferred_element_type=wide)
    o = jnp.einsum("bxijn,bxjnu->bxinu", (scores * own_BXCCN).astype(dtype), v, preferred_element_type=wide)
    past = jnp.einsum("bxcnh,xbnhu->bxcnu", q, states_XBNHU.astype(dtype), preferred_element_type=wide)
    o = (o + past * past_BXCN[..., None]).astype(dtype)
    return o.reshape(batch, num_chunks * size, heads, -1)[:, :length], state_BNHU
