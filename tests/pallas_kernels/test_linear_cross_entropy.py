"""The linear loss's sums on Hopper, in Mosaic's interpreter with races watched, against all logits in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.cross_entropy import cross_entropy, linear_cross_entropy
from pallas_kernels.linear_cross_entropy import Config, linear_cross_entropy_statistics
from pallas_kernels.target import Declined
from tests.pallas_kernels.conftest import assert_accurate

SMALL = Config(columns=128, stages=2, band=2, num_blocks=2)


def draw(rows, dim, vocab, scale=1.0):
    rng = np.random.default_rng(rows + vocab)
    x, w = (jnp.asarray(scale * rng.normal(size=s), jnp.bfloat16) for s in ((rows, dim), (dim, vocab)))
    return x, w, jnp.asarray(rng.integers(0, vocab, rows), jnp.int32)


def bent(logits, softcap):
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


@pytest.mark.parametrize(
    ("shape", "vocab_dim", "softcap"),
    [((128, 128, 128), 1, None), ((130, 64, 192), 1, 5.0), ((70, 192, 104), 0, None)],
    ids=["whole_tiles", "ragged_and_softcap", "table_of_embeddings"],
)
def test_its_sums_give_the_loss(interpreter, shape, vocab_dim, softcap):
    x, w, targets = draw(*shape)
    outside = jnp.where(jnp.arange(shape[0]) % 7 == 0, shape[2] + 5, targets)  # another device's columns
    table = w if vocab_dim else w.T
    found = linear_cross_entropy_statistics(x, table, outside, vocab_dim=vocab_dim, softcap=softcap, config=SMALL)
    max_M, total_M, target_M = found
    with jax.default_matmul_precision("highest"):
        logits = bent(x.astype(jnp.float32) @ w.astype(jnp.float32), softcap)
    rounded = bent((x @ w).astype(jnp.float32), softcap)
    inside = np.asarray(outside) < shape[2]
    exact_target = jnp.where(inside, jnp.take_along_axis(logits, targets[:, None], 1)[:, 0], 0)
    np.testing.assert_allclose(max_M, logits.max(1), rtol=1e-5)
    np.testing.assert_allclose(target_M, exact_target, rtol=1e-5, atol=1e-4)
    loss = jnp.log(total_M) + max_M - target_M
    exact, plain = (cross_entropy(x, targets)[inside] for x in (logits, rounded))
    assert_accurate(loss[inside], plain, exact)


def test_the_op_runs_it_by_name_and_differentiates_it(interpreter):
    x, w, targets = draw(40, 64, 128)

    def gradients(implementation):
        def loss(x, w):
            losses = linear_cross_entropy(x, w, targets, implementation=implementation)
            return losses.mean(), losses

        return jax.grad(loss, (0, 1), has_aux=True)(x, w)

    for a, b in zip(jax.tree.leaves(gradients("mosaic")), jax.tree.leaves(gradients("xla")), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-2, atol=1e-5)


def test_large_logits_do_not_overflow(interpreter):
    x, w, targets = draw(64, 64, 64, scale=30.0)
    max_M, total_M, _ = linear_cross_entropy_statistics(x, w, targets, config=SMALL)
    assert np.isfinite(max_M).all()
    assert (total_M >= 1).all()


def test_what_it_cannot_take_is_declined_with_the_rule():
    x, w, targets = draw(8, 64, 72)
    with pytest.raises(Declined, match=r"w's last dim \(72\) must divide by 64"):
        linear_cross_entropy_statistics(x, w, targets)
    with pytest.raises(Declined, match=r"dtypes float32, bfloat16 must be bfloat16"):
        linear_cross_entropy_statistics(x.astype(jnp.float32), w, targets)
