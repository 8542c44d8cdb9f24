"""What the tests of attention share: small packed sequences, attention by hand, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.ops.attention import attention
from moejax.ops.mask import Mask

B, T, N, K, H = 2, 13, 4, 2, 6


def draw(seed=0, length=T, heads=N, kv_heads=K, dtype="float64"):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, length, n, H)), dtype) for n in (heads, kv_heads, kv_heads)]


def segments(length=T) -> jax.Array:
    """One sequence of two documents and padding, one of three documents."""
    rows = np.array([[1] * 5 + [2] * (length - 7) + [0] * 2, [1] + [2] * 6 + [3] * (length - 7)])
    return jnp.asarray(rows, jnp.int32)


def dense_mask(length=T) -> jax.Array:
    return Mask.of_segments(segments(length)).dense(length, length)


MASK = Mask.of_segments(segments())


def by_reference(q, k, v, mask, **options):
    return attention(q, k, v, mask, implementation="reference", **options)


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
