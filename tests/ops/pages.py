"""Inputs of paged attention as hostile as a pool can be: pages in any order, holes, NaN wherever no token stands."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Pages(NamedTuple):
    """The arguments of paged attention, in order."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    tables: jax.Array
    lengths: jax.Array
    query_lengths: jax.Array

    def sequence(self, b: int, pages: np.ndarray, length: int) -> np.ndarray:
        """Give the numbers of sequence b's tokens, in order."""
        table = np.asarray(self.tables[b])[: -(-length // pages.shape[1])]
        return pages[table].reshape(-1, *pages.shape[2:])[:length]


def make_pages(
    seed: int,
    lengths: Sequence[int],
    queries: Sequence[int],
    length: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    value_dim: int | None = None,
    page: int = 4,
    entries: int | None = None,
    dtype: str = "float32",
) -> Pages:
    """Draw queries [B, T, N, H] and pages of a shuffled pool; what no sequence holds is NaN, unused entries are -1.

    Depends on the sequences alone: a table of more entries changes no number.
    """
    rng = np.random.default_rng(seed)
    entries = entries or max(1, *(-(-n // page) for n in lengths))
    needed = sum(-(-n // page) for n in lengths)
    pool = needed + 2
    tables = np.full((len(lengths), entries), -1, np.int32)
    free = list(rng.permutation(pool))
    k = np.full((pool, page, kv_heads, dim), np.nan)
    v = np.full((pool, page, kv_heads, value_dim or dim), np.nan)
    q = rng.normal(size=(len(lengths), length, heads, dim))
    for b, tokens in enumerate(lengths):
        for i in range(-(-tokens // page)):
            tables[b, i] = free.pop()
            filled = min(page, tokens - i * page)
            for x in (k, v):
                x[tables[b, i], :filled] = rng.normal(size=(filled, *x.shape[2:]))
    return Pages(
        *(jnp.asarray(x, dtype) for x in (q, k, v)),
        jnp.asarray(tables),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(queries, jnp.int32),
    )
