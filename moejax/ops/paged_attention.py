"""What does a query see whose keys lie in pages? Attention through a block table, and how new tokens reach their pages.

A page holds Z tokens of all key/value heads; tables_BI names the page of each run of Z tokens of a sequence.
lengths_B counts the cached tokens, the new ones among them; the last query_lengths_B of these are the queries, query t
at position lengths - query_lengths + t. Table entries past the length may hold any value and page slots past it any
number, NaN included. Inference alone: there is no gradient. (arXiv 2309.06180)
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.compat import vary_like
from moejax.ops.backend import call, choose
from pallas_kernels.target import Target

XLA_SPLIT = 1024
"""Tokens that the XLA way gathers at a time: its memory does not grow with the length."""


def paged_attention_reference(
    q_BTNH: Float[Array, "B T N H"],
    k_PZKH: Float[Array, "P Z K H"],
    v_PZKU: Float[Array, "P Z K U"],
    tables_BI: Int[Array, "B I"],
    lengths_B: Int[Array, "B"],
    query_lengths_B: Int[Array, "B"],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N U"]:
    """Attend with all pages gathered and all scores in memory: the oracle.

    Rows past query_lengths and sequences of length 0 give zeros. `window`: the last so many keys are seen, a query's
    own among them. `softcap` bounds the scores to ± its value by tanh; a sink is one more logit of its head, whose
    value is zero.
    """
    batch, length, heads, dim = q_BTNH.shape
    kv_heads, group = k_PZKH.shape[2], heads // k_PZKH.shape[2]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    k_BSKH, v_BSKU = _gather(k_PZKH, tables_BI, lengths_B), _gather(v_PZKU, tables_BI, lengths_B)
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    q_BTKGH = (q_BTNH.astype(wide) * scale).reshape(batch, length, kv_heads, group, dim)
    s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH.astype(wide), precision="highest")
    s_BKGTS = s_BKGTS if softcap is None else softcap * jnp.tanh(s_BKGTS / softcap)
    keys_S = jnp.arange(k_BSKH.shape[1])
    seen_BTS = seen_keys(keys_S, lengths_B, query_lengths_B, length, window)[:, None, None]
    s_BKGTS = jnp.where(seen_BTS, s_BKGTS, -jnp.inf)
    sinks_KG11 = jnp.full((kv_heads, group, 1, 1), -jnp.inf, wide)
    if sinks_N is not None:
        sinks_KG11 = sinks_N.astype(wide).reshape(sinks_KG11.shape)
    max_BKGT1 = jnp.maximum(s_BKGTS.max(-1, keepdims=True), sinks_KG11)
    max_BKGT1 = jnp.where(jnp.isneginf(max_BKGT1), 0.0, max_BKGT1)
    e_BKGTS = jnp.exp(s_BKGTS - max_BKGT1)
    norm_BKGT1 = e_BKGTS.sum(-1, keepdims=True) + jnp.exp(sinks_KG11 - max_BKGT1)
    p_BKGTS = e_BKGTS / jnp.where(norm_BKGT1 > 0, norm_BKGT1, 1.0)
    o_BTKGU = jnp.einsum("BKGTS,BSKU->BTKGU", p_BKGTS, v_BSKU.astype(wide), precision="highest")
    return o_BTKGU.reshape(batch, length, heads, -1).astype(q_BTNH.dtype)


def seen_keys(
    keys_S: Int[Array, "S"],
    lengths_B: Int[Array, "B"],
    query_lengths_B: Int[Array, "B"],
    length: int,
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """Say which key positions each of `length` query rows sees: none past its own, none for rows that are padding."""
    rows_T = jnp.arange(length)
    position_BT = (lengths_B - query_lengths_B)[:, None] + rows_T
    behind_BTS = position_BT[:, :, None] - keys_S
    seen_BTS = (behind_BTS >= 0) & (rows_T < query_lengths_B[:, None])[:, :, None]
    return seen_BTS if window is None else seen_BTS & (behind_BTS < window)


def _gather(pages_PZKH: Array, tables_BI: Array, lengths_B: Array, first: int | Array = 0) -> Array:
    """Line the table's pages up as [B, S, K, H], position `first` leading, with zeros past the length."""
    batch, entries = tables_BI.shape
    num_pages, page, kv_heads, dim = pages_PZKH.shape
    x_BIZKH = pages_PZKH[jnp.clip(tables_BI, 0, num_pages - 1)]
    x_BSKH = x_BIZKH.reshape(batch, entries * page, kv_heads, dim)
    filled_BS = first + jnp.arange(entries * page) < lengths_B[:, None]
    return jnp.where(filled_BS[:, :, None, None], x_BSKH, jnp.zeros((), x_BSKH.dtype))


