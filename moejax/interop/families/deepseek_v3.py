"""DeepSeek-V3 and R1 as Hugging Face has them: model type deepseek_v3."""

from moejax.config.attention import LatentConfig
from moejax.config.model import ModelConfig
from moejax.config.moe import MoEConfig, RouterConfig
from moejax.interop import names
from moejax.interop.config_json import ConfigJson, Json, rope_json
from moejax.interop.layout import Stored
from moejax.interop.names import Table
from moejax.interop.sizes import first_dense, sizes, sizes_json
from moejax.models.layer import Layer

MODEL_TYPES, ARCHITECTURE = ("deepseek_v3",), "DeepseekV3ForCausalLM"


def config(hf: ConfigJson) -> ModelConfig:
    """Read a config.json; pairs (2i, 2i+1) are rotated unless rope_interleave, which the hub leaves out, is false."""
    hf.must_be("scoring_func", ("sigmoid",), "sigmoid")
    hf.must_be("topk_method", ("noaux_tc",), "noaux_tc")
    router = sigmoid_router(hf, scale=2.5, groups=8, kept=4)
    latent = latent_attention(hf, hf.get("rope_interleave", True))
    return ModelConfig(name="deepseek_v3", latent=latent, moe=experts(hf, router), **sizes(hf))


def sigmoid_router(hf: ConfigJson, scale: float, groups: int, kept: int) -> RouterConfig:
    """Read a router by sigmoid, balancing bias and groups; the numbers are the model type's own defaults."""
    return RouterConfig(
        num_active=hf.get("num_experts_per_tok"),
        score="sigmoid",
        normalize=hf.get("norm_topk_prob", True),
        scale=hf.get("routed_scaling_factor", scale),
        bias_update_rate=0.0,
        num_groups=hf.get("n_group", groups),
        groups_kept=hf.get("topk_group", kept),
        group_best=2,
    )


def latent_attention(hf: ConfigJson, interleaved: bool) -> LatentConfig:
    """Read latent attention."""
    hf.must_be("attention_bias", (False,), False)
    rope_dim = hf.get("qk_rope_head_dim", 64)
    return LatentConfig(
        num_heads=hf.get("num_attention_heads"),
        q_rank=hf.get("q_lora_rank", None),
        kv_rank=hf.get("kv_lora_rank", 512),
        nope_dim=hf.get("qk_nope_head_dim", 128),
        rope_dim=rope_dim,
        value_dim=hf.get("v_head_dim", 128),
        rope=hf.rope(10_000.0, rope_dim, interleaved=interleaved),
    )


def experts(hf: ConfigJson, router: RouterConfig) -> MoEConfig:
    """Read the experts; the shared ones are one feed-forward of their joint width."""
    width = hf.get("moe_intermediate_size")
    return MoEConfig(
        num_experts=hf.get("n_routed_experts"),
        expert_ffn=width,
        shared_ffn=width * hf.get("n_shared_experts", 0),
        dense_layers=first_dense(hf),
        router=router,
    )


def to_json(config: ModelConfig) -> Json:
    """Write a config.json."""
    assert config.moe is not None and config.latent is not None
    own = {
        "rope_interleave": config.latent.rope.interleaved,
        "norm_topk_prob": config.moe.router.normalize,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    return sizes_json(config) | latent_json(config.latent) | experts_json(config.moe) | own


def latent_json(latent: LatentConfig) -> Json:
    """Write latent attention."""
    return {
        "num_attention_heads": latent.num_heads,
        "num_key_value_heads": latent.num_heads,
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        **rope_json(latent.rope, latent.rope_dim),
    }


def experts_json(moe: MoEConfig) -> Json:
    """Write the experts and their router."""
    return {
        "n_routed_experts": moe.num_experts,
        "moe_intermediate_size": moe.expert_ffn,
        "n_shared_experts": moe.shared_ffn // moe.expert_ffn,
        "first_k_dense_replace": len(moe.dense_layers),
        "moe_layer_freq": 1,
        "num_experts_per_tok": moe.router.num_active,
        "routed_scaling_factor": moe.router.scale,
        "n_group": moe.router.num_groups,
        "topk_group": moe.router.groups_kept,
    }


def layer(config: ModelConfig, layer: Layer) -> Table:
    """Name a layer's weights."""
    return latent_layer(config) | balancing_bias("mlp.gate")


def balancing_bias(theirs: str) -> Table:
    """Name the router's balancing bias, which is no weight."""
    return {"ffn.router.bias": Stored(f"{theirs}.e_score_correction_bias", "E -> E")}


def latent_layer(config: ModelConfig) -> Table:
    """Name a layer's weights but for the balancing bias."""
    assert config.latent is not None
    table = names.norms() | names.latent_attention() | names.feed_forward("ffn", "mlp") | names.router("mlp.gate")
    query = "q_proj" if config.latent.q_rank is None else "q_b_proj"
    table["mixer.q"] = Stored(f"self_attn.{query}.weight", "(N H) D -> D N H")
    return table | names.experts("mlp.experts") | names.feed_forward("ffn.shared", "mlp.shared_experts")


def ignored(config: ModelConfig) -> list[str]:
    """Give patterns of tensors that are left out: the layers behind the last one predict further tokens."""
    return [rf"model\.layers\.{config.num_layers}\."]
