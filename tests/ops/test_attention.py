"""Attention: by blocks and by loops as in one piece, forward and backward; who sees whom; finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from moejax.ops import blockwise_attention
from moejax.ops.attention import attention, naive_attention
from moejax.ops.blockwise_attention import attend, attend_bwd, merge
from moejax.ops.mask import Mask, Scoring, visible
from pallas_kernels.target import Declined
from tests.conftest import assert_close
from tests.pallas_kernels.conftest import assert_accurate

B, T, N, K, H = 2, 13, 4, 2, 6


def draw(seed=0, length=T, heads=N, kv_heads=K, dtype="float64"):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, length, n, H)), dtype) for n in (heads, kv_heads, kv_heads)]


def segments(length=T) -> jax.Array:
    """One sequence of two documents and padding, one of three documents."""
    rows = np.array([[1] * 5 + [2] * (length - 7) + [0] * 2, [1] + [2] * 6 + [3] * (length - 7)])
    return jnp.asarray(rows, jnp.int32)


def mask(length=T) -> jax.Array:
    return Mask.of_segments(segments(length)).dense(length, length)


BLIND = jnp.asarray(np.arange(T) % 3 == 1)
SOME_BLIND = Mask(jnp.where(BLIND, -1, segments()), segments())
ALL_BLIND = Mask(jnp.full((B, T), -1), segments())


def by_reference(q, k, v, mask, **options):
    return attention(q, k, v, mask, implementation="reference", **options)


def by_blocks(q, k, v, mask, **options):
    return attention(q, k, v, mask, implementation="xla", **options)


@pytest.fixture(params=[by_reference, by_blocks, "by loops"], ids=["reference", "blocks", "loops"])
def attend_by(request, monkeypatch):
    """Every way of whole sequences; blocks so small that there are several, the loops' of another size."""
    monkeypatch.setattr(blockwise_attention, "BLOCK", 5)
    if request.param == "by loops":
        monkeypatch.setattr(blockwise_attention, "LONG", 0)
        monkeypatch.setattr(blockwise_attention, "LONG_BLOCK", 4)
        return by_blocks
    return request.param


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


def with_gradients(attend, q, k, v, mask):
    def run(q, k, v):
        out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
        return out, pullback(jnp.cos(out))

    return jax.jit(run)(q, k, v)


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


MASK = Mask.of_segments(segments())
MASKS = {"packed": MASK, "window": Mask.of_segments(segments(), 4), "whole": Mask(), "full": Mask(causal=False)}


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


@pytest.mark.parametrize(("kv_heads", "mask"), [*zip((1, 2, 4, 2), MASKS.values(), strict=True)], ids=MASKS)
def test_every_way_and_its_gradients_match_the_reference(x64, attend_by, kv_heads, mask):
    arrays = draw(kv_heads=kv_heads)
    assert_close(with_gradients(attend_by, *arrays, mask), with_gradients(by_reference, *arrays, mask))


@pytest.mark.parametrize("scoring", [Scoring(), Scoring(scale=0.3, softcap=1.5)], ids=["plain", "capped"])
@pytest.mark.parametrize("sinks", [False, True])
def test_scale_softcap_and_sinks_match_the_reference_in_every_way(x64, attend_by, scoring, sinks):
    sink = jnp.array([0.5, -1.0, 2.0, 0.0]) if sinks else None

    def run(attend):
        def f(q, k, v, sink):
            return attend(q, k, v, MASK, scoring=scoring, sinks_N=sink)

        out, pullback = jax.vjp(f, *draw(), sink)
        return out, pullback(jnp.cos(out))

    assert_close(run(attend_by), run(by_reference))


def test_a_sink_is_a_key_without_a_value_and_a_softcap_bends_by_tanh(x64):
    q, k, v = draw(heads=2, kv_heads=1)
    sinks = jnp.array([0.7, -0.2])
    out = by_reference(q, k, v, Mask(), scoring=Scoring(0.5, 2.0), sinks_N=sinks)
    for t, n in ((0, 0), (5, 1)):
        scores = 2.0 * np.tanh(np.asarray(k)[1, : t + 1, 0] @ np.asarray(q)[1, t, n] * 0.5 / 2.0)
        weights = np.exp(scores)
        assert_close(out[1, t, n], weights @ np.asarray(v)[1, : t + 1, 0] / (weights.sum() + np.exp(sinks[n])))


def test_every_way_matches_the_reference_in_float32(x64, attend_by):
    out, gradients = with_gradients(attend_by, *draw(dtype="float32"), MASK)
    exact = with_gradients(by_reference, *draw(dtype="float64"), MASK)
    assert_close((out, gradients), exact, "float32")


def test_every_way_is_as_accurate_in_bfloat16_as_the_reference(attend_by):
    arrays = draw(dtype="bfloat16")
    out, gradients = with_gradients(attend_by, *arrays, MASK)
    plain, plain_gradients = with_gradients(by_reference, *arrays, MASK)
    exact, exact_gradients = with_gradients(by_reference, *(x.astype("float32") for x in arrays), MASK)
    assert all(x.dtype == "bfloat16" for x in (out, *gradients))
    jax.tree.map(assert_accurate, (out, gradients), (plain, plain_gradients), (exact, exact_gradients))


def test_short_blocks_round_nothing_but_operands_in_bfloat16():
    """Delta is summed from unrounded probabilities: more accurate than the reference."""
    arrays = draw(dtype="bfloat16")
    exact = with_gradients(by_reference, *(x.astype("float32") for x in arrays), MASK)
    assert_close(with_gradients(by_blocks, *arrays, MASK), exact, "bfloat16")


