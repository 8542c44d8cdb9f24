"""How far is a key from its query? T5's buckets of distances (arXiv 1910.10683, 2.1)."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def relative_buckets(
    distance: Int[Array, "*B"], buckets: int, max_distance: int, bidirectional: bool
) -> Int[Array, "*B"]:
    """Give the bucket of key index - query index.

    Short distances have a bucket each, longer ones share them by their logarithm, up to max_distance. Both directions
    have half of the buckets, keys behind the query the upper half; else such keys count as distance 0.
    """
    each = buckets // 2 if bidirectional else buckets
    table = jnp.asarray(_bucket_of(each, max_distance))
    if not bidirectional:
        return table[jnp.clip(-distance, 0, max_distance)]
    return table[jnp.clip(jnp.abs(distance), 0, max_distance)] + each * (distance > 0)


@functools.cache
def _bucket_of(buckets: int, max_distance: int) -> np.ndarray:
    """List the bucket of every distance from 0 to max_distance."""
    exact = buckets // 2
    distance = np.arange(max_distance + 1)
    # In float32, as T5 and transformers compute it: at powers of the base rounding decides.
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, buckets - 1)).astype(np.int32)
