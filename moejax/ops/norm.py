"""How is a vector brought to unit root mean square?"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """Divide by the root mean square over D, then scale (arXiv 1910.07467); statistics in float32 or wider."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    mean = jnp.mean(jnp.square(x.astype(wide)), axis=-1, keepdims=True)
    return (x.astype(wide) * lax.rsqrt(mean + eps)).astype(x.dtype) * scale.astype(x.dtype)
