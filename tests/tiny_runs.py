"""Tiny training runs in float64 that parity, golden and accounting tests share: what to train, on what, and how."""

import functools
from typing import Any

import jax
import numpy as np

from moejax.config.mesh import MeshConfig
from moejax.config.model import ModelConfig
from moejax.config.run import OptimizerConfig, RunConfig, TrainConfig
from moejax.train.proof import (
    FLOAT64,
    HostBatch,
    Trained,
    Trial,
    in_float64,
    proof_batch,
    relative_errors,
    to_numpy,
)
from moejax.train.state import TrainState
from tests.conftest import TOLERANCE, mesh_config, model_config

__all__ = ["FLOAT64", "Trained", "relative_errors", "to_numpy"]

Tree = Any

MICROBATCHES, ROWS, LENGTH = 2, 16, 8
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=2, clip_norm=0.5)
"""Large steps, and gradients that are clipped: both would show a wrong norm."""


def proof_model(name: str, **changes: Any) -> ModelConfig:
    """Read a tiny model, all of its arithmetic in float64."""
    return in_float64(model_config(name), **changes)


def make_batch(
    seed: int, vocab: int = 64, rows: int = ROWS, length: int = LENGTH, microbatches: int = MICROBATCHES
) -> HostBatch:
    """Draw a tiny batch."""
    return proof_batch(seed, vocab, rows, length, microbatches)


class TinyRun(Trial):
    """A trial on as many of the 8 devices as its mesh wants."""

    @classmethod
    def of(cls, model: ModelConfig, mesh: MeshConfig, steps: int = 20, **train: Any) -> "TinyRun":
        """Build the parts for tiny batches."""
        wanted = len(jax.devices()) if mesh.data == -1 else int(np.prod(mesh.degrees()))
        batch = {"global_batch": ROWS, "seq_len": LENGTH, "microbatches": MICROBATCHES}
        batch["source_len"] = train.get("seq_len", LENGTH) + 4  # so that no length is taken for the other
        config = RunConfig(model, mesh, TrainConfig(steps=steps, **(batch | train)), OPTIMIZER)
        return super().of(config, jax.devices()[:wanted])


@functools.cache
def initial_state(model: ModelConfig) -> TrainState:
    """Give a model's state of step 0, as numpy arrays."""
    return to_numpy(TinyRun.of(model, mesh_config("single")).init())


def assert_same(actual: Tree, expected: Tree) -> None:
    """Compare every leaf at float64's relative tolerance: no leaf may hide behind a larger one."""
    errors = relative_errors(actual, expected)
    wrong = {path: error for path, error in errors.items() if not error <= TOLERANCE["float64"][0]}
    assert not wrong, wrong
