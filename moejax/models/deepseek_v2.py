"""DeepSeek-V2 (arXiv 2405.04434): latent attention; softmax scores, groups by their best expert, shared experts."""

from moejax.config.model import ModelConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: the first ones, moe.dense_layers, are dense."""
    return layer.layers(config)
