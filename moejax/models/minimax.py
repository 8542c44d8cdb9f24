"""MiniMax-01 (arXiv 2501.08313): seven layers of lightning attention to one of softmax, all sparse, post-norm."""

from moejax.config.model import ModelConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: `mixers` says which are lightning; DeepNorm's constants are in `residual`."""
    return layer.layers(config)
