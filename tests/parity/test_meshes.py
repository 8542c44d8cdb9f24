"""What holds on one device holds on every mesh: loss, router, every gradient, and the state after three steps."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from moejax.accounting.contract import breaches, communication_contract, flop_contract
from moejax.compat import vary, varying_axes
from moejax.config.mesh import MeshConfig
from moejax.models import FAMILIES
from moejax.models.decoder import periods
from moejax.parallel import plan as plan_module
from moejax.parallel import rules, zero
from moejax.parallel.plan import MeshPlan
from moejax.parallel.rules import check_layers, check_model, make_rules
from moejax.train import gradient as train_gradient
from tests.conftest import (
    COMPOSED,
    assert_close,
    eight_device_meshes,
    mesh_config,
    model_config,
    tiny_models,
    tiny_params,
)
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
TELLING = "data2_expert2_tensor2_sp"
"""The mesh that a model runs on by default, unless ALSO has others for it; `-m slow` runs the rest."""
ALSO = {
    ("dense_tiny", "zero3_tensor2_sp"),
    ("dense_tiny", "data2_sequence2_tensor2_sp"),
    ("dropout_tiny", "tensor8"),  # heads numbered with replicated keys and values
    ("expert_choice_tiny", "context_all_to_all"),  # whole columns of scores over a split sequence
    ("gpt_oss_tiny", "data2_sequence2_tensor2_sp"),  # sinks and windows round a ring
    ("minimax_tiny", "data2_sequence2_tensor2_sp"),  # states that other devices' runs leave behind
    ("minimax_tiny", "data2_expert2_tensor2_sp"),
    ("loss_free_tiny", "pipeline2_expert2_tensor2"),  # biases of a stage's own layers
    ("loss_free_tiny", "zero2"),  # buffers beside gradients reduced in every microbatch
    ("noisy_top_k_tiny", "zero3_expert4"),
    ("switch_tiny", "context4_data2"),  # capacity counted over a split sequence
}

BATCHES = [make_batch(seed) for seed in range(3)]

pytestmark = pytest.mark.usefixtures("x64")


def refusal(model: str, mesh: str) -> str | None:
    """Give the reason why a model does not run on a mesh."""
    config, sized = mesh_config(mesh), proof_model(model, **stages_fit(model, mesh_config(mesh)))
    try:
        check_model(make_rules(config), config, sized)
        check_layers(config, layer_runs(sized))
    except ValueError as error:
        return str(error)
    return None


def layer_runs(config):
    return periods(FAMILIES[config.name].layers(config))


def cases():
    params, named = [], {model for model, _ in ALSO}
    for model in tiny_models():
        for mesh in eight_device_meshes():
            if refusal(model, mesh) is None:
                default = model == FULLY_TESTED or (model, mesh) in ALSO or (mesh == TELLING and model not in named)
                default = default and model not in COMPOSED
                marks = () if default else pytest.mark.slow
                params.append(pytest.param(model, mesh, marks=marks, id=f"{model}-{mesh}"))
    return params


def stages_fit(name: str, mesh: MeshConfig) -> dict[str, int]:
    """Give a tiny model as many layers as the mesh has stages for."""
    model = model_config(name)
    period = 1 if model.moe is None else model.moe.every
    wanted = period * mesh.pipeline * mesh.chunks
    return {} if model.num_layers % wanted == 0 else {"num_layers": wanted}


def train(name: str, mesh: MeshConfig, **changes) -> Trained:
    return TinyRun.of(proof_model(name, **changes), mesh).train(initial_state(proof_model(name)), BATCHES)


@functools.cache
def one_device(name: str, **changes) -> Trained:
    model = proof_model(name, **changes)
    return TinyRun.of(model, mesh_config("single")).train(initial_state(model), BATCHES)


@pytest.mark.parametrize(("model", "mesh"), cases())
def test_training_is_the_same_as_on_one_device_and_sends_no_more_than_it_must(model, mesh):
    changes = stages_fit(model, mesh_config(mesh))
    config = proof_model(model, **changes)
    run = TinyRun.of(config, mesh_config(mesh))
    program = run.program(BATCHES[0])
    actual, expected = run.train(initial_state(config), BATCHES, program), one_device(model, **changes)
    assert_same(actual.gradient, expected.gradient)
    assert_same(actual.metrics, expected.metrics)
    assert_same(actual.state, expected.state)
    lines = communication_contract(program.as_text(), run.parts, run.config.train)
    assert sum(line.found for line in lines) > 0
    assert not breaches(lines)


FLOPS = {(FULLY_TESTED, TELLING), (FULLY_TESTED, "pipeline2_interleaved"), ("dense_tiny", "context4_data2")}
"""Traced by default."""


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        pytest.param(*case.values, marks=() if case.values in FLOPS else pytest.mark.slow, id=case.id)
        for case in cases()
    ],
)
def test_a_step_computes_no_more_than_it_must(model, mesh):
    config = proof_model(model, **stages_fit(model, mesh_config(mesh)))
    if config.moe is not None:
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, implementation="ragged_dot"))
    run = TinyRun.of(config, mesh_config(mesh))
    [line] = flop_contract(run.jaxpr(BATCHES[0]), run.parts, run.config.train)
    assert line.kept, line
    assert line.ratio > 0.8


def test_pairs_that_cannot_work_are_refused_with_the_reason():
    """Every other pair of a tiny model and a mesh file is proven above."""
    reasons = {
        (model, mesh): refusal(model, mesh)
        for model in tiny_models()
        for mesh in eight_device_meshes()
        if refusal(model, mesh)
    }
    expected = {}
    for model, mesh in itertools.product(tiny_models(), eight_device_meshes()):
        config, sized = mesh_config(mesh), proof_model(model, **stages_fit(model, mesh_config(mesh)))
        if config.expert > 1 and sized.moe is None:
            expected[model, mesh] = "the model has none"
        elif config.pipeline > 1 and sized.moe is not None and sized.moe.competitive:
            expected[model, mesh] = "set pipeline = 1"
        elif config.pipeline > 1 and sized.moe is not None and sized.moe.router.balance_over == "model":
            expected[model, mesh] = "of all layers at once"
        elif config.pipeline > 1 and sized.encoder is None and len(layer_runs(sized)) > 1:
            expected[model, mesh] = "wants one period of layers"
        elif sized.encoder is not None and config.pipeline > 1:
            expected[model, mesh] = "set pipeline = 1"
        elif sized.encoder is not None and config.sequence > 1:
            expected[model, mesh] = "set sequence = 1"
        elif config.sequence > 1 and sized.attention.dropout > 0:
            expected[model, mesh] = "no split over positions"
    assert reasons.keys() == expected.keys()
    assert all(expected[pair] in reason for pair, reason in reasons.items())


@pytest.mark.parametrize("model", tiny_params())
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
    weights |= {"z_loss": router.z_loss}
    losses = {name: loss for name, loss in first["router"].losses.items() if weights.get(name)}
    if router.balance_over == "model":  # a product of means over all layers: no layer has a part of its own
        weights.pop("load_balance")
        assert first["aux"] > router.load_balance * router.num_active * 0.9, "even, it would be num_active"
    else:
        assert_close(first["aux"], sum(weights[name] * losses[name].sum() for name in losses))
    assert len(losses) == sum(weight > 0 for weight in weights.values())
    assert (first["router"].dropped.sum() > 0) == (config.dispatch == "capacity" and config.router.kind == "top_k")
    if config.router.bias_update_rate:
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(run.state.buffers))


def test_one_device_is_the_same_as_its_slow_twin():
    """Naive attention, dense dispatch, unrolled and recomputed: no block, sort, grouped matmul, scan, nothing saved."""
    model = proof_model(FULLY_TESTED)
    twins = {"attention": dataclasses.replace(model.attention, implementation="reference")}
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


@pytest.fixture
def twins():
    """Train on one device before anything is broken."""
    for name in ("dense_tiny", FULLY_TESTED):
        one_device(name)


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


def test_a_slice_of_a_gradient_that_is_not_summed_is_found(twins, monkeypatch):
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


def test_a_router_loss_that_every_tensor_rank_adds_is_found(twins, monkeypatch):
    honest = train_gradient.router_loss
    monkeypatch.setattr(train_gradient, "router_loss", lambda stats, config: 4 * honest(stats, config))
    assert fails(FULLY_TESTED, "tensor4_data2") == {"gradient", "metrics", "state"}


def test_a_router_loss_of_one_rank_alone_is_a_type_error(monkeypatch):
    monkeypatch.setattr(MeshPlan, "agree", lambda plan, x: x)
    with pytest.raises(ValueError, match="require replication"):
        train(FULLY_TESTED, mesh_config("tensor4_data2"))


def test_a_norm_that_counts_whole_leaves_on_every_rank_is_found(twins, monkeypatch):
    def careless(grads):
        square = sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))
        return jnp.sqrt(lax.psum(square, tuple(sorted(varying_axes(square)))))

    monkeypatch.setattr(zero, "global_norm", careless)
    assert fails("dense_tiny", "tensor4_data2") == {"metrics", "state"}


def test_experts_without_a_rule_are_found(monkeypatch):
    honest = rules.make_rules

    def forget(mesh):
        rows = [(name, () if name == "experts" else axes) for name, axes in honest(mesh).table]
        return rules.Rules(tuple(rows))

    monkeypatch.setattr(plan_module, "make_rules", forget)
    with pytest.raises(AssertionError, match="4 experts on each of 4 ranks"):
        train(FULLY_TESTED, mesh_config("expert4_data2"))


def test_a_batch_that_is_not_split_over_expert_is_a_type_error(monkeypatch):
    honest = rules.make_rules

    def lose_an_axis(mesh):
        rows = [(name, ("data",) if name == "batch" else axes) for name, axes in honest(mesh).table]
        return rules.Rules(tuple(rows))

    monkeypatch.setattr(plan_module, "make_rules", lose_an_axis)
    with pytest.raises(ValueError, match="require replication"):
        train(FULLY_TESTED, mesh_config("expert4_data2"))


def test_a_collective_that_nobody_declared_breaks_the_contract(twins, monkeypatch):
    """Gathering all parts and adding them up gives the same numbers for twice the bytes."""

    def wasteful(self, y_BTD):
        if self.size("tensor") == 1:
            return y_BTD
        return lax.all_gather(vary(y_BTD, ("tensor",)), "tensor", to="invarying").sum(0)

    monkeypatch.setattr(MeshPlan, "leave_tensor", wasteful)
    run = TinyRun.of(proof_model("dense_tiny"), mesh_config("tensor4_data2"))
    program = run.program(BATCHES[0])
    assert_same(
        run.train(initial_state(proof_model("dense_tiny")), BATCHES, program).state, one_device("dense_tiny").state
    )
    [breach] = breaches(communication_contract(program.as_text(), run.parts, run.config.train))
    assert breach.what == "tensor all-gather"
    assert "nobody declared it" in breach.why
