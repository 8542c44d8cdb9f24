"""Mixtral (arXiv 2401.04088): every layer sparse, dropless, top-k with weights that sum to one.

The router's other kinds (noisy top-k, expert choice, sigmoid with a balancing bias) and shared experts are options of
the same layer list.
"""

from moejax.config.model import ModelConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: the last of each period of moe.every is sparse; Mixtral's own period is 1."""
    return layer.layers(config)
