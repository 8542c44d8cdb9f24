"""The training step with kernels inside: as accurate as XLA's in the interpreter, and compiled for H200s."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from moejax.config.model import ModelConfig, Precision
from moejax.config.run import RunConfig, TrainConfig
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


def kernels_in(text: str) -> set[str]:
    return set(re.findall(r"mosaic_gpu[\w.]*", text))
