"""Real processes that are told to stop, killed in the middle of a save, or run out of disk."""

import resource
import shlex
import signal
import time
from pathlib import Path

import pytest

from moejax.train.metrics import read_metrics
from tests.train.conftest import assert_same_bits, losses, read_until, saved_state, small_argv, started

FOREVER = 1_000_000
UNFINISHED = "*.orbax-checkpoint-tmp"


def test_two_stops_and_two_resumes_equal_one_run_to_the_bit(small_config, trainer, tmp_path: Path):
    config = small_config(train__steps=FOREVER)
    argv = small_argv(config, tmp_path)
    for number in (signal.SIGTERM, signal.SIGINT):
        with started(*argv) as process:
            read_until(process, "first step done")
            read_until(process, "step=")
            process.send_signal(number)
            out, err = process.communicate()
        assert (process.returncode, err) == (0, "")
        last_but_one, last = out.splitlines()[-2:]
        assert last_but_one.startswith("stopped at step ")
        assert last_but_one.endswith(f" of {FOREVER}, saved; go on with")
        python, dash_m, module, *argv = shlex.split(last)
        assert (python, dash_m, module) == ("python", "-m", "experiments.train")
    step = int(last_but_one.split()[3])

    config = small_config(train__steps=step + 2)
    resumed, whole = trainer(config, tmp_path / "run"), trainer(config, tmp_path / "whole")
    resumed.fit()
    whole.fit()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same_bits(saved_state(resumed, step + 2), saved_state(whole, step + 2))


def test_a_kill_in_the_middle_of_a_save_loses_nothing_before(small_config, trainer, tmp_path: Path):
    config = small_config(train__steps=FOREVER, train__checkpoint_every=1)
    checkpoints = tmp_path / "run" / "checkpoints"
    with started(*small_argv(config, tmp_path)) as process:
        read_until(process, "first step done")
        kill_in_the_middle_of_a_save(process, checkpoints)
    assert list(checkpoints.glob(UNFINISHED))
    complete = max(complete_steps(checkpoints))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7')  # a record that the kill cut short

    config = small_config(train__steps=complete + 3)
    resumed, whole = trainer(config, tmp_path / "run"), trainer(config, tmp_path / "whole")
    assert int(resumed.start().step) == complete
    resumed.fit()
    whole.fit()
    assert not list(checkpoints.glob(UNFINISHED)), "what the kill left is removed"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same_bits(saved_state(resumed, complete + 3), saved_state(whole, complete + 3))


def complete_steps(checkpoints: Path) -> list[int]:
    return [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]


def kill_in_the_middle_of_a_save(process, checkpoints: Path) -> None:
    """Stop the process whenever a save has begun, and kill it if that save is still unfinished then."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if complete_steps(checkpoints) and any(checkpoints.glob(UNFINISHED)):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.01)
            if any(checkpoints.glob(UNFINISHED)):
                process.send_signal(signal.SIGKILL)
                process.wait()
                return
            process.send_signal(signal.SIGCONT)
    pytest.fail("no save was seen")


def test_a_disk_that_fills_up_stops_the_run_with_one_line(small_config, trainer, tmp_path: Path):
    config = small_config(train__steps=FOREVER, train__checkpoint_every=1)
    with started(*small_argv(config, tmp_path)) as process:
        read_until(process, "first step done")
        read_until(process, "step=5 ")
        # From now on no file of that process grows beyond 100 KB: as on a full disk, every checkpoint fails.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        out, err = process.communicate()
    assert (process.returncode, err.count("\n")) == (2, 1), err
    line = err.strip()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert line == (
        f"error: saving a checkpoint in {checkpoints} failed (File too large); complete checkpoints there are "
        "untouched: make room on the disk and start again with --resume"
    )
    assert "Traceback" not in out

    resumed = trainer(small_config(train__steps=1), tmp_path / "run")
    complete = resumed.checkpoints.steps()
    assert len(complete) == 2
    for step in complete:
        assert int(saved_state(resumed, step).step) == step
    config = small_config(train__steps=complete[-1] + 2)
    trainer(config, tmp_path / "run").fit()
    trainer(config, tmp_path / "whole").fit()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert read_metrics(tmp_path / "run")[-1]["step"] == complete[-1] + 2
