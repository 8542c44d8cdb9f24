"""Which token comes next?"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from moejax.ops.random import uniform_at


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits. Temperature 0 is greedy; top_k 0 and top_p 1 cut nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must not be negative; 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"top_k ({self.top_k}) must not be negative; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be in (0, 1]; 1 keeps every token")


def filter_logits(logits_BV: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """Set to -inf what lies outside the k largest, then outside the smallest set of probability >= top_p.

    The set always holds the largest; ties at the k-th value stay.
    """
    if 0 < top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if top_p < 1.0:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        probs_BV = jax.nn.softmax(sorted_BV)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        kept_BV = jnp.where(before_BV < top_p, sorted_BV, jnp.inf)
        logits_BV = jnp.where(logits_BV < kept_BV.min(-1, keepdims=True), -jnp.inf, logits_BV)
    return logits_BV


def sample(
    logits_BV: Float[Array, "B V"],
    sampling: Sampling,
    key: UInt32[Array, "2"],
    rows_B: UInt32[Array, " B"],
) -> Int[Array, " B"]:
    """Draw a token for each sequence by the Gumbel trick; a row's noise depends on the key and its number alone."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filter_logits(logits_BV / sampling.temperature, sampling.top_k, sampling.top_p)
    column_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.uint32)
    gumbel_BV = -jnp.log(-jnp.log(uniform_at(key, rows_B[:, None], column_V[None])))
    return jnp.argmax(logits_BV + gumbel_BV, axis=-1).astype(jnp.int32)
