"""GLM-4.5 as Hugging Face has it: model type glm4_moe."""

from moejax.config.model import ModelConfig
from moejax.config.moe import RouterConfig
from moejax.interop import names
from moejax.interop.config_json import ConfigJson, Json
from moejax.interop.families.deepseek_v3 import experts, experts_json, ignored
from moejax.interop.layout import Stored
from moejax.interop.names import Table
from moejax.interop.sizes import grouped, grouped_json, sizes, sizes_json
from moejax.models.layer import Layer

MODEL_TYPE, ARCHITECTURE = "glm4_moe", "Glm4MoeForCausalLM"

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "config", "ignored", "layer", "to_json"]


def config(hf: ConfigJson) -> ModelConfig:
    """Read a config.json; attention_bias is on queries, keys and values alone."""
    router = RouterConfig(
        num_active=hf.get("num_experts_per_tok"),
        score="sigmoid",
        normalize=hf.get("norm_topk_prob", True),
        scale=hf.get("routed_scaling_factor", 1.0),
        bias_update_rate=0.0,
        num_groups=hf.get("n_group", 1),
        groups_kept=hf.get("topk_group", 1),
        group_best=2,
    )
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
    bias = {"ffn.router.bias": Stored("mlp.gate.e_score_correction_bias", "E -> E")}
    return names.with_experts(config) | names.feed_forward("ffn.shared", "mlp.shared_experts") | bias
