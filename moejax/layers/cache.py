"""What does a layer remember of the tokens before?"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.compat import vary, vary_like
from moejax.parallel.plan import MeshPlan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of one attention layer, [B, K, S, H] so that a head's keys lie together.

    `segments_BS` is 0 where nothing was written.
    """

    k_BKSH: Float[Array, "B K S H"]
    v_BKSH: Float[Array, "B K S U"]
    segments_BS: Int[Array, "B S"]

    @classmethod
    def empty(
        cls,
        plan: MeshPlan,
        batch: int,
        kv_heads: int,
        length: int,
        head_dim: int,
        dtype: DTypeLike,
        value_dim: int | None = None,
    ) -> "KVCache":
        """Make room for `length` tokens of `batch` sequences; sizes are local."""
        value_dim = head_dim if value_dim is None else value_dim
        axes = plan.batch_axes() + plan.axes_of("heads")
        k, v = (vary(jnp.zeros((batch, kv_heads, length, d), dtype), axes) for d in (head_dim, value_dim))
        return cls(k, v, vary(jnp.zeros((batch, length), jnp.int32), plan.batch_axes()))

    def write(
        self,
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K U"],
        segments_BT: Int[Array, "B T"],
        start: Int[Array, ""],
    ) -> "KVCache":
        """Write T tokens at slot `start` of every sequence."""

        def put(old: Array, new: Array, axis: int) -> Array:
            return lax.dynamic_update_slice_in_dim(vary_like(old, new), new.astype(old.dtype), start, axis)

        written = KVCache(
            put(self.k_BKSH, k_BTKH.swapaxes(1, 2), 2),
            put(self.v_BKSH, v_BTKH.swapaxes(1, 2), 2),
            put(self.segments_BS, segments_BT, 1),
        )
        # Without the barrier XLA fuses the write into each reader, and copies the cache to do it out of place.
        return lax.optimization_barrier(written)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearCache:
    """The running sum of one linear-attention layer: all that it remembers, however long the past."""

    state_BNHU: Float[Array, "B N H U"]

    @classmethod
    def empty(cls, plan: MeshPlan, batch: int, heads: int, dim: int, dtype: DTypeLike) -> "LinearCache":
        """Make the state of `batch` sequences before their first token; sizes are local."""
        axes = plan.batch_axes() + plan.axes_of("heads")
        return cls(vary(jnp.zeros((batch, heads, dim, dim), dtype), axes))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SourceCache:
    """What a layer remembers that looks into a source as well: the source's keys and values never change."""

    own: KVCache
    source: KVCache


Cache = KVCache | LinearCache | SourceCache
