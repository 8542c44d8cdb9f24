"""DeepSeek-V3 (arXiv 2412.19437): latent attention; sigmoid scores, a balancing bias, groups, shared experts."""

from moejax.config.model import ModelConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: the first ones, moe.dense_layers, are dense."""
    return layer.layers(config)
