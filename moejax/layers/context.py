"""What does a layer know of the tokens it is given, besides their vectors?"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from moejax.ops.random import dropout, fold
from moejax.parallel.plan import MeshPlan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Source:
    """What an encoder is given; each of its segments is read by the decoder's segment of that number."""

    ids_BS: Int[Array, "B S"]
    segments_BS: Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """What an encoder makes of its source, whole on every tensor rank."""

    x_BSD: Float[Array, "B S D"]
    segments_BS: Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """The step's arrays, handed down as an argument; local parts, the same on every tensor rank.

    `index_BT` is a token's place in its sequence of `length` tokens, of which this device may hold a part (`sequence`)
    and not in order. A segment of 0 is padding: it is not routed and nobody sees it. `rows_B` are the sequences'
    numbers in the global batch: with a key they decide dropout and noise, whatever the mesh. No key: inference.
    """

    positions_BT: Int[Array, "B T"]
    index_BT: Int[Array, "B T"]
    segments_BT: Int[Array, "B T"]
    rows_B: UInt32[Array, " B"]
    length: int = field(metadata={"static": True})
    key: UInt32[Array, "2"] | None = None
    layer: Int[Array, ""] | int = 0
    keep_logits: bool = field(default=False, metadata={"static": True})
    """let routers hand out their logits"""
    one_by_one: bool = field(default=False, metadata={"static": True})
    """route as cached decoding does, token by token: a fixed number of slots never fills"""
    source: Source | None = None
    """of an encoder-decoder"""
    memory: Memory | None = None
    """and what its decoder's layers look into"""
    bias_NTS: Float[Array, "N T S"] | None = None
    """what a stack's layers add to their scores"""

    @classmethod
    def of(
        cls,
        plan: MeshPlan,
        segments_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None = None,
        rows_B: UInt32[Array, " B"] | None = None,
        key: UInt32[Array, "2"] | None = None,
        source: Source | None = None,
    ) -> "Context":
        """Make the context of this device's part of whole sequences."""
        batch, local = segments_BT.shape
        index_BT = jnp.broadcast_to(plan.sequence_index(local), (batch, local))
        rows_B = jnp.arange(batch, dtype=jnp.uint32) if rows_B is None else rows_B
        positions_BT = index_BT if positions_BT is None else positions_BT
        return cls(positions_BT, index_BT, segments_BT, rows_B, local * plan.degree("seq"), key, source=source)

    @property
    def training(self) -> bool:
        """Say whether dropout and noise are drawn."""
        return self.key is not None

    def at_layer(self, layer: Int[Array, ""] | int) -> "Context":
        """Give the context of one layer."""
        return replace(self, layer=layer)

    def draw(self, purpose: int) -> UInt32[Array, "2"]:
        """Derive the key of one use of randomness in this layer."""
        assert self.key is not None, "randomness belongs to training"
        return fold(self.key, self.layer, purpose)

    def tokens_BT(self) -> UInt32[Array, "B T"]:
        """Give the tokens' numbers in the global batch: row * length + index."""
        return self.rows_B[:, None] * jnp.uint32(self.length) + self.index_BT.astype(jnp.uint32)


PURPOSE_ATTENTION, PURPOSE_MIXER, PURPOSE_FFN, PURPOSE_ROUTER, PURPOSE_EXPERT, PURPOSE_CROSS = range(6)
"""Uses of randomness in a layer; each has its own key."""


def residual_dropout(
    plan: MeshPlan, context: Context, y_BtD: Float[Array, "B t D"], rate: float, purpose: int
) -> Float[Array, "B t D"]:
    """Drop elements of a sublayer's output on the residual stream, which may be split over tensor."""
    if rate == 0.0 or not context.training:
        return y_BtD
    row = plan.residual_part(context.tokens_BT())[:, :, None]
    column = jnp.arange(y_BtD.shape[2], dtype=jnp.uint32)
    return dropout(y_BtD, rate, context.draw(purpose), row, column)
