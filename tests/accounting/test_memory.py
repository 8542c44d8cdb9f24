"""The memory estimate against what autodiff keeps (its vjp's residuals) and against the compiler's own figures."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from moejax.accounting.activations import LayerMemory, activations
from moejax.accounting.memory import WeightBytes, cache_bytes, estimate_memory
from moejax.compat import vary
from moejax.config.attention import AttentionConfig
from moejax.config.mesh import MeshConfig
from moejax.config.model import ModelConfig, Precision
from moejax.config.moe import MoEConfig, RouterConfig
from moejax.config.run import TrainConfig
from moejax.layers.context import Context
from moejax.models import FAMILIES, ModelParts
from moejax.models.block import Block
from moejax.models.remat import rematerialize
from moejax.parallel.plan import MeshPlan
from moejax.train.state import abstract_state
from moejax.train.step import abstract_batch, make_train_step
from tests.conftest import assert_close, mesh_config, model_config
from tests.tiny_runs import TinyRun, make_batch

MESHES = {
    "single": MeshConfig(),
    "data4": MeshConfig(data=4),
    "zero1": MeshConfig(data=4, zero_stage=1),
    "zero3": MeshConfig(data=4, zero_stage=3),
    "tensor4": MeshConfig(tensor=4),
    "tensor_sp": MeshConfig(data=2, tensor=2, sequence_parallel=True),
    "1f1b": MeshConfig(pipeline=2, data=2),
    "gpipe": MeshConfig(pipeline=2, data=2, schedule="gpipe"),
    "1f1b_tensor_sp": MeshConfig(pipeline=2, tensor=2, sequence_parallel=True),
    "ring": MeshConfig(sequence=4),
    "all_to_all": MeshConfig(sequence=2, context="all_to_all"),
    "expert": MeshConfig(expert=4),
    "expert_zero3": MeshConfig(data=2, expert=2, zero_stage=3),
}
LENGTH = 256


def model(kind: str, remat: str = "none", **changes: Any) -> ModelConfig:
    """Make a model so small that its activations weigh far more than its weights."""
    top_k = RouterConfig(num_active=2, load_balance=0.02)
    switch = RouterConfig(num_active=1, normalize=False, load_balance=0.02)
    moe = {
        "dense": None,
        "mixtral": MoEConfig(num_experts=8, expert_ffn=160, router=top_k),
        "switch": MoEConfig(num_experts=8, expert_ffn=288, capacity_factor=1.25, router=switch),
        "shared": MoEConfig(num_experts=8, expert_ffn=160, router=top_k, shared_ffn=160),
    }[kind]
    name: Any = {"shared": "mixtral", "dense": "llama"}.get(kind, kind)
    sizes = {"vocab": 512, "embed": 128, "num_layers": 4, "ffn": 352}
    attention = AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=16)
    return ModelConfig(name=name, attention=attention, moe=moe, remat=remat, **(sizes | changes))  # type: ignore[arg-type]


def make_plan(mesh: MeshConfig) -> MeshPlan:
    return MeshPlan.from_config(mesh, jax.devices()[: math.prod(mesh.degrees())])


# --- weights, gradients, optimizer state: to the byte


@pytest.mark.parametrize("mesh", ["data8", "zero1", "zero3_tensor2_sp"])
def test_weights_and_optimizer_state_fill_what_the_compiler_says(mesh):
    """To the byte: what else the step takes is its batch, without the bytes that it does not read, and five counts."""
    run = TinyRun.of(model_config("dense_tiny"), mesh_config(mesh))
    step = make_train_step(run.parts, run.optimizer, run.config)
    batch = make_batch(0)
    batch["weights"] = batch["weights"].astype("float32")
    read = [array for key, array in batch.items() if key != "bytes"]
    compiled = step.lower(abstract_state(run.parts, run.optimizer), batch).compile()
    estimate = estimate_memory(run.parts, run.config.train)
    local_batch = sum(array.nbytes for array in read) // run.parts.plan.degree("batch")
    arguments = compiled.memory_analysis().argument_size_in_bytes
    assert arguments == estimate.params + estimate.optimizer + local_batch + 5 * 4


@pytest.mark.parametrize(
    ("mesh", "microbatches", "expected"),
    [
        ("data8", 1, (1, 1, 2)),
        ("zero1", 1, (1, 1, 1 / 4)),
        ("zero2", 1, (1, 1, 1 / 4)),
        ("zero2", 2, (1, 1 / 8, 1 / 4)),
        ("zero3", 2, (1 / 8, 1 / 8, 1 / 4)),
    ],
)
def test_each_zero_stage_splits_its_kind_of_state(mesh, microbatches, expected):
    run = TinyRun.of(model_config("mixtral_tiny"), mesh_config(mesh), microbatches=microbatches)
    whole = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(run.parts.shapes))
    estimate = estimate_memory(run.parts, run.config.train)
    assert (estimate.params, estimate.gradients, estimate.optimizer) == tuple(part * whole for part in expected)
    assert estimate.total == sum(dataclasses.astuple(estimate))


def test_weights_are_laid_out_on_paper_as_on_devices():
    for mesh in ("zero3_tensor2_sp", "zero3_expert4", "pipeline2_expert2_tensor2"):
        config = mesh_config(mesh).fill(8)
        built = ModelParts.of(model_config("mixtral_tiny"), MeshPlan.from_config(config))
        paper = ModelParts.of(model_config("mixtral_tiny"), MeshPlan.single()).on(MeshPlan.on_paper(config))
        assert paper.placements == built.placements
        assert WeightBytes.of(paper) == WeightBytes.of(built)


def test_caches_are_split_over_tensor_and_batch():
    config = model("dense")  # 4 layers, 4 key/value heads of 16
    assert cache_bytes(config, MeshPlan.on_paper(MeshConfig()), 8, 100) == 2 * 4 * 8 * 100 * 4 * 16 * 4
    split = MeshPlan.on_paper(MeshConfig(data=2, tensor=2))
    assert cache_bytes(config, split, 8, 100) == cache_bytes(config, MeshPlan.on_paper(MeshConfig()), 8, 100) / 4


# --- what autodiff keeps


def test_activations_shrink_with_what_is_recomputed_and_what_is_split():
    train = TrainConfig(global_batch=16, seq_len=256)

    def size(mesh: str = "single", microbatches: int = 1, **changes: Any) -> float:
        config = dataclasses.replace(model_config("bench_mixtral"), **changes)
        plan = MeshPlan.on_paper(mesh_config(mesh).fill(1 if mesh == "single" else 8))
        return activations(config, plan, dataclasses.replace(train, microbatches=microbatches)).total

    none, names, full = (size(remat=policy) for policy in ("none", "names", "full"))
    assert none > names > full
    assert_close(size(microbatches=4), none / 4)
    assert_close(size("data8"), none / 8)
    assert none > size("tensor4_data2") > size("tensor4_data2_sp") > none / 8
    naive = dataclasses.replace(model_config("bench_mixtral").attention, implementation="reference")
    assert size(attention=naive) > none


def residual_bytes(config: ModelConfig, mesh: MeshConfig, rows: int) -> float:
    """Trace one layer's vjp on the mesh, and add up what it closes over; weights, and copies of them, left out."""
    plan = make_plan(mesh)
    sizes: list[int] = []

    def layer(segments: jax.Array, x: jax.Array) -> jax.Array:
        block = Block(config, plan, nnx.Rngs(0), FAMILIES[config.name].layers(config)[-1])
        graph, params, rest = nnx.split(block, nnx.Param, ...)

        def local(p: nnx.Param) -> nnx.Param:
            spec = p.placement.weight_spec(plan, p[...].ndim)
            part = jnp.zeros(plan.place(spec).shard_shape(p[...].shape), p[...].dtype)
            axes = {a for entry in spec if entry for a in ((entry,) if isinstance(entry, str) else entry)}
            return p.replace(vary(part, sorted(axes | set(plan.gradient_axes()))))

        params = jax.tree.map(local, params, is_leaf=lambda p: isinstance(p, nnx.Variable))
        context = Context.of(plan, segments, None, None, jax.random.key_data(jax.random.key(0)))

        def body(x: jax.Array, params: Any) -> jax.Array:
            return nnx.merge(graph, params, rest)(x, context)[0]

        _, vjp = jax.vjp(rematerialize(body, config.remat, mesh.zero_stage), vary(x, plan.stream_axes()), params)
        weights = {leaf.shape for leaf in jax.tree.leaves(params)}
        kept = [leaf for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "shape") and leaf.shape not in weights]
        sizes.extend(leaf.size * leaf.dtype.itemsize for leaf in kept)
        return jnp.zeros(())

    segments = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32)
    x = jax.ShapeDtypeStruct((rows, LENGTH, config.embed), jnp.dtype(config.precision.compute))
    ins = (plan.spec("batch", "seq"), plan.spec("batch", "residual_seq", "embed"))
    jax.eval_shape(plan.spmd(layer, ins, PartitionSpec()), segments, x)
    return float(sum(sizes))


