"""MiniMax-M2 as Hugging Face has it: model type minimax_m2."""

from moejax.config.model import ModelConfig
from moejax.config.moe import MoEConfig
from moejax.interop import names
from moejax.interop.config_json import ConfigJson, Json, router_json
from moejax.interop.families.deepseek_v3 import balancing_bias, ignored
from moejax.interop.names import Table
from moejax.interop.sizes import grouped, grouped_json, sizes, sizes_json
from moejax.models.layer import Layer

MODEL_TYPES, ARCHITECTURE = ("minimax_m2",), "MiniMaxM2ForCausalLM"

__all__ = ["ARCHITECTURE", "MODEL_TYPES", "config", "ignored", "layer", "to_json"]


def config(hf: ConfigJson) -> ModelConfig:
    """Read a config.json."""
    hf.must_be("scoring_func", ("sigmoid",), "sigmoid")
    hf.must_be("use_qk_norm", (True,), True)
    moe = MoEConfig(
        num_experts=hf.get("num_local_experts"),
        expert_ffn=hf.get("intermediate_size"),
        router=hf.router(score="sigmoid", bias_update_rate=0.0),
    )
    attention = grouped(hf, theta=5e6, qk_norm="projection")
    return ModelConfig(name="minimax_m2", attention=attention, moe=moe, **sizes(hf))


def to_json(config: ModelConfig) -> Json:
    """Write a config.json."""
    moe, attention = config.moe, config.attention
    assert moe is not None
    own = {
        "num_local_experts": moe.num_experts,
        "rotary_dim": attention.rope.dim or attention.head_dim,
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
    }
    return sizes_json(config, ffn=moe.expert_ffn) | grouped_json(attention) | router_json(moe.router) | own


def layer(config: ModelConfig, layer: Layer) -> Table:
    """Name a layer's weights."""
    return names.mixtral(config) | balancing_bias("block_sparse_moe")
