"""Which keys of a config.json do most families spell alike? Read and written here, the others in the family's file."""

from typing import Any

from moejax.config.attention import AttentionConfig
from moejax.config.model import ModelConfig, Precision
from moejax.interop.config_json import ConfigJson, Json, rope_json


def sizes(hf: ConfigJson, eps: float = 1e-6) -> dict[str, Any]:
    """Read a model's sizes as ModelConfig's arguments; `eps` is the model type's own default."""
    hf.must_be("hidden_act", ("silu", "swish"), "silu")
    dtype: Any = hf.dtype()
    return {
        "vocab": hf.get("vocab_size"),
        "embed": hf.get("hidden_size"),
        "num_layers": hf.get("num_hidden_layers"),
        "ffn": hf.get("intermediate_size"),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "norm_eps": hf.get("rms_norm_eps", eps),
        "precision": Precision(params=dtype, compute=dtype),
    }


def sizes_json(config: ModelConfig, ffn: int | None = None) -> Json:
    """Write what `sizes` reads."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.embed,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.ffn if ffn is None else ffn,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "torch_dtype": config.precision.params,
    }


def grouped(hf: ConfigJson, theta: float = 10_000.0, **fixed: Any) -> AttentionConfig:
    """Read grouped-query attention; `fixed` is what the family's file knows of it."""
    heads = hf.get("num_attention_heads")
    head_dim = hf.get("head_dim", hf.get("hidden_size") // heads)
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads", heads),
        head_dim=head_dim,
        rope=hf.rope(theta, head_dim),
        **fixed,
    )


def grouped_json(attention: AttentionConfig) -> Json:
    """Write what `grouped` reads."""
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        **rope_json(attention.rope, attention.head_dim),
    }


def sparse_layers(hf: ConfigJson) -> dict[str, Any]:
    """Read Qwen's way of saying which layers have experts, as MoEConfig's arguments."""
    return {"every": hf.get("decoder_sparse_step", 1), "dense_layers": tuple(hf.get("mlp_only_layers", ()))}


def first_dense(hf: ConfigJson) -> tuple[int, ...]:
    """Read DeepSeek's way: so many dense layers come first."""
    hf.must_be("moe_layer_freq", (1,), 1)
    return tuple(range(hf.get("first_k_dense_replace", 0)))