KEPT = [
    *[("dense", "none", mesh) for mesh in ("single", "tensor_sp", "tensor4", "ring")],
    *[(kind, "none", mesh) for kind in ("mixtral", "switch", "shared") for mesh in ("single", "tensor_sp", "expert")],
    *[(kind, "dots", mesh) for kind in ("dense", "mixtral", "switch", "shared") for mesh in ("single", "tensor_sp")],
    *[(kind, remat, "tensor_sp") for kind in ("dense", "mixtral") for remat in ("names", "full")],
    ("mixtral", "none", "ring"),
]


@pytest.mark.parametrize(("kind", "remat", "mesh"), KEPT)
def test_a_layer_keeps_what_its_vjp_closes_over(kind: str, remat: str, mesh: str):
    config, rows = model(kind, remat), 16
    layer = LayerMemory(config, make_plan(MESHES[mesh]), TrainConfig(global_batch=rows, seq_len=LENGTH))
    expected = residual_bytes(config, MESHES[mesh], rows)
    if mesh == "expert" and remat == "none" and layer.way == "sorted":
        # The experts' own results, for the gradient of weights that are ones: the compiler finds that nobody asks.
        expected -= layer.places * config.embed * 4
    assert layer.kept(FAMILIES[config.name].layers(config)[-1], remat) == pytest.approx(expected, rel=0.04)


