"""Llama as Hugging Face has it: model type llama."""

from moejax.config.model import ModelConfig
from moejax.interop import names
from moejax.interop.config_json import ConfigJson, Json
from moejax.interop.names import Table
from moejax.interop.sizes import grouped, grouped_json, sizes, sizes_json
from moejax.models.layer import Layer

MODEL_TYPES, ARCHITECTURE = ("llama",), "LlamaForCausalLM"


def config(hf: ConfigJson) -> ModelConfig:
    """Read a config.json; attention_bias is on queries, keys, values and output."""
    bias = hf.get("attention_bias", False)
    attention = grouped(hf, qkv_bias=bias, out_bias=bias)
    return ModelConfig(name="llama", attention=attention, ffn_bias=hf.get("mlp_bias", False), **sizes(hf))


def to_json(config: ModelConfig) -> Json:
    """Write a config.json."""
    biases = {"attention_bias": config.attention.qkv_bias, "mlp_bias": config.ffn_bias}
    return sizes_json(config) | grouped_json(config.attention) | biases


def layer(config: ModelConfig, layer: Layer) -> Table:
    """Name a layer's weights."""
    return names.llama(config)
