"""Does a layout compute what one device computes? The same few steps on both, compared leaf by leaf."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from moejax.config.model import ModelConfig, Precision
from moejax.config.run import RunConfig
from moejax.models import ModelParts
from moejax.parallel.plan import MeshPlan
from moejax.parallel.rules import check_batch
from moejax.train import optimizer as optimizers
from moejax.train.state import TrainState, abstract_state, init_state
from moejax.train.step import make_train_step, place_batch

Tree = Any
HostBatch = dict[str, np.ndarray]
FLOAT64 = Precision("float64", "float64", "float64", "float64")


def in_float64(model: ModelConfig, **changes: Any) -> ModelConfig:
    """Give a model all of whose arithmetic is in float64: rounding then hides no mistake."""
    return dataclasses.replace(model, precision=FLOAT64, **changes)


def proof_batch(seed: int, vocab: int, rows: int, length: int, microbatches: int) -> HostBatch:
    """Draw rows of two documents, [Y, B, T]; every seventh one ends in padding, so that the parts differ in tokens.

    A row's tokens differ from one another where the vocabulary is large enough: two that are alike would tie in expert
    choice, and rounding would decide.
    """
    rng = np.random.default_rng(seed)
    shape = (microbatches, rows // microbatches)
    if vocab > length:
        ids = rng.random((*shape, vocab)).argsort(-1).astype(np.int32)[..., : length + 1]
    else:
        ids = rng.integers(0, vocab, (*shape, length + 1), dtype=np.int32)
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


def with_source(batch: HostBatch, length: int) -> HostBatch:
    """Give a batch sources of `length` tokens: its own rows backwards, over and over, padding in front."""

    def backwards(x: np.ndarray) -> np.ndarray:
        return np.take(x[..., ::-1], np.arange(length) % x.shape[-1], axis=-1)

    return batch | {"source": backwards(batch["inputs"]), "source_segments": backwards(batch["segments"])}


@dataclass(frozen=True)
class Trained:
    """What a few steps gave: the first gradient (read off Adam's first moment), each step's metrics, the end state."""

    gradient: Tree
    metrics: list[dict[str, Any]]
    state: TrainState
    rows_sent: list[float]
    """routed rows that went to another device, in each step"""


@dataclass(frozen=True)
class Trial:
    """A model on a mesh with its optimizer and its configuration."""

    parts: ModelParts
    optimizer: Any
    config: RunConfig

    @classmethod
    def of(cls, config: RunConfig, devices: Sequence[Any]) -> "Trial":
        """Build the parts on these devices; raise ValueError for a model, mesh or batch that does not fit."""
        plan = MeshPlan.from_config(config.mesh, devices)
        train = config.train
        source_len = None if config.model.encoder is None else train.num_source()
        check_batch(plan.rules, plan.config, train.global_batch, train.microbatches, train.seq_len, source_len)
        parts = ModelParts.of(config.model, plan)
        return cls(parts, optimizers.build(config.optimizer, train.steps, parts.placements), config)

    def init(self) -> TrainState:
        """Make the state of step 0."""
        return init_state(self.parts, self.optimizer, self.config.train.seed)

    def place(self, state: TrainState) -> TrainState:
        """Put a state of numpy arrays, layers in their own order, onto the mesh."""
        places = abstract_state(self.parts, self.optimizer)
        return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), self.parts.stored(state), places)

    def program(self, batch: HostBatch) -> Any:
        """Compile the training step."""
        return self._trace(batch).lower().compile()

    def jaxpr(self, batch: HostBatch) -> Any:
        """Trace the training step."""
        return self._trace(batch).jaxpr

    def _trace(self, batch: HostBatch) -> Any:
        placed = self._placed(batch)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed)
        step = make_train_step(self.parts, self.optimizer, self.config)
        return step.trace(abstract_state(self.parts, self.optimizer), shapes)

    def _placed(self, batch: HostBatch) -> Tree:
        """Place a batch, with sources where the model has an encoder."""
        if self.config.model.encoder is not None:
            batch = with_source(batch, self.config.train.num_source())
        return place_batch(self.parts.plan, batch)

    def train(self, state: TrainState, batches: Sequence[HostBatch], program: Any = None) -> Trained:
        """Run one step for each batch, all by one compiled program; `state` is numpy, in the layers' own order."""
        program = self.program(batches[0]) if program is None else program
        state, first_moment, metrics = self.place(state), None, []
        for batch in batches:
            state, seen = program(state, self._placed(batch))
            metrics.append(to_numpy(seen))
            if first_moment is None:
                first_moment = to_numpy(self.parts.canonical(state.opt_state[0].mu))
        norm = metrics[0]["grad_norm"]
        scale = (1.0 - self.config.optimizer.beta1) * optimizers.clip_scale(norm, self.config.optimizer.clip_norm)
        gradient = jax.tree.map(lambda m: m / np.asarray(scale), first_moment)
        sent = [_take_sent(step) for step in metrics]
        return Trained(gradient, metrics, to_numpy(self.parts.canonical(state)), sent)


def _take_sent(metrics: dict[str, Any]) -> float:
    """Take out what one device has no twin of: the rows that went to another."""
    if metrics["router"] is None:
        return 0.0
    sent = float(metrics["router"].sent.sum())
    metrics["router"] = metrics["router"]._replace(sent=np.zeros_like(metrics["router"].sent))
    return sent


def to_numpy(tree: Tree) -> Tree:
    """Bring whole arrays to the host."""
    return jax.tree.map(np.asarray, tree)


def relative_errors(actual: Tree, expected: Tree) -> dict[str, float]:
    """Give each leaf's largest error, as a part of its largest expected number; counts must be equal."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True)
    return {jax.tree_util.keystr(path): _relative_error(a, b) for (path, b), a in leaves}


def _relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error, size = (float(np.abs(x).max(initial=0.0)) for x in (actual - expected, expected))
    if not np.isfinite(error):
        return np.inf
    return 0.0 if error == 0 else error / size if size else np.inf
