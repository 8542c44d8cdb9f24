"""What does a query see whose keys lie in pages? Attention through a block table, and how new tokens reach their pages.

A page holds Z tokens of all key/value heads; tables_BI names the page of each run of Z tokens of a sequence.
lengths_B counts the cached tokens, the new ones among them; the last query_lengths_B of these are the queries, query t
at position lengths - query_lengths + t. Table entries past the length may hold any value and page slots past it any
number, NaN included. Inference alone: there is no gradient. (arXiv 2309.06180)
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.compat import vary_like
from moejax.ops.attention import naive_attention
from moejax.ops.backend import call, choose
from moejax.ops.blockwise_attention import Partial, attend, merge, with_sinks
from moejax.ops.mask import PLAIN, Scoring
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
    scoring: Scoring = PLAIN,
    window: int | None = None,
    sinks_N: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N U"]:
    """Attend with all pages gathered and all scores in memory: the oracle.

    Rows past query_lengths and sequences of length 0 give zeros. `window`: the last so many keys are seen, a query's
    own among them; a sink is one more logit of its head, whose value is zero.
    """
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    k_BSKH, v_BSKU = (_gather(pages, tables_BI, lengths_B).astype(wide) for pages in (k_PZKH, v_PZKU))
    seen_BTS = seen_keys(jnp.arange(k_BSKH.shape[1]), lengths_B, query_lengths_B, q_BTNH.shape[1], window)
    o_BTNU = naive_attention(q_BTNH.astype(wide), k_BSKH, v_BSKU, seen_BTS, scoring=scoring, sinks_N=sinks_N)
    return o_BTNU.astype(q_BTNH.dtype)


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
    scoring: Scoring = PLAIN,
    window: int | None = None,
    sinks_N: Float[Array, "N"] | None = None,
    value_dim: int | None = None,
) -> Float[Array, "B T N _"]:
    """Attend a run of pages at a time and merge, as far as the longest sequence goes.

    With value_dim the values are the keys' first columns, gathered once; v_PZKU is then not read.
    """
    batch, length, heads, _ = q_BTNH.shape
    page, wide = k_PZKH.shape[1], jnp.promote_types(q_BTNH.dtype, jnp.float32)
    run = min(tables_BI.shape[1], max(1, XLA_SPLIT // page))
    tables_BI = jnp.pad(tables_BI, ((0, 0), (0, -tables_BI.shape[1] % run)))

    def attend_run(i: Array, done: Partial) -> Partial:
        table_BI = lax.dynamic_slice_in_dim(tables_BI, i * run, run, axis=1)
        first = i * run * page
        k_BSKH = _gather(k_PZKH, table_BI, lengths_B, first)
        v_BSKU = k_BSKH[..., :value_dim] if value_dim else _gather(v_PZKU, table_BI, lengths_B, first)
        seen_BTS = seen_keys(first + jnp.arange(run * page), lengths_B, query_lengths_B, length, window)
        return merge(done, attend(q_BTNH, k_BSKH, v_BSKU, seen_BTS, scoring))

    rows = (batch, length, heads)
    nothing = (jnp.zeros((*rows, value_dim or v_PZKU.shape[3]), wide), jnp.full(rows, -jnp.inf, wide))
    varying = (q_BTNH, k_PZKH, v_PZKU, tables_BI, lengths_B, query_lengths_B)
    runs = jnp.minimum(-(-lengths_B.max(initial=0) // (run * page)), tables_BI.shape[1] // run)
    done = lax.fori_loop(0, runs, attend_run, tuple(vary_like(x, *varying) for x in nothing))
    return with_sinks(done, sinks_N)[0].astype(q_BTNH.dtype)


def paged_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_PZKH: Float[Array, "P Z K H"],
    v_PZKU: Float[Array, "P Z K U"],
    tables_BI: Int[Array, "B I"],
    lengths_B: Int[Array, "B"],
    query_lengths_B: Int[Array, "B"],
    *,
    scoring: Scoring = PLAIN,
    window: int | None = None,
    sinks_N: Float[Array, "N"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N U"]:
    """Attend to cached keys through the block table, by "mosaic" (Hopper), "xla" or "reference".

    By the kernel a query's result has the same bits whatever else is in the batch and however long the table is.
    """

    def mosaic(*args: Array, scoring: Scoring, **options: Any) -> Array:
        from pallas_kernels import paged_attention as kernels  # Mosaic takes long to import

        return call(kernels.paged_attention, *args, scale=scoring.scale, softcap=scoring.softcap, **options)

    ways = {"mosaic": mosaic, "xla": paged_attention_xla, "reference": paged_attention_reference}
    arrays = (q_BTNH, k_PZKH, v_PZKU, tables_BI, lengths_B, query_lengths_B)
    options: dict[str, Any] = {"scoring": scoring, "window": window, "sinks_N": sinks_N}
    return choose("paged_attention", implementation, ways, _order, *arrays, **options)


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
    places = (tables_BI, lengths_B, query_lengths_B)
    return paged_attention_reference(q_BTNJ, latent_PZ1J, values_PZ1U, *places, scoring=Scoring(scale))


def latent_attention_xla(q_BTNJ: Array, latent_PZJ: Array, *places: Array, value_dim: int, scale: float) -> Array:
    """Attend to latent pages a run of pages at a time, each gathered once."""
    latent_PZ1J = latent_PZJ[:, :, None]
    scoring = Scoring(scale)
    return paged_attention_xla(q_BTNJ, latent_PZ1J, latent_PZ1J, *places, scoring=scoring, value_dim=value_dim)


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
    """Attend to cached latents (DeepSeek's absorbed decode), by "mosaic" (Hopper), "xla" or "reference".

    The scale is that of the heads before absorption, which latents do not tell.
    """

    def mosaic(*args: Array, **options: Any) -> Array:
        from pallas_kernels import latent_attention as kernels

        return call(kernels.latent_attention, *args, **options)

    ways = {"mosaic": mosaic, "xla": latent_attention_xla, "reference": latent_attention_reference}
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
