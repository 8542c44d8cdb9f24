"""Mixtral as Hugging Face has it: model type mixtral. Its weights always sum to one: config.json does not say."""

from moejax.config.model import ModelConfig
from moejax.config.moe import MoEConfig
from moejax.interop import names
from moejax.interop.config_json import ConfigJson, Json, router_json
from moejax.interop.names import Table
from moejax.interop.sizes import grouped, grouped_json, sizes, sizes_json
from moejax.models.layer import Layer

MODEL_TYPES, ARCHITECTURE = ("mixtral",), "MixtralForCausalLM"


def config(hf: ConfigJson) -> ModelConfig:
    """Read a config.json."""
    moe = MoEConfig(
        num_experts=hf.get("num_local_experts", 8), expert_ffn=hf.get("intermediate_size"), router=hf.router()
    )
    attention = grouped(hf, theta=1e6, window=hf.get("sliding_window", None))
    return ModelConfig(name="mixtral", attention=attention, moe=moe, **sizes(hf, eps=1e-5))


def to_json(config: ModelConfig) -> Json:
    """Write a config.json."""
    assert config.moe is not None
    experts = {"num_local_experts": config.moe.num_experts, "sliding_window": config.attention.window}
    written = sizes_json(config, ffn=config.moe.expert_ffn) | grouped_json(config.attention)
    return written | experts | router_json(config.moe.router)


def layer(config: ModelConfig, layer: Layer) -> Table:
    """Name a layer's weights."""
    return names.mixtral(config)
