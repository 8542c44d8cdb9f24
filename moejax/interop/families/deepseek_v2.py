"""DeepSeek-V2 as Hugging Face has it: model type deepseek_v2. Its weights are never brought to a sum of one."""

from moejax.config.model import ModelConfig
from moejax.config.moe import RouterConfig
from moejax.interop.config_json import ConfigJson, Json
from moejax.interop.families.deepseek_v3 import experts, experts_json, latent_attention, latent_json, latent_layer
from moejax.interop.names import Table
from moejax.interop.sizes import sizes, sizes_json
from moejax.models.layer import Layer

MODEL_TYPES, ARCHITECTURE = ("deepseek_v2",), "DeepseekV2ForCausalLM"


def config(hf: ConfigJson) -> ModelConfig:
    """Read a config.json; topk_method greedy has no groups."""
    hf.must_be("scoring_func", ("softmax",), "softmax")
    hf.must_be("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    grouped = hf.get("topk_method", "greedy") == "group_limited_greedy"
    router = RouterConfig(
        num_active=hf.get("num_experts_per_tok"),
        normalize=False,
        scale=hf.get("routed_scaling_factor", 1.0),
        num_groups=hf.get("n_group") if grouped else 1,
        groups_kept=hf.get("topk_group") if grouped else 1,
        group_best=1,
    )
    latent = latent_attention(hf, interleaved=True)
    return ModelConfig(name="deepseek_v2", latent=latent, moe=experts(hf, router), **sizes(hf))


def to_json(config: ModelConfig) -> Json:
    """Write a config.json."""
    assert config.moe is not None and config.latent is not None
    method = "group_limited_greedy" if config.moe.router.num_groups > 1 else "greedy"
    own = {"topk_method": method, "scoring_func": "softmax", "norm_topk_prob": False}
    return sizes_json(config) | latent_json(config.latent) | experts_json(config.moe) | own


def layer(config: ModelConfig, layer: Layer) -> Table:
    """Name a layer's weights."""
    return latent_layer(config)
