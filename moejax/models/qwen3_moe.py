"""Qwen3-MoE (arXiv 2505.09388): softmax top-k, no shared experts, an RMSNorm on every head's queries and keys."""

from moejax.config.model import ModelConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: sparse, but for moe.dense_layers and between periods of moe.every."""
    return layer.layers(config)
