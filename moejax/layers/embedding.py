"""From token to vector, and from vector to logits."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.compat import vary
from moejax.config.model import Precision
from moejax.layers.param import make_param, read
from moejax.parallel.plan import MeshPlan


class Embedding(nnx.Module):
    """A table [V, D], its vocabulary split over tensor; tied to the head where the model says so."""

    def __init__(self, plan: MeshPlan, rngs: nnx.Rngs, vocab: int, dim: int, precision: Precision) -> None:
        self.table = make_param(plan, rngs, (vocab, dim), ("vocab", "embed"), precision.params, fan_in=dim)
        self.plan, self.dtype = plan, precision.compute

    def __call__(self, ids_BT: Int[Array, "B T"]) -> Float[Array, "B t D"]:
        """Look ids up; every tensor rank gives the rows that it holds, the sum enters the residual stream."""
        table_vD = read(self.table, self.dtype)
        if self.plan.degree("vocab") == 1:
            return self.plan.leave_tensor(table_vD[ids_BT])
        local_BT = vary(ids_BT, self.plan.axes_of("vocab")) - self.plan.index("vocab") * table_vD.shape[0]
        mine_BT = (local_BT >= 0) & (local_BT < table_vD.shape[0])
        rows_BTD = jnp.where(mine_BT[..., None], table_vD[jnp.where(mine_BT, local_BT, 0)], 0)
        return self.plan.leave_tensor(rows_BTD)


class Head(nnx.Module):
    """The logits' matrix [D, V], its vocabulary split over tensor, or the embedding table transposed."""

    def __init__(
        self, plan: MeshPlan, rngs: nnx.Rngs, vocab: int, dim: int, precision: Precision, scale: float, tied: bool
    ) -> None:
        made = {"dtype": precision.params, "fan_in": dim, "scale": scale}
        self.weight = None if tied else make_param(plan, rngs, (dim, vocab), ("embed", "vocab"), **made)
        self.plan, self.dtype = plan, precision.compute
        self.wide = precision.accumulate

    def matrix(self, embedding: Embedding) -> tuple[Array, int]:
        """Give the local part of the matrix, and its dim of the vocabulary: 0 for a table of embeddings."""
        if self.weight is None:
            return read(embedding.table, self.dtype), 0
        return read(self.weight, self.dtype), 1

    def __call__(self, x_BTD: Float[Array, "*B D"], embedding: Embedding) -> Float[Array, "*B v"]:
        """Give the local columns of the logits, in the accumulate dtype; x has entered tensor already."""
        w, vocab_dim = self.matrix(embedding)
        w_Dv = w if vocab_dim else w.T
        wide = jnp.promote_types(self.dtype, self.wide)
        return jnp.einsum("...D,DV->...V", x_BTD, w_Dv, preferred_element_type=wide)
