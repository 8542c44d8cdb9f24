"""Mixtral (arXiv 2401.04088): every layer sparse, dropless, top-k with weights that sum to one.

The router's other kinds (noisy top-k, expert choice, sigmoid with a balancing bias) and shared experts are options of
the same layer list.
"""

from moejax.config.model import ModelConfig
from moejax.models.block import Kind


def layers(config: ModelConfig) -> list[Kind]:
    """List the layers: the last of each period of moe.every is sparse; Mixtral's own period is 1."""
    assert config.moe is not None
    return ["sparse" if (i + 1) % config.moe.every == 0 else "dense" for i in range(config.num_layers)]
