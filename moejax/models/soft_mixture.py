"""Jacobs' mixture of experts (1991) in every layer: all experts run, a softmax gate mixes them."""

from moejax.config.model import ModelConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: all sparse, so to speak; with moe.competitive the last one's experts predict apart."""
    assert config.moe is not None
    if config.moe.router.kind != "soft":
        raise ValueError(f'a soft_mixture needs moe.router.kind = "soft", not "{config.moe.router.kind}"')
    return layer.layers(config)
