"""Which random bits does an element see? Those of its global coordinates, so that every mesh draws the same."""

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Float, UInt32

from moejax.compat import vary_like

Key = Array
"""A threefry key as raw data: two uint32."""


def bits_at(key: UInt32[Array, "2"], row: UInt32[Array, "..."], column: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Hash (row, column) under `key`: 32 random bits that depend on these numbers and on nothing else."""
    row, column = jnp.broadcast_arrays(row, column)
    row, column = vary_like(row, column), vary_like(column, row)
    words = [vary_like(jnp.broadcast_to(k, row.shape), row) for k in key]
    row, column = vary_like(row, words[0]), vary_like(column, words[0])
    return threefry2x32_p.bind(*words, row, column)[0]


def fold(key: UInt32[Array, "2"], *numbers: Array | int) -> UInt32[Array, "2"]:
    """Derive a key from a key and numbers (a step, a layer, a purpose)."""
    for number in numbers:
        number = jnp.asarray(number).astype(jnp.uint32)
        a, b = threefry2x32_p.bind(
            *(vary_like(k, number) for k in key), vary_like(number, key), vary_like(jnp.uint32(0), key, number)
        )
        key = jnp.stack([a, b])
    return key


def uniform_at(key: UInt32[Array, "2"], row: UInt32[Array, "..."], column: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Draw from the open interval (0, 1) in float32, one number for each (row, column)."""
    return ((bits_at(key, row, column) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


def normal_at(
    key: UInt32[Array, "2"], row: UInt32[Array, "..."], column: UInt32[Array, "..."], dtype: str = "float32"
) -> Float[Array, "..."]:
    """Draw from the standard normal, one number for each (row, column); the uniform behind it has float32's bits."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return jax.scipy.special.ndtri(uniform_at(key, row, column).astype(wide)).astype(dtype)


def dropout(
    x: Float[Array, "*X"], rate: float, key: UInt32[Array, "2"], row: UInt32[Array, "*r"], column: UInt32[Array, "*c"]
) -> Float[Array, "..."]:
    """Zero each element with probability `rate` and scale the rest by 1/(1-rate); row and column broadcast to x."""
    row, column = jnp.broadcast_to(row, x.shape), jnp.broadcast_to(column, x.shape)
    keep = bits_at(key, row, column) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
