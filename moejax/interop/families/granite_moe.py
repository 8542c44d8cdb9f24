"""GraniteMoE as Hugging Face has it: model type granitemoe. Experts are stacked, gate above up."""

from moejax.config.model import ModelConfig, ResidualConfig
from moejax.config.moe import MoEConfig
from moejax.interop import names
from moejax.interop.config_json import ConfigJson, Json, router_json
from moejax.interop.layout import Stored
from moejax.interop.names import Table
from moejax.interop.sizes import grouped, grouped_json, sizes, sizes_json
from moejax.models.layer import Layer

MODEL_TYPES, ARCHITECTURE = ("granitemoe",), "GraniteMoeForCausalLM"


def config(hf: ConfigJson) -> ModelConfig:
    """Read a config.json."""
    bias, joined = hf.get("attention_bias", False), (1.0, float(hf.get("residual_multiplier", 1.0)))
    moe = MoEConfig(
        num_experts=hf.get("num_local_experts", 8), expert_ffn=hf.get("intermediate_size"), router=hf.router()
    )
    return ModelConfig(
        name="granite_moe",
        attention=grouped(hf, qkv_bias=bias, out_bias=bias, scale=float(hf.get("attention_multiplier", 1.0))),
        moe=moe,
        residual=ResidualConfig(attention=joined, ffn=joined),
        embed_scale=float(hf.get("embedding_multiplier", 1.0)),
        logit_divisor=float(hf.get("logits_scaling", 1.0)),
        **sizes(hf),
    )


def to_json(config: ModelConfig) -> Json:
    """Write a config.json."""
    moe = config.moe
    assert moe is not None
    own = {
        "num_local_experts": moe.num_experts,
        "attention_bias": config.attention.qkv_bias,
        "attention_multiplier": config.attention.scale,
        "residual_multiplier": config.residual.ffn[1],
        "embedding_multiplier": config.embed_scale,
        "logits_scaling": config.logit_divisor,
    }
    written = sizes_json(config, ffn=moe.expert_ffn) | grouped_json(config.attention) | router_json(moe.router) | own
    del written["head_dim"]  # hidden_size / num_attention_heads, always
    return written


def layer(config: ModelConfig, layer: Layer) -> Table:
    """Name a layer's weights."""
    table = names.llama(config) | names.router("block_sparse_moe.router.layer")
    for number, name in enumerate(("gate", "up")):
        stored = Stored("block_sparse_moe.input_linear.weight", "E (g F) D -> E D F", ("g", number, 2))
        table[f"ffn.experts.{name}"] = stored
    table["ffn.experts.down"] = Stored("block_sparse_moe.output_linear.weight", "E D F -> E F D")
    return table
