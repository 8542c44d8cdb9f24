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
        self,
        plan: MeshPlan,
        rngs: nnx.Rngs,
        vocab: int,
        dim: int,
        precision: Precision,
        scale: float,
        tied: bool,
        divisor: float = 1.0,
    ) -> None:
        made = {"dtype": precision.params, "fan_in": dim, "scale": scale}
        self.weight = None if tied else make_param(plan, rngs, (dim, vocab), ("embed", "vocab"), **made)
        self.plan, self.dtype = plan, precision.compute
        self.wide, self.divisor = precision.accumulate, divisor

    def matrix(self, embedding: Embedding) -> tuple[Array, int]:
        """Give the local part of the matrix, and its dim of the vocabulary: 0 for a table of embeddings."""
        w, vocab_dim = (embedding.table, 0) if self.weight is None else (self.weight, 1)
        return read(w, self.dtype), vocab_dim

    def scaled(self, x_BTD: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Give what meets the matrix: logits are divided by a constant here, where they are fewer."""
        return x_BTD if self.divisor == 1.0 else x_BTD / self.divisor

    def __call__(self, x_BTD: Float[Array, "*B D"], embedding: Embedding) -> Float[Array, "*B v"]:
        """Give the local columns of the logits, in the accumulate dtype; x has entered tensor already."""
        w, vocab_dim = self.matrix(embedding)
        w_Dv = w if vocab_dim else w.T
        wide = jnp.promote_types(self.dtype, self.wide)
        return jnp.einsum("...D,DV->...V", self.scaled(x_BTD), w_Dv, preferred_element_type=wide)
