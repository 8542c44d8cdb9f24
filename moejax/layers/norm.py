"""The norm before a sublayer."""

from flax import nnx
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
