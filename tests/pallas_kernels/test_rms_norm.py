"""The norm's gradient on Hopper, in Mosaic's interpreter with races watched, against float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.norm import rms_norm
from pallas_kernels.rms_norm import Config, rms_norm_bwd
from pallas_kernels.target import Declined
from tests.pallas_kernels.conftest import assert_accurate

EPS = 1e-6


def draw(rows, dim):
    rng = np.random.default_rng(rows)
    x, dy = (jnp.asarray(rng.normal(size=(rows, dim)), jnp.bfloat16) for _ in range(2))
    return x, jnp.asarray(1 + rng.normal(size=dim) / 4, jnp.bfloat16), dy


def plain(x, scale, dy):
    return jax.vjp(lambda x, scale: rms_norm(x, scale, EPS), x, scale)[1](dy)


@pytest.mark.parametrize(("rows", "dim"), [(13, 1024), (6, 2048)])
def test_it_matches_the_gradient_in_float32(interpreter, rows, dim):
    """An odd number of rows, more of them than slots; rows of one chunk and of two."""
    x, scale, dy = draw(rows, dim)
    got = rms_norm_bwd(x, scale, dy, EPS, Config(stages=2, num_blocks=2))
    exact = plain(*(a.astype(jnp.float32) for a in (x, scale, dy)))
    for a, b, c in zip(got, plain(x, scale, dy), exact, strict=True):
        assert_accurate(a, b, c)


def test_a_row_of_zeros_has_a_finite_gradient(interpreter):
    x, scale, dy = draw(2, 1024)
    dx, dscale = rms_norm_bwd(x.at[0].set(0), scale, dy, EPS)
    assert np.isfinite(dx.astype(jnp.float32)).all()
    assert np.isfinite(dscale.astype(jnp.float32)).all()


def test_what_it_cannot_take_is_declined_with_the_rule():
    x, scale, dy = draw(4, 128)
    with pytest.raises(Declined, match=r"D \(128\) must be a multiple of 1024 up to 8192"):
        rms_norm_bwd(x, scale, dy, EPS)
