"""What the training tests share: a small corpus, runs of a few steps, and programs that are compiled once."""

import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.cli import CONFIGS
from moejax.config import load
from moejax.config.run import RunConfig
from moejax.data import prepare
from moejax.models import ModelParts
from moejax.parallel.plan import MeshPlan
from moejax.train.loop import Trainer
from moejax.train.metrics import read_metrics
from moejax.train.state import abstract_state

ROOT = Path(__file__).parents[2]
SENTENCE = "the router sends each token to an expert while idle experts wait for work and learn nothing"
SMALL = {
    "model.vocab": 264,
    "train.steps": 6,
    "train.global_batch": 8,
    "train.seq_len": 16,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.eval_batches": 1,
    "train.checkpoint_every": 0,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 2,
    "data.tokenizer": "bytes",
}
"""A run of a second; its program does not depend on the number of steps."""

SPARSE = ("loss_free_tiny", "zero3")
"""The tests' one model with experts, and its mesh: compiled once."""

Act = Callable[[dict[str, np.ndarray]], Any]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 60 KB."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    words = random.Random(0).choices(SENTENCE.split(), k=10_000)
    path.write_text("\n\n".join(" ".join(words[n : n + 50]) for n in range(0, len(words), 50)))
    return path


@pytest.fixture(scope="session")
def small_config(corpus: Path) -> Callable[..., RunConfig]:
    """Read a model and a mesh file into the config of a small run; options are dotted keys, `train__steps=3`."""

    def read(model: str = "dense_tiny", mesh: str = "single", **options: Any) -> RunConfig:
        config = load.read_files(CONFIGS / "model" / f"{model}.toml", CONFIGS / "mesh" / f"{mesh}.toml")
        dotted = {key.replace("__", "."): value for key, value in options.items()}
        dotted |= {"model.dropout": 0.1} if model == SPARSE[0] else {}
        return load.override(config, SMALL | {"data.source": str(corpus)} | dotted, "test")

    return read


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trainer]:
    """Make a trainer; equal programs are compiled once a session."""
    programs: dict[RunConfig, Trainer] = {}
    cache = tmp_path_factory.mktemp("data")

    def make(config: RunConfig, out: Path) -> Trainer:
        plan = MeshPlan.from_config(config.mesh, jax.devices()[: int(np.prod(config.mesh.degrees()))])
        parts = ModelParts.of(config.model, plan)
        train = config.train
        data = prepare(config.data, config.model.vocab, train.seq_len, train.seed, cache)
        out.mkdir(exist_ok=True)
        made = Trainer(config, plan, parts, data, out)
        if (twin := programs.setdefault(_program(config), made)) is not made:
            made.train_step, made.eval_step = twin.train_step, twin.eval_step
        return made

    return make


def _program(config: RunConfig) -> RunConfig:
    """Leave only what the compiled step depends on."""
    fixed = {"log_every": 1, "eval_every": 0, "checkpoint_every": 0, "keep_last": 1, "max_bad_steps": 1}
    if config.optimizer.schedule == "constant":
        fixed["steps"] = min(config.train.steps, config.optimizer.warmup_steps)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fixed))


@dataclasses.dataclass
class Acting:
    """A source of batches that does something to the batch of certain steps (counted from 0) on its way."""

    trainer: Trainer
    steps: set[int]
    act: Act

    def __post_init__(self) -> None:
        self.source, self.trainer.source = self.trainer.source, self  # type: ignore[assignment]

    def batches(self, start: int, prefetch: int, part: slice) -> Iterator[dict[str, np.ndarray]]:
        """Give the batches from step `start` on."""
        with contextlib.closing(self.source.batches(start, prefetch, part)) as batches:  # type: ignore[type-var]
            for step, batch in enumerate(batches, start):
                if step in self.steps:
                    self.act(batch)
                yield batch


def losses(out: Path) -> dict[int, float]:
    """Read the training loss of every logged step; a step that is there twice fails."""
    pairs = [(record["step"], record["loss"]) for record in read_metrics(out) if "loss" in record]
    assert len(dict(pairs)) == len(pairs), "a step was recorded twice"
    return dict(pairs)


def saved_state(trainer: Trainer, step: int) -> Any:
    """Read a checkpoint onto the trainer's mesh and from there to the host."""
    return jax.device_get(trainer.checkpoints.restore(step, abstract_state(trainer.parts, trainer.optimizer)))


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Compare two trees for equality, NaN to NaN."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def small_argv(config: RunConfig, tmp_path: Path) -> list[str]:
    """Write a config to a file, and give the command line that runs it in `tmp_path / "run"`."""
    path = tmp_path / "small.toml"
    path.write_text(load.dump_toml(config))
    return ["--model", str(path), "--mesh", str(path), "--out", str(tmp_path / "run")]


@contextlib.contextmanager
def started(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """Start experiments.train on one CPU device; whatever happens, it is gone afterwards."""
    command = [sys.executable, "-m", "experiments.train", "--fake-devices", "1", *argv]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.communicate()


def read_until(process: subprocess.Popen[str], start: str) -> None:
    """Read a process's output up to the line that begins with `start`."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return
    pytest.fail(f"the process ended before {start!r}: {process.communicate()[1]}")
