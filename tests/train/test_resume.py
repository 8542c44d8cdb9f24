"""A run that is stopped and resumed is the run that was not, on the same mesh to the bit and on another to rounding."""

import shutil
import signal
from pathlib import Path

import jax
import pytest

from experiments import cli, train
from tests.conftest import assert_close
from tests.train.conftest import SPARSE, Acting, assert_same_bits, losses, saved_state, small_argv


@pytest.fixture(autouse=True)
def usual_signals():
    """Hear Ctrl-C even where the shell started us in the background and had us ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("model", "mesh", "number"), [(*SPARSE, signal.SIGTERM), ("dense_tiny", "single", signal.SIGINT)]
)
def test_resumed_equals_uninterrupted_to_the_bit(model, mesh, number, small_config, trainer, tmp_path: Path, capsys):
    config = small_config(model, mesh, train__steps=7)
    whole = trainer(config, tmp_path / "whole")
    result = whole.fit()
    assert (result.step, result.stopped_early) == (7, False)

    stopped = trainer(config, tmp_path / "parts")
    Acting(stopped, {3}, lambda batch: signal.raise_signal(number))
    result = stopped.fit()
    assert (result.step, result.stopped_early, result.validation) == (4, True, {})
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler), "the signal is given back"
    assert f"{number.name}: saving step 4" in capsys.readouterr().out

    resumed = trainer(config, tmp_path / "parts")
    assert resumed.fit().validation
    assert "resumed from step 4" in capsys.readouterr().out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert list(losses(tmp_path / "whole")) == [1, 2, 3, 4, 5, 6, 7]
    assert_same_bits(saved_state(resumed, 7), saved_state(whole, 7))


@pytest.mark.parametrize(("mesh", "other"), [("zero3", "single"), ("tensor4_data2", "data8")])
def test_a_run_goes_on_on_another_mesh(mesh, other, small_config, trainer, tmp_path: Path):
    options = {"train__steps": 5, "train__checkpoint_every": 3, "train__keep_last": 9}
    first = trainer(small_config("dense_tiny", mesh, **options), tmp_path / "first")
    first.fit()
    assert first.checkpoints.steps() == [3, 5]
    shutil.copytree(tmp_path / "first" / "checkpoints" / "3", tmp_path / "second" / "checkpoints" / "3")

    second = trainer(small_config("dense_tiny", other, **options), tmp_path / "second")
    assert_same_bits(saved_state(second, 3), saved_state(first, 3))
    second.fit()
    before, after = losses(tmp_path / "first"), losses(tmp_path / "second")
    assert list(after) == [4, 5]
    assert_close(list(after.values()), [before[step] for step in after], "float32")


def test_experts_and_router_biases_restore_onto_another_mesh(small_config, trainer, tmp_path: Path):
    first = trainer(small_config("loss_free_tiny", "zero3_tensor2_sp"), tmp_path)
    state = first.start()
    first.checkpoints.save(7, state, {})
    first.checkpoints.wait()
    assert_same_bits(saved_state(trainer(small_config("loss_free_tiny"), tmp_path), 7), jax.device_get(state))


def test_a_signal_at_a_step_that_is_saved_anyway_saves_once(small_config, trainer, tmp_path: Path):
    stopped = trainer(small_config(train__checkpoint_every=2), tmp_path / "run")
    Acting(stopped, {3}, lambda batch: signal.raise_signal(signal.SIGTERM))
    assert stopped.fit().step == 4
    again = trainer(small_config(train__checkpoint_every=2), tmp_path / "run")
    Acting(again, {4}, lambda batch: signal.raise_signal(signal.SIGTERM))
    assert again.fit().step == 5
    assert again.checkpoints.steps() == [4, 5]


def test_a_second_signal_acts_as_it_always_does(small_config, trainer, tmp_path: Path):
    stopped = trainer(small_config(train__checkpoint_every=2), tmp_path / "run")
    Acting(stopped, {3}, lambda batch: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    assert trainer(small_config(), tmp_path / "run").checkpoints.latest() == 2


def test_a_run_that_is_complete_says_so_and_stays_as_it_is(small_config, tmp_path: Path, capsys):
    argv = small_argv(small_config(mesh="data8", train__steps=3), tmp_path)
    assert cli.run(train.main, argv) == 0
    result = (tmp_path / "run" / "result.json").read_bytes()
    for steps in (3, 2):
        capsys.readouterr()
        assert cli.run(train.main, [*argv, "--resume", "--train.steps", str(steps)]) == 0
        output = capsys.readouterr()
        assert f"is at step 3 of {steps} already; go on with" in output.out
        assert output.out.splitlines()[-1].endswith("--resume --fake-devices 8 --train.steps 6")
        assert "nan" not in output.out + output.err
        assert (tmp_path / "run" / "result.json").read_bytes() == result
