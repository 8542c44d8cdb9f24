"""Which rotation does a config ask for?"""

import functools

from jaxtyping import Array, Float

from moejax.config.attention import RopeConfig
from moejax.layers.context import Context
from moejax.ops.rope import (
    Frequencies,
    apply_rope,
    frequencies,
    rope_tables,
    stretch_llama3,
    stretch_yarn,
    yarn_growth,
)


def rotate(
    x_BTNH: Float[Array, "B T N H"], context: Context, config: RopeConfig, dim: int | None = None
) -> Float[Array, "B T N H"]:
    """Rotate every head by its token's position."""
    inverse_h, growth = rotation(config, config.dim or dim or x_BTNH.shape[-1])
    return apply_rope(x_BTNH, rope_tables(context.positions_BT, inverse_h, growth), config.interleaved)


@functools.cache
def rotation(config: RopeConfig, dim: int) -> tuple[Frequencies, float]:
    """Give the frequencies of `dim` channels, and what cos and sin are multiplied by."""
    inverse_h, factor, length = frequencies(dim, config.theta), config.factor, config.original_length
    if config.kind == "linear":
        return inverse_h / factor, 1.0
    if config.kind == "llama3":
        return stretch_llama3(inverse_h, factor, config.low_freq_factor, config.high_freq_factor, length), 1.0
    if config.kind == "yarn":
        bounds = config.beta_fast, config.beta_slow
        stretched_h = stretch_yarn(inverse_h, config.theta, factor, *bounds, length, config.truncate)
        if config.mscale and config.mscale_all_dim:
            return stretched_h, yarn_growth(factor, config.mscale) / yarn_growth(factor, config.mscale_all_dim)
        return stretched_h, yarn_growth(factor)
    return inverse_h, 1.0


def score_growth(config: RopeConfig) -> float:
    """Give what latent attention multiplies its scores by under yarn."""
    if config.kind != "yarn" or not config.mscale_all_dim:
        return 1.0
    return yarn_growth(config.factor, config.mscale_all_dim) ** 2
