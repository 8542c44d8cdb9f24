"""The dense transformer: RMSNorm, rotary grouped-query attention, SwiGLU (arXiv 2302.13971)."""

from moejax.config.model import ModelConfig
from moejax.models.block import Kind


def layers(config: ModelConfig) -> list[Kind]:
    """List the layers: all dense."""
    return ["dense"] * config.num_layers