def paged_attention_xla(
    q_BTNH: Float[Array, "B T N H"],
    k_PZKH: Float[Array, "P Z K H"],
    v_PZKU: Float[Array, "P Z K U"],
    tables_BI: Int[Array, "B I"],
    lengths_B: Int[Array, "B"],
    query_lengths_B: Int[Array, "B"],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: Float[Array, "N"] | None = None,
    value_dim: int | None = None,
) -> Float[Array, "B T N _"]:
    """Attend a run of pages at a time with a running softmax, as far as the longest sequence goes.

    With value_dim the values are the keys' first columns, gathered once; v_PZKU is then not read.
    """
    batch, length, heads, dim = q_BTNH.shape
    page, kv_heads = k_PZKH.shape[1:3]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    run = min(tables_BI.shape[1], max(1, XLA_SPLIT // page))
    tables_BI = jnp.pad(tables_BI, ((0, 0), (0, -tables_BI.shape[1] % run)))
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    q_BKTGH = q_BTNH.reshape(batch, length, kv_heads, -1, dim).swapaxes(1, 2)

    def attend(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        acc, high, norm = carry
        table_BI = lax.dynamic_slice_in_dim(tables_BI, i * run, run, axis=1)
        first = i * run * page
        k_BSKH = _gather(k_PZKH, table_BI, lengths_B, first)
        v_BSKU = k_BSKH[..., :value_dim] if value_dim else _gather(v_PZKU, table_BI, lengths_B, first)
        s_BKTGS = scale * jnp.einsum("BKTGH,BSKH->BKTGS", q_BKTGH, k_BSKH, preferred_element_type=wide)
        s_BKTGS = s_BKTGS if softcap is None else softcap * jnp.tanh(s_BKTGS / softcap)
        keys_S = first + jnp.arange(run * page)
        seen_BTS = seen_keys(keys_S, lengths_B, query_lengths_B, length, window)
        s_BKTGS = jnp.where(seen_BTS[:, None, :, None], s_BKTGS, -jnp.inf)
        new = jnp.maximum(high, s_BKTGS.max(-1, keepdims=True))
        e_BKTGS, fade = jnp.exp(s_BKTGS - new), jnp.exp(high - new)
        o = jnp.einsum("BKTGS,BSKU->BKTGU", e_BKTGS.astype(v_BSKU.dtype), v_BSKU, preferred_element_type=wide)
        return acc * fade + o, new, norm * fade + e_BKTGS.sum(-1, keepdims=True)

    rows = (*q_BKTGH.shape[:-1], 1)
    low = float(jnp.finfo(wide).min)  # finite: a row that sees nothing keeps differences that are numbers
    high, norm = jnp.full(rows, low, wide), jnp.zeros(rows, wide)
    if sinks_N is not None:
        high = jnp.broadcast_to(sinks_N.astype(wide).reshape(kv_heads, 1, -1, 1), rows)
        norm = jnp.ones(rows, wide)
    acc = jnp.zeros((*rows[:-1], value_dim or v_PZKU.shape[3]), wide)
    varying = (q_BTNH, k_PZKH, v_PZKU, tables_BI, lengths_B, query_lengths_B)
    start = (vary_like(acc, *varying), vary_like(high, *varying), vary_like(norm, *varying))
    runs = jnp.minimum(-(-lengths_B.max(initial=0) // (run * page)), tables_BI.shape[1] // run)
    acc, _, norm = lax.fori_loop(0, runs, attend, start)
    o_BKTGU = acc / jnp.where(norm > 0, norm, 1.0)
    return o_BKTGU.swapaxes(1, 2).reshape(batch, length, heads, -1).astype(q_BTNH.dtype)


def paged_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_PZKH: Float[Array, "P Z K H"],
    v_PZKU: Float[Array, "P Z K U"],
    tables_BI: Int[Array, "B I"],
    lengths_B: Int[Array, "B"],
    query_lengths_B: Int[Array, "B"],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: Float[Array, "N"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N U"]:
    """Attend to cached keys through the block table, by "mosaic" (Hopper), "xla" or "reference".

    By the kernel a query's result has the same bits whatever else is in the batch and however long the table is.
    """

    def mosaic(*args: Array, **options: Any) -> Array:
        from pallas_kernels import paged_attention as kernels  # Mosaic takes long to import

        return call(kernels.paged_attention, *args, **options)

    ways = {
        "mosaic": mosaic,
        "xla": paged_attention_xla,
        "reference": paged_attention_reference,
    }
    return choose(
        "paged_attention",
        implementation,
        ways,
        _order,
        q_BTNH,
        k_PZKH,
        v_PZKU,
        tables_BI,
        lengths_B,
        query_lengths_B,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks_N=sinks_N,
    )


def latent_attention_reference(
    q_BTNJ: Float[Array, "B T N J"],
    latent_PZJ: Float[Array, "P Z J"],
    tables_BI: Int[Array, "B I"],
    lengths_B: Int[Array, "B"],
    query_lengths_B: Int[Array, "B"],
    *,
    value_dim: int,
    scale: float,
) -> Float[Array, "B T N {value_dim}"]:
    """Attend with one key head for all query heads, whose first value_dim numbers are the value (arXiv 2405.04434)."""
    latent_PZ1J = latent_PZJ[:, :, None]
    values_PZ1U = latent_PZ1J[..., :value_dim]
    return paged_attention_reference(
        q_BTNJ, latent_PZ1J, values_PZ1U, tables_BI, lengths_B, query_lengths_B, scale=scale
    )


def latent_attention_xla(q_BTNJ: Array, latent_PZJ: Array, *places: Array, value_dim: int, scale: float) -> Array:
    """Attend to latent pages a run of pages at a time, each gathered once."""
    latent_PZ1J = latent_PZJ[:, :, None]
    return paged_attention_xla(q_BTNJ, latent_PZ1J, latent_PZ1J, *places, scale=scale, value_dim=value_dim)


def latent_attention(
    q_BTNJ: Float[Array, "B T N J"],
    latent_PZJ: Float[Array, "P Z J"],
    tables_BI: Int[Array, "B I"],
    lengths_B: Int[Array, "B"],
    query_lengths_B: Int[Array, "B"],
    *,
    value_dim: int,
    scale: float,
    implementation: str = "auto",
) -> Float[Array, "B T N {value_dim}"]:
    """Attend to cached latents (DeepSeek's absorbed decode), by "mosaic" (Hopper), "xla" or "reference"."""

    def mosaic(*args: Array, **options: Any) -> Array:
        from pallas_kernels import latent_attention as kernels

        return call(kernels.latent_attention, *args, **options)

    ways = {
        "mosaic": mosaic,
        "xla": latent_attention_xla,
        "reference": latent_attention_reference,
    }
    places = (tables_BI, lengths_B, query_lengths_B)
    options: dict[str, Any] = {"value_dim": value_dim, "scale": scale}
    return choose("latent_attention", implementation, ways, _order, q_BTNJ, latent_PZJ, *places, **options)


def _order(chip: Target) -> tuple[str, ...]:
    """Prefer the kernels where they run."""
    return ("mosaic", "xla") if chip.is_hopper else ("xla",)


def write_pages(
    pages_PZKH: Float[Array, "P Z K H"],
    new_BTKH: Float[Array, "B T K H"],
    tables_BI: Int[Array, "B I"],
    positions_B: Int[Array, "B"],
    query_lengths_B: Int[Array, "B"],
) -> Float[Array, "P Z K H"]:
    """Write each sequence's first query_lengths new tokens at positions, positions + 1, ...; give the pages.

    Nothing is written where the table has no entry or names a page outside the pool (-1). Two rows must not name one
    slot: which of them stays is not defined.
    """
    num_pages, page = pages_PZKH.shape[:2]
    _, length = new_BTKH.shape[:2]
    rows_T = jnp.arange(length)
    position_BT = positions_B[:, None] + rows_T
    entry_BT = position_BT // page
    page_BT = jnp.take_along_axis(tables_BI, jnp.clip(entry_BT, 0, tables_BI.shape[1] - 1), axis=1)
    wanted_BT = (rows_T < query_lengths_B[:, None]) & (position_BT >= 0) & (entry_BT < tables_BI.shape[1])
    page_BT = jnp.where(wanted_BT & (page_BT >= 0), page_BT, num_pages)  # past the pool: dropped
    return pages_PZKH.at[page_BT, position_BT % page].set(new_BTKH.astype(pages_PZKH.dtype), mode="drop")
