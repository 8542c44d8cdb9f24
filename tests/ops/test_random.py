"""Random bits by global coordinates: the right distribution, and the same on every layout of the array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moejax.config.mesh import MeshConfig
from moejax.ops.random import bits_at, dropout, fold, normal_at, uniform_at
from moejax.parallel.plan import MeshPlan
from tests.conftest import assert_close

KEY = jnp.array([3, 5], jnp.uint32)
ROWS, COLUMNS = 64, 512


def grid(rows=ROWS, columns=COLUMNS, first_row=0, first_column=0):
    row = jnp.arange(rows, dtype=jnp.uint32)[:, None] + jnp.uint32(first_row)
    return row, jnp.arange(columns, dtype=jnp.uint32) + jnp.uint32(first_column)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_rate_and_the_mean(rate):
    y = np.asarray(dropout(jnp.ones((ROWS, COLUMNS)), rate, KEY, *grid()))
    spread = np.sqrt(rate * (1 - rate) / y.size)
    assert abs((y == 0).mean() - rate) < 4 * spread
    assert abs(y.mean() - 1.0) < 4 * spread / (1 - rate)
    assert_close(np.unique(y), np.array([0.0, 1 / (1 - rate)], np.float32))


def test_dropout_is_independent_from_row_to_row_and_column_to_column():
    kept = np.asarray(dropout(jnp.ones((ROWS, COLUMNS)), 0.5, KEY, *grid())) > 0
    for a, b in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1])):
        correlation = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(a.size)


def test_dropout_of_rate_zero_keeps_everything():
    np.testing.assert_array_equal(dropout(jnp.ones((4, 8)), 0.0, KEY, *grid(4, 8)), np.ones((4, 8)))


def test_the_gradient_is_dropped_with_the_value():
    x = jnp.ones((8, 16))
    y, pullback = jax.vjp(lambda x: dropout(x, 0.5, KEY, *grid(8, 16)), x)
    np.testing.assert_array_equal(pullback(x)[0], y)


def test_bits_belong_to_coordinates_not_to_places():
    whole = np.asarray(bits_at(KEY, *grid(16, 32)))
    part = bits_at(KEY, *grid(4, 8, first_row=10, first_column=20))
    np.testing.assert_array_equal(part, whole[10:14, 20:28])
    turned = bits_at(KEY, *(x.T for x in jnp.broadcast_arrays(*grid(16, 32))))
    np.testing.assert_array_equal(turned, whole.T)
    assert len(np.unique(whole)) == whole.size


def test_every_split_of_an_array_drops_the_same_elements():
    x = jnp.ones((8, 16))
    expected = dropout(x, 0.5, KEY, *grid(8, 16))
    for mesh in (MeshConfig(data=8), MeshConfig(data=2, tensor=4)):
        plan = MeshPlan.from_config(mesh)
        spec = plan.spec("batch", "ffn")

        def drop_part(x, plan=plan):
            first = (plan.index("batch") * x.shape[0], plan.index("ffn") * x.shape[1])
            return dropout(x, 0.5, KEY, *grid(*x.shape, *first))

        split = jax.jit(plan.spmd(drop_part, (spec,), spec))(x)
        np.testing.assert_array_equal(split, expected)


def test_normals_and_uniforms_have_their_moments():
    normal, uniform = (np.asarray(draw(KEY, *grid())) for draw in (normal_at, uniform_at))
    count = normal.size
    assert 0 < uniform.min() < 1e-3
    assert 1 - 1e-3 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 4 / np.sqrt(12 * count)
    assert abs(normal.mean()) < 4 / np.sqrt(count)
    assert abs(normal.var() - 1.0) < 4 * np.sqrt(2 / count)
    assert abs((normal**3).mean()) < 4 * np.sqrt(15 / count)


def test_the_open_interval_has_no_end():
    """Both ends would be infinite normals."""
    ends = ((np.array([0, 2**32 - 1], np.uint32) >> 9).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)
    assert ((ends > 0) & (ends < 1)).all()


def test_folding_numbers_one_by_one_or_together_is_the_same_and_their_order_counts():
    np.testing.assert_array_equal(fold(KEY, 1, 2), fold(fold(KEY, 1), 2))
    keys = [fold(KEY), fold(KEY, 0), fold(KEY, 1), fold(KEY, 1, 2), fold(KEY, 2, 1), fold(KEY, 2)]
    assert len({tuple(np.asarray(key).tolist()) for key in keys}) == len(keys)


def test_draws_under_different_keys_are_unrelated():
    a, b = (np.asarray(uniform_at(key, *grid())) for key in (KEY, fold(KEY, 1)))
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


def test_the_split_spec_is_what_it_says():
    assert MeshPlan.from_config(MeshConfig(data=2, tensor=4)).spec("batch", "ffn") == PartitionSpec(
        ("data",), ("tensor",)
    )
