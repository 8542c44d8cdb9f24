"""Whole steps with kernels inside: as accurate as by XLA in the interpreter, and compiled for H200s."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.accounting.chips import named_chip
from moejax.accounting.target import h200_devices, missing_plugins, nothing_kept
from moejax.config.mesh import MeshConfig
from moejax.config.model import ModelConfig, Precision
from moejax.config.run import RunConfig, TrainConfig
from moejax.models import ModelParts
from moejax.parallel.plan import MeshPlan
from moejax.serve.generate import Generator
from moejax.train.ahead import lower_train_step
from moejax.train.proof import Trial, proof_batch, to_numpy
from moejax.train.state import abstract_state
from tests.conftest import model_config

TRAIN = TrainConfig(global_batch=1, seq_len=96, microbatches=1, steps=2)


def small(way: str, compute: str = "bfloat16", **changes) -> ModelConfig:
    """A Mixtral of one layer whose widths the kernels take."""
    config = model_config("mixtral_tiny")
    attention = dataclasses.replace(config.attention, num_heads=2, num_kv_heads=1, head_dim=64, implementation=way)
    moe = dataclasses.replace(config.moe, num_experts=2, expert_ffn=64, implementation=way)
    precision = Precision("float32", compute, "float32", "float32")
    changes = {"embed": 64, "num_layers": 1, "remat": "none"} | changes
    return dataclasses.replace(config, attention=attention, moe=moe, precision=precision, **changes)


def gradient(model: ModelConfig, state, batch) -> dict:
    trial = Trial.of(RunConfig(model=model, train=TRAIN), jax.devices()[:1])
    return trial.train(trial.init() if state is None else state, [batch]).gradient


@pytest.mark.usefixtures("interpreter")
def test_a_step_by_kernels_is_as_accurate_as_one_by_xla():
    """In the manual program, with packed documents: gradients of every weight. (The interpreter knows no remat.)"""
    batch = proof_batch(0, 64, 1, 96, 1)
    exact = Trial.of(RunConfig(model=small("xla", "float32"), train=TRAIN), jax.devices()[:1])
    state = to_numpy(exact.init())
    exact, plain, ours = (
        jax.tree.leaves_with_path(gradient(small(way, compute), state, batch))
        for way, compute in (("xla", "float32"), ("xla", "bfloat16"), ("mosaic", "bfloat16"))
    )
    for (path, e), (_, p), (_, o) in zip(exact, plain, ours, strict=True):
        error, allowed = (float(np.abs(np.asarray(x) - np.asarray(e)).max()) for x in (o, p))
        floor = 1e-3 * float(np.abs(e).max())
        assert error <= 2 * allowed + floor, f"{jax.tree_util.keystr(path)}: {error:.2e}, XLA's {allowed:.2e}"


# --- compiled for H200s


NAMES = r"(flash_attention\w*|grouped_\w+|rms_norm\w*|linear_\w+)"


def kernels_in(text: str) -> set[str]:
    """Name the Mosaic kernels of a compiled program."""
    lines = (line for line in text.splitlines() if 'custom_call_target="mosaic_gpu_v2"' in line)
    return {name for line in lines for name in re.findall(NAMES, line)}


def compiled_step(model: ModelConfig, mesh: MeshConfig, train: TrainConfig):
    devices = h200_devices(math.prod(mesh.degrees()), named_chip("H200"))
    lowered, _ = lower_train_step(RunConfig(model=model, mesh=mesh, train=train), devices)
    with nothing_kept():
        return lowered.compile()


TRAINING = {"flash_attention", "flash_attention_dq", "flash_attention_dkdv"}


def assert_no_copies_for_each_expert(compiled, model: ModelConfig, num_tokens: int, ranks: int) -> None:
    """Of `num_tokens` a device: gradients (with several ranks their sums too), and a few times the routed rows."""
    rows = num_tokens * model.moe.router.num_active  # before an exchange pads them
    routed = rows * (model.embed + 3 * model.moe.expert_ffn) * 2
    memory = compiled.memory_analysis()
    weights = memory.argument_size_in_bytes / 3  # float32, as the gradients; Adam's moments are the rest
    assert memory.temp_size_in_bytes < weights * (1 if ranks == 1 else 3) + 8 * routed


@pytest.mark.skipif(missing_plugins() is not None, reason=f"{missing_plugins()}")
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=2, expert=2, tensor=2, sequence_parallel=True),
        pytest.param(MeshConfig(sequence=2, expert=2, tensor=2), marks=pytest.mark.slow),
        pytest.param(MeshConfig(pipeline=2, data=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=["data2_expert2_tensor2_sp", "sequence2_expert2_tensor2", "pipeline2_data2_tensor2"],
)
def test_a_step_on_eight_h200s_holds_the_kernels(mesh):
    """With remat, in the manual program, where every array carries the axes that it varies on."""
    model = small("auto", remat="full", num_layers=mesh.pipeline, embed=256)
    attention = dataclasses.replace(model.attention, num_heads=4, num_kv_heads=2)
    moe = dataclasses.replace(model.moe, num_experts=16, expert_ffn=256)
    model = dataclasses.replace(model, attention=attention, moe=moe)
    train = TrainConfig(global_batch=8, seq_len=512, microbatches=2 if mesh.pipeline > 1 else 1)
    compiled = compiled_step(model, mesh, train)
    assert_no_copies_for_each_expert(compiled, model, 512, ranks=8)
    text = compiled.as_text()
    found = kernels_in(text)
    assert found >= TRAINING, found
    assert any(name.startswith("grouped_matmul") for name in found), found
    assert "ragged-dot" not in text


def fine_grained(num_layers: int = 2) -> ModelConfig:
    """Mixtral 8x7B's widths, 64 narrow experts of which a token takes 8."""
    config = model_config("mixtral_8x7b")
    router = dataclasses.replace(config.moe.router, num_active=8)
    moe = dataclasses.replace(config.moe, num_experts=64, expert_ffn=1024, router=router)
    return dataclasses.replace(config, num_layers=num_layers, moe=moe)


