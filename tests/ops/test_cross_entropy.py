"""Cross-entropy: the definition, and columns split over devices against the whole, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from moejax.config.mesh import MeshConfig
from moejax.ops.cross_entropy import cross_entropy, linear_cross_entropy
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
    # A difference over 2e-4 differs from the derivative by some 1e-9 third ones: the tolerance is its error, not ours.
    check_grads(jax.jit(lambda x: cross_entropy(x, targets)), (logits,), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


# --- the head and the loss in one: never all the logits

D = 5


def draw_linear(rows=M, vocab=V, dtype=None, seed=0):
    rng = np.random.default_rng(seed)
    x, w = (jnp.asarray(2 * rng.normal(size=s), dtype or jnp.result_type(float)) for s in ((rows, D), (D, vocab)))
    return x, w, jnp.asarray(rng.integers(0, vocab, rows), jnp.int32)


def head_and_loss(x, w, targets, softcap=None):
    logits = jnp.matmul(x, w, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    return cross_entropy(logits if softcap is None else softcap * jnp.tanh(logits / softcap), targets)


def value_and_gradients(loss, x, w, targets, **kwargs):
    def total(x, w):
        losses = loss(x, w, targets, **kwargs)
        return jnp.sin(losses.astype(jnp.result_type(float))).sum(), losses

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, w)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("block", [None, 16, 5, 1])
def test_the_linear_loss_and_its_gradients_are_those_of_head_and_loss(x64, block, softcap):
    inputs = draw_linear()
    fast = value_and_gradients(linear_cross_entropy, *inputs, block=block, softcap=softcap)
    assert_close(fast, value_and_gradients(head_and_loss, *inputs, softcap=softcap))


def test_a_table_of_embeddings_is_taken_as_it_lies(x64):
    x, w, targets = draw_linear()
    (_, losses), (dx, dw) = value_and_gradients(linear_cross_entropy, x, w.T, targets, block=6, vocab_dim=0)
    (_, expected), gradients = value_and_gradients(head_and_loss, x, w, targets)
    assert_close((losses, (dx, dw.T)), (expected, gradients))


def test_in_bfloat16_the_linear_loss_keeps_logits_and_sums_in_float32():
    inputs = draw_linear(dtype=jnp.bfloat16)
    (_, losses), gradients = value_and_gradients(linear_cross_entropy, *inputs, block=6)
    assert losses.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2
    (_, expected), expected_gradients = value_and_gradients(head_and_loss, *inputs)
    assert_close(losses, expected)
    assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("mesh", [MeshConfig(tensor=8), MeshConfig(data=2, tensor=4)], ids=["tensor8", "data2_tensor4"])
def test_the_linear_loss_on_split_columns_and_rows_matches_the_whole(x64, mesh):
    """x enters tensor (its gradient is summed there), w is each device's columns; blocks do not divide them."""
    plan = MeshPlan.from_config(mesh)
    x, w, targets = draw_linear(rows=8, vocab=40)
    rows, columns = plan.spec("batch"), plan.spec("embed", "vocab")

    def split(x, w, targets):
        def total(x, w):
            first = plan.index("vocab") * w.shape[-1]
            losses = linear_cross_entropy(
                x, w, targets, first, lambda x: plan.sum_over(x, "vocab"), lambda x: plan.max_over(x, "vocab"), block=3
            )
            return plan.sum_over(jnp.sum(jnp.sin(losses)), "batch"), losses

        return jax.value_and_grad(total, (0, 1), has_aux=True)(x, w)

    outs = ((PartitionSpec(), rows), (rows, columns))
    fast = jax.jit(plan.spmd(split, (rows, columns, rows), outs))(x, w, targets)
    assert_close(fast, value_and_gradients(head_and_loss, x, w, targets))


def test_the_linear_loss_holds_one_block_of_logits_in_memory():
    rows, vocab, block = 64, 8192, 256
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, D), (D, vocab))]
    targets = jax.ShapeDtypeStruct((rows,), jnp.int32)
    both = jax.jit(jax.grad(lambda x, w, t: linear_cross_entropy(x, w, t, block=block).sum(), (0, 1)))
    temporaries = both.lower(*shapes, targets).compile().memory_analysis().temp_size_in_bytes
    logits, weights = 4 * rows * vocab, 4 * D * vocab
    assert temporaries < logits / 4 + 2 * weights, f"{temporaries} bytes, all logits {logits}"


def test_large_logits_of_the_linear_loss_do_not_overflow():
    x, w = jnp.array([[1e3], [-1e3]]), jnp.array([[10.0, 0.0, -10.0]])
    value, gradient = jax.value_and_grad(lambda w: linear_cross_entropy(x, w, jnp.array([1, 1]), block=2).sum())(w)
    assert_close(value, np.float32(2e4))
    assert np.isfinite(gradient).all()


def test_gradients_of_the_linear_loss_match_finite_differences(x64):
    x, w, targets = draw_linear()
    f = jax.jit(lambda x, w: linear_cross_entropy(x / 2, w / 2, targets, block=7, softcap=9.0))
    check_grads(f, (x, w), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)  # as above


def test_an_unknown_implementation_of_the_linear_loss_is_refused():
    with pytest.raises(ValueError, match='implementation "triton" must be one of auto, '):
        linear_cross_entropy(*draw_linear(), implementation="triton")
