"""Tiny training runs in float64 that parity, golden and accounting tests share: what to train, on what, and how."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from moejax.config.mesh import MeshConfig
from moejax.config.model import ModelConfig, Precision
from moejax.config.run import OptimizerConfig, RunConfig, TrainConfig
from moejax.models import ModelParts
from moejax.parallel.plan import MeshPlan
from moejax.train import optimizer as optimizers
from moejax.train.state import TrainState, abstract_state, init_state
from moejax.train.gradient import Batch
from moejax.train.step import make_train_step, place_batch
from tests.conftest import TOLERANCE, mesh_config, model_config

Tree = Any

FLOAT64 = Precision("float64", "float64", "float64", "float64")
MICROBATCHES, ROWS, LENGTH = 2, 16, 8
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=2, clip_norm=0.5)
"""Large steps, and gradients that are clipped: both would show a wrong norm."""


def proof_model(name: str, **changes: Any) -> ModelConfig:
    """Read a tiny model, all of its arithmetic in float64."""
    return dataclasses.replace(model_config(name), precision=FLOAT64, **changes)


def make_batch(
    seed: int, vocab: int = 64, rows: int = ROWS, length: int = LENGTH, microbatches: int = MICROBATCHES
) -> Batch:
    """Draw rows of two documents; every seventh one ends in padding, so that the parts differ in their tokens.

    A row's tokens differ from one another: two that are alike would tie in expert choice, and rounding would decide.
    """
    rng = np.random.default_rng(seed)
    shape = (microbatches, rows // microbatches)
    ids = rng.random((*shape, vocab)).argsort(-1).astype(np.int32)[..., : length + 1]
    index = np.broadcast_to(np.arange(length, dtype=np.int32), (*shape, length))
    cut = rng.integers(2, length - 3, (*shape, 1), dtype=np.int32)
    second = index >= cut
    padding = (np.arange(rows).reshape(*shape, 1) % 7 == 0) & (index >= length - 2)
    return {
        "inputs": ids[..., :-1],
        "targets": ids[..., 1:],
        "segments": np.where(padding, 0, 1 + second).astype(np.int32),
        "positions": np.where(second, index - cut, index).astype(np.int32),
        "weights": np.where(padding | (index == cut - 1), 0.0, 1.0),
        "bytes": np.ones((*shape, length), np.int32),
    }


@dataclass(frozen=True)
class TinyRun:
    """A model on a mesh with its optimizer and its configuration."""

    parts: ModelParts
    optimizer: Any
    config: RunConfig

    @classmethod
    def of(cls, model: ModelConfig, mesh: MeshConfig, steps: int = 20, **train: Any) -> "TinyRun":
        """Build the parts on as many of the 8 devices as the mesh wants."""
        wanted = len(jax.devices()) if mesh.data == -1 else int(np.prod(mesh.degrees()))
        parts = ModelParts.of(model, MeshPlan.from_config(mesh, jax.devices()[:wanted]))
        batch = {"global_batch": ROWS, "seq_len": LENGTH, "microbatches": MICROBATCHES}
        config = RunConfig(model, mesh, TrainConfig(steps=steps, **(batch | train)), OPTIMIZER)
        return cls(parts, optimizers.build(config.optimizer, steps, parts.placements), config)

    def init(self) -> TrainState:
        """Make the state of step 0."""
        return init_state(self.parts, self.optimizer, self.config.train.seed)

    def place(self, state: TrainState) -> TrainState:
        """Put a state of numpy arrays onto the mesh."""
        places = abstract_state(self.parts, self.optimizer)
        return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), self.parts.stored(state), places)

    def train(self, state: TrainState, batches: Sequence[Batch]) -> "Trained":
        """Run one step for each batch, all by one compiled program."""
        step = make_train_step(self.parts, self.optimizer, self.config)
        first_moment, metrics = None, []
        for batch in batches:
            state, seen = step(state, place_batch(self.parts.plan, batch))
            metrics.append(to_numpy(seen))
            if first_moment is None:
                first_moment = to_numpy(self.parts.canonical(state.opt_state[0].mu))
        norm = metrics[0]["grad_norm"]
        scale = (1.0 - self.config.optimizer.beta1) * optimizers.clip_scale(norm, self.config.optimizer.clip_norm)
        return Trained(jax.tree.map(lambda m: m / np.asarray(scale), first_moment), metrics, to_numpy(self.parts.canonical(state)))


@dataclass(frozen=True)
class Trained:
    """What a few steps gave: the first gradient (read off Adam's first moment), every step's metrics, the end state."""

    gradient: Tree
    metrics: list[dict[str, Any]]
    state: TrainState


def to_numpy(tree: Tree) -> Tree:
    """Bring whole arrays to the host."""
    return jax.tree.map(np.asarray, tree)


@functools.cache
def initial_state(model: ModelConfig) -> TrainState:
    """Give a model's state of step 0, as numpy arrays."""
    return to_numpy(TinyRun.of(model, mesh_config("single")).init())


def relative_errors(actual: Tree, expected: Tree) -> dict[str, float]:
    """Give each leaf's largest error, as a part of its largest expected number; counts must be equal."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True)
    return {jax.tree_util.keystr(path): _relative_error(a, b) for (path, b), a in leaves}


def _relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error, size = (np.abs(x).max(initial=0.0) for x in (actual - expected, expected))
    if not np.isfinite(error):
        return np.inf
    return 0.0 if error == 0 else float(error / size) if size else np.inf


def assert_same(actual: Tree, expected: Tree) -> None:
    """Compare every leaf at float64's relative tolerance: no leaf may hide behind a larger one."""
    errors = relative_errors(actual, expected)
    wrong = {path: error for path, error in errors.items() if not error <= TOLERANCE["float64"][0]}
    assert not wrong, wrong
