"""Qwen3's dense models as Hugging Face has them: model type qwen3."""

from moejax.config.model import ModelConfig
from moejax.interop import names
from moejax.interop.config_json import ConfigJson, Json
from moejax.interop.names import Table
from moejax.interop.sizes import grouped, grouped_json, sizes, sizes_json
from moejax.models.layer import Layer

MODEL_TYPES, ARCHITECTURE = ("qwen3",), "Qwen3ForCausalLM"


def config(hf: ConfigJson) -> ModelConfig:
    """Read a config.json; windows need use_sliding_window, and are in layers from max_window_layers on."""
    bias, windowed = hf.get("attention_bias", False), hf.get("use_sliding_window", False)
    window = hf.get("sliding_window", None) if windowed else None
    full = min(hf.get("max_window_layers", 28), hf.get("num_hidden_layers")) if window else 0
    layers = hf.get("num_hidden_layers")
    mixers = ("global",) * full + ("attention",) * (layers - full) if full else ("attention",)
    attention = grouped(hf, qkv_bias=bias, out_bias=bias, qk_norm="head", window=window)
    return ModelConfig(name="qwen3", attention=attention, mixers=mixers, **sizes(hf))


def to_json(config: ModelConfig) -> Json:
    """Write a config.json."""
    window = config.attention.window
    kinds = [config.mixers[n % len(config.mixers)] for n in range(config.num_layers)]
    windows = {
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": kinds.count("global") if window else config.num_layers,
        "attention_bias": config.attention.qkv_bias,
    }
    return sizes_json(config) | grouped_json(config.attention) | windows


def layer(config: ModelConfig, layer: Layer) -> Table:
    """Name a layer's weights."""
    return names.llama(config)
