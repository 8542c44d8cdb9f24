"""What does a query see? Softmax attention over grouped heads, causal inside a segment."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Drop = Callable[[Array], Array]
"""Dropout of the probabilities p_BKGTS."""

QUERY_BLOCK = 512
"""Queries that the blockwise path scores at a time."""


def visible(
    q_index_BT: Int[Array, "B T"],
    k_index_BS: Int[Array, "B S"],
    q_segments_BT: Int[Array, "B T"],
    k_segments_BS: Int[Array, "B S"],
) -> Bool[Array, "B T S"]:
    """Say which keys a query sees: those of its own segment that do not come after it."""
    causal = k_index_BS[:, None, :] <= q_index_BT[:, :, None]
    return causal & (q_segments_BT[:, :, None] == k_segments_BS[:, None, :])


def naive_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    visible_BTS: Bool[Array, "B T S"],
    drop: Drop | None = None,
) -> Float[Array, "B T N H"]:
    """Attend with all scores in memory: the oracle. A query that sees nothing gives zeros.

    Key/value head k serves query heads k*G .. k*G+G-1; scores and softmax in float32 or wider.
    """
    batch, length, heads, dim = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTKGH = (q_BTNH * (1.0 / math.sqrt(dim))).reshape(batch, length, kv_heads, heads // kv_heads, dim)
    s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=wide)
    seen = visible_BTS[:, None, None]
    s_BKGTS = jnp.where(seen, s_BKGTS, jnp.finfo(wide).min)
    e_BKGTS = jnp.exp(s_BKGTS - jax.lax.stop_gradient(s_BKGTS.max(-1, keepdims=True)))
    e_BKGTS = jnp.where(seen, e_BKGTS, 0.0)
    norm_BKGT = jnp.maximum(e_BKGTS.sum(-1), jnp.finfo(wide).tiny)
    if drop is not None:
        e_BKGTS = drop(e_BKGTS)
    o_BKGTH = jnp.einsum("BKGTS,BSKH->BKGTH", e_BKGTS.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=wide)
    o_BKGTH = o_BKGTH / norm_BKGT[..., None]
    return jnp.moveaxis(o_BKGTH, 3, 1).reshape(batch, length, heads, -1).astype(q_BTNH.dtype)


def blockwise_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    visible_BTS: Bool[Array, "B T S"],
    block: int = QUERY_BLOCK,
) -> Float[Array, "B T N H"]:
    """Attend a block of queries at a time, against the keys up to the block's end, recomputing scores backward.

    For T = S alone (key i is at index i): skips the half of the scores that causality hides.
    """
    length = q_BTNH.shape[1]
    if k_BSKH.shape[1] != length:
        raise ValueError(f"blockwise attention needs as many keys ({k_BSKH.shape[1]}) as queries ({length})")
    attend = jax.checkpoint(naive_attention)
    parts = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        mask = visible_BTS[:, start:stop, :stop]
        parts.append(attend(q_BTNH[:, start:stop], k_BSKH[:, :stop], v_BSKH[:, :stop], mask))
    return jnp.concatenate(parts, axis=1)


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    visible_BTS: Bool[Array, "B T S"],
    drop: Drop | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """Attend by the named implementation; "auto" takes blocks for long training sequences without dropout."""
    length, keys = q_BTNH.shape[1], k_BSKH.shape[1]
    if implementation == "auto":
        implementation = "blockwise" if drop is None and length == keys > QUERY_BLOCK else "naive"
    if implementation == "blockwise":
        if drop is not None:
            raise ValueError('attention dropout needs attention.implementation = "naive" or "auto"')
        return blockwise_attention(q_BTNH, k_BSKH, v_BSKH, visible_BTS)
    return naive_attention(q_BTNH, k_BSKH, v_BSKH, visible_BTS, drop)
