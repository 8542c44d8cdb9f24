"""What does a layer's mixer cost on paper? Sizes of one token on one device, whichever mixer it is."""

from dataclasses import dataclass

from moejax.config.attention import AttentionConfig, LatentConfig, LightningConfig, Mixer, T5AttentionConfig
from moejax.config.model import ModelConfig
from moejax.ops.linear_attention import CHUNK
from moejax.parallel.plan import MeshPlan


@dataclass(frozen=True)
class MixerSize:
    """Counts of elements, on one tensor rank where heads are split."""

    heads: float
    """query heads here"""
    kv_heads: float
    """key/value heads that the queries here meet"""
    key_dim: int
    """channels of a query or key"""
    value_dim: int
    """channels of a value"""
    projected: float
    """columns of the matrices that meet the layer's input"""
    whole: float
    """weights that every tensor rank holds whole and uses for its own heads"""
    whole_products: float
    """of these, what meets a token in a matmul"""
    cached: float
    """what a cache keeps of a token; of linear attention none, its state does not grow"""
    norms_over_heads: int = 0
    """norms of all heads together: a mean over tensor ranks each"""
    is_linear: bool = False

    @property
    def queries(self) -> float:
        """Give the elements of a token's queries."""
        return self.heads * self.key_dim

    @property
    def outputs(self) -> float:
        """Give the elements of a token's outputs, before they are projected."""
        return self.heads * self.value_dim

    @property
    def keys(self) -> float:
        """Give the elements of a token's key and value that the queries here meet."""
        return self.kv_heads * (self.key_dim + self.value_dim)


def mixer_size(config: ModelConfig, mixer: Mixer, plan: MeshPlan) -> MixerSize:
    """Count one mixer's sizes on a mesh."""
    tensor, embed = plan.degree("heads"), config.embed
    heads = mixer.num_heads / tensor
    if isinstance(mixer, LightningConfig):
        dim = mixer.head_dim
        return MixerSize(heads, heads, dim, dim, 4 * heads * dim, 0, 0, 0, 1, is_linear=True)
    if isinstance(mixer, T5AttentionConfig):
        dim = mixer.head_dim
        return MixerSize(heads, heads, dim, dim, 3 * heads * dim, 0, 0, 2 * heads * dim)
    if isinstance(mixer, LatentConfig):
        width, down = mixer.nope_dim + mixer.rope_dim, mixer.kv_rank + mixer.rope_dim
        whole = embed * (down + (mixer.q_rank or 0))
        norms = mixer.kv_rank + (mixer.q_rank or 0)
        projected = down + (mixer.q_rank or heads * width)
        return MixerSize(heads, heads, width, mixer.value_dim, projected, whole + norms, whole, down)
    dim, projected = mixer.head_dim, mixer.num_kv_heads / plan.degree("kv_heads")
    meets = heads if plan.degree("kv_heads") < tensor else projected
    whole = 2 * embed * mixer.num_kv_heads * dim if plan.config.replicate_kv else 0
    vectors = 2 * mixer.num_kv_heads * dim if plan.config.replicate_kv and mixer.qkv_bias else 0
    vectors += {"none": 0, "head": 2 * dim, "projection": 0}[mixer.qk_norm]
    if plan.config.replicate_kv and mixer.qk_norm == "projection":
        vectors += mixer.num_kv_heads * dim
    columns, over = (heads + 2 * projected) * dim, 2 if mixer.qk_norm == "projection" else 0
    over -= plan.config.replicate_kv and over > 0
    return MixerSize(heads, meets, dim, dim, columns, whole + vectors, whole, 2 * projected * dim, over)


def score_products(mixer: Mixer, seq_len: int) -> tuple[float, float]:
    """Count the multiplications of a token beside the weights': of all heads, and of these what a backward repeats.

    Softmax attention counts the full T x T square (PaLM, arXiv 2204.02311, B) and repeats its scores; lightning
    attention counts its chunks and states, and repeats all; T5's keeps its scores.
    """
    if isinstance(mixer, LightningConfig):
        chunk, dim = min(CHUNK, seq_len), mixer.head_dim
        products = mixer.num_heads * (2.0 * chunk * dim + 2.0 * dim * dim)
        return products, products
    if isinstance(mixer, T5AttentionConfig):
        return 2.0 * seq_len * mixer.num_heads * mixer.head_dim, 0.0
    if isinstance(mixer, AttentionConfig):
        return 2.0 * seq_len * mixer.num_heads * mixer.head_dim, 1.0 * seq_len * mixer.num_heads * mixer.head_dim
    width = mixer.nope_dim + mixer.rope_dim
    return seq_len * mixer.num_heads * float(width + mixer.value_dim), float(seq_len * mixer.num_heads * width)
