"""One layer of a decoder: a mixer and a feed-forward, each behind a norm and beside the residual stream."""

from typing import Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moejax.config.model import ModelConfig
from moejax.layers.attention import Attention
from moejax.layers.cache import KVCache
from moejax.layers.context import PURPOSE_FFN, PURPOSE_MIXER, Context, residual_dropout
from moejax.layers.ffn import FeedForward
from moejax.layers.norm import RMSNorm
from moejax.moe.dispatch import Apart
from moejax.moe.layer import MoELayer
from moejax.moe.stats import RouterStats
from moejax.parallel.plan import MeshPlan

Kind = Literal["dense", "sparse"]
"""What a layer's feed-forward is."""


class Block(nnx.Module):
    """Pre-norm transformer block: x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ModelConfig, plan: MeshPlan, rngs: nnx.Rngs, kind: Kind) -> None:
        dim, precision, scale = config.embed, config.precision, config.init_scale
        self.mixer_norm = RMSNorm(plan, rngs, dim, config.norm_eps, precision)
        self.mixer = Attention(plan, rngs, dim, config.attention, precision, scale)
        self.ffn_norm = RMSNorm(plan, rngs, dim, config.norm_eps, precision)
        if kind == "dense":
            self.ffn = FeedForward(plan, rngs, dim, config.ffn, precision, scale)
        else:
            assert config.moe is not None
            self.ffn = MoELayer(plan, rngs, dim, config.moe, precision, scale)
        self.plan, self.rate = plan, config.dropout

    def __call__(
        self, x_BtD: Float[Array, "B t D"], context: Context, cache: KVCache | None = None, apart: Apart | None = None
    ) -> tuple[Float[Array, "B t D"], RouterStats | None, KVCache | None]:
        """Give the next residual stream, what the router did (None: there is none) and the written cache."""
        x_BtD, cache = self.mix(x_BtD, context, cache)
        with jax.named_scope("ffn"):
            h_BtD, stats = self.ffn_norm(x_BtD), None
            if isinstance(self.ffn, MoELayer):
                y_BTD, stats = self.ffn(self.plan.enter_tensor(h_BtD), context, apart)
                y_BtD = self.plan.leave_tensor(y_BTD)
            else:
                y_BtD = self.ffn(h_BtD)
            y_BtD = checkpoint_name(y_BtD, "ffn_out")
            x_BtD = x_BtD + residual_dropout(self.plan, context, y_BtD, self.rate, PURPOSE_FFN)
        return x_BtD, stats, cache

    def mix(
        self, x_BtD: Float[Array, "B t D"], context: Context, cache: KVCache | None
    ) -> tuple[Float[Array, "B t D"], KVCache | None]:
        """Run the first sublayer alone."""
        with jax.named_scope("mixer"):
            y_BtD, cache = self.mixer(self.mixer_norm(x_BtD), context, cache)
            y_BtD = checkpoint_name(y_BtD, "mixer_out")
            x_BtD = x_BtD + residual_dropout(self.plan, context, y_BtD, self.rate, PURPOSE_MIXER)
        return x_BtD, cache

    def uncombined(
        self, x_BtD: Float[Array, "B t D"], context: Context, cache: KVCache | None = None
    ) -> tuple[Float[Array, "E B t D"], Float[Array, "E B T"], RouterStats, KVCache | None]:
        """Give one residual stream for each expert, and the experts' log gates: a mixture's last layer."""
        assert isinstance(self.ffn, MoELayer), "only a sparse layer has experts"
        x_BtD, cache = self.mix(x_BtD, context, cache)
        h_BTD = self.plan.enter_tensor(self.ffn_norm(x_BtD))
        y_EBTD, log_gate_EBT, stats = self.ffn.uncombined(h_BTD, context)
        return x_BtD + self.plan.leave_tensor(y_EBTD), log_gate_EBT, stats, cache
