"""What a model is: its sizes, its router, its precisions. Knows no mesh and no jax."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

FORBID_UNKNOWN = ConfigDict(extra="forbid")

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]


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
class AttentionConfig:
    """Grouped-query attention (arXiv 2305.13245) with rotary positions (arXiv 2104.09864)."""

    num_heads: Count = 8
    """query heads"""
    num_kv_heads: Count = 4
    """key/value heads; num_heads must be a multiple"""
    head_dim: Annotated[int, Field(ge=2, multiple_of=2)] = 32
    """channels per head"""
    rope_theta: Positive = 10_000.0
    """base of the rotary frequencies"""
    dropout: Rate = 0.0
    """dropout rate of attention probabilities"""
    window: Count | None = None
    """a query sees so many keys, its own included (sliding window, arXiv 2310.06825); none: all before it"""
    implementation: Literal["auto", "mosaic", "xla", "reference"] = "auto"
    """mosaic: flash attention on Hopper; xla: by blocks; reference: all scores in memory; auto: mosaic on Hopper where
    it can, else xla"""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class RouterConfig:
    """Who decides which expert sees which token, with what weight, and what keeps the load even."""

    kind: Literal["top_k", "expert_choice", "soft"] = "top_k"
    """top_k: a token picks experts; expert_choice: an expert picks tokens (training only, arXiv 2202.09368);
    soft: every expert sees every token (Jacobs 1991)"""
    num_active: Count = 2
    """experts per token (for expert_choice: the mean)"""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """what turns logits into probabilities"""
    normalize: bool = True
    """combine weights of the chosen experts sum to one (Mixtral); off: the full softmax probability (Switch)"""
    noise: Literal["none", "gaussian", "jitter"] = "none"
    """exploration while training: gaussian is Shazeer's noisy top-k (arXiv 1701.06538), jitter multiplies the
    router's input by U(1-jitter, 1+jitter) (arXiv 2101.03961)"""
    jitter: Rate = 0.01
    """half-width of the multiplicative jitter"""
    load_balance: NonNegative = 0.0
    """alpha of the Switch loss alpha * E * sum f_i P_i (arXiv 2101.03961)"""
    z_loss: NonNegative = 0.0
    """weight of mean(logsumexp(logits)^2) (arXiv 2202.08906)"""
    importance_loss: NonNegative = 0.0
    """weight of CV(importance)^2 (arXiv 1701.06538)"""
    load_loss: NonNegative = 0.0
    """weight of CV(smooth load)^2; wants noise = "gaussian" (arXiv 1701.06538)"""
    bias_update_rate: NonNegative = 0.0
    """step of the loss-free balancing bias, added for the choice alone (arXiv 2408.15664); 0: no bias"""
    num_groups: Count = 1
    """groups that the experts fall into, one per node (DeepSeek-V3's node-limited routing, arXiv 2412.19437)"""
    groups_kept: Count = 1
    """groups that one token may reach: those whose best num_active / groups_kept experts score highest together"""

    def __post_init__(self) -> None:
        if self.groups_kept > self.num_groups:
            raise ValueError(f"groups_kept ({self.groups_kept}) must not exceed num_groups ({self.num_groups})")
        if self.num_groups > 1 and self.kind != "top_k":
            raise ValueError(f'num_groups ({self.num_groups}) needs kind = "top_k", not "{self.kind}"')
        if self.load_loss and self.noise != "gaussian":
            raise ValueError(f'load_loss ({self.load_loss}) needs noise = "gaussian", not "{self.noise}"')
        if self.kind != "top_k" and (self.noise == "gaussian" or self.bias_update_rate):
            raise ValueError(f'noise = "gaussian" and bias_update_rate need kind = "top_k", not "{self.kind}"')
        if self.kind != "top_k" and self.load_balance:
            raise ValueError(f'load_balance ({self.load_balance}) needs kind = "top_k", not "{self.kind}": set it to 0')


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class MoEConfig:
    """A layer of experts behind a router."""

    num_experts: Count = 8
    """routed experts"""
    expert_ffn: Count = 512
    """hidden width of one expert"""
    router: RouterConfig = RouterConfig()
    """the router"""
    capacity_factor: Positive | None = None
    """slots per expert and sequence, as a multiple of T * num_active / num_experts; none: dropless"""
    dispatch: Literal["auto", "dense", "capacity", "sorted"] = "auto"
    """dense: every expert on every token (the oracle); capacity: fixed slots, overflow dropped and counted;
    sorted: dropless grouped matmul; auto: capacity where a capacity_factor is given, else sorted"""
    implementation: Literal["auto", "mosaic", "triton", "xla", "ragged_dot", "reference"] = "auto"
    """sorted: how groups of rows meet their experts' weights; see ops/grouped_matmul.py"""
    num_shared_experts: Annotated[int, Field(ge=0)] = 0
    """experts of width expert_ffn that see every token, ungated (arXiv 2401.06066)"""
    every: Count = 1
    """a sparse layer every so many layers, the last of each period (Switch: 2)"""
    dropout: Rate = 0.0
    """dropout inside the experts"""
    competitive: bool = False
    """soft mixtures only: the last layer's experts predict apart and the loss is Jacobs' competitive one,
    -log sum p_i P_i(y)"""

    def __post_init__(self) -> None:
        if self.router.num_active > self.num_experts:
            raise ValueError(f"num_active ({self.router.num_active}) must not exceed num_experts ({self.num_experts})")
        groups = self.router.num_groups
        if self.num_experts % groups:
            raise ValueError(f"num_experts ({self.num_experts}) must divide by num_groups ({groups})")
        if self.router.num_active > self.num_experts // groups * self.router.groups_kept:
            raise ValueError(
                f"num_active ({self.router.num_active}) must not exceed the experts of groups_kept "
                f"({self.router.groups_kept}) groups of {self.num_experts // groups}"
            )
        if self.router.kind == "expert_choice" and self.dispatch == "sorted":
            raise ValueError('expert_choice has fixed slots: set dispatch = "capacity" or "dense"')
        if self.dispatch == "capacity" and self.capacity_factor is None and self.router.kind != "expert_choice":
            raise ValueError('dispatch = "capacity" needs a capacity_factor (1.25 is usual)')
        if self.dispatch == "sorted" and self.capacity_factor is not None:
            raise ValueError(f'dispatch = "sorted" is dropless: remove capacity_factor ({self.capacity_factor})')
        if self.competitive and self.router.kind != "soft":
            raise ValueError(f'competitive needs router.kind = "soft", not "{self.router.kind}"')

    def way(self, training: bool) -> Literal["dense", "capacity", "sorted"]:
        """Say how rows reach their experts: a capacity is for training alone, inference never drops a token."""
        if self.router.kind == "soft" or self.dispatch == "dense":
            return "dense"
        if self.router.kind == "expert_choice":
            return "capacity"
        return "capacity" if self.capacity_factor is not None and training else "sorted"


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class ModelConfig:
    """A decoder-only language model."""

    name: Literal["dense", "soft_mixture", "switch", "mixtral"] = "dense"
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
    """every layer's attention"""
    moe: MoEConfig | None = None
    """the sparse layers; none: dense"""
    tie_embeddings: bool = False
    """the head is the embedding table, transposed"""
    norm_eps: Positive = 1e-5
    """epsilon of every RMSNorm (arXiv 1910.07467)"""
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

    def __post_init__(self) -> None:
        if (self.moe is None) != (self.name == "dense"):
            raise ValueError(f'name = "{self.name}" {"needs a" if self.moe is None else "takes no"} [moe] table')
