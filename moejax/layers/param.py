"""How is a weight made, and how is it read?"""

import jax
import jax.numpy as jnp
from flax import nnx
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


def read(param: nnx.Param, dtype: str) -> Array:
    """Give a weight's value for the computation: cast, then (ZeRO-3) gathered, so that the narrow type travels."""
    return whole_weight(param[...].astype(dtype), param.placement)
