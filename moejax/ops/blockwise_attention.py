"""How does XLA attend without all scores in memory? A block of queries at a time, parts of the keys merged."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from moejax.compat import vary_like
from moejax.ops.mask import PLAIN, Mask, Scoring

BLOCK = 64
"""Short sequences: so many queries at a time, each block against the keys up to its end; each is compiled."""
LONG, LONG_BLOCK = 1024, 512
"""From so many tokens on: loops over square blocks of so many queries and keys, in the memory of one block."""

Partial = tuple[Float[Array, "B T N U"], Float[Array, "B T N"]]


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


def _scores(q_BKQH: Array, k_BSKH: Array, visible_BTS: Array, scoring: Scoring) -> Array:
    """Give the masked scores [B, K, G*T, S]; the mask is added: one pass less than a select."""
    batch, kv_heads, rows, dim = q_BKQH.shape
    wide = jnp.promote_types(q_BKQH.dtype, jnp.float32)
    scale = jnp.asarray(scoring.factor(dim), q_BKQH.dtype)
    s_BKQS = jnp.einsum("BKQH,BSKH->BKQS", q_BKQH * scale, k_BSKH, preferred_element_type=wide)
    bias_BTS = jnp.where(visible_BTS, 0.0, 0.5 * jnp.finfo(wide).min).astype(wide)
    _, length, keys = visible_BTS.shape
    s_BKGTS = scoring.bend(s_BKQS).reshape(batch, kv_heads, -1, length, keys) + bias_BTS[:, None, None]
    return s_BKGTS.reshape(batch, kv_heads, rows, keys)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKU: Float[Array, "B S K U"],
    visible_BTS: Bool[Array, "b T S"],
    scoring: Scoring = PLAIN,
) -> Partial:
    """Attend to a part of the keys: the output over these alone and its log-sum-exp, in float32 or wider.

    A query that sees nothing gives zeros and -inf; `merge` joins two parts.
    """
    length, kv_heads = q_BTNH.shape[1], k_BSKH.shape[2]
    s_BKQS = _scores(_by_kv_head(q_BTNH, kv_heads), k_BSKH, visible_BTS, scoring)
    max_BKQ1 = s_BKQS.max(-1, keepdims=True)
    e_BKQS = jnp.exp(s_BKQS - max_BKQ1)
    norm_BKQ1 = e_BKQS.sum(-1, keepdims=True)
    o_BKQU = jnp.einsum("BKQS,BSKU->BKQU", e_BKQS.astype(v_BSKU.dtype), v_BSKU, preferred_element_type=norm_BKQ1.dtype)
    sees_BKQ1 = max_BKQ1 > 0.25 * jnp.finfo(s_BKQS.dtype).min
    o_BKQU = jnp.where(sees_BKQ1, o_BKQU / norm_BKQ1, 0.0)
    lse_BKQ1 = jnp.where(sees_BKQ1, max_BKQ1 + jnp.log(norm_BKQ1), -jnp.inf)
    return _by_query(o_BKQU, length), _by_query(lse_BKQ1, length)[..., 0]


def merge(one: Partial, other: Partial) -> Partial:
    """Join the outputs and log-sum-exps over two disjoint parts of the keys (arXiv 2112.05682)."""
    (o1_BTNU, lse1_BTN), (o2_BTNU, lse2_BTN) = one, other
    max_BTN = jnp.maximum(lse1_BTN, lse2_BTN)
    safe_BTN = jnp.where(jnp.isneginf(max_BTN), 0.0, max_BTN)
    w1_BTN, w2_BTN = jnp.exp(lse1_BTN - safe_BTN), jnp.exp(lse2_BTN - safe_BTN)
    norm_BTN = w1_BTN + w2_BTN
    o_BTNU = (o1_BTNU * w1_BTN[..., None] + o2_BTNU * w2_BTN[..., None]) / jnp.where(norm_BTN > 0, norm_BTN, 1)[
        ..., None
    ]
    return o_BTNU, safe_BTN + jnp.log(norm_BTN)


def with_sinks(part: Partial, sinks_N: Float[Array, " N"] | None) -> Partial:
    """Let every query see its head's sink too: it takes its share of the probability and brings nothing."""
    if sinks_N is None:
        return part
    o_BTNU, lse_BTN = part
    both_BTN = jnp.logaddexp(lse_BTN, sinks_N.astype(lse_BTN.dtype))
    return o_BTNU * jnp.exp(lse_BTN - both_BTN)[..., None].astype(o_BTNU.dtype), both_BTN


def sinks_bwd(
    sinks_N: Float[Array, " N"], lse_BTN: Float[Array, "B T N"], delta_BTN: Float[Array, "B T N"]
) -> Float[Array, " N"]:
    """Give a sink's gradient, its probability times -delta: its value is zero. lse and delta are over all keys."""
    return -(jnp.exp(sinks_N.astype(lse_BTN.dtype) - lse_BTN) * delta_BTN).sum((0, 1)).astype(sinks_N.dtype)


