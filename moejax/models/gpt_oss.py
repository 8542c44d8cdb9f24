"""gpt-oss (arXiv 2508.10925): sinks, windows in every other layer, clamped SwiGLU, softmax over the chosen."""

from moejax.config.model import ModelConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: `mixers` alternates windows and whole attention; all sparse."""
    return layer.layers(config)
