"""MiniMax-Text-01 as Hugging Face has it (model type minimax), and as MiniMax released it (minimax_text_01).

The released model rotates `rotary_dim` channels of a head; transformers ignores that key (issues 48241 and 48486) and
rotates all. We do what the released model does wherever the key stands.
"""

from typing import Any

from moejax.config.attention import LightningConfig
from moejax.config.model import ModelConfig, ResidualConfig
from moejax.config.moe import MoEConfig
from moejax.interop import names
from moejax.interop.config_json import ConfigJson, Json, router_json
from moejax.interop.layout import Stored
from moejax.interop.names import Table
from moejax.interop.sizes import grouped, grouped_json, sizes, sizes_json
from moejax.models.layer import Layer

MODEL_TYPES, ARCHITECTURE = ("minimax", "minimax_text_01"), "MiniMaxForCausalLM"
"""transformers' name, which is written, and the release's."""

_KEYS = {
    "attention": ("full_attn_{}_factor", "layernorm_full_attention_{}"),
    "lightning": ("linear_attn_{}_factor", "layernorm_linear_attention_{}"),
    "ffn": ("mlp_{}_factor", "layernorm_mlp_{}"),
}
"""Of each sublayer's alpha and beta: transformers' key and the release's."""


def config(hf: ConfigJson) -> ModelConfig:
    """Read a config.json of either kind; of lightning attention it says the layers alone, its heads are attention's."""
    attention = grouped(hf, theta=1e6)
    hf.must_be("shared_intermediate_size", (0,), 0)
    moe = MoEConfig(
        num_experts=hf.get("num_local_experts", 8), expert_ffn=hf.get("intermediate_size"), router=hf.router()
    )
    mixers = _mixers(hf)
    lightning = LightningConfig(num_heads=attention.num_heads, head_dim=attention.head_dim)
    residual = ResidualConfig(of_norm=hf.get("postnorm", True), **{name: _factors(hf, name) for name in _KEYS})
    return ModelConfig(
        name="minimax",
        attention=attention,
        lightning=lightning if "lightning" in mixers else None,
        mixers=mixers,
        moe=moe,
        residual=residual,
        **sizes(hf, eps=1e-5),
    )


def _factors(hf: ConfigJson, name: str) -> tuple[float, float]:
    alpha, beta = ([key.format(x) for key in _KEYS[name]] for x in ("alpha", "beta"))
    return tuple(float(hf.get(new, hf.get(old, 1.0))) for new, old in (alpha, beta))  # type: ignore[return-value]


def _mixers(hf: ConfigJson) -> tuple[Any, ...]:
    """Read which layers are lightning's; where nothing is said, as transformers does: every other, from the second."""
    layers = hf.get("num_hidden_layers")
    if (numbers := hf.get("attn_type_list", None)) is not None:
        return tuple("attention" if number else "lightning" for number in numbers[:layers])
    named = hf.get("layer_types", ["full_attention" if n % 2 == 0 else "linear_attention" for n in range(layers)])
    kinds = {"full_attention": "attention", "linear_attention": "lightning"}
    return tuple(kinds[name] for name in named)


def to_json(config: ModelConfig) -> Json:
    """Write a config.json for transformers, with the release's rotary_dim beside where not all is rotated."""
    moe, attention = config.moe, config.attention
    assert moe is not None
    kinds = {"attention": "full_attention", "lightning": "linear_attention"}
    mixers = [config.mixers[n % len(config.mixers)] for n in range(config.num_layers)]
    written = sizes_json(config, ffn=moe.expert_ffn) | grouped_json(attention) | router_json(moe.router)
    written |= {"num_local_experts": moe.num_experts, "layer_types": [kinds[mixer] for mixer in mixers]}
    written.pop("partial_rotary_factor", None)
    if attention.rope.dim is not None:
        written["rotary_dim"] = attention.rope.dim
    for name, (key, _) in _KEYS.items():
        alpha, beta = getattr(config.residual, name)
        written |= {key.format("alpha"): alpha, key.format("beta"): beta}
    return written


def layer(config: ModelConfig, layer: Layer) -> Table:
    """Name a layer's weights; lightning attention's projection holds each head's query, key and value together."""
    table = names.mixtral(config)
    if not isinstance(layer.mixer, LightningConfig):
        return table
    heads = "(N H) D -> D N H"
    return table | {
        "mixer.qkv": Stored("self_attn.qkv_proj.weight", heads),
        "mixer.gate": Stored("self_attn.output_gate.weight", heads),
        "mixer.norm.scale": Stored("self_attn.norm.weight", "(N H) -> N H"),
        "mixer.out": Stored("self_attn.out_proj.weight", "D (N H) -> N H D"),
    }


def ignored(config: ModelConfig) -> list[str]:
    """Give patterns of tensors that are left out: tables of decays, computed anew (bf16 files hold them rounded)."""
    return [r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$"]