def attend_bwd(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKU: Float[Array, "B S K U"],
    visible_BTS: Bool[Array, "b T S"],
    lse_BTN: Float[Array, "B T N"],
    do_BTNU: Float[Array, "B T N U"],
    delta_BTN: Float[Array, "B T N"] | None = None,
    scoring: Scoring = PLAIN,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K U"]]:
    """Give dq, dk and dv of a part of the keys, in float32 or wider.

    lse is over all keys, and so is delta, the sum of do * o over U; without it these keys are all there are.
    """
    dtype, wide, length, kv_heads = q_BTNH.dtype, lse_BTN.dtype, q_BTNH.shape[1], k_BSKH.shape[2]
    q_BKQH, do_BKQU = _by_kv_head(q_BTNH, kv_heads), _by_kv_head(do_BTNU, kv_heads)
    # An infinite log-sum-exp makes the probabilities of a query that sees nothing zero.
    lse_BTN = jnp.where(jnp.isneginf(lse_BTN), jnp.inf, lse_BTN)
    s_BKQS = _scores(q_BKQH, k_BSKH, visible_BTS, scoring)
    p_BKQS = jnp.exp(s_BKQS - _by_kv_head(lse_BTN[..., None], kv_heads))
    dot = functools.partial(jnp.einsum, preferred_element_type=wide)
    dv_BSKU = dot("BKQS,BKQU->BSKU", p_BKQS.astype(dtype), do_BKQU)
    dp_BKQS = dot("BKQU,BSKU->BKQS", do_BKQU, v_BSKU)
    if delta_BTN is None:  # equal to the sum of do * o, but not rounded as a saved output is
        delta_BKQ1 = (p_BKQS * dp_BKQS).sum(-1, keepdims=True)
    else:
        delta_BKQ1 = _by_kv_head(delta_BTN[..., None], kv_heads)
    ds_BKQS = p_BKQS * (dp_BKQS - delta_BKQ1) * scoring.factor(q_BKQH.shape[-1])
    if scoring.softcap is not None:  # a hidden pair's p is zero, whatever its score
        ds_BKQS *= 1.0 - jnp.square(jnp.maximum(s_BKQS, -scoring.softcap) / scoring.softcap)
    ds_BKQS = ds_BKQS.astype(dtype)
    dq_BKQH = dot("BKQS,BSKH->BKQH", ds_BKQS, k_BSKH)
    dk_BSKH = dot("BKQS,BKQH->BSKH", ds_BKQS, q_BKQH)
    return _by_query(dq_BKQH, length), dk_BSKH, dv_BSKU


# --- whole sequences: T = S, key i beside query i


def blockwise(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKU: Float[Array, "B S K U"],
    mask: Mask,
    scoring: Scoring = PLAIN,
) -> Partial:
    """Attend a block of queries at a time, each against the keys that causality leaves (arXiv 2205.14135)."""
    length = q_BTNH.shape[1]
    assert k_BSKH.shape[1] == length, "query i stands beside key i"
    if wants_delta(length):
        return _long(q_BTNH, k_BSKH, v_BSKU, mask, scoring)
    parts = []
    for first, count, keys in _short_blocks(length, mask.causal):
        q = q_BTNH[:, first : first + count]
        seen = mask.cut(first, count, 0, keys).dense(count, keys)
        parts.append(attend(q, k_BSKH[:, :keys], v_BSKU[:, :keys], seen, scoring))
    o_BTNU, lse_BTN = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    return o_BTNU, lse_BTN


def blockwise_bwd(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKU: Float[Array, "B S K U"],
    mask: Mask,
    lse_BTN: Float[Array, "B T N"],
    do_BTNU: Float[Array, "B T N U"],
    delta_BTN: Float[Array, "B T N"] | None = None,
    scoring: Scoring = PLAIN,
) -> tuple[Array, Array, Array]:
    """Go through the blocks again; a key's gradient is the sum over the blocks that see it."""
    length = q_BTNH.shape[1]
    if wants_delta(length):
        return _long_bwd(q_BTNH, k_BSKH, v_BSKU, mask, lse_BTN, do_BTNU, delta_BTN, scoring)
    dq, dk, dv = [], [], []
    for first, count, keys in _short_blocks(length, mask.causal):
        rows = slice(first, first + count)
        delta = None if delta_BTN is None else delta_BTN[:, rows]
        seen = mask.cut(first, count, 0, keys).dense(count, keys)
        block = (q_BTNH[:, rows], k_BSKH[:, :keys], v_BSKU[:, :keys], seen, lse_BTN[:, rows], do_BTNU[:, rows])
        dq_block, dk_block, dv_block = attend_bwd(*block, delta, scoring)
        rest = ((0, 0), (0, length - keys), (0, 0), (0, 0))
        dq.append(dq_block)
        dk.append(jnp.pad(dk_block, rest))
        dv.append(jnp.pad(dv_block, rest))
    return jnp.concatenate(dq, axis=1), functools.reduce(jnp.add, dk), functools.reduce(jnp.add, dv)


def wants_delta(length: int) -> bool:
    """Say whether the backward must be told delta: short blocks see all of a query's keys and sum it themselves."""
    return length >= LONG


def _short_blocks(length: int, causal: bool) -> list[tuple[int, int, int]]:
    """Give each block's first query, its queries, and the keys that they may see."""
    cuts = [(first, min(BLOCK, length - first)) for first in range(0, length, BLOCK)]
    return [(first, count, first + count if causal else length) for first, count in cuts]


class _Loops:
    """Long sequences in square blocks: arrays padded to whole blocks, and who meets whom."""

    def __init__(self, length: int, mask: Mask) -> None:
        self.length, self.number = length, -(-length // LONG_BLOCK)
        self.mask, self.extra = mask, self.number * LONG_BLOCK - length
        if self.extra and mask.q_segments_BT is not None and mask.k_segments_BS is not None:
            pad = ((0, 0), (0, self.extra))
            queries = jnp.pad(mask.q_segments_BT, pad, constant_values=-1)
            keys = jnp.pad(mask.k_segments_BS, pad, constant_values=-2)
            self.mask = Mask(queries, keys, mask.q_starts, mask.k_starts, mask.window, mask.causal)

    def padded(self, x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, self.extra)) + ((0, 0),) * (x.ndim - 2))

    def block(self, x: Array, i: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, i * LONG_BLOCK, LONG_BLOCK, axis=1)

    def seen(self, i: Array, j: Array) -> Array:
        dense = self.mask.cut(i * LONG_BLOCK, LONG_BLOCK, j * LONG_BLOCK, LONG_BLOCK).dense(LONG_BLOCK, LONG_BLOCK)
        return dense & (j * LONG_BLOCK + jnp.arange(LONG_BLOCK) < self.length)

    def over_keys(self, i: Array, body: Callable, carry: tuple) -> tuple:
        """Run the body over the key blocks that query block i may see."""
        window = self.mask.window
        first = 0 if window is None else jnp.maximum(i * LONG_BLOCK - window + 1, 0) // LONG_BLOCK
        return lax.fori_loop(first, i + 1 if self.mask.causal else self.number, body, carry)


