"""Which tiny models are golden? One for each family and for each setting of a family that changes the mathematics.

Numbers are chosen so that the setting is felt in 24 tokens (a window of 6, a clip of 0.8), that sizes which could be
mixed up differ, and that dims which need not divide do not. `matters` names fields and other values for them:
make_goldens refuses a case whose logits stay the same with one of those, for it would test nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DENSE = {
    "vocab_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "rms_norm_eps": 1e-2,
}  # fmt: skip
MOE = DENSE | {"router_aux_loss_coef": 0.05}


@dataclass(frozen=True)
class Case:
    """A tiny model."""

    model_type: str
    config: dict[str, Any]
    legacy: dict[str, Any] = field(default_factory=dict)
    """what the hub's config.json says otherwise; the value ... removes a key"""
    matters: dict[str, Any] = field(default_factory=dict)
    """other values of fields that must change the logits; a dotted name goes into rope_parameters"""
    storage: str = "F32"
    """dtype of the file's tensors, or of those that are not quantised"""
    quantisation: dict[str, Any] | None = None
    """`quantization_config` of a file whose layers are stored in FP8 or MXFP4"""
    prediction_layers: bool = False
    """whether the file has DeepSeek's layers for multi-token prediction, which are to be ignored"""


LLAMA = DENSE | {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MIXTRAL = MOE | {
    "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40,
    "num_local_experts": 6, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN3 = DENSE | {
    "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 56,
}  # fmt: skip
QWEN3_MOE = QWEN3 | {
    "router_aux_loss_coef": 0.05, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3,
}  # fmt: skip
DEEPSEEK_YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7,
}  # fmt: skip
DEEPSEEK = DENSE | {
    "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 56, "moe_intermediate_size": 20,
    "num_attention_heads": 3, "num_key_value_heads": 3, "n_shared_experts": 2, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7, "first_k_dense_replace": 1,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "rope_parameters": DEEPSEEK_YARN, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,  # as MLA's and lightning attention's inner norms have it, whatever the config says
}  # fmt: skip
DEEPSEEK_HUB = {
    "moe_layer_freq": 1, "ep_size": 1, "aux_loss_alpha": 0.001, "seq_aux": True, "head_dim": ..., "qk_head_dim": ...,
}  # fmt: skip
DEEPSEEK_V3_HUB = DEEPSEEK_HUB | {
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": ..., "num_nextn_predict_layers": 1,
}  # fmt: skip
GPT_OSS = MOE | {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "intermediate_size": 32,
    "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, "swiglu_limit": 1.5,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    },
}  # fmt: skip
GPT_OSS_HUB = {"experts_per_token": 2, "initial_context_length": 32, "swiglu_alpha": ...}
SWITCH = {
    "vocab_size": 96, "d_model": 48, "d_kv": 8, "num_heads": 4, "d_ff": 40, "num_layers": 4, "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_experts": 4, "expert_capacity": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "router_z_loss_coef": 0.01,
    "router_aux_loss_coef": 0.02, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
SWITCH_MATTERS = {"expert_capacity": 64, "relative_attention_max_distance": 128}

CASES: Mapping[str, Case] = {
    "llama": Case(
        "llama",
        LLAMA | {"head_dim": 24, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
        matters={"rope.rope_theta": 1e4, "rope.rope_type": "default", "rope.factor": 4.0, "rms_norm_eps": 1e-6},
    ),
    "llama_tied": Case(
        "llama",
        LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True, "eos_token_id": [2, 3]},
        legacy={"head_dim": ..., "rope_theta": ...},
    ),
    "llama_linear_rope": Case(
        "llama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        legacy={"rope_scaling": {"type": "linear", "factor": 4.0}},
        matters={"rope.factor": 1.0},
    ),
    "mixtral": Case("mixtral", MIXTRAL, legacy={"head_dim": ..., "rope_theta": ...}, matters={"rope.rope_theta": 1e4}),
    "mixtral_window": Case(
        "mixtral",
        MIXTRAL | {"head_dim": 16, "num_local_experts": 4, "sliding_window": 6, "tie_word_embeddings": True},
        matters={"sliding_window": 7},
    ),
    "mixtral_bf16": Case("mixtral", MIXTRAL, storage="BF16"),
    "qwen3": Case(
        "qwen3", QWEN3 | {"tie_word_embeddings": True, "num_hidden_layers": 3}, legacy={"layer_types": ...}
    ),
    "qwen3_moe": Case(
        "qwen3_moe",
        QWEN3_MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1], "norm_topk_prob": True},
        matters={"norm_topk_prob": False},
    ),
    "qwen3_moe_nonorm": Case(
        "qwen3_moe",
        QWEN3_MOE | {"norm_topk_prob": False, "use_sliding_window": True, "sliding_window": 7},
        matters={"norm_topk_prob": True, "sliding_window": 8},
    ),
    "qwen2_moe": Case(
        "qwen2_moe",
        MOE | {
            "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 56,
            "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28, "num_experts": 6,
            "num_experts_per_tok": 2, "norm_topk_prob": False,
        },
        legacy={"qkv_bias": ..., "layer_types": ..., "sliding_window": 4096},
        matters={"norm_topk_prob": True},
    ),
    "olmoe": Case(
        "olmoe",
        MOE | {
            "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
            "num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 0.8, "norm_topk_prob": False,
        },
        matters={"clip_qkv": None, "norm_topk_prob": True},
    ),
    "deepseek_v3": Case(
        "deepseek_v3",
        DEEPSEEK,
        legacy=DEEPSEEK_V3_HUB,
        matters={
            "rope_interleave": False, "topk_group": 4, "routed_scaling_factor": 1.0, "norm_topk_prob": False,
            "rope.mscale": 0.7, "rope.mscale_all_dim": 1.0, "rope.factor": 1.0, "rope.truncate": False,
        },
    ),
    "deepseek_v3_noq": Case(
        "deepseek_v3",
        DEEPSEEK | {
            "num_hidden_layers": 2, "q_lora_rank": None, "v_head_dim": 20, "norm_topk_prob": False, "n_group": 1,
            "topk_group": 1, "rope_interleave": False, "n_shared_experts": 1, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        legacy=DEEPSEEK_V3_HUB | {"rope_interleave": False},
        matters={"norm_topk_prob": True, "rope_interleave": True},
    ),
    "deepseek_v3_fp8": Case(
        "deepseek_v3",
        DEEPSEEK | {"num_hidden_layers": 2},
        legacy=DEEPSEEK_V3_HUB,
        storage="BF16",
        quantisation={
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [32, 32],
        },
        prediction_layers=True,
    ),
    "deepseek_v2": Case(
        "deepseek_v2",
        DEEPSEEK | {"num_attention_heads": 4, "num_key_value_heads": 4, "topk_method": "group_limited_greedy"},
        legacy=DEEPSEEK_HUB | {"scoring_func": "softmax"},
        matters={"topk_method": "greedy", "routed_scaling_factor": 1.0, "rope.mscale": 0.7, "rope.mscale_all_dim": 1.0},
    ),
    "minimax": Case(
        "minimax",
        MIXTRAL | {
            "rms_norm_eps": 1e-6, "hidden_size": 32, "head_dim": 10,
            "intermediate_size": 24, "num_local_experts": 4, "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
            "block_size": 7, "full_attn_alpha_factor": 1.5, "full_attn_beta_factor": 0.8,
            "linear_attn_alpha_factor": 1.3, "linear_attn_beta_factor": 0.7, "mlp_alpha_factor": 1.4,
            "mlp_beta_factor": 0.6,
        },
        matters={
            f"{part}_{letter}_factor": 1.0
            for part in ("full_attn", "linear_attn", "mlp")
            for letter in ("alpha", "beta")
        },
    ),
    "gpt_oss": Case(
        "gpt_oss",
        GPT_OSS,
        legacy=GPT_OSS_HUB,
        matters={"swiglu_limit": 7.0, "sliding_window": 7, "rope.truncate": True, "rope.factor": 1.0},
    ),
    "gpt_oss_mxfp4": Case(
        "gpt_oss",
        GPT_OSS,
        legacy=GPT_OSS_HUB,
        storage="BF16",
        quantisation={
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
            "quant_method": "mxfp4",
        },
    ),
    "glm4_moe": Case(
        "glm4_moe",
        DENSE | {
            "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 56, "moe_intermediate_size": 20,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "n_shared_experts": 1,
            "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
            "routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "norm_topk_prob": True, "use_qk_norm": True,
            "attention_bias": True, "partial_rotary_factor": 0.5,
        },
        legacy={"num_nextn_predict_layers": 1},
        matters={"rope.partial_rotary_factor": 1.0, "topk_group": 2, "norm_topk_prob": False},
    ),
    "minimax_m2": Case(
        "minimax_m2",
        MOE | {
            "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8,
            "intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 3,
        },
        legacy={
            "rotary_dim": 8, "partial_rotary_factor": ..., "use_qk_norm": True, "qk_norm_type": "per_layer",
            "use_routing_bias": True, "scoring_func": "sigmoid", "use_mtp": True, "num_mtp_modules": 3,
            "mtp_transformer_layers": 1, "shared_intermediate_size": 0, "attn_type_list": [1, 1],
        },
        matters={"rope.partial_rotary_factor": 1.0},
    ),
    "granitemoe": Case(
        "granitemoe",
        MIXTRAL | {
            "embedding_multiplier": 0.6, "attention_multiplier": 0.2, "residual_multiplier": 1.4, "logits_scaling": 1.5,
            "tie_word_embeddings": True, "attention_bias": False,
        },
        matters={
            "embedding_multiplier": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
        },
    ),
    "switch": Case(
        "switch_transformers",
        SWITCH,
        legacy={"tie_word_embeddings": ..., "encoder_sparse_step": ..., "decoder_sparse_step": ...},
        matters=SWITCH_MATTERS,
    ),
    "switch_untied": Case("switch_transformers", SWITCH | {"tie_word_embeddings": False}, matters=SWITCH_MATTERS),
}  # fmt: skip


def legacy(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Respell transformers 5's config.json as the hub's files do, with a case's `changes`."""
    result = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    rope = dict(config.get("rope_parameters") or {})
    if rope:
        kind = rope.pop("rope_type", "default")
        result["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            result["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        spelling = "type" if config["model_type"].startswith("deepseek") else "rope_type"
        result["rope_scaling"] = None if kind == "default" else {spelling: kind, **rope}
    if config["model_type"] == "qwen3_moe":
        result["num_experts"] = result.pop("num_local_experts", result.get("num_experts"))
    result |= {"torch_dtype": config.get("dtype", "float32"), "transformers_version": "4.46.0"} | dict(changes)
    return {key: value for key, value in sorted(result.items()) if value is not ...}


def with_field(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Change a field of transformers 5's config; `rope.x` is in rope_parameters."""
    if key.startswith("rope."):
        return {**config, "rope_parameters": {**config["rope_parameters"], key.removeprefix("rope."): value}}
    return {**config, key: value}
