"""OLMoE (arXiv 2409.02060): 64 small experts, one RMSNorm over all heads' queries and one over all keys."""

from moejax.config.model import ModelConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: all sparse."""
    return layer.layers(config)
