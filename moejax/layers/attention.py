"""Self-attention with grouped heads and rotary positions, with and without a cache."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.config.attention import AttentionConfig
from moejax.config.model import Precision
from moejax.layers.cache import KVCache
from moejax.layers.context import PURPOSE_ATTENTION, Context
from moejax.layers.norm import HeadNorm
from moejax.layers.param import make_param, read
from moejax.layers.rope import rotate
from moejax.ops.attention import Drop, attention
from moejax.ops.mask import Mask, Scoring
from moejax.ops.random import dropout
from moejax.parallel.overlap import column_parallel, row_parallel
from moejax.parallel.plan import MeshPlan
from moejax.parallel.ring_attention import context_attention


class Attention(nnx.Module):
    """Grouped-query attention (arXiv 2305.13245); heads split over tensor."""

    def __init__(
        self,
        plan: MeshPlan,
        rngs: nnx.Rngs,
        dim: int,
        config: AttentionConfig,
        precision: Precision,
        eps: float,
        scale: float = 1.0,
    ) -> None:
        heads, kv_heads, head_dim, dtype = config.num_heads, config.num_kv_heads, config.head_dim, precision.params
        made = {"dtype": dtype, "scale": scale}
        kv_axes = ("embed", "kv_heads", "head_dim")
        self.q = make_param(plan, rngs, (dim, heads, head_dim), ("embed", "heads", "head_dim"), fan_in=dim, **made)
        self.k = make_param(plan, rngs, (dim, kv_heads, head_dim), kv_axes, fan_in=dim, **made)
        self.v = make_param(plan, rngs, (dim, kv_heads, head_dim), kv_axes, fan_in=dim, **made)
        out_axes = ("heads", "head_dim", "embed")
        self.out = make_param(plan, rngs, (heads, head_dim, dim), out_axes, fan_in=heads * head_dim, **made)
        biases, together = config.qkv_bias, config.qk_norm == "projection"
        normed = config.qk_norm != "none"

        def vector(there: bool, shape: tuple[int, ...], *axes: str) -> nnx.Param | None:
            return make_param(plan, rngs, shape, axes, dtype, fill=0.0) if there else None

        def norm(heads: int, axis: str) -> HeadNorm | None:
            made = (heads, head_dim, eps, precision, axis if together else None)
            return HeadNorm(plan, rngs, *made) if normed else None

        self.q_bias = vector(biases, (heads, head_dim), "heads", "head_dim")
        self.k_bias, self.v_bias = (vector(biases, (kv_heads, head_dim), *kv_axes[1:]) for _ in "kv")
        self.out_bias = vector(config.out_bias, (dim,), "embed")
        self.q_norm, self.k_norm = norm(heads, "heads"), norm(kv_heads, "kv_heads")
        self.sinks = vector(config.sinks, (heads,), "heads")
        self.plan, self.config, self.dtype = plan, config, precision.compute
        self.scoring = Scoring(config.scale)

    def __call__(
        self, x_BtD: Float[Array, "B t D"], context: Context, cache: KVCache | None = None
    ) -> tuple[Float[Array, "B t D"], KVCache | None]:
        """Give the output, and the cache with these tokens in it; both ends are parts of the residual stream.

        With a cache the tokens stand at slot index_BT[0, 0] on.
        """
        config = self.config
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BtD)
        q_BTNH, k_BTKH = (rotate(x, context, config.rope) for x in (q_BTNH, k_BTKH))
        sinks_N = None if self.sinks is None else read(self.sinks, self.dtype)
        if cache is None and self.plan.size("sequence") > 1:
            o_BTNH = context_attention(
                self.plan,
                q_BTNH,
                self._local_kv(k_BTKH),
                self._local_kv(v_BTKH),
                context.segments_BT,
                config.window,
                config.implementation,
                self.scoring,
                sinks_N,
            )
            return self._out(o_BTNH), None
        if cache is None:
            k_BSKH, v_BSKH, mask = k_BTKH, v_BTKH, Mask.of_segments(context.segments_BT, config.window)
        else:
            start = context.index_BT[0, 0]
            cache = cache.write(k_BTKH, v_BTKH, context.segments_BT, start)
            k_BSKH, v_BSKH = cache.k_BKSH.swapaxes(1, 2), cache.v_BKSH.swapaxes(1, 2)
            mask = Mask(context.segments_BT, cache.segments_BS, (start,), window=config.window)
        k_BSKH, v_BSKH = self._local_kv(k_BSKH), self._local_kv(v_BSKH)
        made = {"scoring": self.scoring, "sinks_N": sinks_N, "drop": self._drop(context)}
        o_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, mask, implementation=config.implementation, **made)
        return self._out(o_BTNH), cache

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """Make room for `length` tokens of `batch` local sequences."""
        heads = self.config.num_kv_heads // self.plan.degree("kv_heads")
        return KVCache.empty(self.plan, batch, heads, length, self.config.head_dim, self.dtype)

    def _out(self, o_BTNH: Array) -> Array:
        w_NHD = read(self.out, self.dtype)
        w_ND = w_NHD.reshape(-1, w_NHD.shape[-1])
        y_BtD = row_parallel(self.plan, o_BTNH.reshape(*o_BTNH.shape[:2], -1), w_ND)
        return y_BtD if self.out_bias is None else y_BtD + read(self.out_bias, self.dtype)

    def _project(self, x_BtD: Array) -> list[Array]:
        """Give queries, keys and values, before rotation."""
        weights = [read(param, self.dtype) for param in (self.q, self.k, self.v)]
        flat = column_parallel(self.plan, x_BtD, [w_DNH.reshape(w_DNH.shape[0], -1) for w_DNH in weights])
        made = [y_BTF.reshape(*y_BTF.shape[:2], *w.shape[1:]) for y_BTF, w in zip(flat, weights, strict=True)]
        biases = (self.q_bias, self.k_bias, self.v_bias)
        made = [x if b is None else x + read(b, self.dtype) for x, b in zip(made, biases, strict=True)]
        if self.q_norm is not None and self.k_norm is not None:
            made = [self.q_norm(made[0]), self.k_norm(made[1]), made[2]]
        clip = self.config.clip
        return made if clip is None else [jnp.clip(x, -clip, clip) for x in made]

    def _local_kv(self, k_BSKH: Array) -> Array:
        """Pick the key/value head of each local query head where tensor ranks hold them all (replicate_kv)."""
        heads, tensor = self.config.num_heads, self.plan.degree("heads")
        if self.plan.degree("kv_heads") == tensor:
            return k_BSKH
        local = heads // tensor
        first = self.plan.index("heads") * local
        return k_BSKH[:, :, (first + jnp.arange(local)) // (heads // self.config.num_kv_heads)]

    def _drop(self, context: Context) -> Drop | None:
        """Give the dropout of the probabilities: bits of (row, head) and (query, key)."""
        if self.config.dropout == 0.0 or not context.training:
            return None
        key = context.draw(PURPOSE_ATTENTION)

        def drop(p_BKGTS: Array) -> Array:
            _, kv, group, queries, keys = p_BKGTS.shape
            local = kv * group
            head = self.plan.index("heads") * local + jnp.arange(local).reshape(kv, group)
            row = context.rows_B[:, None, None] * jnp.uint32(self.config.num_heads) + head.astype(jnp.uint32)
            column = jnp.arange(queries * keys, dtype=jnp.uint32).reshape(queries, keys)
            return dropout(p_BKGTS, self.config.dropout, key, row[..., None, None], column)

        return drop
