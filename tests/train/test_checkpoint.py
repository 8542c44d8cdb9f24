"""What is kept, what a failed save leaves, what the user reads; without a model."""

import gc
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import load
from moejax.config.run import RunConfig
from moejax.train.checkpoint import Checkpoints, check_same_model
from moejax.train.state import TrainState
from tests.train.conftest import assert_same_bits

META = {"model": {}, "data": "x"}

# What Orbax leaves open when it fails is collected at any time later, and would be blamed on any test.
leaves_loops_open = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def state(seed: int) -> TrainState:
    """Make a state of 400 KB that differs with the seed."""
    w = jax.random.normal(jax.random.key(seed), (100_000,))
    return TrainState(jnp.int32(seed), {"w": w}, {}, {"count": jnp.int32(seed)}, jnp.int32(0), jnp.int32(0))


def shapes() -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkpoints(tmp_path: Path):
    opened = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    yield opened
    opened.close()


def save(checkpoints: Checkpoints, losses: dict[int, float | None]) -> None:
    for step, val_loss in losses.items():
        checkpoints.save(step, state(step), META, val_loss)
    checkpoints.wait()


def test_the_newest_and_the_best_are_kept(checkpoints: Checkpoints):
    save(checkpoints, {1: 5.0, 2: 3.0, 3: None, 4: 4.0, 5: float("nan"), 6: 3.5, 7: None})
    assert (checkpoints.steps(), checkpoints.best(), checkpoints.latest()) == ([2, 6, 7], 2, 7)
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["2", "6", "7"]
    assert_same_bits(checkpoints.restore(2, shapes()), state(2))


def test_a_resumed_run_remembers_which_is_the_best(checkpoints: Checkpoints):
    save(checkpoints, {1: 3.0, 2: 5.0, 3: 4.0})
    again = Checkpoints(checkpoints.directory, keep_last=1)
    save(again, {4: 3.5, 5: 3.2})
    assert (again.steps(), again.best()) == ([1, 5], 1)
    save(again, {6: 2.0, 7: None})
    assert (again.steps(), again.best()) == ([6, 7], 6)


def test_keeping_none_with_a_loss_keeps_the_newest(checkpoints: Checkpoints):
    save(checkpoints, dict.fromkeys(range(1, 6)))
    assert (checkpoints.steps(), checkpoints.best()) == ([4, 5], None)


def test_reading_does_not_write(checkpoints: Checkpoints):
    save(checkpoints, {1: None})
    (checkpoints.directory / "2.orbax-checkpoint-tmp").mkdir()
    before = files(checkpoints.directory)
    reader = Checkpoints(checkpoints.directory, read_only=True)
    assert (reader.choose(None), reader.meta(1)) == (1, META)
    with pytest.raises(ValueError, match=r"holds no checkpoint of step 3, only of \[1\]"):
        reader.choose(3)
    assert files(checkpoints.directory) == before
    assert (checkpoints.directory / "2.orbax-checkpoint-tmp").is_dir(), "another process may be writing it"
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        Checkpoints(checkpoints.directory / "nowhere", read_only=True).choose(None)


@pytest.fixture(autouse=True)
def collect():
    """Collect what a failure left while the test that made it is still the one to blame."""
    yield
    gc.collect()


@pytest.fixture
def full_disk():
    """Let no file of this process grow beyond 100 KB: the system's own error, like that of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@leaves_loops_open
@pytest.mark.parametrize("surfaces_in", ["wait", "save", "check"])
def test_a_full_disk_is_one_clear_error_and_earlier_checkpoints_stay(
    surfaces_in: str, tmp_path: Path, full_disk, capfd: pytest.CaptureFixture[str]
):
    checkpoints = Checkpoints(tmp_path / "run", keep_last=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    save(checkpoints, {1: 3.0})
    before = files(checkpoints.directory)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(OSError, match="File too large") as caught:
        checkpoints.save(2, state(2), META, 2.0)
        if surfaces_in == "save":
            checkpoints.save(3, state(3), META, 1.0)
        while surfaces_in == "check":
            checkpoints.check()
        checkpoints.wait()
    assert str(caught.value) == (
        f"saving a checkpoint in {checkpoints.directory} failed (File too large); complete checkpoints there are "
        "untouched: make room on the disk and start again with --resume"
    )
    checkpoints.close()
    assert capfd.readouterr().err == "", "no traceback of a library's thread"
    assert before.items() <= files(checkpoints.directory).items(), "though keep_last = 1 and the new loss was better"
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert_same_bits(Checkpoints(checkpoints.directory, read_only=True).restore(1, shapes()), state(1))


def test_what_an_unfinished_save_left_is_removed(checkpoints: Checkpoints):
    save(checkpoints, {1: None})
    for step in (2, 3):
        left = checkpoints.directory / f"{step}.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
        left.mkdir(parents=True)
        (left / "half").write_bytes(b"x" * 1000)
    again = Checkpoints(checkpoints.directory)
    assert again.latest() == 1
    save(again, {2: None})
    assert sorted(path.name for path in again.directory.iterdir()) == ["1", "2"]


@leaves_loops_open
def test_closing_after_a_failure_is_quiet(tmp_path: Path, full_disk, capfd: pytest.CaptureFixture[str]):
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1, state(1), META)
    checkpoints.close()
    assert capfd.readouterr().err == ""


@leaves_loops_open
def test_a_damaged_checkpoint_is_named(checkpoints: Checkpoints):
    save(checkpoints, {1: None, 2: None})
    for path in (checkpoints.directory / "2" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(OSError, match=r"reading the checkpoint of step 2 in .* remove a damaged one") as caught:
        checkpoints.restore(2, shapes())
    assert len(str(caught.value).splitlines()) == 1
    assert_same_bits(checkpoints.restore(1, shapes()), state(1))


def test_a_checkpoint_of_another_model_is_refused():
    small = load.to_table(RunConfig().model)
    check_same_model(small, small | {"remat": "full"}, Path("run"))
    with pytest.raises(ValueError, match=r"run holds another model: model\.attention\.num_heads is 8 there and 4 here"):
        check_same_model(small, small | {"attention": small["attention"] | {"num_heads": 4}}, Path("run"))
    with pytest.raises(ValueError, match=r"model\.moe is None there"):
        check_same_model(small, small | {"moe": {"num_experts": 4}}, Path("run"))


def test_metadata_survives_as_it_is(checkpoints: Checkpoints):
    meta = {"model": {"moe": None, "eps": 1e-5, "name": "dense"}, "versions": {"jax": jax.__version__}}
    checkpoints.save(1, state(1), meta, np.float32(2.5).item())
    checkpoints.wait()
    assert checkpoints.meta(1) == meta
