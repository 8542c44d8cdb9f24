"""Nobody changed the training by accident: losses as committed in losses.json (see make.py for how to renew them)."""

import numpy as np
import pytest

from tests.conftest import tiny_models, tiny_params
from tests.golden.make import STEPS, VOCAB, golden_batch, read_losses, train_losses

RTOL = 1e-7
"""Room for another CPU's rounding of the float32 router noise; everything else agrees to 1e-10."""


def test_every_tiny_model_has_golden_losses():
    assert sorted(read_losses()) == tiny_models()


@pytest.mark.parametrize("name", tiny_params())
def test_losses_are_as_committed(name):
    np.testing.assert_allclose(train_losses(name), read_losses()[name], rtol=RTOL, atol=0)


@pytest.mark.parametrize("name", tiny_models())
def test_golden_losses_fall(name):
    losses = read_losses()[name]
    assert len(losses) == STEPS
    assert abs(losses[0] - np.log(VOCAB)) < 1.0, "at birth a model knows nothing"
    assert np.mean(losses[-3:]) < 0.75 * losses[0]


def test_the_batches_are_what_they_say():
    batch = golden_batch(7)
    inside = batch["weights"] > 0
    assert ((5 * batch["inputs"] + 3) % VOCAB == batch["targets"])[inside].all()
    assert 0.5 < inside.mean() < 1.0
    assert (batch["positions"][..., 0] == 0).all()
    assert (np.diff(batch["positions"])[np.diff(batch["segments"]) == 0] == 1).all()
    assert (golden_batch(8)["inputs"] != batch["inputs"]).any()
