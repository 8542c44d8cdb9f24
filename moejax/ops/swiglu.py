"""What is the gate of a feed-forward layer?"""

import jax
from jaxtyping import Array, Float


def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """Give silu(gate) * up (arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up