def test_narrow_arithmetic_keeps_narrow_arrays():
    config = model("mixtral", precision=Precision(compute="bfloat16"))
    layer = LayerMemory(config, make_plan(MeshConfig()), TrainConfig(global_batch=16, seq_len=LENGTH))
    expected = residual_bytes(config, MeshConfig(), 16)
    assert layer.kept(FAMILIES[config.name].layers(config)[-1], "none") == pytest.approx(expected, rel=0.04)


# --- what the compiler says

QUICK = [("dense", "full", "tensor_sp", 1), ("mixtral", "full", "1f1b", 4), ("mixtral", "none", "expert", 1)]
GRID = [
    *QUICK,
    *[("dense", remat, "single", 1) for remat in ("none", "dots", "names", "full")],
    *[("mixtral", remat, "single", 1) for remat in ("none", "dots", "names", "full")],
    *[("dense", "full", mesh, 1) for mesh in ("zero1", "zero3", "ring", "all_to_all")],
    *[("dense", "none", mesh, 1) for mesh in ("tensor4", "ring", "zero3")],
    *[("dense", "full", mesh, 4) for mesh in ("single", "1f1b", "gpipe")],
    *[("mixtral", "full", mesh, 1) for mesh in ("tensor_sp", "ring", "expert")],
    *[("mixtral", "full", mesh, 4) for mesh in ("single", "gpipe", "1f1b_tensor_sp", "expert_zero3")],
    *[
        ("mixtral", "names", "data4", 4),
        ("mixtral", "dots", "zero3", 1),
        ("switch", "none", "single", 1),
        ("switch", "full", "expert", 1),
    ],
]


@functools.cache
def error(kind: str, remat: str, mesh: str, microbatches: int) -> float:
    """Compile a training step of 16 sequences a device (8 to a microbatch); give (estimate - compiled) / compiled.

    The CPU's default scheduler runs whatever can run at once and holds more for it; this is the one that saves memory,
    as GPUs do.
    """
    config, plan = model(kind, remat), make_plan(MESHES[mesh])
    batch = 16 * plan.degree("batch") * (1 if microbatches == 1 else microbatches // 2)
    changes = {"global_batch": batch, "seq_len": LENGTH, "microbatches": microbatches}
    run = TinyRun.of(config, MESHES[mesh], **changes)
    step = make_train_step(run.parts, run.optimizer, run.config)
    lowered = step.lower(abstract_state(run.parts, run.optimizer), abstract_batch(run.parts.plan, run.config.train))
    compiled = lowered.compile({"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}).memory_analysis()
    total = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    return estimate_memory(run.parts, run.config.train).total / total - 1


@pytest.mark.parametrize(("kind", "remat", "mesh", "microbatches"), QUICK)
def test_the_estimate_is_near_the_compiled_memory(kind: str, remat: str, mesh: str, microbatches: int):
    assert abs(error(kind, remat, mesh, microbatches)) < 0.15


@pytest.mark.slow
def test_the_estimate_s_error_over_the_grid():
    """What is kept is exact; what lives beside it is the compiler's schedule, of which this is a model.

    Measured (jax 0.11.2): median 5.7 %, worst 18 %; a fifth of the cases are off by more than a tenth, both ways.
    """
    errors = {case: error(*case) for case in GRID}
    print(*(f"{' '.join(map(str, case)):36} {100 * e:+.1f} %" for case, e in errors.items()), sep="\n")
    sizes = np.abs(list(errors.values()))
    print(
        f"median {np.median(sizes):.1%}, worst {sizes.max():.1%}, over a tenth: {(sizes > 0.1).sum()} of {sizes.size}"
    )
    assert np.median(sizes) < 0.07
    assert sizes.max() < 0.2