def _long(q: Array, k: Array, v: Array, mask: Mask, scoring: Scoring) -> Partial:
    loops = _Loops(q.shape[1], mask)
    q, k, v = map(loops.padded, (q, k, v))
    batch, _, heads, _ = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def queries(i: Array) -> Partial:
        q_i = loops.block(q, i)

        def keys(j: Array, done: Partial) -> Partial:
            return merge(done, attend(q_i, loops.block(k, j), loops.block(v, j), loops.seen(i, j), scoring))

        nothing = (jnp.zeros((batch, LONG_BLOCK, heads, v.shape[-1]), wide),)
        nothing += (jnp.full((batch, LONG_BLOCK, heads), -jnp.inf, wide),)
        return loops.over_keys(i, keys, tuple(vary_like(x, q, k, v) for x in nothing))

    o, lse = (x.swapaxes(0, 1) for x in lax.map(queries, jnp.arange(loops.number)))
    return tuple(x.reshape(batch, -1, *x.shape[3:])[:, : loops.length] for x in (o, lse))


def _long_bwd(
    q: Array, k: Array, v: Array, mask: Mask, lse: Array, do: Array, delta: Array | None, scoring: Scoring
) -> tuple[Array, Array, Array]:
    loops, wide = _Loops(q.shape[1], mask), lse.dtype
    length = loops.length
    assert delta is not None, "a sum over all keys: no block knows it alone"
    # A padded query's log-sum-exp is infinite: it sees nothing and gives no gradient.
    lse = jnp.pad(lse, ((0, 0), (0, loops.extra), (0, 0)), constant_values=-jnp.inf)
    q, k, v, do, delta = map(loops.padded, (q, k, v, do, delta))

    def add(total: Array, part: Array, j: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(total, loops.block(total, j) + part, j * LONG_BLOCK, axis=1)

    def queries(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        q_i, do_i, lse_i, delta_i = (loops.block(x, i) for x in (q, do, lse, delta))

        def keys(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            block = (q_i, loops.block(k, j), loops.block(v, j), loops.seen(i, j), lse_i, do_i)
            dq_j, dk_j, dv_j = attend_bwd(*block, delta_i, scoring)
            return dq + dq_j, add(dk, dk_j, j), add(dv, dv_j, j)

        dq, dk, dv = loops.over_keys(i, keys, (jnp.zeros_like(q_i, wide), *carry))
        return (dk, dv), dq

    start = (jnp.zeros_like(k, wide), jnp.zeros_like(v, wide))
    (dk, dv), dq = lax.scan(queries, start, jnp.arange(loops.number))
    dq = dq.swapaxes(0, 1).reshape(q.shape)
    return dq[:, :length], dk[:, :length], dv[:, :length]
