"""Sorting slots by expert, gathering and combining rows: against plain numpy and a scatter, forward and backward."""

from typing import get_args, get_type_hints

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, PartitionSpec

from moejax.config.moe import MoEConfig
from moejax.ops.permute import combine_reference, combine_rows, gather_rows, move_rows, sort_by_expert
from pallas_kernels.target import Declined

M, A, E, D = 13, 3, 5, 4


def draw(seed, chosen_rate=0.7):
    rng = np.random.default_rng(seed)
    dtype = jnp.result_type(float)  # float64 where x64 is enabled
    experts, chosen = rng.integers(0, E, (M, A)).astype(np.int32), rng.random((M, A)) < chosen_rate
    x, weights = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((M, D), (M, A)))
    return jnp.asarray(experts), jnp.asarray(chosen), x, weights


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), rate=st.sampled_from((0.0, 0.5, 1.0)))
def test_order_is_a_stable_sort_with_the_slots_not_chosen_last(seed, rate):
    experts, chosen, _, _ = draw(seed, rate)
    order = sort_by_expert(experts, E, chosen)
    key = np.where(chosen, experts, E).reshape(-1)
    np.testing.assert_array_equal(order.rows_R, np.argsort(key, kind="stable"))
    np.testing.assert_array_equal(np.asarray(order.inverse_R)[order.rows_R], np.arange(M * A))
    np.testing.assert_array_equal(order.group_sizes_E, np.bincount(key, minlength=E + 1)[:E])


def test_every_slot_is_chosen_by_default():
    experts, _, _, _ = draw(0)
    chosen = jnp.ones((M, A), bool)
    chex.assert_trees_all_equal(sort_by_expert(experts, E), sort_by_expert(experts, E, chosen))


def test_gathered_rows_are_the_tokens_of_the_slots():
    with jax.enable_x64(True):
        experts, chosen, x, _ = draw(1)
        order = sort_by_expert(experts, E, chosen)
        rows = np.asarray(gather_rows(x, order, A))
        count = int(chosen.sum())
        np.testing.assert_array_equal(rows[:count], x[order.rows_R[:count] // A])
        assert not rows[count:].any()


def test_gather_and_combine_and_gradients_match_the_scatter():
    with jax.enable_x64(True):
        experts, chosen, x, weights = draw(2)
        order = sort_by_expert(experts, E, chosen)

        def slow_gather(x):
            rows = x[order.rows_R // A]
            return jnp.where((jnp.arange(M * A) < chosen.sum())[:, None], rows, 0)

        def loss(gather, combine, x, weights):
            return (jnp.sin(combine(jnp.exp(gather(x)), weights, order)) ** 2).sum()

        fast = jax.value_and_grad(lambda *a: loss(lambda x: gather_rows(x, order, A), combine_rows, *a), (0, 1))
        slow = jax.value_and_grad(lambda *a: loss(slow_gather, combine_reference, *a), (0, 1))
        chex.assert_trees_all_close(jax.jit(fast)(x, weights), slow(x, weights), rtol=1e-12, atol=1e-12)


def test_rows_move_under_every_name_that_experts_have():
    experts, chosen, x, weights = draw(2)
    order = sort_by_expert(experts, E, chosen)
    for name in get_args(get_type_hints(MoEConfig)["implementation"]):

        def moved(x, weights, name=name):
            return combine_rows(gather_rows(x, order, A, implementation=name), weights, order, implementation=name)

        if name == "triton":  # no GPU here
            with pytest.raises(Declined):
                moved(x, weights)
        else:
            chex.assert_trees_all_equal(moved(x, weights), moved(x, weights, "auto"))


def test_slots_not_chosen_leak_nothing_even_when_not_finite():
    experts, chosen, x, weights = draw(3)
    order = sort_by_expert(experts, E, chosen)
    junk = (jnp.arange(M * A) >= chosen.sum())[:, None]
    rows = jnp.where(junk, jnp.nan, gather_rows(x, order, A))
    y, pullback = jax.vjp(lambda rows, weights: combine_rows(rows, weights, order), rows, weights)
    drows, dweights = pullback(jnp.ones_like(y))
    chex.assert_tree_all_finite((y, drows, dweights))
    assert not jnp.where(junk, drows, 0).any()
    assert not dweights[~chosen].any()
    (dx,) = jax.vjp(lambda x: gather_rows(x, order, A), x)[1](rows)
    chex.assert_tree_all_finite(dx)


def test_the_backward_has_no_scatter():
    experts, chosen, x, weights = draw(4)
    order = sort_by_expert(experts, E, chosen)

    def loss(x, weights):
        return combine_rows(gather_rows(x, order, A), weights, order).sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, weights).as_text()
    assert "scatter" not in text
    assert "gather" in text


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_token_s_rows_are_summed_in_float32(dtype):
    experts = jnp.zeros((1, 256), jnp.int32)
    order = sort_by_expert(experts, 1)
    y = combine_rows(jnp.ones((256, 1), dtype), jnp.full((1, 256), 1.0078125, dtype), order)
    assert y.dtype == dtype
    np.testing.assert_allclose(np.float32(y[0, 0]), 258.0)


def test_inside_shard_map_a_replicated_input_gets_its_summed_gradient():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("data"), PartitionSpec()
    experts = jnp.concatenate([draw(5)[0], draw(6)[0]])
    _, _, x, weights = draw(7)

    def loss(experts, x, weights):
        order = sort_by_expert(experts, E)
        return (combine_rows(jnp.exp(gather_rows(x, order, A)), weights, order) ** 2).sum()

    def program(experts, x, weights):
        total = lambda x, weights: jax.lax.psum(loss(experts, x, weights), "data")  # noqa: E731
        return jax.grad(total, (0, 1))(x, weights)

    run = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=(split, whole, whole), out_specs=(whole, whole)))
    one_device = jax.grad(lambda x, weights: sum(loss(e, x, weights) for e in jnp.split(experts, 2)), (0, 1))
    chex.assert_trees_all_close(run(experts, x, weights), one_device(x, weights), rtol=1e-5)