ONE, EIGHT, TENSOR = MeshConfig(), MeshConfig(data=2, expert=4, zero_stage=1), MeshConfig(tensor=8)


@pytest.mark.slow
@pytest.mark.skipif(missing_plugins() is not None, reason=f"{missing_plugins()}")
@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one", "eight"])
def test_a_step_of_real_size_keeps_a_few_times_the_routed_rows(mesh):
    """No E-fold copies, which would be 69 GB; of a small step on eight the test above says so."""
    model, ranks = fine_grained(), math.prod(mesh.degrees())
    train = TrainConfig(global_batch=4 * ranks, seq_len=4096)
    compiled = compiled_step(model, mesh, train)
    assert kernels_in(compiled.as_text()) >= TRAINING
    assert_no_copies_for_each_expert(compiled, model, 4 * 4096, ranks)


@pytest.mark.skipif(missing_plugins() is not None, reason=f"{missing_plugins()}")
@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        (small("auto", embed=256), ONE),
        pytest.param(fine_grained(num_layers=1), ONE, marks=pytest.mark.slow),
        pytest.param(fine_grained(num_layers=1), TENSOR, marks=pytest.mark.slow),
    ],
    ids=["small", "real", "real_eight"],
)
def test_a_decode_loop_compiles_with_the_kernels(model, mesh):
    """Prompts by flash attention, experts by grouped matmuls; little beside the weights and their bfloat16 copies."""
    batch, prompt, new = 8, 512, 128
    plan = MeshPlan.from_config(mesh, h200_devices(math.prod(mesh.degrees()), named_chip("H200")))
    parts = ModelParts.of(model, plan)
    state = abstract_state(parts, optax.identity())
    ids, pad, seed = (
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=plan.sharding(*names))
        for shape, names in (((batch, prompt), ("batch", None)), ((batch,), ("batch",)), ((), ()))
    )
    with jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh):
        traced = Generator(parts, new).compile().trace(state.params, state.buffers, ids, pad, seed)
    lowered = traced.lower(lowering_platforms=("cuda",))
    with nothing_kept():
        compiled = lowered.compile()
    found = kernels_in(compiled.as_text())
    assert "flash_attention" in found, found
    assert any(name.startswith("grouped_matmul") for name in found), found
    routed = batch * prompt * model.moe.router.num_active * (model.embed + 3 * model.moe.expert_ffn) * 2
    memory = compiled.memory_analysis()
    assert (
        memory.temp_size_in_bytes < memory.argument_size_in_bytes / 2 * 1.1 + 4 * routed
    )  # weights again, as bfloat16
