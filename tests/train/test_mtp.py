"""Multi-token prediction: what it predicts, from what, and that every mesh trains it alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.model import MTPConfig
from moejax.layers.context import Context
from moejax.models import ModelParts
from moejax.parallel.plan import MeshPlan
from moejax.parallel.rules import check_model, make_rules
from moejax.train.loss import further_losses
from tests.conftest import mesh_config
from tests.tiny_runs import TinyRun, assert_same, initial_state, make_batch, proof_model

pytestmark = pytest.mark.usefixtures("x64")

KEY = np.zeros(2, np.uint32)


def config(depth: int = 2):
    return proof_model("deepseek_v3_tiny", mtp=MTPConfig(depth=depth, weight=0.3))


def losses(batch: dict[str, np.ndarray], depth: int = 2) -> np.ndarray:
    """Give the further tokens' weighted losses [B, T]."""
    parts = ModelParts.of(config(depth), MeshPlan.single())
    model = parts.merge(*jax.tree.map(jnp.asarray, parts.init(0)))
    batch = {name: jnp.asarray(value[0]) for name, value in batch.items()}
    context = Context.of(parts.plan, batch["segments"], batch["positions"], key=jnp.asarray(KEY))
    output = model(batch["inputs"], context)
    return np.asarray(further_losses(model, output, batch, context)[0])


def row(length: int = 12) -> dict[str, np.ndarray]:
    """Make one row of one document, [1, 1, T]."""
    ids = np.random.default_rng(0).permutation(64)[None, None, : length + 1].astype(np.int32)
    ones = np.ones((1, 1, length), np.int32)
    places = {"segments": ones, "positions": np.cumsum(ones, -1) - 1, "weights": np.ones((1, 1, length)), "bytes": ones}
    return {"inputs": ids[..., :-1], "targets": ids[..., 1:], **places}


@pytest.mark.parametrize("changed", [6, 9])
def test_a_prediction_sees_nothing_of_what_it_predicts(changed):
    """Depth 1 at position i reads tokens up to i + 1 and predicts i + 2: a later token changes no earlier loss."""
    before, other = row(), row()
    other["inputs"][..., changed] = other["targets"][..., changed - 1] = 63 - before["inputs"][..., changed]
    moved = np.abs(losses(before, 1) - losses(other, 1))[0] > 1e-12
    assert not moved[: changed - 2].any(), "these predict earlier tokens"
    assert moved[changed - 2] and moved[changed - 1], "its own prediction, and the first to read it"


def test_no_document_predicts_anothers_tokens():
    batch = row()
    batch["segments"][..., 7:] = 2
    batch["weights"][..., 6] = 0.0
    found = losses(batch, 1)[0]
    assert (found[[5, 6, 11]] == 0).all(), "the last two of a document have no token so far on; nor has the row's last"
    assert (found[[0, 4, 7, 10]] > 0).all()


@pytest.mark.parametrize("mesh", ["data2_expert2_tensor2_sp", "zero3_tensor2_sp"])
def test_a_mesh_trains_it_as_one_device_does(mesh):
    batches = [make_batch(seed) for seed in range(2)]
    one, many = (
        TinyRun.of(config(), mesh_config(name)).train(initial_state(config()), batches) for name in ("single", mesh)
    )
    assert_same(many.gradient, one.gradient)
    assert_same(many.metrics, one.metrics)
    assert one.metrics[0]["mtp"] > 0


@pytest.mark.parametrize("mesh", ["context4_data2", "pipeline2_data2_tensor2"])
def test_meshes_that_keep_its_tokens_elsewhere_are_refused(mesh):
    plain = dataclasses.replace(config(), num_layers=4)
    with pytest.raises(ValueError, match=r"mtp reads the last layer's stream .* leave mtp out"):
        check_model(make_rules(mesh_config(mesh)), mesh_config(mesh), plain)
