"""Qwen2-MoE (arXiv 2407.10671): softmax weights left as they are, and a gated shared expert."""

from moejax.config.model import ModelConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: sparse, but for moe.dense_layers and between periods of moe.every."""
    return layer.layers(config)
