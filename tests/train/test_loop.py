"""The loop: what it fetches and when, what it donates, what it does with gradients that are not finite."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl

from experiments import cli, train
from moejax.train import loop
from moejax.train.metrics import read_metrics
from moejax.train.step import place_batch
from tests.train.conftest import SPARSE, Acting, assert_same_bits, saved_state, small_argv


class Spied:
    """Stands for an array among a step's metrics, and tells when it is fetched; anything else than that raises."""

    def __init__(self, fetched: set[int], step: int, array: jax.Array) -> None:
        self.fetched, self.step, self.array = fetched, step, array

    def block_until_ready(self) -> "Spied":
        self.array.block_until_ready()
        return self

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        self.fetched.add(self.step)
        return np.asarray(self.array)


def test_nothing_is_fetched_between_log_steps(small_config, trainer, tmp_path: Path, monkeypatch):
    watched = trainer(small_config(*SPARSE, train__steps=20, train__log_every=10), tmp_path)
    metrics_of: set[int] = set()
    anything_after: set[int] = set()
    step, dispatched = watched.train_step, 0

    def spy(state: Any, batch: Any) -> Any:
        nonlocal dispatched
        dispatched += 1
        state, metrics = step(state, batch)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((state, metrics)))
        return state, jax.tree.map(functools.partial(Spied, metrics_of, dispatched), metrics)

    watched.train_step = spy
    value = ArrayImpl._value  # where float, int, device_get and most others end
    monkeypatch.setattr(ArrayImpl, "_value", property(lambda x: anything_after.add(dispatched) or value.fget(x)))
    with jax.transfer_guard_device_to_host("disallow"):  # on a CPU it lets everything pass
        watched.fit()
    assert metrics_of == {1, 10, 20}
    assert anything_after <= {0, 1, 10, 20}, "0: the step of the state that the run begins with"


def test_few_steps_are_queued_on_the_devices(small_config, trainer, tmp_path: Path, monkeypatch):
    watched = trainer(small_config(train__steps=12, train__log_every=100), tmp_path)
    waited: list[int] = []
    ready = jax.block_until_ready
    monkeypatch.setattr(loop.jax, "block_until_ready", lambda x: waited.append(len(jax.tree.leaves(x))) or ready(x))
    watched.fit()
    assert waited.count(1) == 12 - loop.MAX_QUEUED, "each step waits for the one that lies so many steps back"


def test_the_state_is_donated(small_config, trainer, tmp_path: Path):
    one = trainer(small_config(), tmp_path)
    state = one.start()
    new, _ = one.train_step(state, place_batch(one.plan, one.source.batch(0)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def poison(batch: dict[str, np.ndarray]) -> None:
    """Make one target's weight infinite: the loss and all gradients that hang on it are not finite."""
    batch["weights"] = batch["weights"].copy()
    batch["weights"].flat[3] = np.inf


@pytest.mark.parametrize("mesh", ["single", "zero3"])
def test_a_bad_step_changes_nothing_and_is_counted(mesh, small_config, trainer, tmp_path: Path):
    config = small_config("dense_tiny", mesh, train__steps=5, train__checkpoint_every=1, train__keep_last=9)
    run = trainer(config, tmp_path)
    Acting(run, {2}, poison)
    run.fit()
    before, skipped, after = (saved_state(run, step) for step in (2, 3, 4))
    assert_same_bits((skipped.params, skipped.opt_state), (before.params, before.opt_state))
    assert [int(skipped.step), int(skipped.skipped), int(skipped.skipped_in_a_row)] == [3, 1, 1]
    assert [int(after.skipped), int(after.skipped_in_a_row)] == [1, 0]
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (after.params, skipped.params)), strict=True))
    records = {record["step"]: record for record in read_metrics(tmp_path) if "loss" in record}
    assert records[3]["loss"] is None, "NaN is no JSON"
    assert [records[step]["skipped"] for step in range(1, 6)] == [0, 0, 1, 1, 1]
    assert all(np.isfinite(records[step]["loss"]) for step in (1, 2, 4, 5))


def test_bad_steps_in_a_row_stop_the_run_with_one_line(small_config, trainer, tmp_path: Path, capsys):
    options = {"train__steps": 30, "train__max_bad_steps": 3, "train__log_every": 2, "train__checkpoint_every": 1}
    config = small_config("dense_tiny", "data8", **options)
    argv = small_argv(config, tmp_path)
    cli.prepare_out(tmp_path / "run", config, resume=False)
    broken = trainer(config, tmp_path / "run")
    state = dataclasses.replace(broken.start(), step=jnp.int32(1))
    params = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), state.params)
    broken.checkpoints.save(1, dataclasses.replace(state, params=params), broken.describe_state())
    broken.checkpoints.wait()
    assert cli.run(train.main, [*argv, "--resume"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "error: step 4: the gradient was not finite for 3 steps in a row (train.max_bad_steps = 3); lower "
        "optimizer.lr (0.001) in another --out, or remove the newest checkpoints in "
        f"{tmp_path}/run/checkpoints and --resume"
    )
    assert [record["skipped"] for record in read_metrics(tmp_path / "run")] == [1, 3], "the last record shows it"


def test_bad_steps_with_good_ones_between_do_not_stop_the_run(small_config, trainer, tmp_path: Path):
    run = trainer(small_config(train__steps=6, train__max_bad_steps=2), tmp_path)
    Acting(run, {1, 3, 5}, poison)
    assert run.fit().step == 6
    assert read_metrics(tmp_path)[-2]["skipped"] == 3
