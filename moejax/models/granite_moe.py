"""GraniteMoE: Mixtral with multipliers on embeddings, scores, sublayers and logits."""

from moejax.config.model import ModelConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: all sparse."""
    return layer.layers(config)
