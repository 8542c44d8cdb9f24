"""One layer of a decoder: a mixer and a feed-forward, each behind a norm and beside the residual stream."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moejax.config.attention import AttentionConfig, LatentConfig, T5AttentionConfig
from moejax.config.model import LoRAConfig, ModelConfig
from moejax.layers.attention import Attention
from moejax.layers.cache import Cache, KVCache, SourceCache
from moejax.layers.context import PURPOSE_CROSS, PURPOSE_FFN, PURPOSE_MIXER, Context, residual_dropout
from moejax.layers.ffn import FeedForward
from moejax.layers.latent_attention import LatentAttention
from moejax.layers.lightning import LightningAttention
from moejax.layers.lora import adapt
from moejax.layers.norm import RMSNorm
from moejax.layers.t5_attention import T5Attention
from moejax.models.layer import Layer
from moejax.moe.experts import Apart
from moejax.moe.layer import MoELayer
from moejax.moe.stats import RouterStats
from moejax.parallel.plan import MeshPlan


class Block(nnx.Module):
    """Transformer block: x = alpha x + beta mixer(norm(x)), then the same with the feed-forward.

    Pre-norm carries x on, post-norm what the norm gave. Between both a decoder behind an encoder looks into the source.
    """

    def __init__(self, config: ModelConfig, plan: MeshPlan, rngs: nnx.Rngs, layer: Layer) -> None:
        dim, precision, scale = config.embed, config.precision, config.init_scale
        self.mixer_norm = RMSNorm(plan, rngs, dim, config.norm_eps, precision)
        mixer = layer.mixer
        if isinstance(mixer, AttentionConfig):
            self.mixer = Attention(plan, rngs, dim, mixer, precision, config.norm_eps, scale)
        elif isinstance(mixer, LatentConfig):
            self.mixer = LatentAttention(plan, rngs, dim, mixer, precision, scale)
        elif isinstance(mixer, T5AttentionConfig):
            self.mixer = T5Attention(plan, rngs, dim, mixer, precision, layer.part != "encoder", scale)
        else:
            self.mixer = LightningAttention(plan, rngs, dim, mixer, precision, config.num_layers, scale)
        if layer.part == "decoder":
            assert isinstance(mixer, T5AttentionConfig), "no other mixer looks into a source"
            self.cross = T5Attention(plan, rngs, dim, mixer, precision, False, scale)
            self.cross_norm = RMSNorm(plan, rngs, dim, config.norm_eps, precision)
        else:
            self.cross, self.cross_norm = None, None
        self.ffn_norm = RMSNorm(plan, rngs, dim, config.norm_eps, precision)
        if layer.ffn == "dense":
            gated = config.ffn_activation == "swiglu"
            self.ffn = FeedForward(plan, rngs, dim, config.ffn, precision, scale, config.ffn_bias, gated)
        else:
            assert config.moe is not None
            self.ffn = MoELayer(plan, rngs, dim, config.moe, precision, scale)
        if config.lora is not None:
            self._adapt(config.lora, plan, rngs, precision.accumulate)
        self.plan, self.rate, self.layer = plan, config.dropout, layer

    def _adapt(self, lora: LoRAConfig, plan: MeshPlan, rngs: nnx.Rngs, dtype: str) -> None:
        """Give the targets their low-rank updates."""
        sparse = self.ffn if isinstance(self.ffn, MoELayer) else None
        experts, dense = (None, self.ffn) if sparse is None else (sparse.experts, sparse.shared)
        targets = {"attention": [self.mixer, self.cross], "experts": [experts], "ffn": [dense]}
        for module in (module for name in lora.targets for module in targets[name] if module is not None):
            adapt(module, plan, rngs, lora, dtype)

    def __call__(
        self, x_BtD: Float[Array, "B t D"], context: Context, cache: Cache | None = None, apart: Apart | None = None
    ) -> tuple[Float[Array, "B t D"], RouterStats | None, Cache | None]:
        """Give the next residual stream, what the router did (None: there is none) and the written cache."""
        x_BtD, cache = self.mix(x_BtD, context, cache)
        with jax.named_scope("ffn"):
            h_BtD, stats = self.ffn_norm(x_BtD), None
            if isinstance(self.ffn, MoELayer):
                y_BTD, stats = self.ffn(self.plan.enter_tensor(h_BtD), context, apart)
                y_BtD = self.plan.leave_tensor(y_BTD)
            else:
                y_BtD = self.ffn(h_BtD)
            y_BtD = residual_dropout(self.plan, context, checkpoint_name(y_BtD, "ffn_out"), self.rate, PURPOSE_FFN)
            x_BtD = self._join(x_BtD, h_BtD, y_BtD, self.layer.join_ffn)
        return x_BtD, stats, cache

    def mix(
        self, x_BtD: Float[Array, "B t D"], context: Context, cache: Cache | None
    ) -> tuple[Float[Array, "B t D"], Cache | None]:
        """Run what stands before the feed-forward."""
        source = None
        if isinstance(cache, SourceCache):
            cache, source = cache.own, cache.source
        with jax.named_scope("mixer"):
            h_BtD = self.mixer_norm(x_BtD)
            y_BtD, cache = self.mixer(h_BtD, context, cache)  # type: ignore[arg-type] (each mixer made its own)
            y_BtD = residual_dropout(self.plan, context, checkpoint_name(y_BtD, "mixer_out"), self.rate, PURPOSE_MIXER)
            x_BtD = self._join(x_BtD, h_BtD, y_BtD, self.layer.join_mixer)
        if self.cross is None or self.cross_norm is None:
            return x_BtD, cache
        with jax.named_scope("cross"):
            y_BtD = checkpoint_name(self.cross.look(self.cross_norm(x_BtD), context, source), "cross_out")
            x_BtD = x_BtD + residual_dropout(self.plan, context, y_BtD, self.rate, PURPOSE_CROSS)
        if source is None:
            return x_BtD, None
        assert isinstance(cache, KVCache)
        return x_BtD, SourceCache(cache, source)

    def uncombined(
        self, x_BtD: Float[Array, "B t D"], context: Context, cache: Cache | None = None
    ) -> tuple[Float[Array, "E B t D"], Float[Array, "E B T"], RouterStats, Cache | None]:
        """Give one residual stream for each expert, and the experts' log gates: a mixture's last layer."""
        assert isinstance(self.ffn, MoELayer), "only a sparse layer has experts"
        x_BtD, cache = self.mix(x_BtD, context, cache)
        h_BtD = self.ffn_norm(x_BtD)
        y_EBTD, log_gate_EBT, stats = self.ffn.uncombined(self.plan.enter_tensor(h_BtD), context)
        return self._join(x_BtD, h_BtD, self.plan.leave_tensor(y_EBTD), self.layer.join_ffn), log_gate_EBT, stats, cache

    def _join(self, x_BtD: Array, normed_BtD: Array, y_BtD: Array, weights: tuple[float, float]) -> Array:
        alpha, beta = weights
        carried_BtD = normed_BtD if self.layer.carries_norm else x_BtD
        carried_BtD = carried_BtD if alpha == 1.0 else alpha * carried_BtD
        return carried_BtD + (y_BtD if beta == 1.0 else beta * y_BtD)
