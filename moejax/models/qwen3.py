"""Qwen3's dense models (arXiv 2505.09388): Llama with an RMSNorm on every head's queries and keys."""

from moejax.config.model import ModelConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: all dense."""
    return layer.layers(config)
