"""Parts of the keys: what attention to each of them gives merges to attention to all, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.blockwise_attention import attend, attend_bwd, merge
from tests.conftest import assert_close
from tests.ops.attention_inputs import MASK, B, H, K, N, T, by_hand, by_reference, dense_mask, draw, with_gradients


def in_parts(q, k, v, seen, cuts):
    """Attend to the keys between the cuts one part after the other, merging as a ring does."""
    parts = [slice(a, b) for a, b in zip((0, *cuts), (*cuts, T), strict=True)]
    found = [attend(q, k[:, keys], v[:, keys], seen[:, :, keys]) for keys in parts]
    return functools.reduce(merge, found)


@pytest.mark.parametrize("cuts", [(5,), (2, 3, 9)], ids=str)
def test_parts_of_the_keys_merge_to_the_whole(x64, cuts):
    """Early queries see nothing of the later parts, and some see nothing of any."""
    q, k, v = draw()
    seen = dense_mask() & jnp.asarray(np.arange(T) != 4)[None, :, None]
    o, lse = jax.jit(lambda *a: in_parts(*a, cuts))(q, k, v, seen)
    assert_close(o, by_hand(q, k, v, seen))
    scores = np.einsum("BTKGH,BSKH->BTKGS", np.reshape(q, (B, T, K, N // K, H)), k) / np.sqrt(H)
    exact = np.where(np.asarray(seen)[:, :, None, None], np.exp(scores), 0.0).sum(-1).reshape(B, T, N)
    np.testing.assert_array_equal(np.isneginf(lse), exact == 0)
    assert_close(np.exp(lse), exact)


def test_a_part_that_sees_nothing_gives_zeros_and_changes_nothing(x64):
    q, k, v = draw()
    o, lse = attend(q, k, v, dense_mask())
    nothing = attend(q, 1e3 * k, v, jnp.zeros_like(dense_mask()))
    assert not np.asarray(nothing[0]).any()
    assert np.isneginf(nothing[1]).all()
    for merged in (merge((o, lse), nothing), merge(nothing, (o, lse))):
        assert_close(merged, (o, lse))
    both = merge(nothing, nothing)
    assert not np.asarray(both[0]).any()
    assert np.isneginf(both[1]).all()


def test_scores_far_apart_merge_to_the_larger_ones():
    """exp of either log-sum-exp overflows float32."""
    o = jnp.ones((1, 1, 1, 1), jnp.float32)
    merged, lse = merge((o, jnp.full((1, 1, 1), 500.0)), (3 * o, jnp.full((1, 1, 1), 900.0)))
    np.testing.assert_array_equal(merged, 3 * o)
    np.testing.assert_array_equal(lse, [[[900.0]]])


def test_gradients_of_the_parts_add_up_to_those_of_the_whole(x64):
    """Given the log-sum-exp over all keys, and the sum of do * o."""
    q, k, v = draw()
    out, whole = with_gradients(by_reference, q, k, v, MASK)
    do, (_, lse) = jnp.cos(out), attend(q, k, v, dense_mask())
    delta = (do * out).sum(-1)
    parts = [slice(0, 4), slice(4, T)]
    of_parts = (attend_bwd(q, k[:, s], v[:, s], dense_mask()[:, :, s], lse, do, delta) for s in parts)
    dq, dk, dv = zip(*of_parts, strict=True)
    assert_close((sum(dq), jnp.concatenate(dk, 1), jnp.concatenate(dv, 1)), whole)
