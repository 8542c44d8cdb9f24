"""GLM-4.5 as Hugging Face has it: model type glm4_moe."""

from moejax.config.model import ModelConfig
from moejax.interop import names
from moejax.interop.config_json import ConfigJson, Json
from moejax.interop.families.deepseek_v3 import balancing_bias, experts, experts_json, ignored, sigmoid_router
from moejax.interop.names import Table
from moejax.interop.sizes import grouped, grouped_json, sizes, sizes_json
from moejax.models.layer import Layer

MODEL_TYPES, ARCHITECTURE = ("glm4_moe",), "Glm4MoeForCausalLM"

__all__ = ["ARCHITECTURE", "MODEL_TYPES", "config", "ignored", "layer", "to_json"]


def config(hf: ConfigJson) -> ModelConfig:
    """Read a config.json; attention_bias is on queries, keys and values alone."""
    router = sigmoid_router(hf, scale=1.0, groups=1, kept=1)
    norm = "head" if hf.get("use_qk_norm", False) else "none"
    attention = grouped(hf, qkv_bias=hf.get("attention_bias", False), qk_norm=norm)
    return ModelConfig(name="glm4_moe", attention=attention, moe=experts(hf, router), **sizes(hf, eps=1e-5))


def to_json(config: ModelConfig) -> Json:
    """Write a config.json."""
    assert config.moe is not None
    own = {
        "attention_bias": config.attention.qkv_bias,
        "use_qk_norm": config.attention.qk_norm == "head",
        "norm_topk_prob": config.moe.router.normalize,
    }
    return sizes_json(config) | grouped_json(config.attention) | experts_json(config.moe) | own


def layer(config: ModelConfig, layer: Layer) -> Table:
    """Name a layer's weights."""
    shared = names.feed_forward("ffn.shared", "mlp.shared_experts")
    return names.with_experts(config) | shared | balancing_bias("mlp.gate")
