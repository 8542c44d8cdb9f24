"""Cross-entropy: the definition, and columns split over devices against the whole, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from moejax.config.mesh import MeshConfig
from moejax.ops.cross_entropy import cross_entropy
from moejax.parallel.plan import MeshPlan
from tests.conftest import assert_close

M, V = 6, 16


def draw(scale=3.0):
    rng = np.random.default_rng(0)
    return jnp.asarray(scale * rng.normal(size=(M, V))), jnp.asarray([0, 3, 4, 11, 15, 8], jnp.int32)


def test_it_is_minus_the_log_softmax_of_the_target(x64):
    logits, targets = draw()
    expected = -scipy.special.log_softmax(np.asarray(logits), axis=-1)[np.arange(M), targets]
    assert_close(cross_entropy(logits, targets), expected)


def test_its_gradient_is_softmax_minus_one_hot(x64):
    logits, targets = draw()
    gradient = jax.grad(lambda logits: cross_entropy(logits, targets).sum())(logits)
    assert_close(gradient, scipy.special.softmax(np.asarray(logits), axis=-1) - np.eye(V)[np.asarray(targets)])


@pytest.mark.parametrize("mesh", [MeshConfig(tensor=8), MeshConfig(data=2, tensor=4)], ids=["tensor8", "data2_tensor4"])
def test_split_columns_and_rows_match_the_whole(x64, mesh):
    """Nobody holds a whole row; each device's gradient is its own columns'."""
    plan = MeshPlan.from_config(mesh)
    logits, targets = draw()
    rows, columns = plan.spec("batch"), plan.spec("batch", "vocab")

    def split(logits, targets):
        def total(logits):
            first = plan.index("vocab") * logits.shape[-1]
            losses = cross_entropy(
                logits, targets, first, lambda x: plan.sum_over(x, "vocab"), lambda x: plan.max_over(x, "vocab")
            )
            return plan.sum_over(jnp.sum(jnp.sin(losses)), "batch"), losses

        return jax.value_and_grad(total, has_aux=True)(logits)

    outs = ((PartitionSpec(), rows), columns)
    (total, losses), gradient = jax.jit(plan.spmd(split, (columns, rows), outs))(logits, targets)
    expected = jax.grad(lambda logits: jnp.sin(cross_entropy(logits, targets)).sum())(logits)
    assert_close(losses, cross_entropy(logits, targets))
    assert_close(total, np.sin(np.asarray(losses)).sum())
    assert_close(gradient, expected)


def test_large_logits_do_not_overflow():
    logits = jnp.array([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]])
    value, gradient = jax.value_and_grad(lambda x: cross_entropy(x, jnp.array([1, 2])).sum())(logits)
    assert_close(value, np.float32(1e4 + np.log(3)))
    assert np.isfinite(gradient).all()


def test_low_precision_logits_are_summed_in_float32():
    losses = cross_entropy(jnp.zeros((1, 3000), "bfloat16"), jnp.array([7]))
    assert losses.dtype == jnp.float32
    assert_close(losses, np.array([np.log(3000)], np.float32))


def test_gradients_match_finite_differences(x64):
    logits, targets = draw(1.0)
    check_grads(jax.jit(lambda x: cross_entropy(x, targets)), (logits,), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)
