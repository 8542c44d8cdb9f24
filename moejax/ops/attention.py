"""What does a query see? Softmax attention over grouped heads, causal inside a segment."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.compat import vary_like

Drop = Callable[[Array], Array]
"""Dropout of the probabilities p_BKGTS."""

MIN_BLOCK, MAX_BLOCKS = 64, 16
"""The blockwise path scores at least so many queries at a time, in at most so many blocks (each is compiled)."""


def visible(
    q_index_BT: Int[Array, "B T"],
    k_index_BS: Int[Array, "B S"],
    q_segments_BT: Int[Array, "B T"],
    k_segments_BS: Int[Array, "B S"],
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """Say which keys a query sees: those of its own segment that do not come after it, the last `window` of them."""
    distance_BTS = q_index_BT[:, :, None] - k_index_BS[:, None, :]
    seen_BTS = (distance_BTS >= 0) & (q_segments_BT[:, :, None] == k_segments_BS[:, None, :])
    return seen_BTS if window is None else seen_BTS & (distance_BTS < window)


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
    block: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attend a block of queries at a time, against the keys up to the block's end; scores are recomputed backward.

    For T = S alone (key i is at index i): skips the half of the scores that causality hides, and keeps the rest in
    cache; O(T) memory is saved for the backward (arXiv 2205.14135).
    """
    length = q_BTNH.shape[1]
    if k_BSKH.shape[1] != length:
        raise ValueError(f"blockwise attention needs as many keys ({k_BSKH.shape[1]}) as queries ({length})")
    block = block or max(MIN_BLOCK, -(-length // (MAX_BLOCKS * MIN_BLOCK)) * MIN_BLOCK)
    arrays = (q_BTNH, k_BSKH, v_BSKH, visible_BTS)
    return _attend_blocks(block, *(vary_like(x, *arrays) for x in arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_blocks(block: int, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visible_BTS: Array) -> Array:
    return _attend_blocks_fwd(block, q_BTNH, k_BSKH, v_BSKH, visible_BTS)[0]


def _attend_blocks_fwd(
    block: int, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visible_BTS: Array
) -> tuple[Array, tuple]:
    parts = []
    for start in range(0, q_BTNH.shape[1], block):
        rows, keys = slice(start, start + block), slice(0, start + block)
        parts.append(attend(q_BTNH[:, rows], k_BSKH[:, keys], v_BSKH[:, keys], visible_BTS[:, rows, keys]))
    o_BTNH, lse_BTN = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    return o_BTNH.astype(q_BTNH.dtype), (q_BTNH, k_BSKH, v_BSKH, visible_BTS, lse_BTN)


def _attend_blocks_bwd(block: int, saved: tuple, do_BTNH: Array) -> tuple:
    """Go through the blocks again; a key's gradient is the sum over the blocks that see it."""
    q_BTNH, k_BSKH, v_BSKH, visible_BTS, lse_BTN = saved
    dq, dk, dv = [], [], []
    length = q_BTNH.shape[1]
    for start in range(0, length, block):
        rows, keys = slice(start, start + block), slice(0, start + block)
        dq_block, dk_block, dv_block = attend_bwd(
            q_BTNH[:, rows],
            k_BSKH[:, keys],
            v_BSKH[:, keys],
            visible_BTS[:, rows, keys],
            lse_BTN[:, rows],
            do_BTNH[:, rows],
        )
        rest = ((0, 0), (0, length - dk_block.shape[1]), (0, 0), (0, 0))
        dq.append(dq_block)
        dk.append(jnp.pad(dk_block, rest))
        dv.append(jnp.pad(dv_block, rest))
    dk_BSKH, dv_BSKH = (functools.reduce(jnp.add, parts).astype(k_BSKH.dtype) for parts in (dk, dv))
    return jnp.concatenate(dq, axis=1).astype(q_BTNH.dtype), dk_BSKH, dv_BSKH, None


_attend_blocks.defvjp(_attend_blocks_fwd, _attend_blocks_bwd)


def _by_kv_head(x_BTNH: Array, kv_heads: int) -> Array:
    """Turn [B, T, N, H] into [B, K, G*T, H]: the queries that share a key/value head are one matrix's rows."""
    batch, length, heads, dim = x_BTNH.shape
    x_BTKGH = x_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    return x_BTKGH.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)


def _by_query(x_BKQH: Array, length: int) -> Array:
    """Undo `_by_kv_head`."""
    batch, kv_heads, _, dim = x_BKQH.shape
    x_BKGTH = x_BKQH.reshape(batch, kv_heads, -1, length, dim)
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, dim)


def _scores(q_BKQH: Array, k_BSKH: Array, visible_BTS: Array) -> Array:
    """Give the masked scores [B, K, G*T, S]; the mask is added: one pass less than a select."""
    batch, kv_heads, rows, dim = q_BKQH.shape
    wide = jnp.promote_types(q_BKQH.dtype, jnp.float32)
    scale = jnp.asarray(1.0 / math.sqrt(dim), q_BKQH.dtype)
    s_BKQS = jnp.einsum("BKQH,BSKH->BKQS", q_BKQH * scale, k_BSKH, preferred_element_type=wide)
    bias_BTS = jnp.where(visible_BTS, 0.0, 0.5 * jnp.finfo(wide).min).astype(wide)
    _, length, keys = visible_BTS.shape
    s_BKGTS = s_BKQS.reshape(batch, kv_heads, -1, length, keys) + bias_BTS[:, None, None]
    return s_BKGTS.reshape(batch, kv_heads, rows, keys)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    visible_BTS: Bool[Array, "B T S"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend to a part of the keys: the output over these alone and its log-sum-exp, in float32 or wider.

    A query that sees nothing gives zeros and -inf; `merge` joins two parts.
    """
    length, kv_heads = q_BTNH.shape[1], k_BSKH.shape[2]
    s_BKQS = _scores(_by_kv_head(q_BTNH, kv_heads), k_BSKH, visible_BTS)
    max_BKQ1 = s_BKQS.max(-1, keepdims=True)
    e_BKQS = jnp.exp(s_BKQS - max_BKQ1)
    norm_BKQ1 = e_BKQS.sum(-1, keepdims=True)
    o_BKQH = jnp.einsum("BKQS,BSKH->BKQH", e_BKQS.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=norm_BKQ1.dtype)
    sees_BKQ1 = max_BKQ1 > 0.25 * jnp.finfo(s_BKQS.dtype).min
    o_BKQH = jnp.where(sees_BKQ1, o_BKQH / norm_BKQ1, 0.0)
    lse_BKQ1 = jnp.where(sees_BKQ1, max_BKQ1 + jnp.log(norm_BKQ1), -jnp.inf)
    return _by_query(o_BKQH, length), _by_query(lse_BKQ1, length)[..., 0]


Partial = tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]


def merge(one: Partial, other: Partial) -> Partial:
    """Join the outputs and log-sum-exps over two disjoint parts of the keys (arXiv 2112.05682)."""
    (o1_BTNH, lse1_BTN), (o2_BTNH, lse2_BTN) = one, other
    max_BTN = jnp.maximum(lse1_BTN, lse2_BTN)
    safe_BTN = jnp.where(jnp.isneginf(max_BTN), 0.0, max_BTN)
    w1_BTN, w2_BTN = jnp.exp(lse1_BTN - safe_BTN), jnp.exp(lse2_BTN - safe_BTN)
    norm_BTN = w1_BTN + w2_BTN
    o_BTNH = (o1_BTNH * w1_BTN[..., None] + o2_BTNH * w2_BTN[..., None]) / jnp.where(norm_BTN > 0, norm_BTN, 1)[
        ..., None
    ]
    return o_BTNH, safe_BTN + jnp.log(norm_BTN)


def attend_bwd(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    visible_BTS: Bool[Array, "B T S"],
    lse_BTN: Float[Array, "B T N"],
    do_BTNH: Float[Array, "B T N H"],
    delta_BTN: Float[Array, "B T N"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Give dq, dk and dv of a part of the keys, in float32 or wider.

    lse is over all keys, and so is delta, the sum of do * o over H; without it these keys are all there are.
    """
    dtype, wide, length, kv_heads = q_BTNH.dtype, lse_BTN.dtype, q_BTNH.shape[1], k_BSKH.shape[2]
    q_BKQH, do_BKQH = _by_kv_head(q_BTNH, kv_heads), _by_kv_head(do_BTNH, kv_heads)
    # An infinite log-sum-exp makes the probabilities of a query that sees nothing zero.
    lse_BTN = jnp.where(jnp.isneginf(lse_BTN), jnp.inf, lse_BTN)
    p_BKQS = jnp.exp(_scores(q_BKQH, k_BSKH, visible_BTS) - _by_kv_head(lse_BTN[..., None], kv_heads))
    dot = functools.partial(jnp.einsum, preferred_element_type=wide)
    dv_BSKH = dot("BKQS,BKQH->BSKH", p_BKQS.astype(dtype), do_BKQH)
    dp_BKQS = dot("BKQH,BSKH->BKQS", do_BKQH, v_BSKH)
    if delta_BTN is None:  # equal to the sum of do * o, but not rounded as a saved output is
        delta_BKQ1 = (p_BKQS * dp_BKQS).sum(-1, keepdims=True)
    else:
        delta_BKQ1 = _by_kv_head(delta_BTN[..., None], kv_heads)
    ds_BKQS = (p_BKQS * (dp_BKQS - delta_BKQ1) / math.sqrt(q_BKQH.shape[-1])).astype(dtype)
    dq_BKQH = dot("BKQS,BSKH->BKQH", ds_BKQS, k_BSKH)
    dk_BSKH = dot("BKQS,BKQH->BSKH", ds_BKQS, q_BKQH)
    return _by_query(dq_BKQH, length), dk_BSKH, dv_BSKH


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    visible_BTS: Bool[Array, "B T S"],
    drop: Drop | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """Attend by the named implementation; "auto" takes blocks for whole sequences without attention dropout."""
    if implementation == "auto":
        implementation = "blockwise" if drop is None and 1 < q_BTNH.shape[1] == k_BSKH.shape[1] else "naive"
    if implementation == "blockwise":
        if drop is not None:
            raise ValueError('attention dropout needs attention.implementation = "naive" or "auto"')
        return blockwise_attention(q_BTNH, k_BSKH, v_BSKH, visible_BTS)
    return naive_attention(q_BTNH, k_BSKH, v_BSKH, visible_BTS, drop)
