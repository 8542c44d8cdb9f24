"""gpt-oss as Hugging Face has it: model type gpt_oss. Experts are stacked, (in, out), gate and up interleaved."""

from moejax.config.model import ModelConfig
from moejax.config.moe import MoEConfig
from moejax.interop import names
from moejax.interop.config_json import ConfigJson, Json, router_json
from moejax.interop.layout import Stored
from moejax.interop.names import Table
from moejax.interop.sizes import grouped, grouped_json, sizes, sizes_json
from moejax.models.layer import Layer

MODEL_TYPES, ARCHITECTURE = ("gpt_oss",), "GptOssForCausalLM"

_KINDS = {"sliding_attention": "attention", "full_attention": "global"}


def config(hf: ConfigJson) -> ModelConfig:
    """Read a config.json; where it names no layers, windows are in every other, from the first."""
    hf.must_be("swiglu_alpha", (1.702,), 1.702)
    layers = hf.get("num_hidden_layers")
    named = hf.get("layer_types", [list(_KINDS)[number % 2] for number in range(layers)])
    moe = MoEConfig(
        num_experts=hf.get("num_local_experts"),
        expert_ffn=hf.get("intermediate_size"),
        activation="clamped_swiglu",
        limit=hf.get("swiglu_limit", 7.0),
        bias=True,
        router=hf.router(bias=True),
    )
    bias = hf.get("attention_bias", True)
    window = hf.get("sliding_window", 128)
    attention = grouped(hf, theta=150_000.0, window=window, sinks=True, qkv_bias=bias, out_bias=bias)
    mixers = tuple(_KINDS[name] for name in named)
    return ModelConfig(name="gpt_oss", attention=attention, mixers=mixers, moe=moe, **sizes(hf, eps=1e-5))  # type: ignore[arg-type]


def to_json(config: ModelConfig) -> Json:
    """Write a config.json."""
    moe = config.moe
    assert moe is not None
    kinds = {ours: theirs for theirs, ours in _KINDS.items()}
    mixers = [config.mixers[n % len(config.mixers)] for n in range(config.num_layers)]
    own = {
        "num_local_experts": moe.num_experts,
        "swiglu_limit": moe.limit,
        "sliding_window": config.attention.window,
        "layer_types": [kinds[mixer] for mixer in mixers],
        "attention_bias": config.attention.qkv_bias,
    }
    written = sizes_json(config, ffn=moe.expert_ffn) | grouped_json(config.attention)
    return written | router_json(moe.router) | own


def layer(config: ModelConfig, layer: Layer) -> Table:
    """Name a layer's weights."""
    table = names.llama(config) | names.router("mlp.router")
    table["ffn.router.logit_bias"] = Stored("mlp.router.bias", "E -> E")
    for number, name in enumerate(("gate", "up")):
        pick = ("g", number, 2)
        table[f"ffn.experts.{name}"] = Stored("mlp.experts.gate_up_proj", "E D (F g) -> E D F", pick)
        table[f"ffn.experts.{name}_bias"] = Stored("mlp.experts.gate_up_proj_bias", "E (F g) -> E F", pick)
    table["ffn.experts.down"] = Stored("mlp.experts.down_proj", "E F D -> E F D")
    table["ffn.experts.down_bias"] = Stored("mlp.experts.down_proj_bias", "E D -> E D")
    return table
