"""Rotary positions, RMSNorm and SwiGLU: their defining properties, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from moejax.ops.norm import rms_norm
from moejax.ops.rope import apply_rope, frequencies, rope_tables
from moejax.ops.swiglu import swiglu
from tests.conftest import assert_close

H, THETA = 8, 100.0


def rotate(x, positions):
    """Rotate one vector [H] at each position: [T, H]."""
    tables = rope_tables(jnp.asarray(positions, jnp.int32)[None], frequencies(H, THETA))
    return apply_rope(jnp.broadcast_to(x, (1, len(positions), 1, H)), tables)[0, :, 0]


def vectors(count, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, H)))


def test_rotation_keeps_the_norm_of_every_pair(x64):
    (x,) = vectors(1)
    turned = np.asarray(rotate(x, range(50)))
    pairs = np.hypot(turned[:, : H // 2], turned[:, H // 2 :])
    assert_close(pairs, np.broadcast_to(np.hypot(x[: H // 2], x[H // 2 :]), pairs.shape))


def test_scores_depend_on_the_distance_alone(x64):
    q, k = vectors(2)
    scores = np.asarray(rotate(q, range(40)) @ rotate(k, range(40)).T)
    for distance in (0, 1, 7):
        diagonal = np.diagonal(scores, -distance)
        assert_close(diagonal, np.full_like(diagonal, diagonal[0]))
    assert np.std(scores[:, 0]) > 0.1


def test_position_zero_turns_nothing_and_the_first_pair_turns_one_radian_a_step(x64):
    x = jnp.eye(H)[0]
    turned = np.asarray(rotate(x, [0, 1, 3]))
    expected = np.zeros((3, H))
    expected[:, 0], expected[:, H // 2] = np.cos([0, 1, 3]), np.sin([0, 1, 3])
    assert_close(turned, expected)


def test_pair_i_turns_by_theta_to_the_minus_2i_over_h(x64):
    tables = rope_tables(jnp.array([[5]], jnp.int32), frequencies(H, THETA))
    angle = 5 * THETA ** (-2 * np.arange(H // 2) / H)
    assert_close(tables, np.stack([np.cos(angle), np.sin(angle)])[:, None, None])


def test_tables_are_float32_or_wider():
    assert rope_tables(jnp.zeros((1, 1), jnp.int32), frequencies(H, THETA)).dtype == jnp.float32


def test_rms_norm_gives_unit_mean_square_times_scale(x64):
    x, scale = 7.0 * vectors(5), vectors(1)[0]
    y = np.asarray(rms_norm(x, jnp.ones(H), 0.0))
    assert_close((y**2).mean(-1), np.ones(5))
    assert_close(
        rms_norm(x, scale, 1e-3), np.asarray(x / np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True) + 1e-3) * scale)
    )


def test_rms_norm_takes_its_statistics_in_float32():
    """The square of 300 overflows float16."""
    y = rms_norm(jnp.full((1, H), 300.0, "float16"), jnp.ones(H, "float16"), 1e-6)
    assert y.dtype == jnp.float16
    assert_close(y, np.ones((1, H), np.float16))


def test_rms_norm_of_zeros_is_zero_with_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda x: rms_norm(x, jnp.ones(H), 1e-6).sum())(jnp.zeros((1, H)))
    assert value == 0.0
    assert np.isfinite(gradient).all()


def test_swiglu_is_silu_of_the_gate_times_up(x64):
    gate, up = vectors(4), vectors(4, seed=1)
    assert_close(swiglu(gate, up), np.asarray(gate / (1 + np.exp(-gate)) * up))


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rope"])
def test_gradients_match_finite_differences(x64, name):
    positions = jnp.arange(3, dtype=jnp.int32)[None]
    functions = {
        "rms_norm": (lambda x, scale: rms_norm(x, scale[0], 1e-3), (vectors(3), vectors(1, seed=1))),
        "swiglu": (swiglu, (vectors(3), vectors(3, seed=1))),
        "rope": (
            lambda x: apply_rope(x.reshape(1, 3, 1, H), rope_tables(positions, frequencies(H, THETA))),
            (vectors(3),),
        ),
    }
    function, arrays = functions[name]
    # A difference over 2e-4 differs from the derivative by some 1e-9 third ones: the tolerance is its error, not ours.
    check_grads(jax.jit(function), arrays, order=1, modes=["fwd", "rev"], atol=1e-7, rtol=1e-7)
