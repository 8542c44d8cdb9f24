"""GLM-4.5 (arXiv 2508.06471): DeepSeek-V3's router over grouped-query attention, half of a head rotated."""

from moejax.config.model import ModelConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: the first ones, moe.dense_layers, are dense."""
    return layer.layers(config)