def test_the_default_block_is_exact_on_a_length_of_many(x64):
    arrays, mask = draw(length=150), Mask.of_segments(segments(150))
    assert_close(jax.jit(by_blocks)(*arrays, mask), by_reference(*arrays, mask))


def test_grouped_heads_share_what_repeated_ones_copy(x64, attend_by):
    q, k, v = draw()
    repeated = [jnp.repeat(x, N // K, axis=2) for x in (k, v)]
    out, (dq, dk, dv) = with_gradients(attend_by, q, k, v, MASK)
    same, (dq_same, *dkv_same) = with_gradients(attend_by, q, *repeated, MASK)
    summed = [x.reshape(B, T, K, N // K, H).sum(3) for x in dkv_same]
    assert_close((out, dq, dk, dv), (same, dq_same, *summed))


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(x64, attend_by):
    q, k, v = draw()
    out, (dq, dk, dv) = with_gradients(attend_by, q, k, v, SOME_BLIND)
    assert not np.asarray(out)[:, BLIND].any()
    assert not np.asarray(dq)[:, BLIND].any()
    assert_close(out, by_hand(q, k, v, SOME_BLIND.dense(T, T)))
    assert np.isfinite(dk).all()
    assert np.isfinite(dv).all()
    none, gradients = with_gradients(attend_by, q, k, v, ALL_BLIND)
    assert not any(np.asarray(x).any() for x in (none, *gradients))


def test_a_hidden_key_may_hold_any_finite_number(x64, attend_by):
    q, k, v = draw()
    hidden = ~np.asarray(mask()[0, 7])  # the sight of one query of the first sequence
    k = k.at[0, hidden].set(1e6)
    v = v.at[0, hidden].set(-1e6)
    assert_close(attend_by(q, k, v, MASK)[0, 7], by_hand(*draw(), mask())[0, 7])


def test_scores_far_apart_neither_overflow_nor_vanish(attend_by):
    q, k, v = draw(dtype="float32")
    out, gradients = with_gradients(attend_by, 300.0 * q, 300.0 * k, v, MASK)
    assert all(np.isfinite(x).all() for x in (out, *gradients))
    assert_close(out, by_hand(300.0 * q, 300.0 * k, v, mask()), "float32")


@pytest.mark.parametrize("scoring", [Scoring(), Scoring(scale=0.3, softcap=1.5)], ids=["plain", "capped"])
def test_gradients_match_finite_differences(x64, attend_by, scoring):
    q, k, v = (x[:, :5] for x in draw(length=7))
    mask, sinks = Mask.of_segments(segments(7)[:, :5]), jnp.array([0.5, -1.0, 2.0, 0.0])

    def run(*arrays):
        return attend_by(*arrays[:3], mask, scoring=scoring, sinks_N=arrays[3])

    check_grads(jax.jit(run), (q, k, v, sinks), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


def test_long_sequences_need_the_memory_of_one_block_whatever_the_length():
    """Forward and backward: temporaries grow as the arrays do, where all scores would grow with the square."""

    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        loss = jax.grad(lambda q, k, v: by_blocks(q, k, v, Mask()).sum(), (0, 1, 2))
        return jax.jit(loss).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    few, many = temporaries(4096), temporaries(16384)
    assert many < 4.4 * few


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

    def is_by_blocks(q, **options):
        return "custom_vjp" in str(jax.make_jaxpr(lambda *a: attention(*a, MASK, **options))(q, k, v))

    assert is_by_blocks(q)
    assert is_by_blocks(q, implementation="xla")
    assert not is_by_blocks(q, implementation="reference")
    assert not is_by_blocks(q, drop=lambda p: p)
    last = Mask(segments()[:, -1:], segments(), (T - 1,))
    out = attention(q[:, -1:], k, v, last)
    assert_close(out, by_reference(q, k, v, MASK)[:, -1:])


def test_what_a_way_cannot_do_is_refused_by_name():
    q, k, v = draw(dtype="float32")
    with pytest.raises(Declined, match="attention dropout needs"):
        by_blocks(q, k, v, MASK, drop=lambda p: p)
    with pytest.raises(Declined, match="cudnn cannot do segments, float32, the device cpu; use"):
        attention(q, k, v, MASK, implementation="cudnn")
    with pytest.raises(ValueError, match='implementation "fast" must be one of auto, mosaic, cudnn, xla, reference'):
        attention(q, k, v, MASK, implementation="fast")


def test_parts_of_sequences_are_what_their_places_say_in_every_way(x64):
    """As many queries as keys, but not beside them: blocks would hide the wrong half."""
    q, k, v = draw(length=16)
    shifted, runs = Mask(q_starts=(10,)), Mask(q_starts=(4, 24), k_starts=(0, 8))
    for mask in (shifted, runs, Mask(k_starts=(3,))):
        expected = by_reference(q, k, v, mask)
        for way in ("auto", "xla"):
            assert_close(attention(q, k, v, mask, implementation=way), expected)


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
    out, whole = with_gradients(by_reference, q, k, v, MASK)
    do, (_, lse) = jnp.cos(out), attend(q, k, v, mask())
    delta = (do * out).sum(-1)
    parts = [slice(0, 4), slice(4, T)]
    dq, dk, dv = zip(*(attend_bwd(q, k[:, s], v[:, s], mask()[:, :, s], lse, do, delta) for s in parts), strict=True)
    assert_close((sum(dq), jnp.concatenate(dk, 1), jnp.concatenate(dv, 1)), whole)
