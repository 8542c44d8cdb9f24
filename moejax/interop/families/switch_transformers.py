"""Switch Transformers as Hugging Face has them: model type switch_transformers, T5's names.

An untied model's files hold the embedding three times, and transformers trains the copies apart: we have one table.
"""

from moejax.config.attention import T5AttentionConfig
from moejax.config.model import START_TOKEN, EncoderConfig, ModelConfig, Precision
from moejax.config.moe import MoEConfig, RouterConfig
from moejax.interop.config_json import ConfigJson, Json
from moejax.interop.layout import Stored
from moejax.interop.names import MATRIX, VECTOR, Table
from moejax.models.layer import Layer

MODEL_TYPES, ARCHITECTURE = ("switch_transformers",), "SwitchTransformersForConditionalGeneration"
ATTENTION = {name: Stored(f"{name}.weight", "(N H) D -> D N H") for name in "qkv"} | {
    "out": Stored("o.weight", "D (N H) -> N H D")
}


def config(hf: ConfigJson) -> ModelConfig:
    """Read a config.json; it gives the number of sparse layers, of which the steps between them follow."""
    hf.must_be("dense_act_fn", ("relu",), "relu")
    hf.must_be("router_ignore_padding_tokens", (False,), False)
    hf.must_be("feed_forward_proj", ("relu",), "relu")
    hf.must_be("decoder_start_token_id", (START_TOKEN,), START_TOKEN)
    layers, jitter = hf.get("num_layers", 12), hf.get("router_jitter_noise", 0.01)
    decoder_layers, width = hf.get("num_decoder_layers", layers), hf.get("d_ff", 2048)
    router = RouterConfig(
        num_active=1,
        normalize=False,
        noise="jitter" if jitter else "none",
        jitter=jitter,
        load_balance=hf.get("router_aux_loss_coef", 0.001),
        balance_over="stack",
        z_loss=hf.get("router_z_loss_coef", 0.001),
        bias=hf.get("router_bias", False),
        padding=True,
    )
    moe = MoEConfig(
        num_experts=hf.get("num_experts", 8),
        expert_ffn=width,
        activation="relu",
        every=_step(decoder_layers, hf.get("num_sparse_decoder_layers", 3)),
        slots=hf.get("expert_capacity", 64),
        router=router,
    )
    t5 = T5AttentionConfig(
        num_heads=hf.get("num_heads", 12),
        head_dim=hf.get("d_kv", 64),
        buckets=hf.get("relative_attention_num_buckets", 32),
        max_distance=hf.get("relative_attention_max_distance", 128),
    )
    dtype = hf.dtype()
    return ModelConfig(
        name="switch_transformers",
        vocab=hf.get("vocab_size", 32128),
        embed=hf.get("d_model", 768),
        num_layers=decoder_layers,
        ffn=width,
        ffn_activation="relu",
        t5=t5,
        encoder=EncoderConfig(num_layers=layers, every=_step(layers, hf.get("num_sparse_encoder_layers", 3))),
        moe=moe,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        norm_eps=hf.get("layer_norm_epsilon", 1e-6),
        dropout=hf.get("dropout_rate", 0.1),
        precision=Precision(params=dtype, compute=dtype),  # type: ignore[arg-type]
    )


def _step(layers: int, sparse: int) -> int:
    """Give the distance of sparse layers; of none, transformers makes the second one sparse all the same."""
    return layers // sparse if sparse else layers


def to_json(config: ModelConfig) -> Json:
    """Write a config.json; the number of sparse layers is one that gives their distance back."""
    moe, t5, encoder = config.moe, config.t5, config.encoder
    assert moe is not None and t5 is not None and encoder is not None
    router = moe.router
    return {
        "vocab_size": config.vocab,
        "d_model": config.embed,
        "d_kv": t5.head_dim,
        "d_ff": moe.expert_ffn,
        "num_heads": t5.num_heads,
        "num_layers": encoder.num_layers,
        "num_decoder_layers": config.num_layers,
        "num_sparse_encoder_layers": encoder.num_layers // encoder.every,
        "num_sparse_decoder_layers": config.num_layers // moe.every,
        "num_experts": moe.num_experts,
        "expert_capacity": moe.slots,
        "relative_attention_num_buckets": t5.buckets,
        "relative_attention_max_distance": t5.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "dropout_rate": config.dropout,
        "dense_act_fn": "relu",
        "feed_forward_proj": "relu",
        "router_bias": router.bias,
        "router_dtype": "float32",
        "router_jitter_noise": router.jitter if router.noise == "jitter" else 0.0,
        "router_ignore_padding_tokens": False,
        "router_z_loss_coef": router.z_loss,
        "router_aux_loss_coef": router.load_balance,
        "tie_word_embeddings": config.tie_embeddings,
        "is_encoder_decoder": True,
        "decoder_start_token_id": START_TOKEN,
        "torch_dtype": config.precision.params,
    }


def model(config: ModelConfig) -> Table:
    """Name what is outside the layers; each stack's scores by distance lie in its first layer."""
    table = {"embedding.table": Stored("shared.weight", "V D -> V D")}
    for ours, theirs in {"encoder_": "encoder", "": "decoder"}.items():
        table[f"{ours}norm.scale"] = Stored(f"{theirs}.final_layer_norm.weight", VECTOR)
    for stack in ("encoder", "decoder"):
        name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table[f"{stack}_bias.table"] = Stored(name, "X N -> X N")
    return table if config.tie_embeddings else table | {"head.weight": Stored("lm_head.weight", MATRIX)}


def prefix(config: ModelConfig, number: int) -> str:
    """Give what stands before the names of a layer's weights; the encoder's layers come first."""
    assert config.encoder is not None
    first = config.encoder.num_layers
    return f"encoder.block.{number}." if number < first else f"decoder.block.{number - first}."


def layer(config: ModelConfig, layer: Layer) -> Table:
    """Name a layer's weights; its sublayers are numbered."""
    table = _sublayer(0, "mixer", "SelfAttention", ATTENTION)
    if layer.part == "decoder":
        table |= _sublayer(1, "cross", "EncDecAttention", ATTENTION)
    number = 2 if layer.part == "decoder" else 1
    wide = {"up": "wi", "down": "wo"}
    if layer.ffn == "dense":
        return table | _sublayer(
            number, "ffn", "mlp", {ours: Stored(f"{x}.weight", MATRIX) for ours, x in wide.items()}
        )
    experts = {f"experts.{ours}": Stored(f"experts.expert_{{expert}}.{x}.weight", MATRIX) for ours, x in wide.items()}
    router = {
        "router.weight": Stored("router.classifier.weight", MATRIX),
        "router.logit_bias": Stored("router.classifier.bias", "E -> E"),
    }
    return table | _sublayer(number, "ffn", "mlp", experts | router)


def _sublayer(number: int, ours: str, theirs: str, weights: Table) -> Table:
    table = {f"{ours}_norm.scale": Stored(f"layer.{number}.layer_norm.weight", VECTOR)}
    for name, stored in weights.items():
        table[f"{ours}.{name}"] = Stored(f"layer.{number}.{theirs}.{stored.name}", stored.dims)
    return table


def copies(config: ModelConfig) -> dict[str, str]:
    """Name the tensors that repeat another one; of an untied model transformers wants each of them in the file."""
    return {f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")}
