"""The training step with kernels inside: as accurate as XLA's in the interpreter, and compiled for H200s."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from moejax.accounting.chips import named_chip
from moejax.accounting.target import h200_devices, missing_plugins
from moejax.config.mesh import MeshConfig
from moejax.config.model import ModelConfig, Precision
from moejax.config.run import RunConfig, TrainConfig
from moejax.train.ahead import lower_train_step
from moejax.train.proof import Trial, proof_batch, to_numpy
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
    return {
        name for line in lines for name in re.findall(r"(flash_attention\w*|grouped_\w+|rms_norm\w*|linear_\w+)", line)
    }


def compiled_step(model: ModelConfig, mesh: MeshConfig, train: TrainConfig):
    devices = h200_devices(math.prod(mesh.degrees()), named_chip("H200"))
    return lower_train_step(RunConfig(model=model, mesh=mesh, train=train), devices)[0].compile()


TRAINING = {"flash_attention", "flash_attention_dq", "flash_attention_dkdv"}


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
    model = small("auto", remat="full", num_layers=2, embed=256)
    attention = dataclasses.replace(model.attention, num_heads=4, num_kv_heads=2)
    moe = dataclasses.replace(model.moe, num_experts=4, expert_ffn=256)
    train = TrainConfig(global_batch=8, seq_len=512, microbatches=2 if mesh.pipeline > 1 else 1)
    text = compiled_step(dataclasses.replace(model, attention=attention, moe=moe), mesh, train).as_text()
    found = kernels_in(text)
    assert found >= TRAINING, found
    assert any(name.startswith("grouped_matmul") for name in found), found
    assert "ragged-dot" not in text
