"""What does a query bring home? Softmax attention over grouped heads."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.ops.backend import call, choose, to_common_axes
from moejax.ops.blockwise_attention import (
    Partial,
    attend,
    attend_bwd,
    blockwise,
    blockwise_bwd,
    merge,
    sinks_bwd,
    wants_delta,
    with_sinks,
)
from moejax.ops.mask import PLAIN, Mask, Scoring
from pallas_kernels.target import Declined, Target, target

Drop = Callable[[Array], Array]
"""Dropout of the probabilities p_BKGTS."""

FEW = 64
"""Fewer queries than these would leave rows of the flash kernel's tiles empty: a decode step reads its cache once."""


def naive_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKU: Float[Array, "B S K U"],
    visible_BTS: Bool[Array, "b T S"],
    drop: Drop | None = None,
    scoring: Scoring = PLAIN,
    sinks_N: Float[Array, "N"] | None = None,
    bias_NTS: Float[Array, "N T S"] | None = None,
) -> Float[Array, "B T N U"]:
    """Attend with all scores in memory: the oracle. A query that sees nothing gives zeros.

    Key/value head k serves query heads k*G .. k*G+G-1; scores and softmax in float32 or wider. A sink is a score that
    every query of a head sees and that brings nothing home (gpt-oss). A bias is added to the scores.
    """
    batch, length, heads, dim = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTKGH = (q_BTNH * scoring.factor(dim)).reshape(batch, length, kv_heads, heads // kv_heads, dim)
    s_BKGTS = scoring.bend(jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=wide))
    if bias_NTS is not None:
        s_BKGTS = s_BKGTS + bias_NTS.astype(wide).reshape(kv_heads, -1, *bias_NTS.shape[1:])
    seen = visible_BTS[:, None, None]
    s_BKGTS = jnp.where(seen, s_BKGTS, jnp.finfo(wide).min)
    none_N = jnp.full(heads, -jnp.inf, wide)
    sink_KG11 = (none_N if sinks_N is None else sinks_N.astype(wide)).reshape(kv_heads, -1, 1, 1)
    max_BKGT1 = jax.lax.stop_gradient(jnp.maximum(s_BKGTS.max(-1, keepdims=True), sink_KG11))
    e_BKGTS = jnp.where(seen, jnp.exp(s_BKGTS - max_BKGT1), 0.0)
    norm_BKGT = jnp.maximum(e_BKGTS.sum(-1) + jnp.exp(sink_KG11 - max_BKGT1)[..., 0], jnp.finfo(wide).tiny)
    if drop is not None:
        e_BKGTS = drop(e_BKGTS)
    o_BKGTU = jnp.einsum("BKGTS,BSKU->BKGTU", e_BKGTS.astype(v_BSKU.dtype), v_BSKU, preferred_element_type=wide)
    o_BKGTU = o_BKGTU / norm_BKGT[..., None]
    return jnp.moveaxis(o_BKGTU, 3, 1).reshape(batch, length, heads, -1).astype(q_BTNH.dtype)


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKU: Float[Array, "B S K U"],
    mask: Mask,
    *,
    scoring: Scoring = PLAIN,
    sinks_N: Float[Array, " N"] | None = None,
    drop: Drop | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N U"]:
    """Attend by the named implementation.

    "reference": all scores in memory; "xla": whole sequences by blocks, O(T) memory, others as the reference; "mosaic":
    flash attention on Hopper; "cudnn": whole sequences without segments. "auto": mosaic on Hopper, else xla; the
    reference for attention dropout. ValueError for another name, Declined where the named one cannot.
    """
    length, num_keys = q_BTNH.shape[1], k_BSKH.shape[1]

    def reference(q: Array, k: Array, v: Array, mask: Mask, sinks: Array | None) -> Array:
        return naive_attention(q, k, v, mask.dense(length, num_keys), drop, scoring, sinks)

    def order(chip: Target) -> Sequence[str]:
        by_blocks = drop is None and length > 1 and mask.is_of_whole_sequences(length, num_keys)
        kernel = chip.is_hopper and drop is None and length >= FEW
        return [*(["mosaic"] if kernel else []), "xla" if by_blocks else "reference"]

    def vjp(way: str) -> Callable[..., Array]:
        if way == "xla" and not mask.is_of_whole_sequences(length, num_keys):
            return reference  # a few queries against a cache: their scores are few

        def run(q: Array, k: Array, v: Array, mask: Mask, sinks: Array | None) -> Array:
            if drop is not None:
                raise Declined(f'attention dropout needs implementation="reference" or "auto", not "{way}"')
            leaves, tree = jax.tree.flatten((q, k, v, mask, sinks))
            leaves = to_common_axes(*map(jnp.asarray, leaves))
            return _attend(way, scoring, *jax.tree.unflatten(tree, leaves))

        return run

    ways = {"mosaic": vjp("mosaic"), "cudnn": functools.partial(_cudnn, scoring), "xla": vjp("xla")}
    ways["reference"] = reference
    return choose("attention", implementation, ways, order, q_BTNH, k_BSKH, v_BSKU, mask, sinks_N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(way: str, scoring: Scoring, q: Array, k: Array, v: Array, mask: Mask, sinks_N: Array | None) -> Array:
    return _attend_fwd(way, scoring, q, k, v, mask, sinks_N)[0]


def _attend_fwd(
    way: str, scoring: Scoring, q: Array, k: Array, v: Array, mask: Mask, sinks_N: Array | None
) -> tuple[Array, tuple]:
    if way == "xla":
        o, lse = with_sinks(blockwise(q, k, v, mask, scoring), sinks_N)
    else:
        o, lse = _flash(q, k, v, mask, scoring, sinks_N)
    # Not rounded where it may be: delta = sum of do * o, a difference of large numbers, is made of it.
    kept = o if way == "mosaic" or sinks_N is not None or wants_delta(q.shape[1]) else None
    return o.astype(q.dtype), (q, k, v, mask, sinks_N, kept, lse)


def _attend_bwd(way: str, scoring: Scoring, saved: tuple, do: Array) -> tuple:
    q, k, v, mask, sinks_N, o, lse = saved
    delta: Any = None if o is None else (do.astype(lse.dtype) * o.astype(lse.dtype)).sum(-1)
    backward = blockwise_bwd if way == "xla" else _flash_bwd
    dq, dk, dv = backward(q, k, v, mask, lse, do, delta, scoring)
    dsinks = None if sinks_N is None else sinks_bwd(sinks_N, lse, delta)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, dsinks


_attend.defvjp(_attend_fwd, _attend_bwd)


# --- a part of the keys: what a ring brings by


def partial_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKU: Float[Array, "B S K U"],
    mask: Mask,
    *,
    scoring: Scoring = PLAIN,
    implementation: str = "auto",
) -> Partial:
    """Attend to some of the keys: the output over these alone and its log-sum-exp, in float32 or wider.

    Its gradient is `partial_attention_bwd`, which wants the log-sum-exp over all keys: it is the ring's to combine.
    """

    def flash(q: Array, k: Array, v: Array, mask: Mask) -> Partial:
        o, lse = _flash(q, k, v, mask, scoring, None)
        return o.astype(lse.dtype), lse

    def xla(q: Array, k: Array, v: Array, mask: Mask) -> Partial:
        return attend(q, k, v, mask.dense(q.shape[1], k.shape[1]), scoring)

    ways = {"mosaic": flash, "xla": xla, "reference": xla}
    return choose("partial attention", implementation, ways, _of_parts, q_BTNH, k_BSKH, v_BSKU, mask)


