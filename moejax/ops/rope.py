"""How does a query or key carry its position?"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_tables(positions_BT: Int[Array, "B T"], head_dim: int, theta: float) -> Float[Array, "2 B T h"]:
    """Give cos and sin of position * theta^(-2i/H) for i < H/2, in float32 or wider (arXiv 2104.09864)."""
    wide = jnp.result_type(float)  # float64 where x64 is enabled
    inverse_h = theta ** (-jnp.arange(0, head_dim, 2, dtype=wide) / head_dim)
    angle_BTh = positions_BT[..., None].astype(wide) * inverse_h
    return jnp.stack([jnp.cos(angle_BTh), jnp.sin(angle_BTh)])


def apply_rope(x_BTNH: Float[Array, "B T N H"], tables: Float[Array, "2 B T h"]) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H/2) of every head."""
    cos, sin = (t[:, :, None, :].astype(x_BTNH.dtype) for t in tables)
    a, b = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
