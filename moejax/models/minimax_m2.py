"""MiniMax-M2: softmax attention with one norm over all heads, sigmoid scores and a balancing bias."""

from moejax.config.model import ModelConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: all sparse."""
    return layer.layers(config)
