"""Switch transformer (arXiv 2101.03961): top-1 experts in every moe.every-th layer, gated by the full softmax."""

from moejax.config.model import ModelConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: the last of each period of moe.every is sparse."""
    assert config.moe is not None
    router = config.moe.router
    if router.num_active != 1 or router.normalize:
        raise ValueError(
            f"a switch routes to one expert by its full probability: set num_active = 1, not {router.num_active}, "
            "and normalize = false"
        )
    return layer.layers(config)