# --- rows that move one to one, and some that do not


def draw_moves(seed: int, rows: int = 9, places: int = 7):
    """Draw a partial one-to-one map from rows to places, seen from both ends; elsewhere the indices are junk."""
    rng = np.random.default_rng(seed)
    count = rng.integers(0, min(rows, places) + 1)
    taken_rows, taken_places = rng.permutation(rows)[:count], rng.permutation(places)[:count]
    take, back = rng.integers(-3, rows + 3, places), rng.integers(-3, places + 3, rows)
    taken, kept = np.zeros(places, bool), np.zeros(rows, bool)
    take[taken_places], taken[taken_places] = taken_rows, True
    back[taken_rows], kept[taken_rows] = taken_places, True
    return [jnp.asarray(x) for x in (take.astype(np.int32), taken, back.astype(np.int32), kept)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_moved_rows_and_their_gradient_are_those_of_a_plain_gather(seed):
    with jax.enable_x64(True):
        moves = draw_moves(seed)
        take, taken, _, _ = moves
        rng = np.random.default_rng(seed)
        x, dy = jnp.asarray(rng.normal(size=(9, D))), jnp.asarray(rng.normal(size=(7, D)))
        y, pullback = jax.vjp(lambda x: move_rows(x, *moves), x)
        plain, plain_pullback = jax.vjp(lambda x: jnp.where(taken[:, None], x[jnp.clip(take, 0, 8)], 0), x)
        np.testing.assert_array_equal(y, plain)
        np.testing.assert_array_equal(*(p(dy)[0] for p in (pullback, plain_pullback)))


def test_moving_rows_back_undoes_it_and_integers_may_move():
    take, taken, back, kept = draw_moves(2)
    x = jnp.arange(9 * D, dtype=jnp.int32).reshape(9, D) + 1
    there = move_rows(x, take, taken, back, kept)
    again = move_rows(there, back, kept, take, taken)
    np.testing.assert_array_equal(again, jnp.where(kept[:, None], x, 0))
    assert kept.any()
    assert not kept.all()


def test_the_backward_of_moving_rows_has_no_scatter():
    moves = draw_moves(2)
    grad = jax.jit(jax.grad(lambda x: jnp.square(move_rows(x, *moves)).sum()))
    assert "scatter" not in grad.lower(jnp.ones((9, D))).as_text()
