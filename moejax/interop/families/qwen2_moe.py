"""Qwen2-MoE as Hugging Face has it: model type qwen2_moe."""

from moejax.config.model import ModelConfig
from moejax.config.moe import MoEConfig
from moejax.interop import names
from moejax.interop.config_json import ConfigJson, Json, router_json
from moejax.interop.layout import Stored
from moejax.interop.names import Table
from moejax.interop.sizes import grouped, grouped_json, sizes, sizes_json, sparse_layers
from moejax.models.layer import Layer

MODEL_TYPES, ARCHITECTURE = ("qwen2_moe",), "Qwen2MoeForCausalLM"


def config(hf: ConfigJson) -> ModelConfig:
    """Read a config.json; biases are on queries, keys and values alone."""
    hf.must_be("use_sliding_window", (False,), False)
    moe = MoEConfig(
        num_experts=hf.get("num_experts", 60),
        expert_ffn=hf.get("moe_intermediate_size"),
        shared_ffn=hf.get("shared_expert_intermediate_size"),
        shared_gate=True,
        router=hf.router(normalize=hf.get("norm_topk_prob", False)),
        **sparse_layers(hf),
    )
    attention = grouped(hf, qkv_bias=hf.get("qkv_bias", True))
    return ModelConfig(name="qwen2_moe", attention=attention, moe=moe, **sizes(hf))


def to_json(config: ModelConfig) -> Json:
    """Write a config.json."""
    moe = config.moe
    assert moe is not None
    own = {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.expert_ffn,
        "shared_expert_intermediate_size": moe.shared_ffn,
        "norm_topk_prob": moe.router.normalize,
        "decoder_sparse_step": moe.every,
        "mlp_only_layers": list(moe.dense_layers),
        "qkv_bias": config.attention.qkv_bias,
    }
    return sizes_json(config) | grouped_json(config.attention) | router_json(moe.router) | own


def layer(config: ModelConfig, layer: Layer) -> Table:
    """Name a layer's weights."""
    gate = {"ffn.shared_gate": Stored("mlp.shared_expert_gate.weight", "F D -> D F")}
    return names.with_experts(config) | names.feed_forward("ffn.shared", "mlp.shared_expert") | gate
