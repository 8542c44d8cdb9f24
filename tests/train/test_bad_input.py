"""What a user gets wrong is one line and exit code 2, before anything is written and without touching a run."""

from pathlib import Path

import pytest

from experiments import cli, train
from moejax.config import load
from tests.train.conftest import small_argv

DATA8 = {"mesh": "data8", "train__steps": 1}


def refuse(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the experiment, and give the one line that it must end with."""
    capsys.readouterr()
    assert cli.run(train.main, argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "extra", "message"),
    [
        ({"mesh": "single"}, [], "the mesh has 1 devices (pipeline 1 * data 1 * sequence 1 * expert 1 * tensor 1) but"),
        (
            {"mesh": "tensor8"},
            ["--model.attention.num-heads", "4"],
            "attention.num_heads (4) must divide by tensor (8)",
        ),
        (DATA8, ["--train.global-batch", "12"], "global_batch / microbatches (12) must divide by data (8)"),
        (DATA8, ["--train.microbatches", "2"], "global_batch / microbatches (4) must divide by data (8)"),
        (DATA8, ["--data.source", "{tmp}/empty.txt"], "data.source ({tmp}/empty.txt) has no text in its 1 files"),
        (DATA8, ["--data.source", "{tmp}/none.txt"], "data.source ({tmp}/none.txt) matches no file: give stdlib-prose"),
        (DATA8, ["--model.vocab", "64"], "model.vocab (64) must be at least 258 for tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    options, extra, message, small_config, tmp_path: Path, capsys
):
    (tmp_path / "empty.txt").write_text("\n")
    argv = small_argv(small_config(**options), tmp_path) + [word.format(tmp=tmp_path) for word in extra]
    assert refuse(argv, capsys).startswith(message.format(tmp=tmp_path))
    assert not (tmp_path / "run").exists(), "the next try needs no --resume"


def test_an_unknown_key_of_a_file_is_named_with_its_table(small_config, tmp_path: Path, capsys):
    argv = small_argv(small_config(**DATA8), tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(path.read_text().replace("global_batch", "global_bach"))
    assert refuse(argv, capsys) == f"{path}: [train] unknown key global_bach; did you mean global_batch?"
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten_and_goes_on_only_as_what_it_was(small_config, tmp_path: Path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a corpus that will be edited, " * 200)
    argv = small_argv(small_config(**DATA8, data__source=str(text)), tmp_path)
    run = tmp_path / "run"
    assert cli.run(train.main, argv) == 0
    before = contents(run)

    assert refuse(argv, capsys) == f"{run} already holds a run: add --resume to go on, or choose another --out"
    argv.append("--resume")
    message = refuse([*argv, "--model.attention.num-heads", "16"], capsys)
    assert message == f"cannot resume {run}: model.attention.num_heads was 8 and is now 16"
    assert contents(run) == before

    saved = load.read_run(run / "config.toml")
    other = load.override(saved, {"model.norm_eps": 0.5}, "test")
    (run / "config.toml").write_text(load.dump_toml(other))  # by hand
    message = refuse(["--out", str(run), "--resume"], capsys)
    assert message.startswith(f"{run}/checkpoints holds another model: model.norm_eps is 1e-05 there and 0.5 here")
    (run / "config.toml").write_text(load.dump_toml(saved))
    assert contents(run) == before

    text.write_text("another text, " * 300)
    assert refuse(argv, capsys).startswith(f"the corpus {text} has changed since this run began (sha256 ")
    assert contents(run) == before


def test_another_tokenizer_from_the_same_text_is_refused(small_config, trainer, tmp_path: Path):
    run = trainer(small_config(), tmp_path / "run")
    run.checkpoints.save(1, run.start(), run.describe_state() | {"tokenizer": "another"})
    run.checkpoints.wait()
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match="the tokenizer bytes is another than when this run began"):
        trainer(small_config(), tmp_path / "run").fit()
    assert contents(tmp_path / "run") == before


def test_resuming_without_a_checkpoint_starts_at_step_0_and_says_so(small_config, tmp_path: Path, capsys):
    argv = [*small_argv(small_config(**DATA8), tmp_path), "--resume"]
    cli.prepare_out(tmp_path / "run", cli.parse(argv, name="train", doc=None).config, resume=False)
    assert cli.run(train.main, argv) == 0
    assert f"{tmp_path}/run holds no complete checkpoint yet: starting at step 0\n" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()
