"""Multi-head latent attention (MLA, arXiv 2405.04434): keys and values of all heads grow out of one small vector.

Whole sequences grow them and attend as usual. With a cache, which holds the small vectors alone, queries go down to
them instead: all heads share one key, the latent vector and the rotated part, and one value, the latent vector.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.config.attention import LatentConfig
from moejax.config.model import Precision
from moejax.layers.cache import KVCache
from moejax.layers.context import Context
from moejax.layers.norm import RMSNorm
from moejax.layers.param import make_param, read
from moejax.layers.rope import rotate, score_growth
from moejax.ops.attention import attention
from moejax.ops.mask import Mask, Scoring
from moejax.parallel.overlap import column_parallel, row_parallel
from moejax.parallel.plan import MeshPlan
from moejax.parallel.ring_attention import context_attention


class LatentAttention(nnx.Module):
    """Heads split over tensor; what makes the latent vectors is whole on every rank, and so is the cache."""

    def __init__(
        self,
        plan: MeshPlan,
        rngs: nnx.Rngs,
        dim: int,
        config: LatentConfig,
        precision: Precision,
        scale: float = 1.0,
    ) -> None:
        heads, rank, width = config.num_heads, config.kv_rank, config.nope_dim + config.rope_dim
        made = {"dtype": precision.params, "scale": scale}
        up = ("latent", "heads", "head_dim")
        squeezed = config.q_rank or dim
        q_axes = ("embed" if config.q_rank is None else "latent", *up[1:])
        first = {"shape": (dim, squeezed), "axes": ("embed", "latent"), "fan_in": dim}
        self.q_down = None if config.q_rank is None else make_param(plan, rngs, **first, **made)
        norm = (squeezed, config.norm_eps, precision)
        self.q_norm = None if config.q_rank is None else RMSNorm(plan, rngs, *norm)
        self.q = make_param(plan, rngs, (squeezed, heads, width), q_axes, fan_in=squeezed, **made)
        self.kv_down = make_param(plan, rngs, (dim, rank + config.rope_dim), ("embed", "latent"), fan_in=dim, **made)
        self.kv_norm = RMSNorm(plan, rngs, rank, config.norm_eps, precision)
        self.kv = make_param(plan, rngs, (rank, heads, config.nope_dim + config.value_dim), up, fan_in=rank, **made)
        out = (heads, config.value_dim, dim)
        self.out = make_param(plan, rngs, out, ("heads", "head_dim", "embed"), fan_in=heads * config.value_dim, **made)
        self.plan, self.config, self.dtype = plan, config, precision.compute
        self.scoring = Scoring(width**-0.5 * score_growth(config.rope))

    def __call__(
        self, x_BtD: Float[Array, "B t D"], context: Context, cache: KVCache | None = None
    ) -> tuple[Float[Array, "B t D"], KVCache | None]:
        """Give the output, and the cache with these tokens in it; both ends are parts of the residual stream.

        With a cache the tokens stand at slot index_BT[0, 0] on.
        """
        q_BTNH, latent_BTJ, turned_BTH = self._project(x_BtD, context)
        if cache is None:
            return self._out(self._whole(q_BTNH, latent_BTJ, turned_BTH, context)), None
        start = context.index_BT[0, 0]
        key_BT1J = jnp.concatenate([latent_BTJ, turned_BTH], axis=-1)[:, :, None]
        cache = cache.write(key_BT1J, latent_BTJ[:, :, None, :0], context.segments_BT, start)
        mask = Mask(context.segments_BT, cache.segments_BS, (start,))
        return self._out(self._absorbed(q_BTNH, cache.k_BKSH.swapaxes(1, 2), mask)), cache

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """Make room for `length` tokens of `batch` local sequences: one key of latent and rotated part, no values."""
        width = self.config.kv_rank + self.config.rope_dim
        return KVCache.empty(self.plan, batch, 1, length, width, self.dtype, value_dim=0)

    def _project(self, x_BtD: Array, context: Context) -> tuple[Array, Array, Array]:
        """Give queries, their position in their last channels; the latent vectors; the rotated part of the keys."""
        config, w_DNH = self.config, read(self.q, self.dtype)
        first = w_DNH.reshape(w_DNH.shape[0], -1) if self.q_down is None else read(self.q_down, self.dtype)
        q_BTF, down_BTJ = column_parallel(self.plan, x_BtD, [first, read(self.kv_down, self.dtype)])
        if self.q_norm is not None:
            q_BTF = self.q_norm(q_BTF) @ w_DNH.reshape(w_DNH.shape[0], -1)
        q_BTNH = q_BTF.reshape(*q_BTF.shape[:2], *w_DNH.shape[1:])
        nope_BTNH, rope_BTNH = jnp.split(q_BTNH, [config.nope_dim], axis=-1)
        q_BTNH = jnp.concatenate([nope_BTNH, rotate(rope_BTNH, context, config.rope)], axis=-1)
        latent_BTJ, key_BTH = jnp.split(down_BTJ, [config.kv_rank], axis=-1)
        return q_BTNH, self.kv_norm(latent_BTJ), rotate(key_BTH[:, :, None], context, config.rope)[:, :, 0]

    def _whole(self, q_BTNH: Array, latent_BTJ: Array, turned_BTH: Array, context: Context) -> Array:
        """Grow every head's key and value, and attend."""
        grown_BTNH = jnp.einsum("BTJ,JNH->BTNH", latent_BTJ, read(self.kv, self.dtype))
        nope_BTNH, v_BTNU = jnp.split(grown_BTNH, [self.config.nope_dim], axis=-1)
        turned_BTNH = jnp.broadcast_to(turned_BTH[:, :, None], (*nope_BTNH.shape[:3], self.config.rope_dim))
        k_BTNH = jnp.concatenate([nope_BTNH, turned_BTNH], axis=-1)
        segments_BT, way = context.segments_BT, self.config.implementation
        if self.plan.size("sequence") > 1:
            return context_attention(self.plan, q_BTNH, k_BTNH, v_BTNU, segments_BT, None, way, self.scoring)
        mask = Mask.of_segments(segments_BT)
        return attention(q_BTNH, k_BTNH, v_BTNU, mask, scoring=self.scoring, implementation=way)

    def _absorbed(self, q_BTNH: Array, key_BS1J: Array, mask: Mask) -> Array:
        """Attend to the latent vectors themselves: what grows keys goes into the queries, values grow afterwards."""
        config = self.config
        to_key_JNH, to_value_JNU = jnp.split(read(self.kv, self.dtype), [config.nope_dim], axis=-1)
        nope_BTNH, rope_BTNH = jnp.split(q_BTNH, [config.nope_dim], axis=-1)
        q_BTNJ = jnp.concatenate([jnp.einsum("BTNH,JNH->BTNJ", nope_BTNH, to_key_JNH), rope_BTNH], axis=-1)
        value_BS1J = key_BS1J[..., : config.kv_rank]
        way = "reference" if config.implementation == "reference" else "auto"
        o_BTNJ = attention(q_BTNJ, key_BS1J, value_BS1J, mask, scoring=self.scoring, implementation=way)
        return jnp.einsum("BTNJ,JNU->BTNU", o_BTNJ, to_value_JNU)

    def _out(self, o_BTNU: Array) -> Array:
        w_NUD = read(self.out, self.dtype)
        return row_parallel(self.plan, o_BTNU.reshape(*o_BTNU.shape[:2], -1), w_NUD.reshape(-1, w_NUD.shape[-1]))
