"""Lightning attention (arXiv 2501.08313): a running sum of keys and values that fades by a head's own rate."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.config.attention import LightningConfig
from moejax.config.model import Precision
from moejax.layers.cache import LinearCache
from moejax.layers.context import Context
from moejax.layers.norm import HeadNorm
from moejax.layers.param import make_param, read
from moejax.ops.linear_attention import linear_attention
from moejax.parallel.linear_context import context_linear_attention
from moejax.parallel.overlap import column_parallel, row_parallel
from moejax.parallel.plan import MeshPlan


class LightningAttention(nnx.Module):
    """silu(x W) as queries, keys and values; a norm over all heads; a sigmoid gate. Heads split over tensor."""

    def __init__(
        self,
        plan: MeshPlan,
        rngs: nnx.Rngs,
        dim: int,
        config: LightningConfig,
        precision: Precision,
        num_layers: int,
        scale: float = 1.0,
    ) -> None:
        heads, head_dim = config.num_heads, config.head_dim
        axes, made = ("embed", "heads", "head_dim"), {"dtype": precision.params, "scale": scale}
        self.qkv = make_param(plan, rngs, (dim, heads, 3 * head_dim), axes, fan_in=dim, **made)
        self.gate = make_param(plan, rngs, (dim, heads, head_dim), axes, fan_in=dim, **made)
        self.norm = HeadNorm(plan, rngs, heads, head_dim, config.norm_eps, precision, "heads")
        out_axes = ("heads", "head_dim", "embed")
        self.out = make_param(plan, rngs, (heads, head_dim, dim), out_axes, fan_in=heads * head_dim, **made)
        self.plan, self.config, self.dtype, self.num_layers = plan, config, precision.compute, num_layers

    def __call__(
        self, x_BtD: Float[Array, "B t D"], context: Context, cache: LinearCache | None = None
    ) -> tuple[Float[Array, "B t D"], LinearCache | None]:
        """Give the output, and the state after these tokens; both ends are parts of the residual stream."""
        plan, segments_BT, way = self.plan, context.segments_BT, self.config.implementation
        weights = [read(param, self.dtype) for param in (self.qkv, self.gate)]
        flat = column_parallel(plan, x_BtD, [w_DNH.reshape(w_DNH.shape[0], -1) for w_DNH in weights])
        qkv_BTNH, gate_BTNH = (y.reshape(*y.shape[:2], *w.shape[1:]) for y, w in zip(flat, weights, strict=True))
        q_BTNH, k_BTNH, v_BTNH = jnp.split(jax.nn.silu(qkv_BTNH), 3, axis=-1)
        v_BTNH = jnp.where(segments_BT[..., None, None] > 0, v_BTNH, 0)  # padding leaves nothing behind
        decay_N = self.decay(context.layer)
        if cache is None and plan.size("sequence") > 1:
            o_BTNH = context_linear_attention(plan, q_BTNH, k_BTNH, v_BTNH, decay_N, segments_BT, way)
        else:
            state = None if cache is None else cache.state_BNHU
            o_BTNH, state = linear_attention(q_BTNH, k_BTNH, v_BTNH, decay_N, state, segments_BT, implementation=way)
            cache = None if cache is None else LinearCache(state)
        o_BTNH = self.norm(o_BTNH) * jax.nn.sigmoid(gate_BTNH)
        w_NHD = read(self.out, self.dtype)
        y_BtD = row_parallel(plan, o_BTNH.reshape(*o_BTNH.shape[:2], -1), w_NHD.reshape(-1, w_NHD.shape[-1]))
        return y_BtD, cache

    def decay(self, layer: Array | int) -> Float[Array, " N"]:
        """Give the log of what each local head keeps of its state per token: -2^(-8(h+1)/N), less in later layers.

        The terms of 1e-5 are the original's: they keep the last layer's rate from being zero.
        """
        heads = self.config.num_heads
        local = heads // self.plan.degree("heads")
        head_N = self.plan.index("heads") * local + jnp.arange(local)
        wide = jnp.result_type(float)
        slope_N = jnp.exp2(-8.0 / heads * (head_N + 1).astype(wide))
        return -slope_N * (1 - jnp.asarray(layer, wide) / (self.num_layers - 1 + 1e-5) + 1e-5)

    def empty_cache(self, batch: int, length: int) -> LinearCache:
        """Make the state before the first token; `length` costs nothing."""
        heads, dim = self.config.num_heads // self.plan.degree("heads"), self.config.head_dim
        return LinearCache.empty(self.plan, batch, heads, dim, jnp.promote_types(self.dtype, jnp.float32))
