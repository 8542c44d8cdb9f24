"""ZeRO: what each stage splits, to the byte; that weights are born split; that accumulation is one big batch."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from moejax.compat import vary
from moejax.config.mesh import MeshConfig
from moejax.models import ModelParts
from moejax.models.remat import rematerialize
from moejax.parallel.plan import MeshPlan
from moejax.parallel.zero import Placement, global_norm, gradient_buffers, place, update_slices, whole_weight
from moejax.train.state import abstract_state
from moejax.train.step import make_train_step
from tests.conftest import assert_close, eight_device_meshes, mesh_config, model_config
from tests.tiny_runs import TinyRun, assert_same, initial_state, make_batch, proof_model

STAGES = (0, 1, 2, 3)


def plan_of(stage: int, **degrees: int) -> MeshPlan:
    return MeshPlan.from_config(MeshConfig(**(degrees or {"data": 8}), zero_stage=stage))


# --- which dim is split


def test_the_largest_free_dim_that_divides_is_split():
    assert place(plan_of(1), ("embed", "ffn"), (32, 64)) == Placement(("embed", "ffn"), -1, ("data",), 1)
    assert place(plan_of(1), ("embed", "ffn"), (64, 32)).dim == -2
    assert place(plan_of(1), ("embed", "ffn"), (32, 60)).dim == -2, "60 does not divide by 8"
    assert place(plan_of(3, data=2, tensor=4), ("embed", "ffn"), (32, 64)).dim == -2, "tensor splits ffn"


def test_a_weight_without_such_a_dim_stays_whole():
    assert place(plan_of(3), ("embed",), (36,)).dim is None
    assert place(plan_of(0), ("embed",), (32,)).dim is None
    assert place(plan_of(3, tensor=8), ("embed",), (32,)).dim is None, "there are no replicas to split over"


def test_dims_count_from_the_end_so_that_layers_can_be_stacked_in_front():
    placement = place(plan_of(3), ("embed", "ffn"), (64, 36))
    assert placement.weight_spec(plan_of(3), 2) == PartitionSpec(("data",), None)
    assert placement.weight_spec(plan_of(3), 3) == PartitionSpec(None, ("data",), None)


@pytest.mark.parametrize(
    ("stage", "weight", "state"), [(0, None, None), (1, None, "data"), (2, None, "data"), (3, "data", "data")]
)
def test_a_stage_says_what_is_split(stage, weight, state):
    plan = plan_of(stage)
    placement = place(plan, ("embed", "ffn"), (36, 64))
    for spec, axis in ((placement.weight_spec(plan, 2), weight), (placement.state_spec(plan, 2), state)):
        assert spec == PartitionSpec(None, None if axis is None else (axis,))


# --- memory, to the byte


def bytes_on_a_device(tree) -> set[int]:
    """Give the bytes that each device holds of a tree; one number where all hold as much."""
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return set(held.values())


@pytest.mark.parametrize("stage", STAGES)
def test_memory_falls_by_what_the_stage_splits(stage):
    """A model dim of 40 and 36 hidden units: some weights have two dims to choose from, some one, none has none."""
    moe = dataclasses.replace(model_config("mixtral_tiny").moe, expert_ffn=36)
    run = TinyRun.of(
        dataclasses.replace(model_config("mixtral_tiny"), embed=40, vocab=60, moe=moe),
        MeshConfig(data=8, zero_stage=stage),
    )
    state = run.init()
    whole = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(run.parts.shapes))
    counts = 2 * 4  # Adam's and the schedule's
    assert bytes_on_a_device(state.params) == {whole // 8 if stage == 3 else whole}
    assert bytes_on_a_device(state.opt_state) == {2 * whole // (8 if stage else 1) + counts}


def test_a_weight_that_does_not_divide_is_held_whole():
    """A model dim of 36: of a norm nothing divides by 8, of the other weights the other dim does."""
    run = TinyRun.of(dataclasses.replace(model_config("dense_tiny"), embed=36), MeshConfig(data=8, zero_stage=3))
    vocab, embed, ffn, layers, heads, kv_heads, head_dim = 64, 36, 64, 2, 8, 4, 8
    matrices = vocab * embed + layers * embed * (2 * (heads + kv_heads) * head_dim + 3 * ffn)
    norms = (2 * layers + 1) * embed
    assert bytes_on_a_device(run.init().params) == {4 * (matrices // 8 + norms)}


def test_tensor_and_zero_split_together():
    run = TinyRun.of(model_config("mixtral_tiny"), mesh_config("zero3_tensor2_sp"))
    split_by_tensor = norms_and_router = 0
    for leaf, placement in zip(jax.tree.leaves(run.parts.shapes), jax.tree.leaves(run.parts.placements), strict=True):
        if run.parts.plan.axes_of(*placement.axes):
            split_by_tensor += 4 * math.prod(leaf.shape)
        else:
            norms_and_router += 4 * math.prod(leaf.shape)
    assert bytes_on_a_device(run.init().params) == {split_by_tensor // 8 + norms_and_router // 4}


# --- birth


def test_weights_are_born_split(monkeypatch):
    """The init program of a device puts out its part alone, and never holds the whole: not even the largest weight."""
    parts = ModelParts.of(model_config("bench_mixtral"), plan_of(3))
    sizes = [4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(parts.shapes)]
    programs, honest = [], jax.jit

    def recorded(f, **options):
        programs.append(honest(f, **options))
        return programs[-1]

    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", recorded)
        params, _ = parts.init(0)
    memory = programs[0].lower().compile().memory_analysis()
    assert memory.output_size_in_bytes < sum(sizes) / 8 + 10_000
    assert memory.temp_size_in_bytes < max(sizes)
    assert bytes_on_a_device(params) == {sum(sizes) // 8}


@pytest.mark.parametrize("mesh", eight_device_meshes())
def test_every_mesh_draws_the_same_weights_bit_by_bit(mesh):
    model = dataclasses.replace(model_config("loss_free_tiny"), num_layers=4)  # so many an interleaved mesh wants
    one_device, parts = (TinyRun.of(model, mesh_config(name)).parts for name in ("single", mesh))
    jax.tree.map(np.testing.assert_array_equal, parts.canonical(parts.init(3)), one_device.init(3))


# --- inside the program


@pytest.mark.usefixtures("x64")
def test_the_norm_of_split_and_whole_leaves_is_the_norm_of_the_whole():
    plan = plan_of(0, data=2, tensor=4)
    rng = np.random.default_rng(0)
    tree = {"whole": rng.normal(size=3), "tensor": rng.normal(size=(8, 2)), "both": rng.normal(size=(16, 2))}
    specs = {"whole": PartitionSpec(), "tensor": PartitionSpec("tensor"), "both": PartitionSpec(("data", "tensor"))}
    norm = jax.jit(plan.spmd(global_norm, (specs,), PartitionSpec()))(tree)
    assert_close(norm, np.sqrt(sum(np.square(leaf).sum() for leaf in tree.values())))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_rank_updates_its_own_slice_and_all_see_the_whole(stage):
    plan = plan_of(stage)
    placements = {"matrix": place(plan, ("embed", "ffn"), (3, 16)), "norm": place(plan, ("embed",), (3,))}
    weights = {"matrix": jnp.arange(48.0).reshape(3, 16), "norm": jnp.ones(3)}
    specs = {name: placements[name].weight_spec(plan, w.ndim) for name, w in weights.items()}

    def program(weights):
        def update(slices):
            assert slices["matrix"].shape == (3, 2)
            return {"matrix": slices["matrix"] + 100.0 * lax.axis_index("data"), "norm": slices["norm"] + 1.0}

        return update_slices(plan, update, weights, placements)

    updated = jax.jit(plan.spmd(program, (specs,), specs))(weights)
    assert_close(updated["matrix"], weights["matrix"] + 100.0 * np.repeat(np.arange(8), 2).astype(np.float32))
    assert_close(updated["norm"], 2.0 * weights["norm"])


POLICIES = ("none", "full", "dots", "names")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_weight_is_gathered_again_for_the_backward(policy):
    plan = plan_of(3)
    placement = place(plan, ("embed", "ffn"), (8, 16))

    def loss(w, x):
        return rematerialize(lambda x, w: jnp.tanh(x @ whole_weight(w, placement)), policy, 3)(x, w).sum()

    specs = (placement.weight_spec(plan, 2), PartitionSpec("data"))
    program = plan.spmd(jax.grad(loss, (0, 1)), specs, specs)
    text = str(jax.make_jaxpr(program)(jnp.ones((8, 16)), jnp.ones((16, 8))))
    assert text.count("all_gather[") == 2
    assert text.count("reduce_scatter[") == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_keeps_the_layers_whole_weights_for_the_backward(policy):
    """Kept weights would lie stacked, one of each layer: the whole model on every device."""
    run = TinyRun.of(dataclasses.replace(model_config("mixtral_tiny"), remat=policy), mesh_config("zero3"))
    step = make_train_step(run.parts, run.optimizer, run.config)
    program = jax.make_jaxpr(step)(abstract_state(run.parts, run.optimizer), make_batch(0))
    stacked = {tuple(sorted(leaf.shape)) for leaf in jax.tree.leaves(run.parts.shapes["stacks"])}
    inside = next(eqn.params["jaxpr"] for eqn in equations(program.jaxpr) if eqn.primitive.name == "shard_map")
    shapes = {var.aval.shape for eqn in equations(inside) for var in eqn.outvars if hasattr(var.aval, "shape")}
    assert len(shapes) > 50
    assert not {shape for shape in shapes if tuple(sorted(shape)) in stacked}


def equations(jaxpr):
    """Give the equations of a program and of all programs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.usefixtures("x64")
