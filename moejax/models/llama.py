"""Llama (arXiv 2302.13971, 2407.21783): the dense transformer of RMSNorm, rotary grouped-query attention and SwiGLU."""

from moejax.config.model import ModelConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: all dense."""
    return layer.layers(config)
