"""T5's buckets of distances, against the formula written out number by number."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.relative import relative_buckets


def bucket(distance: int, buckets: int, max_distance: int, bidirectional: bool) -> int:
    """Write the formula out for one distance, key index - query index."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    far = exact + math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact)
    return first + min(int(far + 1e-6), buckets - 1)  # whole powers are hit from below in floating point


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(8, 20), (32, 128), (8, 16), (4, 3)])
def test_buckets_are_those_of_the_formula(buckets, max_distance, bidirectional):
    distances = np.arange(-300, 301)
    found = relative_buckets(jnp.asarray(distances), buckets, max_distance, bidirectional)
    expected = [bucket(int(d), buckets, max_distance, bidirectional) for d in distances]
    np.testing.assert_array_equal(found, expected)
    assert set(expected) == set(range(buckets)) - ({buckets // 2} if bidirectional else set())


def test_keys_behind_a_causal_query_are_at_distance_zero():
    assert relative_buckets(jnp.arange(5), 32, 128, bidirectional=False).tolist() == [0] * 5
