"""Attention: by blocks as in one piece, forward and backward; who sees whom; grouped heads; finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from moejax.ops.attention import attend, attend_bwd, attention, blockwise_attention, merge, naive_attention, visible
from tests.conftest import assert_close

B, T, N, K, H = 2, 13, 4, 2, 6


def draw(seed=0, length=T, heads=N, kv_heads=K, dtype="float64"):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, length, n, H)), dtype) for n in (heads, kv_heads, kv_heads)]


def segments(length=T) -> jax.Array:
    """One sequence of two documents and padding, one of three documents."""
    rows = np.array([[1] * 5 + [2] * (length - 7) + [0] * 2, [1] + [2] * 6 + [3] * (length - 7)])
    return jnp.asarray(rows, jnp.int32)


def mask(length=T) -> jax.Array:
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (B, length))
    return visible(index, index, segments(length), segments(length))


def by_hand(q, k, v, seen) -> np.ndarray:
    """One query at a time, over the keys that it sees and no others."""
    q, k, v, seen = (np.asarray(x, np.float64) for x in (q, k, v, seen))
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(seen[b, t])
        if keys.size:
            head = n // (q.shape[2] // k.shape[2])
            scores = k[b, keys, head] @ q[b, t, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, keys, head] / weights.sum()
    return out


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(attend, q, k, v, seen):
    out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, seen), q, k, v)
    return out, pullback(jnp.cos(out))


def test_a_query_sees_its_own_document_up_to_itself():
    seen, rows = np.asarray(mask()), np.asarray(segments())
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


def test_naive_attention_is_a_softmax_over_the_visible_keys(x64):
    q, k, v = draw()
    assert_close(naive_attention(q, k, v, mask()), by_hand(q, k, v, mask()))


@pytest.mark.parametrize(("block", "kv_heads"), [(5, 1), (5, 2), (5, 4), (13, 2), (64, 2)])
def test_blockwise_and_its_gradients_match_naive(x64, block, kv_heads):
    arrays = draw(kv_heads=kv_heads)
    blocks = with_gradients(lambda *a: blockwise_attention(*a, block), *arrays, mask())
    assert_close(blocks, with_gradients(naive_attention, *arrays, mask()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blockwise_matches_naive_in_lower_precision(dtype):
    arrays = draw(dtype=dtype)
    out, gradients = with_gradients(lambda *a: blockwise_attention(*a, 5), *arrays, mask())
    exact, exact_gradients = with_gradients(naive_attention, *(x.astype("float32") for x in arrays), mask())
    assert out.dtype == dtype
    assert all(gradient.dtype == dtype for gradient in gradients)
    assert_close(out, exact, dtype)
    assert_close(gradients, exact_gradients, dtype)


def test_the_default_block_is_exact_on_a_length_of_many(x64):
    arrays, seen = draw(length=150), mask(150)
    jitted = jax.jit(lambda *a: blockwise_attention(*a))
    assert_close(jitted(*arrays, seen), naive_attention(*arrays, seen))


@pytest.mark.parametrize("attend", [naive_attention, blockwise_attention])
def test_grouped_heads_share_what_repeated_ones_copy(x64, attend):
    q, k, v = draw()
    repeated = [jnp.repeat(x, N // K, axis=2) for x in (k, v)]
    out, (dq, dk, dv) = with_gradients(attend, q, k, v, mask())
    same, (dq_same, *dkv_same) = with_gradients(attend, q, *repeated, mask())
    summed = [x.reshape(B, T, K, N // K, H).sum(3) for x in dkv_same]
    assert_close((out, dq, dk, dv), (same, dq_same, *summed))


@pytest.mark.parametrize("attend", [naive_attention, blockwise_attention])
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(x64, attend):
    blind = jnp.asarray(np.arange(T) % 3 == 1)
    seen = mask() & ~blind[None, :, None]
    q, k, v = draw()
    out, (dq, dk, dv) = with_gradients(attend, q, k, v, seen)
    assert not np.asarray(out)[:, blind].any()
    assert not np.asarray(dq)[:, blind].any()
    assert_close(out, by_hand(q, k, v, seen))
    assert np.isfinite(dk).all()
    assert np.isfinite(dv).all()
    none, gradients = with_gradients(attend, q, k, v, jnp.zeros_like(seen))
    assert not any(np.asarray(x).any() for x in (none, *gradients))


@pytest.mark.parametrize("attend", [naive_attention, blockwise_attention])
def test_a_hidden_key_may_hold_any_finite_number(x64, attend):
    q, k, v = draw()
    hidden = ~np.asarray(mask()[0, 7])  # the sight of one query of the first sequence
    k = k.at[0, hidden].set(1e6)
    v = v.at[0, hidden].set(-1e6)
    assert_close(attend(q, k, v, mask())[0, 7], by_hand(*draw(), mask())[0, 7])


@pytest.mark.parametrize("attend", [naive_attention, blockwise_attention])
def test_scores_far_apart_neither_overflow_nor_vanish(attend):
    q, k, v = draw(dtype="float32")
    out, gradients = with_gradients(attend, 300.0 * q, 300.0 * k, v, mask())
    assert all(np.isfinite(x).all() for x in (out, *gradients))
    assert_close(out, by_hand(300.0 * q, 300.0 * k, v, mask()), "float32")


@pytest.mark.parametrize("attend", [naive_attention, blockwise_attention])
def test_gradients_match_finite_differences(x64, attend):
    q, k, v = (x[:, :5] for x in draw(length=7))
    seen = mask(7)[:, :5, :5]
    check_grads(jax.jit(lambda q, k, v: attend(q, k, v, seen)), (q, k, v), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


def test_dropout_takes_the_probabilities_after_their_sum(x64):
    """The kept ones are not renormalised: with twice the probabilities the output doubles."""
    q, k, v = draw()
    doubled = naive_attention(q, k, v, mask(), drop=lambda p: 2.0 * p)
    assert_close(doubled, 2.0 * naive_attention(q, k, v, mask()))
    first = naive_attention(q, k, v, mask(), drop=lambda p: p.at[..., 1:].set(0.0))
    diagonal = np.asarray(first)[:, 0]  # the first query's one key is key 0
    assert_close(diagonal, np.repeat(np.asarray(v)[:, 0], N // K, axis=1))


def test_auto_takes_blocks_for_whole_sequences_and_naive_for_dropout_and_decoding(x64):
    q, k, v = draw()

    def is_by_blocks(q, seen, **options):
        return "custom_vjp" in str(jax.make_jaxpr(lambda *a: attention(*a, **options))(q, k, v, seen))

    assert is_by_blocks(q, mask())
    assert is_by_blocks(q, mask(), implementation="blockwise")
    assert not is_by_blocks(q, mask(), implementation="naive")
    assert not is_by_blocks(q, mask(), drop=lambda p: p)
    assert not is_by_blocks(q[:, -1:], mask()[:, -1:])


def test_blockwise_refuses_what_it_cannot_do():
    q, k, v = draw(dtype="float32")
    with pytest.raises(ValueError, match=r"as many keys \(13\) as queries \(5\)"):
        blockwise_attention(q[:, :5], k, v, mask()[:, :5])
    with pytest.raises(ValueError, match="attention dropout needs"):
        attention(q, k, v, mask(), drop=lambda p: p, implementation="blockwise")


# --- parts of the keys


def in_parts(q, k, v, seen, cuts):
    """Attend to the keys between the cuts one part after the other, merging as a ring does."""
    parts = [slice(a, b) for a, b in zip((0, *cuts), (*cuts, T), strict=True)]
    found = [attend(q, k[:, keys], v[:, keys], seen[:, :, keys]) for keys in parts]
    return functools.reduce(merge, found)


@pytest.mark.parametrize("cuts", [(5,), (2, 3, 9)], ids=str)
def test_parts_of_the_keys_merge_to_the_whole(x64, cuts):
    """Early queries see nothing of the later parts, and some see nothing of any."""
    q, k, v = draw()
    seen = mask() & jnp.asarray(np.arange(T) != 4)[None, :, None]
    o, lse = jax.jit(lambda *a: in_parts(*a, cuts))(q, k, v, seen)
    assert_close(o, by_hand(q, k, v, seen))
    scores = np.einsum("BTKGH,BSKH->BTKGS", np.reshape(q, (B, T, K, N // K, H)), k) / np.sqrt(H)
    exact = np.where(np.asarray(seen)[:, :, None, None], np.exp(scores), 0.0).sum(-1).reshape(B, T, N)
    np.testing.assert_array_equal(np.isneginf(lse), exact == 0)
    assert_close(np.exp(lse), exact)


def test_a_part_that_sees_nothing_gives_zeros_and_changes_nothing(x64):
    q, k, v = draw()
    o, lse = attend(q, k, v, mask())
    nothing = attend(q, 1e3 * k, v, jnp.zeros_like(mask()))
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
    out, whole = with_gradients(naive_attention, q, k, v, mask())
    do, (_, lse) = jnp.cos(out), attend(q, k, v, mask())
    delta = (do * out).sum(-1)
    parts = [slice(0, 4), slice(4, T)]
    dq, dk, dv = zip(*(attend_bwd(q, k[:, s], v[:, s], mask()[:, :, s], lse, do, delta) for s in parts), strict=True)
    assert_close((sum(dq), jnp.concatenate(dk, 1), jnp.concatenate(dv, 1)), whole)
