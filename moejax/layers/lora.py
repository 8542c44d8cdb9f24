"""How is a large matrix trained by two small ones? LoRA (arXiv 2106.09685): W + alpha / rank * A B.

The sum is made where the weight is read: every kernel, mesh and precision sees an ordinary matrix. What it saves is
memory, the optimizer's state and the gradients of all other weights, not arithmetic.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from moejax.config.model import LoRAConfig
from moejax.layers.param import read
from moejax.parallel.plan import MeshPlan
from moejax.parallel.zero import place


class Adapter(nnx.Param):
    """A factor of a low-rank update: where a model has them, nothing else is trained."""


class Adapted(nnx.Module):
    """A matrix with its update; experts have an update each."""

    def __init__(self, plan: MeshPlan, rngs: nnx.Rngs, base: nnx.Param, config: LoRAConfig, dtype: str) -> None:
        axes, shape = base.placement.axes, base[...].shape
        front = 1 if axes[0] == "experts" else 0
        # Matrices out of heads or hidden units end in "embed"; all others have one dim that they read from.
        split = len(axes) - 1 if axes[-1] == "embed" else front + 1

        def factor(value: Array, names: tuple[str | None, ...]) -> Adapter:
            return Adapter(value, placement=place(plan, names, value.shape))

        rank, fan_in = config.rank, math.prod(shape[front:split])
        draw = jax.nn.initializers.normal(fan_in**-0.5)
        self.base = base
        self.down = factor(draw(rngs.params(), (*shape[:split], rank), dtype), (*axes[:split], None))
        up = jnp.zeros((*shape[:front], rank, *shape[split:]), dtype)
        self.up = factor(up, (*axes[:front], None, *axes[split:]))
        self.front, self.scale = front, config.alpha / rank

    def read(self, dtype: DTypeLike) -> Array:
        """Give the sum for the computation, whole over the batch axes."""
        return self._sum(*(read(weight, dtype) for weight in (self.base, self.down, self.up)))

    def merged(self) -> nnx.Variable:
        """Give the sum as a weight in the place of the matrix: of whole arrays, outside the program, stacked or not."""
        base = self.base[...]
        wide = jnp.promote_types(base.dtype, self.down[...].dtype)
        total = self._sum
        for _ in range(base.ndim - len(self.base.placement.axes)):
            total = jax.vmap(total)
        return self.base.replace(
            total(*(w[...].astype(wide) for w in (self.base, self.down, self.up))).astype(base.dtype)
        )

    def _sum(self, w: Array, down: Array, up: Array) -> Array:
        lead = w.shape[: self.front]
        update = down.reshape(*lead, -1, down.shape[-1]) @ up.reshape(*lead, up.shape[self.front], -1)
        return w + self.scale * update.reshape(w.shape)


def adapt(module: nnx.Module, plan: MeshPlan, rngs: nnx.Rngs, config: LoRAConfig, dtype: str) -> None:
    """Give every matrix that a module holds itself an update."""
    for name, value in list(vars(module).items()):
        if isinstance(value, nnx.Param) and not value.placement.is_vector:
            setattr(module, name, Adapted(plan, rngs, value, config, dtype))