def partial_attention_bwd(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKU: Float[Array, "B S K U"],
    mask: Mask,
    lse_BTN: Float[Array, "B T N"],
    do_BTNU: Float[Array, "B T N U"],
    delta_BTN: Float[Array, "B T N"],
    *,
    scoring: Scoring = PLAIN,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K U"]]:
    """Give dq, dk and dv of some of the keys, in float32 or wider; lse and delta = sum of do * o are over all keys."""
    wide = lse_BTN.dtype

    def flash(q: Array, k: Array, v: Array, mask: Mask, lse: Array, do: Array, delta: Array) -> tuple[Array, ...]:
        return tuple(x.astype(wide) for x in _flash_bwd(q, k, v, mask, lse, do, delta, scoring))

    def xla(q: Array, k: Array, v: Array, mask: Mask, lse: Array, do: Array, delta: Array) -> tuple[Array, ...]:
        return attend_bwd(q, k, v, mask.dense(q.shape[1], k.shape[1]), lse, do, delta, scoring)

    ways = {"mosaic": flash, "xla": xla, "reference": xla}
    arrays = (q_BTNH, k_BSKH, v_BSKU, mask, lse_BTN, do_BTNU, delta_BTN)
    return choose("partial attention", implementation, ways, _of_parts, *arrays)


def _of_parts(chip: Target) -> Sequence[str]:
    return ["mosaic", "xla"] if chip.is_hopper else ["xla"]


# --- the kernels


def _runs(x: Array | None, number: int) -> list[Any]:
    return [None] * number if x is None else jnp.split(x, number, axis=1)


def _flash_options(mask: Mask, scoring: Scoring) -> dict[str, Any]:
    return {"causal": mask.causal, "window": mask.window, "softcap": scoring.softcap, "scale": scoring.scale}


def _flash(q: Array, k: Array, v: Array, mask: Mask, scoring: Scoring, sinks_N: Array | None) -> Partial:
    """Run the kernel on each run of queries against each run of keys, and merge."""
    from pallas_kernels.flash_attention import flash_attention  # Mosaic takes long to import: where it is used alone

    num_q, num_k = len(mask.q_starts), len(mask.k_starts)
    inner = sinks_N if num_k == 1 else None
    parts = []
    for q_i, q_start, q_segments in zip(_runs(q, num_q), mask.q_starts, _runs(mask.q_segments_BT, num_q), strict=True):
        of_keys = zip(_runs(k, num_k), _runs(v, num_k), mask.k_starts, _runs(mask.k_segments_BS, num_k), strict=True)
        found = [
            call(
                flash_attention,
                q_i,
                k_j,
                v_j,
                offset=jnp.asarray(q_start - k_start, jnp.int32),
                q_segments_BT=q_segments,
                k_segments_BS=k_segments,
                sinks_N=inner,
                **_flash_options(mask, scoring),
            )
            for k_j, v_j, k_start, k_segments in of_keys
        ]
        part = functools.reduce(merge, ((o.astype(jnp.float32), lse) for o, lse in found)) if num_k > 1 else found[0]
        parts.append(part if num_k == 1 else with_sinks(part, sinks_N))
    o, lse = (jnp.concatenate(x, axis=1) if num_q > 1 else x[0] for x in zip(*parts, strict=True))
    return o, lse


def _flash_bwd(
    q: Array, k: Array, v: Array, mask: Mask, lse: Array, do: Array, delta: Array, scoring: Scoring
) -> tuple[Array, Array, Array]:
    from pallas_kernels.flash_attention_bwd import flash_attention_bwd

    num_q, num_k = len(mask.q_starts), len(mask.k_starts)
    of_queries = [_runs(x, num_q) for x in (q, mask.q_segments_BT, lse, do, delta)]
    of_keys = [_runs(x, num_k) for x in (k, v, mask.k_segments_BS)]
    dq: list[list[Array]] = [[] for _ in range(num_q)]
    dk, dv = ([[] for _ in range(num_k)] for _ in range(2))
    for i, (q_i, q_segments, lse_i, do_i, delta_i) in enumerate(zip(*of_queries, strict=True)):
        for j, (k_j, v_j, k_segments) in enumerate(zip(*of_keys, strict=True)):
            gradients = call(
                flash_attention_bwd,
                q_i,
                k_j,
                v_j,
                do_i,
                lse_i,
                delta_i,
                offset=jnp.asarray(mask.q_starts[i] - mask.k_starts[j], jnp.int32),
                q_segments_BT=q_segments,
                k_segments_BS=k_segments,
                **_flash_options(mask, scoring),
            )
            for total, gradient in zip((dq[i], dk[j], dv[j]), gradients, strict=True):
                total.append(gradient)

    def joined(runs: list[list[Array]]) -> Array:
        sums = [functools.reduce(jnp.add, (x.astype(lse.dtype) for x in run)) if run[1:] else run[0] for run in runs]
        return jnp.concatenate(sums, axis=1) if sums[1:] else sums[0]

    return joined(dq), joined(dk), joined(dv)


def _cudnn(scoring: Scoring, q: Array, k: Array, v: Array, mask: Mask, sinks_N: Array | None) -> Array:
    """Attend by cuDNN's flash attention, which knows no segments (a dense mask would cost it 2.5 times as much)."""
    asked = {
        "segments": mask.q_segments_BT is not None,
        "a part of a sequence": not mask.is_of_whole_sequences(q.shape[1], k.shape[1]),
        "sinks": sinks_N is not None,
        "a softcap": scoring.softcap is not None,
        f"{q.dtype}": q.dtype not in (jnp.float16, jnp.bfloat16),
        f"the device {target().kind}": not target().is_gpu,
    }
    if found := [what for what, there in asked.items() if there]:
        raise Declined(f'cudnn cannot do {", ".join(found)}; use implementation="mosaic" or "xla"')
    window = None if mask.window is None else (mask.window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scoring.scale, is_causal=mask.causal, local_window_size=window, implementation="cudnn"
    )
