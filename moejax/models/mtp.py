"""Multi-token prediction (arXiv 2412.19437, 2.2): at depth k a block more predicts the token k places further on.

It reads the stream of the depth before it beside the embedding of the next token, so that causality holds; table and
head are the model's own. It is for training: generation leaves it out.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config.model import ModelConfig
from moejax.layers.context import Context
from moejax.layers.norm import RMSNorm
from moejax.layers.param import make_param, read
from moejax.models.block import Block
from moejax.models.layer import Layer
from moejax.moe.stats import RouterStats
from moejax.parallel.plan import MeshPlan


class FurtherToken(nnx.Module):
    """One depth: norms of the stream and of the next token's embedding, a matrix that joins both, a block, a norm."""

    def __init__(self, config: ModelConfig, plan: MeshPlan, rngs: nnx.Rngs, layer: Layer) -> None:
        dim, precision = config.embed, config.precision
        self.stream_norm = RMSNorm(plan, rngs, dim, config.norm_eps, precision)
        self.token_norm = RMSNorm(plan, rngs, dim, config.norm_eps, precision)
        self.join = make_param(plan, rngs, (2 * dim, dim), ("embed", None), precision.params, fan_in=2 * dim)
        self.block = Block(config, plan, rngs, layer)
        self.norm = RMSNorm(plan, rngs, dim, config.norm_eps, precision)
        self.plan, self.dtype = plan, precision.compute

    def __call__(
        self, x_BtD: Float[Array, "B t D"], token_BtD: Float[Array, "B t D"], context: Context
    ) -> tuple[Float[Array, "B t D"], Float[Array, "B T D"], RouterStats | None]:
        """Give the next depth's stream, what meets the head, and what the router did."""
        both = jnp.concatenate([self.stream_norm(x_BtD), self.token_norm(token_BtD)], axis=-1)
        x_BtD, stats, _ = self.block(both @ read(self.join, self.dtype), context)
        return x_BtD, self.plan.enter_tensor(self.norm(x_BtD)), stats


def ahead(x_BT: Int[Array, "B T"] | Float[Array, "B T"], places: int) -> Array:
    """Give what stands so many places further on; zeros beyond the end."""
    return jnp.pad(x_BT[:, places:], ((0, 0), (0, places)))
