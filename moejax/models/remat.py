"""What does the backward pass recompute? One named policy for each block."""

from collections.abc import Callable
from typing import Any

import jax

from moejax.parallel.zero import all_but_gathered_weights

BLOCK_OUTPUTS = ("mixer_out", "cross_out", "ffn_out")
"""Checkpoint names of a block's sublayer outputs."""


def rematerialize(body: Callable[..., Any], policy: str, zero_stage: int) -> Callable[..., Any]:
    """Wrap a block by the named policy.

    none: everything is saved (under ZeRO-3 all but the gathered weights, which would be the whole model);
    full: nothing but the block's input; dots: results of matmuls with weights; names: the sublayers' outputs.
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        if zero_stage < 3:
            return body
        return jax.checkpoint(body, policy=all_but_gathered_weights)
    chosen = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "names": policies.save_only_these_names(*BLOCK_OUTPUTS),
    }[policy]
    return jax.checkpoint(body, policy=chosen)
