"""Attention: by blocks and by loops as in one piece, forward and backward; finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from moejax.ops import blockwise_attention
from moejax.ops.attention import attention, naive_attention
from moejax.ops.mask import Mask, Scoring
from pallas_kernels.target import Declined
from tests.conftest import assert_close
from tests.ops.attention_inputs import (
    MASK,
    B,
    H,
    K,
    N,
    T,
    by_hand,
    by_reference,
    dense_mask,
    draw,
    segments,
    with_gradients,
)
from tests.pallas_kernels.conftest import assert_accurate

BLIND = jnp.asarray(np.arange(T) % 3 == 1)
SOME_BLIND = Mask(jnp.where(BLIND, -1, segments()), segments())
ALL_BLIND = Mask(jnp.full((B, T), -1), segments())


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


def test_naive_attention_is_a_softmax_over_the_visible_keys(x64):
    q, k, v = draw()
    assert_close(naive_attention(q, k, v, dense_mask()), by_hand(q, k, v, dense_mask()))


MASKS = {"packed": MASK, "window": Mask.of_segments(segments(), 4), "whole": Mask(), "full": Mask(causal=False)}


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
    hidden = ~np.asarray(dense_mask()[0, 7])  # the sight of one query of the first sequence
    k = k.at[0, hidden].set(1e6)
    v = v.at[0, hidden].set(-1e6)
    assert_close(attend_by(q, k, v, MASK)[0, 7], by_hand(*draw(), dense_mask())[0, 7])


def test_scores_far_apart_neither_overflow_nor_vanish(attend_by):
    q, k, v = draw(dtype="float32")
    out, gradients = with_gradients(attend_by, 300.0 * q, 300.0 * k, v, MASK)
    assert all(np.isfinite(x).all() for x in (out, *gradients))
    assert_close(out, by_hand(300.0 * q, 300.0 * k, v, dense_mask()), "float32")


@pytest.mark.parametrize("scoring", [Scoring(), Scoring(scale=0.3, softcap=1.5)], ids=["plain", "capped"])
def test_gradients_match_finite_differences(x64, attend_by, scoring):
    q, k, v = (x[:, :5] for x in draw(length=7))
    mask, sinks = Mask.of_segments(segments(7)[:, :5]), jnp.array([0.5, -1.0, 2.0, 0.0])

    def run(*arrays):
        return attend_by(*arrays[:3], mask, scoring=scoring, sinks_N=arrays[3])

    # A difference over 2e-4 differs from the derivative by some 1e-9 third ones: the tolerance is its error, not ours.
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
    doubled = naive_attention(q, k, v, dense_mask(), drop=lambda p: 2.0 * p)
    assert_close(doubled, 2.0 * naive_attention(q, k, v, dense_mask()))
    first = naive_attention(q, k, v, dense_mask(), drop=lambda p: p.at[..., 1:].set(0.0))
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
