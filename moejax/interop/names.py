"""What are weights called in files? The names that most families share; each family's file says what differs.

A table maps the path of a layer's weight to its tensor, without the prefix of the layer.
"""

from moejax.config.attention import AttentionConfig
from moejax.config.model import ModelConfig
from moejax.interop.layout import Stored

Table = dict[str, Stored]

VECTOR, MATRIX = "D -> D", "F D -> D F"
"""A file's matrices are (out, in), ours (in, out)."""


def model(config: ModelConfig) -> Table:
    """Name what is outside the layers."""
    table = {
        "embedding.table": Stored("model.embed_tokens.weight", "V D -> V D"),
        "norm.scale": Stored("model.norm.weight", VECTOR),
    }
    return table if config.tie_embeddings else table | {"head.weight": Stored("lm_head.weight", MATRIX)}


def prefix(config: ModelConfig, number: int) -> str:
    """Give what stands before the names of a layer's weights."""
    return f"model.layers.{number}."


def norms() -> Table:
    """Name the norms before both sublayers."""
    return {
        "mixer_norm.scale": Stored("input_layernorm.weight", VECTOR),
        "ffn_norm.scale": Stored("post_attention_layernorm.weight", VECTOR),
    }


def attention(config: AttentionConfig) -> Table:
    """Name softmax attention's weights, those that not every family has included."""
    table = {"mixer.out": Stored("self_attn.o_proj.weight", "D (N H) -> N H D")}
    table["mixer.out_bias"] = Stored("self_attn.o_proj.bias", VECTOR)
    table["mixer.sinks"] = Stored("self_attn.sinks", "N -> N")
    for name in "qkv":
        table[f"mixer.{name}"] = Stored(f"self_attn.{name}_proj.weight", "(N H) D -> D N H")
        table[f"mixer.{name}_bias"] = Stored(f"self_attn.{name}_proj.bias", "(N H) -> N H")
    dims = "(N H) -> N H" if config.qk_norm == "projection" else "H -> H"
    return table | {f"mixer.{x}_norm.scale": Stored(f"self_attn.{x}_norm.weight", dims) for x in "qk"}


def latent_attention() -> Table:
    """Name latent attention's weights."""
    heads = "(N H) D -> D N H"
    return {
        "mixer.q_down": Stored("self_attn.q_a_proj.weight", MATRIX),
        "mixer.q_norm.scale": Stored("self_attn.q_a_layernorm.weight", VECTOR),
        "mixer.kv_down": Stored("self_attn.kv_a_proj_with_mqa.weight", MATRIX),
        "mixer.kv_norm.scale": Stored("self_attn.kv_a_layernorm.weight", VECTOR),
        "mixer.kv": Stored("self_attn.kv_b_proj.weight", heads),
        "mixer.out": Stored("self_attn.o_proj.weight", "D (N H) -> N H D"),
    }


def feed_forward(ours: str, theirs: str) -> Table:
    """Name a gated feed-forward's weights: gate_proj, up_proj, down_proj under a prefix."""
    table = {f"{ours}.{x}": Stored(f"{theirs}.{x}_proj.weight", MATRIX) for x in ("gate", "up", "down")}
    return table | {f"{ours}.{x}_bias": Stored(f"{theirs}.{x}_proj.bias", VECTOR) for x in ("gate", "up", "down")}


def experts(theirs: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Table:
    """Name experts that have a tensor each."""
    named = {"gate": gate, "up": up, "down": down}
    return {f"ffn.experts.{x}": Stored(f"{theirs}.{{expert}}.{y}.weight", MATRIX) for x, y in named.items()}


def router(theirs: str) -> Table:
    """Name the router's matrix."""
    return {"ffn.router.weight": Stored(f"{theirs}.weight", MATRIX)}


def llama(config: ModelConfig) -> Table:
    """Name a layer's weights as Llama does."""
    return norms() | attention(config.attention) | feed_forward("ffn", "mlp")


def with_experts(config: ModelConfig) -> Table:
    """Name a layer's weights as Llama does, or, of a sparse layer, as most families do."""
    return llama(config) | router("mlp.gate") | experts("mlp.experts")


def mixtral(config: ModelConfig) -> Table:
    """Name a layer's weights as Mixtral does: w1 is the gate, w3 the way up, w2 the way down."""
    theirs = "block_sparse_moe"
    return llama(config) | router(f"{theirs}.gate") | experts(f"{theirs}.experts", "w1", "w3", "w2")
