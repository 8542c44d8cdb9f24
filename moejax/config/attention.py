"""How do tokens see one another? The configs of a layer's mixer; knows no mesh and no jax."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moejax.config.fields import FORBID_UNKNOWN, Count, Even, NonNegative, Positive, Rate

Way = Literal["auto", "mosaic", "xla", "reference"]


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864), and how they are stretched to lengths beyond those of training."""

    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    """linear: positions divided by the factor; llama3: long wavelengths alone; yarn: by parts (arXiv 2309.00071)"""
    theta: Positive = 10_000.0
    """base of the rotary frequencies"""
    dim: Even | None = None
    """channels of a head that are rotated, the first ones; none: all"""
    interleaved: bool = False
    """rotate the pairs (2i, 2i+1) instead of (i, i + dim/2)"""
    factor: Positive = 1.0
    """stretch, for every kind but default"""
    original_length: Count = 4096
    """positions of training before the stretch (llama3, yarn)"""
    low_freq_factor: Positive = 1.0
    """llama3: wavelengths beyond original_length / this are stretched whole"""
    high_freq_factor: Positive = 4.0
    """llama3: wavelengths within original_length / this are left alone"""
    beta_fast: Positive = 32.0
    """yarn: channels that turn so often in original_length, or more, are left alone"""
    beta_slow: Positive = 1.0
    """yarn: channels that turn so often, or less, are stretched whole"""
    truncate: bool = True
    """yarn: round the ends of the ramp between both to whole channels"""
    mscale: NonNegative = 0.0
    """yarn: growth of cos and sin with log(factor), DeepSeek's; 0: 0.1 log(factor) + 1, the paper's"""
    mscale_all_dim: NonNegative = 0.0
    """yarn: the part of mscale that latent attention puts into its scores instead"""

    def __post_init__(self) -> None:
        if self.kind == "default" and self.factor != 1.0:
            raise ValueError(f'factor ({self.factor}) needs kind = "linear", "llama3" or "yarn", not "default"')


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class AttentionConfig:
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    num_heads: Count = 8
    """query heads"""
    num_kv_heads: Count = 4
    """key/value heads; num_heads must be a multiple"""
    head_dim: Even = 32
    """channels per head"""
    rope: RopeConfig = RopeConfig()
    """positions"""
    dropout: Rate = 0.0
    """dropout rate of attention probabilities"""
    window: Count | None = None
    """a query sees so many keys, its own included (sliding window, arXiv 2310.06825); none: all before it"""
    scale: Positive | None = None
    """what scores are multiplied by; none: 1 / sqrt(head_dim)"""
    qkv_bias: bool = False
    """biases on queries, keys and values"""
    out_bias: bool = False
    """a bias on the output"""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """RMSNorm of queries and keys before rotation: of each head (arXiv 2302.05442), or of all heads together"""
    clip: Positive | None = None
    """bound on the size of queries', keys' and values' elements, before rotation (OLMoE's clip_qkv)"""
    sinks: bool = False
    """a learned score per head that takes its share of every query's attention and brings nothing (gpt-oss)"""
    implementation: Way = "auto"
    """mosaic: flash attention on Hopper; xla: by blocks; reference: all scores in memory; auto: mosaic on Hopper where
    it can, else xla"""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.rope.dim is not None and self.rope.dim > self.head_dim:
            raise ValueError(f"rope.dim ({self.rope.dim}) must not exceed head_dim ({self.head_dim})")
        if self.sinks and self.dropout:
            raise ValueError(f"sinks have no dropout: set dropout ({self.dropout}) to 0")


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class LatentConfig:
    """Multi-head latent attention (MLA, arXiv 2405.04434): keys and values of all heads from one small vector."""

    num_heads: Count = 8
    """heads"""
    q_rank: Count | None = None
    """channels that queries are squeezed through; none: projected at once"""
    kv_rank: Count = 64
    """channels of the latent vector, all that the cache holds besides the rotated part of the key"""
    nope_dim: Count = 32
    """channels of a query or key that carry no position"""
    rope_dim: Even = 16
    """channels that do; the key's are shared by all heads"""
    value_dim: Count = 32
    """channels of a value"""
    rope: RopeConfig = RopeConfig()
    """positions"""
    norm_eps: Positive = 1e-6
    """epsilon of the latent vectors' RMSNorms"""
    implementation: Way = "auto"
    """as of attention"""


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class LightningConfig:
    """Lightning attention (arXiv 2501.08313): a running sum of keys and values that fades, no softmax, no positions."""

    num_heads: Count = 8
    """heads"""
    head_dim: Even = 32
    """channels per head"""
    norm_eps: Positive = 1e-6
    """epsilon of the RMSNorm over all heads' outputs"""
    implementation: Literal["auto", "mosaic", "xla"] = "auto"
    """mosaic: chunks on Hopper; xla: chunks by matmuls; auto: the first of both that can"""


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class T5AttentionConfig:
    """T5's attention (arXiv 1910.10683): a learned score for each distance instead of rotation, and no scale."""

    num_heads: Count = 8
    """heads"""
    head_dim: Count = 32
    """channels per head; together they need not be the model's"""
    buckets: Annotated[int, Field(ge=4, multiple_of=2)] = 32
    """learned scores per head; half of them for single distances, the others for ever wider ranges"""
    max_distance: Count = 128
    """from here on all distances are one"""
    implementation: Literal["auto", "reference"] = "auto"
    """all scores in memory, either way"""

    def __post_init__(self) -> None:
        if self.max_distance <= self.buckets // 2:
            raise ValueError(f"max_distance ({self.max_distance}) must exceed buckets / 2 ({self.buckets // 2})")


Mixer = AttentionConfig | LatentConfig | LightningConfig | T5AttentionConfig
