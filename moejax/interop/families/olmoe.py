"""OLMoE as Hugging Face has it: model type olmoe."""

from moejax.config.model import ModelConfig
from moejax.config.moe import MoEConfig
from moejax.interop import names
from moejax.interop.config_json import ConfigJson, Json, router_json
from moejax.interop.names import Table
from moejax.interop.sizes import grouped, grouped_json, sizes, sizes_json
from moejax.models.layer import Layer

MODEL_TYPES, ARCHITECTURE = ("olmoe",), "OlmoeForCausalLM"


def config(hf: ConfigJson) -> ModelConfig:
    """Read a config.json; an expert is intermediate_size wide."""
    bias = hf.get("attention_bias", False)
    moe = MoEConfig(
        num_experts=hf.get("num_experts", 64),
        expert_ffn=hf.get("intermediate_size"),
        router=hf.router(normalize=hf.get("norm_topk_prob", False)),
    )
    attention = grouped(hf, qkv_bias=bias, out_bias=bias, qk_norm="projection", clip=hf.get("clip_qkv", None))
    return ModelConfig(name="olmoe", attention=attention, moe=moe, **sizes(hf, eps=1e-5))


def to_json(config: ModelConfig) -> Json:
    """Write a config.json."""
    moe = config.moe
    assert moe is not None
    own = {
        "num_experts": moe.num_experts,
        "norm_topk_prob": moe.router.normalize,
        "clip_qkv": config.attention.clip,
        "attention_bias": config.attention.qkv_bias,
    }
    written = sizes_json(config, ffn=moe.expert_ffn) | grouped_json(config.attention) | router_json(moe.router) | own
    del written["head_dim"]  # hidden_size / num_attention_heads, always
    return written


def layer(config: ModelConfig, layer: Layer) -> Table:
    """Name a layer's weights."""
    return names.with_experts(config)
