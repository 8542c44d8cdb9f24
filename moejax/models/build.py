"""Which model does a name stand for?"""

from flax import nnx

from moejax.config.model import ModelConfig
from moejax.models import dense, mixtral, soft_mixture, switch
from moejax.models.decoder import Decoder
from moejax.parallel.plan import MeshPlan
from moejax.parallel.rules import check_model

FAMILIES = {"dense": dense, "soft_mixture": soft_mixture, "switch": switch, "mixtral": mixtral}
"""Name -> the module whose `layers(config)` lists the layers."""


def build(config: ModelConfig, plan: MeshPlan, rngs: nnx.Rngs) -> Decoder:
    """Make a model on a mesh; raise ValueError, naming both numbers, where a size does not divide."""
    check_model(plan.rules, plan.config, config)
    return Decoder(config, plan, rngs, FAMILIES[config.name].layers(config))
