"""Two processes of four devices train as one of eight does; one dies and the run goes on; all stop at the same step."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moejax.train.metrics import read_metrics
from tests.conftest import assert_close
from tests.train.conftest import ROOT, assert_same_bits, losses, read_until, saved_state, small_argv

MODEL, MESH = "mixtral_tiny", "tensor4_data2"
EVERY = {"train__eval_every": 2, "train__checkpoint_every": 2, "train__keep_last": 100}
FOREVER = 1_000_000
GRACE, SLACK = 2, 8
"""Seconds: what the survivors are given, and what this machine may take beyond."""


@dataclass
class Died:
    """A run of two processes of which one was killed."""

    out: Path
    argv: list[str]
    survived: int
    code: int
    seconds: float
    output: str
    errors: str


@contextlib.contextmanager
def launched(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """Start two processes of experiments.train; whatever happens, they are gone afterwards."""
    command = ["bash", str(ROOT / "scripts" / "launch_local.sh"), "2", "--devices-per-process", "4", "--", "train"]
    environment = os.environ | {"PYTHON": sys.executable, "GRACE": str(GRACE)}
    process = subprocess.Popen(
        [*command, *argv],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def members(process: subprocess.Popen[str]) -> list[int]:
    """Give the process ids of a launched run, in the order of their numbers."""
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "experiments.train"], capture_output=True, text=True, check=True
    )
    return sorted(int(word) for word in found.stdout.split())


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture(scope="module")
def died(small_config, tmp_path_factory: pytest.TempPathFactory) -> Died:
    """Run two processes for some steps, and kill one of them."""
    folder = tmp_path_factory.mktemp("processes")
    argv = small_argv(small_config(MODEL, MESH, train__steps=FOREVER, **EVERY), folder)
    with launched(*argv) as process:
        read_until(process, "[0] step=5 ")
        first, second = members(process)
        os.kill(second, signal.SIGKILL)
        began = time.monotonic()
        output, errors = process.communicate(timeout=60)
        seconds = time.monotonic() - began
        survived = sum(alive(pid) for pid in (first, second))
    return Died(folder / "run", argv, survived, process.returncode, seconds, output, errors)


@pytest.fixture(scope="module")
def whole(small_config, trainer, tmp_path_factory: pytest.TempPathFactory):
    """Train the same steps, and some more, in one process."""
    out = tmp_path_factory.mktemp("whole")
    made = trainer(small_config(MODEL, MESH, train__steps=8, **EVERY), out)
    made.fit()
    return made


def complete(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())


def assert_same_losses(out: Path, whole: Path) -> None:
    actual, expected = losses(out), losses(whole)
    common = sorted(actual.keys() & expected.keys())
    assert len(common) >= 5
    assert_close([actual[step] for step in common], [expected[step] for step in common], "float32")


def test_a_death_ends_all_in_time_and_says_how_to_go_on(died: Died):
    assert died.survived == 0
    assert died.code == 128 + signal.SIGKILL
    assert died.seconds < GRACE + SLACK
    assert f"error: process 1 of 2 was killed by SIGKILL; stopping the others within {GRACE} seconds" in died.errors
    assert died.errors.rstrip().splitlines()[-1].endswith(f"-- train {' '.join(died.argv)} --resume")
    assert "[1]" not in died.output, "process 0 alone prints"


def test_two_processes_train_as_one(died: Died, whole):
    assert_same_losses(died.out, whole.out)
    validation = [[r["val_loss"] for r in read_metrics(out) if "val_loss" in r][:2] for out in (died.out, whole.out)]
    assert len(validation[0]) == 2
    assert_close(validation[0], validation[1], "float32")


def test_one_process_restores_what_two_saved_and_goes_on(died: Died, whole, small_config, trainer, tmp_path: Path):
    step = complete(died.out)[0]
    shutil.copytree(died.out / "checkpoints" / str(step), tmp_path / "checkpoints" / str(step))
    made = trainer(small_config(MODEL, MESH, train__steps=8, **EVERY), tmp_path)
    for other in ("", "single"):
        reader = trainer(small_config(MODEL, other), tmp_path) if other else made
        assert_close(saved_state(reader, step), saved_state(whole, step), "float32")
    made.fit()
    after = losses(tmp_path)
    assert list(after) == list(range(step + 1, 9))
    assert_close(list(after.values()), [losses(whole.out)[n] for n in after], "float32")


def test_a_signal_to_one_process_stops_both_at_the_same_step(died: Died, whole, small_config, trainer):
    begin = complete(died.out)[-1]
    with launched(*died.argv, "--resume", "--train.eval-every", "0") as process:
        read_until(process, f"[0] resumed from step {begin}")
        read_until(process, "[0] step=")
        os.kill(members(process)[1], signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "[0] a signal to another process: saving step " in output
    step = complete(died.out)[-1]
    assert f"[0] stopped at step {step} of {FOREVER}, saved" in output
    assert list(losses(died.out)) == list(range(1, step + 1))
    assert_same_losses(died.out, whole.out)
    state = saved_state(trainer(small_config(MODEL, MESH), died.out), step)
    assert_same_bits(state.step, step)


def test_a_mistake_ends_both_with_one_line_each(died: Died):
    with launched(*died.argv) as process:
        _, errors = process.communicate(timeout=60)
    refusal = f"{died.out} already holds a run: add --resume to go on, or choose another --out"
    assert process.returncode == 2
    assert f"[0] error: {refusal}" in errors
    assert "Traceback" not in errors
    said = [line for line in errors.splitlines() if line.startswith("[1]")]
    assert said in ([], [f"[1] error: process 0 stopped: {refusal}"])
