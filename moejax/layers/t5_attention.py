"""T5's attention (arXiv 1910.10683): unscaled scores, a learned one for each distance, and a look into the source."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config.attention import T5AttentionConfig
from moejax.config.model import Precision
from moejax.layers.cache import KVCache
from moejax.layers.context import Context, Memory
from moejax.layers.param import make_param, read
from moejax.ops.attention import naive_attention
from moejax.ops.mask import Mask, Scoring
from moejax.ops.relative import relative_buckets
from moejax.parallel.overlap import column_parallel, row_parallel
from moejax.parallel.plan import MeshPlan

UNSCALED = Scoring(scale=1.0)


class RelativeBias(nnx.Module):
    """A learned score for each bucket of distances and each head; all layers of a stack share it."""

    def __init__(
        self, plan: MeshPlan, rngs: nnx.Rngs, config: T5AttentionConfig, precision: Precision, bidirectional: bool
    ) -> None:
        shape, axes = (config.buckets, config.num_heads), (None, "heads")
        self.table = make_param(plan, rngs, shape, axes, precision.params, fill=0.0)
        self.config, self.dtype, self.bidirectional = config, precision.compute, bidirectional

    def __call__(self, query_T: Int[Array, " T"], key_S: Int[Array, " S"]) -> Float[Array, "N T S"]:
        """Give the local heads' scores of queries and keys at these indices."""
        made = self.config.buckets, self.config.max_distance, self.bidirectional
        bucket_TS = relative_buckets(key_S[None, :] - query_T[:, None], *made)
        return jnp.moveaxis(read(self.table, self.dtype)[bucket_TS], -1, 0)


class T5Attention(nnx.Module):
    """Attention of a stack's tokens to one another, or to what the encoder made of the source; heads split over tensor.

    Padding asks as segment 1 does, and nobody sees it.
    """

    def __init__(
        self,
        plan: MeshPlan,
        rngs: nnx.Rngs,
        dim: int,
        config: T5AttentionConfig,
        precision: Precision,
        causal: bool,
        scale: float = 1.0,
    ) -> None:
        heads, head_dim = config.num_heads, config.head_dim
        shape, axes = (dim, heads, head_dim), ("embed", "heads", "head_dim")
        made = {"dtype": precision.params, "scale": scale}
        # Unscaled scores: the queries' weights are smaller by 1 / sqrt(head_dim) instead.
        self.q = make_param(plan, rngs, shape, axes, fan_in=dim * head_dim, **made)
        self.k = make_param(plan, rngs, shape, axes, fan_in=dim, **made)
        self.v = make_param(plan, rngs, shape, axes, fan_in=dim, **made)
        out_axes = ("heads", "head_dim", "embed")
        self.out = make_param(plan, rngs, (heads, head_dim, dim), out_axes, fan_in=heads * head_dim, **made)
        self.plan, self.config, self.dtype, self.causal = plan, config, precision.compute, causal

    def __call__(
        self, x_BtD: Float[Array, "B t D"], context: Context, cache: KVCache | None = None
    ) -> tuple[Float[Array, "B t D"], KVCache | None]:
        """Give the output, and the cache with these tokens in it; both ends are parts of the residual stream."""
        weights = [self._flat(param) for param in (self.q, self.k, self.v)]
        q_BTNH, k_BSNH, v_BSNH = map(self._by_head, column_parallel(self.plan, x_BtD, weights))
        segments_BT, segments_BS, start = context.segments_BT, context.segments_BT, 0
        if cache is not None:
            start = context.index_BT[0, 0]
            cache = cache.write(k_BSNH, v_BSNH, segments_BT, start)
            k_BSNH, v_BSNH, segments_BS = cache.k_BKSH.swapaxes(1, 2), cache.v_BKSH.swapaxes(1, 2), cache.segments_BS
        mask = Mask(jnp.maximum(segments_BT, 1), segments_BS, (start,), causal=self.causal)
        return self._attend(q_BTNH, k_BSNH, v_BSNH, mask, context.bias_NTS), cache

    def look(
        self, x_BtD: Float[Array, "B t D"], context: Context, cache: KVCache | None = None
    ) -> Float[Array, "B t D"]:
        """Attend to the source: to the encoder's memory, or to the keys and values that `remember` made of it."""
        [q_BTF] = column_parallel(self.plan, x_BtD, [self._flat(self.q)])
        if cache is None:
            assert context.memory is not None, "a decoder that looks into a source needs one"
            cache = self.remember(context.memory)
        mask = Mask(jnp.maximum(context.segments_BT, 1), cache.segments_BS, causal=False)
        return self._attend(self._by_head(q_BTF), cache.k_BKSH.swapaxes(1, 2), cache.v_BKSH.swapaxes(1, 2), mask, None)

    def remember(self, memory: Memory) -> KVCache:
        """Give keys and values of an encoder's memory."""
        k_BSNH, v_BSNH = (self._by_head(memory.x_BSD @ self._flat(param)) for param in (self.k, self.v))
        return KVCache(k_BSNH.swapaxes(1, 2), v_BSNH.swapaxes(1, 2), memory.segments_BS)

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """Make room for `length` tokens of `batch` local sequences."""
        heads = self.config.num_heads // self.plan.degree("heads")
        return KVCache.empty(self.plan, batch, heads, length, self.config.head_dim, self.dtype)

    def _attend(self, q_BTNH: Array, k_BSNH: Array, v_BSNH: Array, mask: Mask, bias_NTS: Array | None) -> Array:
        visible_BTS = mask.dense(q_BTNH.shape[1], k_BSNH.shape[1])
        o_BTNH = naive_attention(q_BTNH, k_BSNH, v_BSNH, visible_BTS, scoring=UNSCALED, bias_NTS=bias_NTS)
        w_NHD = read(self.out, self.dtype)
        return row_parallel(self.plan, o_BTNH.reshape(*o_BTNH.shape[:2], -1), w_NHD.reshape(-1, w_NHD.shape[-1]))

    def _flat(self, param: nnx.Param) -> Array:
        w_DNH = read(param, self.dtype)
        return w_DNH.reshape(w_DNH.shape[0], -1)

    def _by_head(self, x_BTF: Array) -> Array:
        return x_BTF.reshape(*x_BTF.shape[:2], -1, self.config.head_dim)
