"""What is the gate of a feed-forward layer?"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """Give silu(gate) * up (arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up


def clamped_swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"], limit: float) -> Float[Array, "*B F"]:
    """Give gpt-oss's (up + 1) * gate * sigmoid(1.702 gate), gate bounded from above, up from both sides."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)
