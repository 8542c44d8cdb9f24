"""What does a layer remember of the tokens before?"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.compat import vary_like


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of one attention layer, [B, K, S, H] so that a head's keys lie together.

    `segments_BS` is 0 where nothing was written.
    """

    k_BKSH: Float[Array, "B K S H"]
    v_BKSH: Float[Array, "B K S H"]
    segments_BS: Int[Array, "B S"]

    @classmethod
    def empty(cls, batch: int, kv_heads: int, length: int, head_dim: int, dtype: str) -> "KVCache":
        """Make room for `length` tokens of `batch` sequences; sizes are local."""
        zeros = jnp.zeros((batch, kv_heads, length, head_dim), dtype)
        return cls(zeros, zeros, jnp.zeros((batch, length), jnp.int32))

    def write(
        self,
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
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
