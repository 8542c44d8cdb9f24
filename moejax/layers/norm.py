"""The norm before a sublayer, of a head, or of all heads together."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from moejax.config.model import Precision
from moejax.layers.param import make_param, read
from moejax.ops.norm import rms_norm
from moejax.parallel.plan import MeshPlan


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a learned scale (arXiv 1910.07467)."""

    def __init__(self, plan: MeshPlan, rngs: nnx.Rngs, dim: int, eps: float, precision: Precision) -> None:
        self.scale = make_param(plan, rngs, (dim,), ("embed",), precision.params)
        self.eps, self.dtype = eps, precision.compute

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise the last dim."""
        return rms_norm(x, read(self.scale, self.dtype), self.eps)


class HeadNorm(nnx.Module):
    """RMSNorm of queries or keys: of each head by one scale, or of all heads together, which tensor may split."""

    def __init__(
        self, plan: MeshPlan, rngs: nnx.Rngs, heads: int, dim: int, eps: float, precision: Precision, axis: str | None
    ) -> None:
        shape, axes = ((dim,), ("head_dim",)) if axis is None else ((heads, dim), (axis, "head_dim"))
        self.scale = make_param(plan, rngs, shape, axes, precision.params)
        self.plan, self.eps, self.dtype, self.axis = plan, eps, precision.compute, axis

    def __call__(self, x_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Normalise each head; or over all heads (`axis` is their logical name) of all tensor ranks."""
        scale = read(self.scale, self.dtype)
        if self.axis is None:
            return rms_norm(x_BTNH, scale, self.eps)
        wide_BTNH = x_BTNH.astype(jnp.promote_types(x_BTNH.dtype, jnp.float32))
        mean = self.plan.mean_over(jnp.square(wide_BTNH).mean((-2, -1), keepdims=True), self.axis)
        return (wide_BTNH * lax.rsqrt(mean + self.eps)).astype(x_BTNH.dtype) * scale
