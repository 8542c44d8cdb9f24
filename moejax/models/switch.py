"""Switch transformer (arXiv 2101.03961): top-1 experts in every moe.every-th layer, gated by the full softmax."""

from moejax.config.model import ModelConfig
from moejax.config.moe import RouterConfig
from moejax.models import layer
from moejax.models.layer import Layer


def layers(config: ModelConfig) -> list[Layer]:
    """List the layers: the last of each period of moe.every is sparse."""
    assert config.moe is not None
    check_router(config.moe.router)
    return layer.layers(config)


def check_router(router: RouterConfig) -> None:
    """Raise ValueError unless a router is a switch's."""
    if router.num_active != 1 or router.normalize:
        raise ValueError(
            f"a switch routes to one expert by its full probability: set num_active = 1, not {router.num_active}, "
            "and normalize = false"
        )
