"""AdamW, its schedule and its weight-decay mask, from the configuration."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moejax.config.run import OptimizerConfig
from moejax.parallel.zero import Placement


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Give the learning rate by step: linear warm-up, then cosine, WSD (arXiv 2404.06395) or constant."""
    warmup = min(config.warmup_steps, steps)
    final = config.lr * config.final_lr_fraction
    # Step 0 already moves: the warm-up's first rate is lr / warmup, not zero.
    rise = optax.linear_schedule(config.lr / max(warmup, 1), config.lr, max(warmup - 1, 1))
    rest = max(steps - warmup, 1)
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(config.lr, rest, config.final_lr_fraction)
    elif config.schedule == "wsd":
        decay = min(max(round(steps * config.decay_fraction), 1), rest)
        fall = optax.join_schedules(
            [optax.constant_schedule(config.lr), optax.linear_schedule(config.lr, final, decay)], [rest - decay]
        )
    else:
        fall = optax.constant_schedule(config.lr)
    return optax.join_schedules([rise, fall], [warmup]) if warmup else fall


def decays(placement: Placement) -> bool:
    """Say whether a weight decays: matrices do; scales, biases and the router (a dim without a name) do not."""
    return not placement.is_vector and None not in placement.axes


def build(config: OptimizerConfig, steps: int, placements: Any) -> optax.GradientTransformation:
    """Make AdamW without clipping: the norm of a split gradient is `parallel/zero.py`'s matter."""
    return optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=jax.tree.map(decays, placements)),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )


def clip_scale(norm: jax.Array, limit: float) -> jax.Array:
    """Give the factor that brings a gradient of this norm to at most `limit`."""
    return jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
