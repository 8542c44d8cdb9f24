"""Grouped matmul and the experts' feed-forward against the dense oracle: any group sizes, alone and in shard_map."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, PartitionSpec

from moejax.ops.grouped_matmul import (
    expert_swiglu,
    expert_swiglu_reference,
    grouped_matmul,
    grouped_matmul_reference,
)
from tests.conftest import assert_close

IMPLEMENTATIONS = ("ragged_dot", "xla")

ADVERSARIAL = {
    "one_row": (1, [0, 1, 0]),
    "no_chosen_row": (5, [0, 0, 0]),
    "no_row": (0, [0, 0]),
    "all_to_one": (200, [0, 200, 0]),
    "tail_not_chosen": (150, [3, 70, 0, 1]),
    "one_expert": (70, [70]),
    "block_edges": (640, [64, 256, 0, 320]),
    "off_by_one": (645, [63, 257, 1, 319, 0]),
    "many_experts": (300, [1] * 256),
    "last_expert_full": (300, [0] * 255 + [300]),
    "more_than_the_rows": (130, [100, 90, 4]),
}


def draw(seed, rows, experts, dtype="float32", d=6, f=10):
    rng = np.random.default_rng(seed)
    shapes = ((rows, d), (experts, d, f), (experts, d, f), (experts, f, d))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def value_and_gradients(function, cotangent, *arrays):
    out, pullback = jax.vjp(function, *arrays)
    return out, pullback(jnp.asarray(cotangent, out.dtype))


def check_matmul(implementation, rows, sizes, dtype):
    x, w, _, _ = draw(0, rows, len(sizes), dtype)
    sizes = jnp.asarray(sizes, jnp.int32)
    cotangent = np.random.default_rng(1).normal(size=(rows, w.shape[2]))

    def run(implementation):
        matmul = jax.jit(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation))
        return value_and_gradients(matmul, cotangent, x, w)

    assert_close(run(implementation), run("reference"), dtype)


def check_swiglu(implementation, rows, sizes, dtype):
    x, gate, up, down = draw(0, rows, len(sizes), dtype)
    sizes = jnp.asarray(sizes, jnp.int32)
    cotangent = np.random.default_rng(1).normal(size=x.shape)
    fast = jax.jit(lambda *arrays: expert_swiglu(*arrays, sizes, implementation=implementation))
    slow = jax.jit(lambda *arrays: expert_swiglu_reference(*arrays, sizes))
    assert_close(
        value_and_gradients(fast, cotangent, x, gate, up, down),
        value_and_gradients(slow, cotangent, x, gate, up, down),
        dtype,
    )


def test_reference_is_a_matmul_per_run():
    x, w, _, _ = draw(0, 9, 3)
    y = grouped_matmul_reference(x, w, jnp.array([2, 0, 5]))
    expected = jnp.concatenate([x[:2] @ w[0], x[2:7] @ w[2], jnp.zeros((2, 10))])
    chex.assert_trees_all_close(y, expected, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_matmul_and_gradients_match_reference(case, implementation):
    rows, sizes = ADVERSARIAL[case]
    with jax.enable_x64(True):
        check_matmul(implementation, rows, sizes, "float64")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ("tail_not_chosen", "off_by_one", "all_to_one"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_matmul_in_lower_precision_matches_reference(dtype, case, implementation):
    check_matmul(implementation, *ADVERSARIAL[case], dtype)


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_loops_of_blocks_for_swiglu_and_gradients_match_reference(case):
    with jax.enable_x64(True):
        check_swiglu("xla", *ADVERSARIAL[case], "float64")


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_loops_of_blocks_for_swiglu_in_lower_precision_matches_reference(dtype):
    check_swiglu("xla", *ADVERSARIAL["off_by_one"], dtype)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.one_of(st.just(0), st.integers(0, 140)), min_size=5, max_size=5), tail=st.integers(0, 80))
def test_any_group_sizes_match_reference(sizes, tail):
    rows = 600  # one shape, so that one program serves all examples
    sizes = jnp.asarray(sizes, jnp.int32)
    sizes = jnp.where(jnp.cumsum(sizes) > rows - tail, 0, sizes)
    x, gate, up, down = draw(0, rows, 5)
    assert_close(FAST(x, gate, up, down, sizes), SLOW(x, gate, up, down, sizes), "float32")


def _summed(function):
    def run(x, gate, up, down, sizes):
        return value_and_gradients(lambda *a: function(*a, sizes), jnp.cos(x), x, gate, up, down)

    return jax.jit(run)


FAST = _summed(lambda *a: expert_swiglu(*a, implementation="xla"))
SLOW = _summed(expert_swiglu_reference)


def test_rows_after_the_last_group_neither_read_nor_write():
    x, gate, up, down = draw(0, 90, 2)
    x = x.at[75:].set(jnp.nan)
    sizes = jnp.array([70, 5])
    y, gradients = FAST(x, gate, up, down, sizes)
    assert not y[75:].any()
    assert not gradients[0][75:].any()
    chex.assert_tree_all_finite((y, gradients[1:]))


def test_auto_is_xlas_loops_on_a_cpu():
    x, w, _, _ = draw(0, 8, 2)
    lowered = jax.jit(grouped_matmul).lower(x, w, jnp.array([3, 5])).as_text()
    assert "while" in lowered


def test_unknown_implementation_is_an_error_that_names_the_known():
    x, w, _, _ = draw(0, 8, 2)
    with pytest.raises(ValueError, match="must be one of auto, mosaic, triton, xla, ragged_dot, reference"):
        grouped_matmul(x, w, jnp.array([3, 5]), implementation="fast")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_split_and_weights_whole_inside_shard_map_match_one_device(implementation):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("data"), PartitionSpec()
    with jax.enable_x64(True):
        x, *weights = draw(0, 200, 4, "float64")
        sizes = jnp.asarray([[30, 0, 69, 1], [0, 100, 0, 0]], jnp.int32)

        def loss(implementation, sizes, x, *weights):
            y = expert_swiglu(x, *weights, sizes, implementation=implementation)
            return (
                y + jnp.cos(grouped_matmul(x, weights[0], sizes, implementation=implementation) @ weights[2][0])
            ).sum()

        def one_device(x, *weights):
            halves = zip(sizes, jnp.split(x, 2), strict=True)
            return sum(loss("reference", size, half, *weights) for size, half in halves)

        def program(sizes, x, *weights):
            def total(x, *weights):
                return jax.lax.psum(loss(implementation, sizes[0], x, *weights), "data")

            return jax.value_and_grad(total, argnums=(0, 1, 2, 3))(x, *weights)

        specs = (split, split, whole, whole, whole)
        outs = (whole, (split, whole, whole, whole))
        run = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=outs, check_vma=True))
        expected = jax.value_and_grad(one_device, argnums=(0, 1, 2, 3))(x, *weights)
        assert_close(run(sizes, x, *weights), expected, "float64")


def test_gradient_under_scan_and_remat_matches_reference():
    x, gate, up, down = draw(0, 100, 3)
    sizes = jnp.array([40, 0, 50])
    stacked = [jnp.stack([w, 0.5 * w]) for w in (gate, up, down)]

    def loss(implementation, x, stacked):
        @jax.checkpoint
        def layer(x, weights):
            return x + expert_swiglu(x, *weights, sizes, implementation=implementation), None

        return (jax.lax.scan(layer, x * 0.1, stacked)[0] ** 2).sum()

    fast, slow = (jax.jit(jax.grad(lambda *a, i=i: loss(i, *a), (0, 1)))(x, stacked) for i in ("xla", "reference"))
    assert_close(fast, slow, "float32")
