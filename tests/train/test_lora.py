"""Low-rank updates: they start as nothing, they alone move, on every mesh alike, and they can be merged away."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.model import LoRAConfig
from moejax.layers.context import Context
from moejax.models import ModelParts
from moejax.models.lora import merge_updates
from moejax.parallel.plan import MeshPlan
from tests.conftest import assert_close, mesh_config
from tests.tiny_runs import TinyRun, assert_same, initial_state, make_batch, proof_model

pytestmark = pytest.mark.usefixtures("x64")

LORA = LoRAConfig(rank=4, alpha=8.0, targets=("attention", "experts", "ffn"))
BATCHES = [make_batch(seed) for seed in range(3)]


def adapted(name: str):
    return proof_model(name, lora=LORA)


def logits(parts: ModelParts, params, buffers):
    ids = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    model = parts.merge(*jax.tree.map(jnp.asarray, (params, buffers)))
    return model.logits(model(ids, Context.of(parts.plan, jnp.ones_like(ids))))


@pytest.mark.parametrize("name", ["mixtral_tiny", "deepseek_v3_tiny"])
def test_a_fresh_update_changes_nothing_and_a_trained_one_can_be_merged(name):
    run = TinyRun.of(adapted(name), mesh_config("single"))
    state = initial_state(adapted(name))
    plain, params, buffers = merge_updates(run.parts, state.params, state.buffers)
    base = jax.tree.leaves(jax.tree.map(np.asarray, params))
    assert plain.config.lora is None
    assert_close(logits(plain, params, buffers), logits(run.parts, state.params, state.buffers))
    trained = run.train(state, BATCHES).state
    merged = merge_updates(run.parts, trained.params, trained.buffers)
    assert_close(logits(*merged), logits(run.parts, trained.params, trained.buffers))
    moved = [np.abs(a - b).max() > 0 for a, b in zip(jax.tree.leaves(merged[1]), base, strict=True)]
    assert any(moved) and not all(moved), "updates move their matrices, nothing moves the others"


def test_updates_alone_are_trained():
    config = adapted("mixtral_tiny")
    parts = ModelParts.of(config, MeshPlan.single())
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(parts.shapes)}
    assert names == {"down", "up"}
    state = initial_state(config)
    trained = TinyRun.of(config, mesh_config("single")).train(state, BATCHES).state
    jax.tree.map(np.testing.assert_array_equal, trained.buffers, jax.tree.map(np.asarray, state.buffers))
    assert all(
        np.abs(a - b).max() > 0 for a, b in zip(*map(jax.tree.leaves, (trained.params, state.params)), strict=True)
    )


@pytest.mark.parametrize("mesh", ["data2_expert2_tensor2_sp", "zero3_expert4"])
def test_updates_train_on_a_mesh_as_on_one_device(mesh):
    config = adapted("mixtral_tiny")
    one, many = (
        TinyRun.of(config, mesh_config(name)).train(initial_state(config), BATCHES) for name in ("single", mesh)
    )
    assert_same(many.gradient, one.gradient)
    assert_same(many.state, one.state)


def test_only_targets_have_updates():
    few = dataclasses.replace(adapted("mixtral_tiny"), lora=LoRAConfig(targets=("experts",)))
    paths = jax.tree_util.tree_leaves_with_path(ModelParts.of(few, MeshPlan.single()).shapes)
    assert {path[-3].key for path, _ in paths} == {"experts"}
