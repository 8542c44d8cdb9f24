"""How does a query or key carry its position, also beyond the lengths of training?

Frequencies are numpy's, float64: they are constants of a model.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Frequencies = Float[np.ndarray, " h"]


def frequencies(dim: int, theta: float) -> Frequencies:
    """Give theta^(-2i/dim) for i < dim/2: radians per position of each pair of channels (arXiv 2104.09864)."""
    return theta ** (-np.arange(0, dim, 2) / dim)


def stretch_llama3(inverse_h: Frequencies, factor: float, low: float, high: float, length: int) -> Frequencies:
    """Stretch waves longer than length / low by the factor, leave those within length / high, blend between.

    Llama 3.1 (arXiv 2407.21783).
    """
    turns_h = length * inverse_h / (2 * math.pi)  # in the length of training
    kept_h = np.clip((turns_h - low) / (high - low), 0.0, 1.0)
    return kept_h * inverse_h + (1 - kept_h) * inverse_h / factor


def stretch_yarn(
    inverse_h: Frequencies, theta: float, factor: float, fast: float, slow: float, length: int, truncate: bool
) -> Frequencies:
    """Leave channels that turn `fast` times in `length`, stretch those that turn `slow` times, a ramp between.

    YaRN (arXiv 2309.00071); `truncate` rounds the ramp's ends to whole channels.
    """
    dim = 2 * len(inverse_h)
    ends = [dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow)]
    first, last = (math.floor(ends[0]), math.ceil(ends[1])) if truncate else ends
    first, last = max(first, 0), min(last, dim - 1)
    ramp_h = np.clip((np.arange(dim // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
    return inverse_h * (1 - ramp_h) + inverse_h / factor * ramp_h


def yarn_growth(factor: float, mscale: float = 1.0) -> float:
    """Give 0.1 mscale ln(factor) + 1: what YaRN multiplies queries and keys by."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def rope_tables(
    positions_BT: Int[Array, "B T"], inverse_h: Frequencies, growth: float = 1.0
) -> Float[Array, "2 B T h"]:
    """Give cos and sin of position * frequency, times `growth`, in float32 or wider."""
    wide = jnp.result_type(float)  # float64 where x64 is enabled
    angle_BTh = positions_BT[..., None].astype(wide) * jnp.asarray(inverse_h, wide)
    return growth * jnp.stack([jnp.cos(angle_BTh), jnp.sin(angle_BTh)])


def apply_rope(
    x_BTNH: Float[Array, "B T N H"], tables: Float[Array, "2 B T h"], interleaved: bool = False
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + h) of every head's first 2h channels, or (2i, 2i + 1); leave the others."""
    cos, sin = (t[:, :, None, :].astype(x_BTNH.dtype) for t in tables)
    size = cos.shape[-1]
    turned, rest = x_BTNH[..., : 2 * size], x_BTNH[..., 2 * size :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
        return jnp.concatenate([turned, rest], axis=-1)
    a, b = turned[..., :size], turned[..., size:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
