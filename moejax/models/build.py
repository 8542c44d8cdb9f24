"""Which model does a name stand for?"""

from flax import nnx

from moejax.config.model import ModelConfig
from moejax.models import (
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    granite_moe,
    llama,
    minimax,
    minimax_m2,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    soft_mixture,
    switch,
    switch_transformers,
)
from moejax.models.decoder import Decoder
from moejax.models.encoder_decoder import EncoderDecoder
from moejax.parallel.plan import MeshPlan
from moejax.parallel.rules import check_model

FAMILIES = {
    "llama": llama,
    "soft_mixture": soft_mixture,
    "switch": switch,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "minimax": minimax,
    "minimax_m2": minimax_m2,
    "gpt_oss": gpt_oss,
    "glm4_moe": glm4_moe,
    "granite_moe": granite_moe,
    "switch_transformers": switch_transformers,
}
"""Name -> the module whose `layers(config)` lists the layers."""


def build(config: ModelConfig, plan: MeshPlan, rngs: nnx.Rngs) -> Decoder:
    """Make a model on a mesh; raise ValueError, naming both numbers, where a size does not divide."""
    check_model(plan.rules, plan.config, config)
    kind = Decoder if config.encoder is None else EncoderDecoder
    return kind(config, plan, rngs, FAMILIES[config.name].layers(config))