def test_a_gradient_leaves_the_program_as_narrow_as_its_state():
    """Stage 2 accumulates slices, stage 1 whole gradients."""
    weight = {"w": jnp.ones((3, 16))}
    for stage, reduced, shape in ((1, False, (3, 16)), (2, True, (3, 2))):
        plan = plan_of(stage)
        placements = {"w": place(plan, ("embed", "ffn"), (3, 16))}

        def program(weights, plan=plan, placements=placements, reduced=reduced, shape=shape):
            local = jax.tree.map(lambda w: vary(w, ("data",)), weights)
            buffers = gradient_buffers(plan, local, placements, "float64", reduced)
            assert buffers["w"].shape == shape
            return buffers

        jax.eval_shape(plan.spmd(program, ({"w": PartitionSpec()},), {"w": PartitionSpec("data")}), weight)


# --- accumulation


@pytest.mark.usefixtures("x64")
def test_microbatches_accumulate_to_one_big_batch():
    """The parts hold different numbers of tokens: a mean of means would differ."""
    state = initial_state(proof_model("dense_tiny"))
    trained = []
    for microbatches in (1, 2):
        run = TinyRun.of(proof_model("dense_tiny"), mesh_config("single"), microbatches=microbatches)
        trained.append(run.train(state, [make_batch(seed, microbatches=microbatches) for seed in range(2)]))
    halves = make_batch(0)["weights"].sum((1, 2))
    assert halves[0] != halves[1]
    assert_same(trained[1].gradient, trained[0].gradient)
    assert_same(trained[1].metrics, trained[0].metrics)
    assert_same(trained[1].state, trained[0].state)
