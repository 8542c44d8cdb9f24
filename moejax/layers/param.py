"""How is a weight made, and how is it read?"""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from moejax.parallel.plan import MeshPlan
from moejax.parallel.zero import place, whole_weight


def make_param(
    plan: MeshPlan,
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: str,
    fan_in: int | None = None,
    scale: float = 1.0,
    fill: float = 1.0,
) -> nnx.Param:
    """Make a weight: truncated normal of std sqrt(scale / fan_in), cut at two of them; `fill` where fan_in is None.

    Its logical axes and its ZeRO dim travel with it as metadata.
    """
    if fan_in is None:
        value = jnp.full(shape, fill, dtype)
    else:
        draw = jax.nn.initializers.truncated_normal((scale / fan_in) ** 0.5)
        value = draw(rngs.params(), shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)
    return nnx.Param(value, placement=place(plan, axes, shape, is_vector=fan_in is None))


class Readable(Protocol):
    """What stands in a weight's place and gives its value itself: a weight with a low-rank update."""

    def read(self, dtype: DTypeLike) -> Array:
        """Give the value for the computation."""
        ...


def read(weight: nnx.Param | Readable, dtype: DTypeLike) -> Array:
    """Give a weight's value for the computation: cast, then (ZeRO-3) gathered, so that the narrow type travels."""
    if not isinstance(weight, nnx.Variable):
        return weight.read(dtype)
    return whole_weight(weight[...].astype(dtype), weight.placement)
