"""What holds on one device holds on every mesh: loss, router, every gradient, and the state after three steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from moejax.compat import varying_axes
from moejax.config.mesh import MeshConfig
from moejax.parallel import zero
from moejax.parallel.plan import MeshPlan
from moejax.train import step as train_step
from tests.conftest import assert_close, eight_device_meshes, mesh_config, tiny_models
from tests.tiny_runs import (
    OPTIMIZER,
    TinyRun,
    Trained,
    assert_same,
    initial_state,
    make_batch,
    proof_model,
    relative_errors,
)

FULLY_TESTED = "mixtral_tiny"
TELLING = ("tensor4_data2", "zero3_tensor2_sp")
"""The meshes that the other models run on by default; `-m slow` runs the rest."""
ALSO = {("dropout_tiny", "tensor8"), ("loss_free_tiny", "zero2")}
"""Heads numbered with replicated keys and values; buffers beside gradients reduced in every microbatch."""

BATCHES = [make_batch(seed) for seed in range(3)]

pytestmark = pytest.mark.usefixtures("x64")


def cases():
    params = []
    for model in tiny_models():
        for mesh in eight_device_meshes():
            default = model == FULLY_TESTED or mesh in TELLING or (model, mesh) in ALSO
            params.append(pytest.param(model, mesh, marks=() if default else pytest.mark.slow, id=f"{model}-{mesh}"))
    return params


def train(name: str, mesh: MeshConfig, **changes) -> Trained:
    run = TinyRun.of(proof_model(name, **changes), mesh)
    return run.train(run.place(initial_state(proof_model(name))), BATCHES)


@functools.cache
def one_device(name: str) -> Trained:
    return train(name, mesh_config("single"))


@pytest.mark.parametrize(("model", "mesh"), cases())
def test_training_is_the_same_as_on_one_device(model, mesh):
    actual, expected = train(model, mesh_config(mesh)), one_device(model)
    assert_same(actual.gradient, expected.gradient)
    assert_same(actual.metrics, expected.metrics)
    assert_same(actual.state, expected.state)


@pytest.mark.parametrize("model", tiny_models())
def test_the_compared_run_is_telling(model):
    """A comparison says nothing about a loss that is zero, a capacity that is never full, a bias that never moves."""
    run = one_device(model)
    first = run.metrics[0]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(run.gradient))
    assert first["grad_norm"] > OPTIMIZER.clip_norm
    assert not run.state.skipped
    start = initial_state(proof_model(model))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-4, run.state.params, start.params)
    assert all(jax.tree.leaves(moved))
    config = proof_model(model).moe
    if config is None:
        assert first["router"] is None
        return
    assert first["router"].load_E.std() > 0 or config.router.kind != "top_k"
    router = config.router
    weights = {"load_balance": router.load_balance, "importance": router.importance_loss, "load": router.load_loss}
    losses = {name: loss for name, loss in first["router"].losses.items() if weights.get(name)}
    assert_close(first["aux"], sum(weights[name] * losses[name].sum() for name in losses))
    assert len(losses) == sum(weight > 0 for weight in weights.values())
    assert (first["router"].dropped.sum() > 0) == (config.dispatch == "capacity" and config.router.kind == "top_k")
    if config.router.bias_update_rate:
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(run.state.buffers))


def test_one_device_is_the_same_as_its_slow_twin():
    """Naive attention, dense dispatch, unrolled and recomputed: no block, sort, grouped matmul, scan, nothing saved."""
    model = proof_model(FULLY_TESTED)
    twins = {"attention": dataclasses.replace(model.attention, implementation="naive")}
    twins["moe"] = dataclasses.replace(model.moe, dispatch="dense")
    slow, fast = (
        train(FULLY_TESTED, mesh_config("single"), remat="full", unroll=True, **twins),
        one_device(FULLY_TESTED),
    )
    assert_same(slow.gradient, fast.gradient)
    assert_same(slow.metrics, fast.metrics)
    assert_same(slow.state, fast.state)


def test_auto_is_data_parallelism_over_all_devices():
    assert mesh_config("auto").fill(8) == mesh_config("data8")


# --- does the net catch? One mistake at a time


def fails(name: str, mesh: str) -> set[str]:
    """Say which parts of a run differ from one device's."""
    actual, expected = train(name, mesh_config(mesh)), one_device(name)
    parts = ("gradient", "metrics", "state")
    errors = {part: relative_errors(getattr(actual, part), getattr(expected, part)) for part in parts}
    return {part for part, leaves in errors.items() if max(leaves.values()) > 1e-6}


@pytest.mark.parametrize("mesh", ["data8", "tensor4_data2"])
def test_a_gradient_that_is_not_reduced_is_a_type_error(mesh, monkeypatch):
    def forget_one(plan, grads, placements):
        reduced = honest(plan, grads, placements)
        return reduced | {"norm": grads["norm"]}

    honest = zero.reduce_gradients
    monkeypatch.setattr(zero, "reduce_gradients", forget_one)
    with pytest.raises(ValueError, match="require replication"):
        train("dense_tiny", mesh_config(mesh))


def test_a_slice_of_a_gradient_that_is_not_summed_is_found(monkeypatch):
    """The type checker cannot see it: a split gradient varies anyway."""

    def slice_one(plan, grads, placements):
        reduced, embedding = honest(plan, grads, placements), placements["embedding"]["table"]
        own = zero.update_slices(plan, lambda g: g, {"table": grads["embedding"]["table"]}, {"table": embedding})
        size = reduced["embedding"]["table"].shape[embedding.dim]
        own = lax.dynamic_slice_in_dim(own["table"], lax.axis_index("data") * size, size, 2 + embedding.dim)
        return reduced | {"embedding": {"table": own}}

    honest = zero.reduce_gradients
    monkeypatch.setattr(zero, "reduce_gradients", slice_one)
    assert "gradient" in fails("dense_tiny", "zero1")


def test_a_router_loss_that_every_tensor_rank_adds_is_found(monkeypatch):
    honest = train_step.router_loss
    monkeypatch.setattr(train_step, "router_loss", lambda stats: 4 * honest(stats))
    assert fails(FULLY_TESTED, "tensor4_data2") == {"gradient", "metrics", "state"}


def test_a_router_loss_of_one_rank_alone_is_a_type_error(monkeypatch):
    monkeypatch.setattr(MeshPlan, "agree", lambda plan, x: x)
    with pytest.raises(ValueError, match="require replication"):
        train(FULLY_TESTED, mesh_config("tensor4_data2"))


def test_a_norm_that_counts_whole_leaves_on_every_rank_is_found(monkeypatch):
    def careless(grads):
        square = sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))
        return jnp.sqrt(lax.psum(square, tuple(sorted(varying_axes(square)))))

    monkeypatch.setattr(zero, "global_norm", careless)
    assert fails("dense_tiny", "tensor4_data2") == {"metrics", "state"}
