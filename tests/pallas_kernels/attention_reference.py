"""Attention with all scores in memory: what the attention kernels' tests compare with, in any dtype."""

import jax
import jax.numpy as jnp

Array = jax.Array


def dense_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKU: Array,
    *,
    offset: int = 0,
    q_segments_BT: Array | None = None,
    k_segments_BS: Array | None = None,
    sinks_N: Array | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> tuple[Array, Array]:
    """Give o in the inputs' dtype and the natural log of each query's softmax denominator, float32 or wider."""
    (_, length, heads, dim), (_, keys, kv_heads, _) = q_BTNH.shape, k_BSKH.shape
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    k_BSNH, v_BSNU = (jnp.repeat(x, heads // kv_heads, 2) for x in (k_BSKH, v_BSKU))
    product = {"precision": "highest", "preferred_element_type": wide}
    s_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, **product) * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        s_BNTS = softcap * jnp.tanh(s_BNTS / softcap)
    ahead = jnp.arange(length)[:, None] + offset - jnp.arange(keys)[None]
    seen = (ahead >= 0) | (not causal)
    if window is not None:
        seen &= ahead < window
    seen = seen[None, None]
    if q_segments_BT is not None and k_segments_BS is not None:
        seen = seen & (q_segments_BT[:, :, None] == k_segments_BS[:, None])[:, None]
    s_BNTS = jnp.where(seen, s_BNTS, -jnp.inf)
    logits = s_BNTS
    if sinks_N is not None:
        sink = jnp.broadcast_to(sinks_N.astype(wide)[None, :, None, None], (*s_BNTS.shape[:3], 1))
        logits = jnp.concatenate([s_BNTS, sink], 3)
    lse_BNT = jax.nn.logsumexp(logits, 3)
    safe = jnp.where(jnp.isneginf(lse_BNT), 0.0, lse_BNT)[..., None]
    p_BNTS = jnp.where(seen, jnp.exp(jnp.where(seen, s_BNTS, 0.0) - safe), 0.0)
    o_BTNU = jnp.einsum("BNTS,BSNU->BTNU", p_BNTS.astype(v_BSNU.dtype), v_BSNU, **product)
    return o_BTNU.astype(q_BTNH.dtype), lse_BNT.swapaxes(1, 2)
