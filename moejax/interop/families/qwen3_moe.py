"""Qwen3-MoE as Hugging Face has it: model type qwen3_moe."""

from moejax.config.model import ModelConfig
from moejax.config.moe import MoEConfig
from moejax.interop import names
from moejax.interop.config_json import ConfigJson, Json, router_json
from moejax.interop.names import Table
from moejax.interop.sizes import grouped, grouped_json, sizes, sizes_json, sparse_layers
from moejax.models.layer import Layer

MODEL_TYPES, ARCHITECTURE = ("qwen3_moe",), "Qwen3MoeForCausalLM"


def config(hf: ConfigJson) -> ModelConfig:
    """Read a config.json; transformers 5 says num_local_experts, the hub num_experts."""
    bias = hf.get("attention_bias", False)
    window = hf.get("sliding_window", None) if hf.get("use_sliding_window", False) else None
    moe = MoEConfig(
        num_experts=hf.get("num_experts", hf.get("num_local_experts", 128)),
        expert_ffn=hf.get("moe_intermediate_size"),
        router=hf.router(normalize=hf.get("norm_topk_prob", False)),
        **sparse_layers(hf),
    )
    attention = grouped(hf, qkv_bias=bias, out_bias=bias, qk_norm="head", window=window)
    return ModelConfig(name="qwen3_moe", attention=attention, moe=moe, **sizes(hf))


def to_json(config: ModelConfig) -> Json:
    """Write a config.json."""
    moe = config.moe
    assert moe is not None
    own = {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.expert_ffn,
        "norm_topk_prob": moe.router.normalize,
        "decoder_sparse_step": moe.every,
        "mlp_only_layers": list(moe.dense_layers),
        "attention_bias": config.attention.qkv_bias,
        "sliding_window": config.attention.window,
        "use_sliding_window": config.attention.window is not None,
    }
    return sizes_json(config) | grouped_json(config.attention) | router_json(moe.router) | own


def layer(config: ModelConfig, layer: Layer) -> Table:
    """Name a layer's weights."""
    return names.with_experts(config)
