"""Jacobs' competitive mixture (1991): its loss, whom its gradient teaches, and the language model made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from moejax.layers.context import Context
from moejax.models import ModelParts
from moejax.ops.cross_entropy import mixture_cross_entropy
from moejax.parallel.plan import MeshPlan
from moejax.train.loss import token_losses
from tests.conftest import assert_close
from tests.tiny_runs import initial_state, make_batch, proof_model

pytestmark = pytest.mark.usefixtures("x64")

E, M, D = 3, 7, 4


def draw():
    rng = np.random.default_rng(0)
    log_gate = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(E, M))), axis=0)
    return log_gate, jnp.asarray(rng.normal(size=(E, M, D))), jnp.asarray(rng.normal(size=(M, D)))


def test_regression_form_is_jacobs_own():
    log_gate, outputs, targets = draw()
    half_squares = 0.5 * ((targets - outputs) ** 2).sum(-1)
    expected = -np.log((np.exp(log_gate) * np.exp(-np.asarray(half_squares))).sum(0))
    assert_close(mixture_cross_entropy(log_gate, half_squares), expected)


def test_each_expert_learns_in_proportion_to_its_posterior():
    """dE/do_i = h_i (o_i - d), h_i the posterior; the gate's logits move from the posterior to the prior."""
    log_gate, outputs, targets = draw()

    def loss(gate_logits, outputs):
        half_squares = 0.5 * ((targets - outputs) ** 2).sum(-1)
        return mixture_cross_entropy(jax.nn.log_softmax(gate_logits, axis=0), half_squares).sum()

    dgate, doutputs = jax.grad(loss, (0, 1))(log_gate, outputs)
    joint = np.exp(log_gate) * np.exp(-0.5 * np.asarray((targets - outputs) ** 2).sum(-1))
    posterior = joint / joint.sum(0)
    assert_close(doutputs, posterior[..., None] * np.asarray(outputs - targets))
    assert_close(dgate, np.exp(log_gate) - posterior)


def test_the_cooperative_error_is_another_one():
    """||d - sum p_i o_i||^2 pulls every expert by the same residual: what competition is for."""
    log_gate, outputs, targets = draw()
    gate = jnp.exp(log_gate)[..., None]
    cooperative = jax.grad(lambda o: 0.5 * ((targets - (gate * o).sum(0)) ** 2).sum())(outputs)
    residual = np.asarray(cooperative / gate)
    assert_close(residual, np.broadcast_to(residual[0], residual.shape))


def test_a_language_model_s_loss_mixes_the_experts_probabilities():
    config = proof_model("soft_mixture_competitive_tiny")
    parts, state = ModelParts.of(config, MeshPlan.single()), initial_state(config)
    batch = {key: jnp.asarray(value[0]) for key, value in make_batch(0).items()}

    @jax.jit
    def run(params):
        model = parts.merge(params, {})
        output = model(batch["inputs"], Context.of(MeshPlan.single(), batch["segments"], batch["positions"]))
        every = model.head(output.hidden, model.embedding)
        return output.log_gate_EBT, every, model.logits(output), token_losses(model, output, batch["targets"])

    log_gate, every, mixed, losses = (np.asarray(part) for part in run(state.params))
    assert every.shape == (4, 8, 8, 64)
    assert_close(scipy.special.logsumexp(log_gate, axis=0), np.zeros((8, 8)))
    probabilities = (np.exp(log_gate)[..., None] * scipy.special.softmax(every, axis=-1)).sum(0)
    assert_close(np.exp(mixed), probabilities)
    picked = np.take_along_axis(probabilities, batch["targets"][..., None], axis=-1)[..., 0]
    assert_close(losses, -np.log(picked))
    assert np.abs(every[0] - every[1]).max() > 1e-3, "the experts must differ for this to say something"
