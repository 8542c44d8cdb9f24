"""How surprised is the model by each target?"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Reduce = Callable[[Array], Array]


def cross_entropy(
    logits_MV: Float[Array, "M V"],
    targets_M: Int[Array, " M"],
    first: Int[Array, ""] | int = 0,
    sum_over: Reduce = lambda x: x,
    max_over: Reduce = jax.lax.stop_gradient,
) -> Float[Array, " M"]:
    """Give -log softmax(logits)[target] in nats, in float32 or wider.

    Where the vocabulary is split, `logits` are the columns from `first` on, and the two reductions join the devices'
    parts: nobody holds a whole row.
    """
    wide = jnp.promote_types(logits_MV.dtype, jnp.float32)
    logits_MV = logits_MV.astype(wide)
    max_M = max_over(logits_MV.max(-1))
    total_M = sum_over(jnp.exp(logits_MV - max_M[:, None]).sum(-1))
    # A comparison, whose transpose is a select: that of a gather would scatter into a zeroed copy of the logits.
    is_target_MV = jnp.arange(logits_MV.shape[-1]) == (targets_M - first)[:, None]
    target_M = sum_over(jnp.where(is_target_MV, logits_MV, 0.0).sum(-1))
    return jnp.log(total_M) + max_M - target_M


def mixture_cross_entropy(log_gate_EM: Float[Array, "E M"], loss_EM: Float[Array, "E M"]) -> Float[Array, " M"]:
    """Give -log sum_e gate_e exp(-loss_e): Jacobs' competitive loss (1991), whose gradient trains each expert in
    proportion to its posterior; with loss = ||d - o_e||^2 / 2 it is the paper's own, with cross-entropies a mixture of
    softmaxes."""
    return -jax.nn.logsumexp(log_gate_EM - loss_EM, axis=0)
