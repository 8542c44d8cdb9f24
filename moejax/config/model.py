"""What a model is: its sizes, its layers, its precisions. Knows no mesh and no jax."""

from typing import Final, Literal

from pydantic.dataclasses import dataclass

from moejax.config.attention import AttentionConfig, LatentConfig, LightningConfig, Mixer, T5AttentionConfig
from moejax.config.fields import FORBID_UNKNOWN, Count, Dtype, Positive, Rate
from moejax.config.moe import MoEConfig


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class Precision:
    """The dtype of each kind of arithmetic; proofs set every field to float64."""

    params: Dtype = "float32"
    """master weights and optimizer state"""
    compute: Dtype = "float32"
    """matmuls and the residual stream"""
    accumulate: Dtype = "float32"
    """gradient accumulation over microbatches, softmax and norm statistics, logits"""
    router: Dtype = "float32"
    """router logits and probabilities"""


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class ResidualConfig:
    """What a sublayer's output is added to: x = alpha * x + beta * sublayer(norm(x))."""

    of_norm: bool = False
    """carry norm(x) on instead of x, as DeepNorm's post-norm does (arXiv 2203.00555, MiniMax-01)"""
    attention: tuple[Positive, Positive] = (1.0, 1.0)
    """alpha and beta of softmax attention"""
    lightning: tuple[Positive, Positive] = (1.0, 1.0)
    """alpha and beta of lightning attention"""
    ffn: tuple[Positive, Positive] = (1.0, 1.0)
    """alpha and beta of the feed-forward"""


START_TOKEN: Final = 0
"""What a decoder behind an encoder begins with, in T5 its padding."""


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class EncoderConfig:
    """The encoder of an encoder-decoder; its layers are as wide as the decoder's."""

    num_layers: Count = 4
    """blocks of attention and feed-forward"""
    every: Count = 2
    """of so many layers the second is sparse; 1: all are"""


Family = Literal[
    "llama",
    "soft_mixture",
    "switch",
    "mixtral",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "minimax",
    "minimax_m2",
    "gpt_oss",
    "glm4_moe",
    "granite_moe",
    "switch_transformers",
]
DENSE = ("llama", "qwen3")
"""Families without experts."""


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class MTPConfig:
    """Multi-token prediction (arXiv 2412.19437, 2.2): blocks behind the last one, for training alone."""

    depth: Count = 1
    """how many tokens beyond the next one are predicted"""
    weight: Positive = 0.3
    """of the mean of the depths' losses in the training loss"""


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class LoRAConfig:
    """Low-rank updates (arXiv 2106.09685): they alone are trained, all other weights stay as they were loaded."""

    rank: Count = 16
    """columns of the small matrices"""
    alpha: Positive = 32.0
    """an update is multiplied by alpha / rank"""
    targets: tuple[Literal["attention", "experts", "ffn"], ...] = ("attention", "experts")
    """matrices that have one: every mixer's, every expert's, dense and shared feed-forwards'"""


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class ModelConfig:
    """A language model: a decoder alone, or behind an encoder."""

    name: Family = "llama"
    """which file of moejax/models lists the layers"""
    vocab: Count = 2048
    """vocabulary; a tokenizer trained for the run gets this size"""
    embed: Count = 256
    """model dim"""
    num_layers: Count = 4
    """blocks of attention and feed-forward"""
    ffn: Count = 704
    """hidden width of a dense feed-forward layer"""
    attention: AttentionConfig = AttentionConfig()
    """softmax attention"""
    latent: LatentConfig | None = None
    """latent attention, which takes the place of softmax attention where it is given"""
    lightning: LightningConfig | None = None
    """lightning attention, for the layers that `mixers` gives it"""
    t5: T5AttentionConfig | None = None
    """T5's attention, which an encoder-decoder has instead"""
    encoder: EncoderConfig | None = None
    """what reads the source, which the decoder's layers look into"""
    mixers: tuple[Literal["attention", "global", "lightning"], ...] = ("attention",)
    """what mixes the tokens, layer by layer, over and over: attention, attention without its window, lightning"""
    ffn_activation: Literal["swiglu", "relu"] = "swiglu"
    """of the dense feed-forward; relu has no gate (T5)"""
    ffn_bias: bool = False
    """biases on the dense feed-forward's matrices"""
    moe: MoEConfig | None = None
    """the sparse layers; none: dense"""
    tie_embeddings: bool = False
    """the head is the embedding table, transposed"""
    residual: ResidualConfig = ResidualConfig()
    """how sublayers join the residual stream"""
    embed_scale: Positive = 1.0
    """what embeddings are multiplied by"""
    logit_divisor: Positive = 1.0
    """what logits are divided by"""
    norm_eps: Positive = 1e-5
    """epsilon of every RMSNorm (arXiv 1910.07467)"""
    mtp: MTPConfig | None = None
    """predict further tokens while training; none: the next one alone"""
    lora: LoRAConfig | None = None
    """train low-rank updates; none: all weights"""
    dropout: Rate = 0.0
    """dropout on each sublayer's output, before the residual sum"""
    init_scale: Positive = 1.0
    """s in the truncated normal of std sqrt(s / fan_in); Switch trains steadily at 0.1"""
    unroll: bool = False
    """compile the layers one by one instead of scanning one: about a tenth faster on a CPU, slower to compile"""
    remat: Literal["none", "full", "dots", "names"] = "none"
    """what the backward recomputes, by block; see moejax/models/remat.py"""
    precision: Precision = Precision()
    """dtypes"""

    def mixer_tables(self) -> dict[str, Mixer]:
        """Give the mixers that the layers use, by the name of their table."""
        if self.t5 is not None:
            return {"t5": self.t5}
        tables: dict[str, Mixer] = {}
        if {"attention", "global"} & set(self.mixers):
            tables |= {"attention": self.attention} if self.latent is None else {"latent": self.latent}
        return tables if self.lightning is None else {**tables, "lightning": self.lightning}

    def __post_init__(self) -> None:
        if (self.moe is None) != (self.name in DENSE):
            raise ValueError(f'name = "{self.name}" {"needs a" if self.moe is None else "takes no"} [moe] table')
        if ("lightning" in self.mixers) != (self.lightning is not None):
            raise ValueError('mixers that name "lightning" need a [lightning] table, and the other way round')
        if len({self.name == "switch_transformers", self.encoder is not None, self.t5 is not None}) > 1:
            raise ValueError(f'name = "{self.name}": "switch_transformers" alone has, and needs, [encoder] and [t5]')
        if self.moe is not None and self.moe.router.balance_over == "stack" and self.encoder is None:
            raise ValueError('balance_over = "stack" is of an encoder and a decoder: set it to "layer" or "model"')
        if not self.mixers:
            raise ValueError('mixers = []: name at least one, such as "attention"')
