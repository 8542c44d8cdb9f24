"""Who computes what: the configs of routers and experts; knows no mesh and no jax."""

from typing import Literal

from pydantic.dataclasses import dataclass

from moejax.config.fields import FORBID_UNKNOWN, Count, NonNegative, Number, Positive, Rate


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
    balance_over: Literal["layer", "model", "stack"] = "layer"
    """layer: each layer's loss by itself, f_i a share of the slots; model: Hugging Face's, f_i slots per token (even:
    num_active in all), both means over all layers before the product; it has no pipeline; stack: its Switch's, means
    over a sequence's tokens in all layers of the encoder, or of the decoder, and then over sequences; z_loss likewise;
    as there, a stack whose layers are all sparse adds nothing"""
    z_loss: NonNegative = 0.0
    """weight of mean(logsumexp(logits)^2) (arXiv 2202.08906)"""
    importance_loss: NonNegative = 0.0
    """weight of CV(importance)^2 (arXiv 1701.06538)"""
    load_loss: NonNegative = 0.0
    """weight of CV(smooth load)^2; wants noise = "gaussian" (arXiv 1701.06538)"""
    scale: Positive = 1.0
    """what combine weights are multiplied by in the end (DeepSeek's routed_scaling_factor)"""
    bias: bool = False
    """a learned bias on the logits (gpt-oss)"""
    bias_update_rate: NonNegative | None = None
    """step of the loss-free balancing bias, added for the choice alone (arXiv 2408.15664); 0: it stays as it was
    loaded; none: no bias"""
    padding: bool = False
    """padding is routed too, takes its slots and counts in the losses (Hugging Face's Switch)"""
    num_groups: Count = 1
    """groups that the experts fall into, one per node (DeepSeek-V3's node-limited routing, arXiv 2412.19437)"""
    groups_kept: Count = 1
    """groups that one token may reach: those whose best experts score highest together"""
    group_best: Count | None = None
    """how many of a group's experts that is (DeepSeek-V2: 1, V3: 2); none: num_active / groups_kept"""

    def __post_init__(self) -> None:
        if self.groups_kept > self.num_groups:
            raise ValueError(f"groups_kept ({self.groups_kept}) must not exceed num_groups ({self.num_groups})")
        if self.num_groups > 1 and self.kind != "top_k":
            raise ValueError(f'num_groups ({self.num_groups}) needs kind = "top_k", not "{self.kind}"')
        if self.load_loss and self.noise != "gaussian":
            raise ValueError(f'load_loss ({self.load_loss}) needs noise = "gaussian", not "{self.noise}"')
        if self.kind != "top_k" and (self.noise == "gaussian" or self.bias_update_rate is not None):
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
    slots: Count | None = None
    """slots per expert and sequence as a number, which holds at inference too (Hugging Face's Switch); cached decoding
    routes a token at a time and fills none"""
    dispatch: Literal["auto", "dense", "capacity", "sorted"] = "auto"
    """dense: every expert on every token (the oracle); capacity: fixed slots, overflow dropped and counted;
    sorted: dropless grouped matmul; auto: capacity where a capacity_factor or slots are given, else sorted"""
    implementation: Literal["auto", "mosaic", "triton", "xla", "ragged_dot", "reference"] = "auto"
    """sorted: how groups of rows meet their experts' weights; see ops/grouped_matmul.py"""
    shared_ffn: Number = 0
    """hidden width of the shared experts, which see every token (arXiv 2401.06066), all together; 0: there are none"""
    shared_gate: bool = False
    """weigh what the shared experts give by the sigmoid of a learned score of the token (Qwen2-MoE)"""
    activation: Literal["swiglu", "clamped_swiglu", "relu"] = "swiglu"
    """clamped_swiglu: gpt-oss's (up + 1) * gate * sigmoid(1.702 gate), gate at most limit, up within +- limit; relu: of
    up alone, there is no gate (T5)"""
    limit: Positive = 7.0
    """the bound of clamped_swiglu"""
    bias: bool = False
    """biases on the experts' matrices"""
    every: Count = 1
    """a sparse layer every so many layers, the last of each period (Switch: 2)"""
    dense_layers: tuple[Number, ...] = ()
    """layers, counted from 0, that are dense all the same (DeepSeek: the first ones)"""
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
        limit = self.capacity_factor if self.slots is None else self.slots
        if self.capacity_factor is not None and self.slots is not None:
            raise ValueError(f"slots ({self.slots}) and capacity_factor ({self.capacity_factor}): give one of both")
        if self.dispatch == "capacity" and limit is None and self.router.kind != "expert_choice":
            raise ValueError('dispatch = "capacity" needs a capacity_factor (1.25 is usual) or slots')
        if self.dispatch == "sorted" and limit is not None:
            raise ValueError(f'dispatch = "sorted" is dropless: remove capacity_factor or slots ({limit})')
        if self.slots is not None and self.router.kind != "top_k":
            raise ValueError(f'slots ({self.slots}) need router.kind = "top_k", not "{self.router.kind}"')
        if self.competitive and self.router.kind != "soft":
            raise ValueError(f'competitive needs router.kind = "soft", not "{self.router.kind}"')

    def is_sparse(self, layer: int) -> bool:
        """Say whether layer number `layer` has experts."""
        return (layer + 1) % self.every == 0 and layer not in self.dense_layers

    def num_slots(self, length: int) -> int:
        """Give the places per expert in a sequence: ceil(capacity_factor * T * A / E), or `slots`, within 1 and T."""
        if self.slots is not None:
            return min(length, self.slots)
        wanted = (self.capacity_factor or 1.0) * length * self.router.num_active
        return max(1, min(length, -int(-wanted // self.num_experts)))

    def way(self, training: bool) -> Literal["dense", "capacity", "sorted"]:
        """Say how rows reach their experts: a capacity_factor is for training alone, inference then drops no token."""
        if self.router.kind == "soft" or self.dispatch == "dense":
            return "dense"
        if self.router.kind == "expert_choice":
            return "capacity"
        limited = self.slots is not None or (self.capacity_factor is not None and training)
        return "capacity" if limited else "sorted"
