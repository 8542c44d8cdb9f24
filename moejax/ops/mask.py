"""Which keys does a query see, and how is a pair scored?"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Start = Int[Array, ""] | int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: those of its own segment that do not come after it, the last `window` of them.

    Queries and keys are runs of consecutive indices, all of one length: one run, but for a ring's zig-zag order, where
    a device holds two. `q_starts` and `k_starts` are the indices of each run's first. No segments: there is but one.
    """

    # `Any`: jax makes masks of placeholders too.
    q_segments_BT: Any = None
    """int32 [B, T]"""
    k_segments_BS: Any = None
    """int32 [B, S]"""
    q_starts: Any = (0,)
    """a number or scalar for each run"""
    k_starts: Any = (0,)
    window: int | None = field(default=None, metadata={"static": True})
    causal: bool = field(default=True, metadata={"static": True})

    def __post_init__(self) -> None:
        if self.window is not None and not self.causal:
            raise ValueError(f"a window ({self.window}) counts back from the query: it needs a causal mask")

    @classmethod
    def of_segments(cls, segments_BT: Int[Array, "B T"], window: int | None = None) -> "Mask":
        """Let whole sequences attend to themselves."""
        return cls(segments_BT, segments_BT, window=window)

    def is_of_whole_sequences(self, num_queries: int, num_keys: int) -> bool:
        """Say whether query i stands beside key i, as far as shapes tell: one run each, from 0 on."""
        starts = (*self.q_starts, *self.k_starts)
        return num_queries == num_keys and len(starts) == 2 and all(isinstance(x, int) and x == 0 for x in starts)

    def dense(self, num_queries: int, num_keys: int) -> Bool[Array, "b T S"]:
        """Write the mask out; b is 1 where there are no segments."""
        q_index_1T, k_index_1S = (
            jnp.concatenate([start + jnp.arange(length // len(starts), dtype=jnp.int32) for start in starts])[None]
            for starts, length in ((self.q_starts, num_queries), (self.k_starts, num_keys))
        )
        if self.q_segments_BT is None or self.k_segments_BS is None:
            none_1T, none_1S = jnp.zeros_like(q_index_1T), jnp.zeros_like(k_index_1S)
            return visible(q_index_1T, k_index_1S, none_1T, none_1S, self.window, self.causal)
        return visible(q_index_1T, k_index_1S, self.q_segments_BT, self.k_segments_BS, self.window, self.causal)

    def cut(self, q_first: Start, num_queries: int, k_first: Start, num_keys: int) -> "Mask":
        """Give the mask of some of the queries and some of the keys, of one run each."""
        (q_start,), (k_start,) = self.q_starts, self.k_starts

        def some(segments: Array | None, first: Start, number: int) -> Array | None:
            return None if segments is None else jax.lax.dynamic_slice_in_dim(segments, first, number, axis=1)

        return Mask(
            some(self.q_segments_BT, q_first, num_queries),
            some(self.k_segments_BS, k_first, num_keys),
            (q_start + q_first,),
            (k_start + k_first,),
            self.window,
            self.causal,
        )


def visible(
    q_index_BT: Int[Array, "b T"],
    k_index_BS: Int[Array, "b S"],
    q_segments_BT: Int[Array, "B T"],
    k_segments_BS: Int[Array, "B S"],
    window: int | None = None,
    causal: bool = True,
) -> Bool[Array, "B T S"]:
    """Say which keys a query sees: those of its own segment that do not come after it, the last `window` of them."""
    distance_BTS = q_index_BT[:, :, None] - k_index_BS[:, None, :]
    seen_BTS = q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
    if causal:
        seen_BTS = seen_BTS & (distance_BTS >= 0)
    return seen_BTS if window is None else seen_BTS & (distance_BTS < window)


class Scoring(NamedTuple):
    """How a query and a key become a score: scale * q.k, by default 1 / sqrt(H); softcap bends it by tanh."""

    scale: float | None = None
    softcap: float | None = None

    def factor(self, dim: int) -> float:
        """Give the scale for heads of `dim` channels."""
        return 1.0 / math.sqrt(dim) if self.scale is None else self.scale

    def bend(self, scores: Array) -> Array:
        """Bound scores to (-softcap, softcap)."""
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)


PLAIN = Scoring()
