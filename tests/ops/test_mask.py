"""Masks: who sees whom, in packed sequences, under windows, in parts of a sequence."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.mask import Mask, visible
from tests.ops.attention_inputs import B, T, dense_mask, segments


def test_a_query_sees_its_own_document_up_to_itself():
    seen, rows = np.asarray(dense_mask()), np.asarray(segments())
    for b, t, s in np.ndindex(seen.shape):
        assert seen[b, t, s] == (s <= t and rows[b, s] == rows[b, t])


@pytest.mark.parametrize("window", [1, 3, T])
def test_with_a_window_a_query_sees_the_last_so_many_of_these_keys(window):
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    seen = np.asarray(visible(index, index, segments(), segments(), window))
    for b, t, s in np.ndindex(seen.shape):
        assert seen[b, t, s] == (t - window < s <= t and segments()[b, s] == segments()[b, t])
    assert seen[:, np.arange(T), np.arange(T)].all(), "itself always"


def test_sight_goes_by_index_not_by_place(x64):
    """A device that holds a sequence's parts in another order sees the same pairs."""
    order = np.random.default_rng(0).permutation(T)
    index, mixed = (
        jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)),
        jnp.tile(jnp.asarray(order, jnp.int32), (B, 1)),
    )
    plain = visible(index, index, segments(), segments(), 4)
    reordered = visible(index, mixed, segments(), segments()[:, order], 4)
    np.testing.assert_array_equal(reordered, plain[:, :, order])


def test_a_mask_of_runs_sees_as_their_places_in_the_sequence_say():
    """Two runs of queries and two of keys, as a ring's rank holds them, and parts cut out of one."""
    whole = np.asarray(Mask(window=5).dense(16, 16)[0])
    runs = Mask(q_starts=(4, 12), k_starts=(0, 8), window=5).dense(8, 8)
    queries, keys = [*range(4, 8), *range(12, 16)], [*range(4), *range(8, 12)]
    np.testing.assert_array_equal(runs[0], whole[np.ix_(queries, keys)])
    cut = Mask.of_segments(segments(), 4).cut(3, 6, 1, 7)
    np.testing.assert_array_equal(cut.dense(6, 7), Mask.of_segments(segments(), 4).dense(T, T)[:, 3:9, 1:8])
    with pytest.raises(ValueError, match=r"a window \(4\) counts back"):
        Mask(window=4, causal=False)
