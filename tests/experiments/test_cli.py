"""The command line: files, then --smoke, then dotted options; a user's mistake is one line."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cli
from moejax.config import load
from moejax.config.load import ConfigError
from moejax.config.run import RunConfig

ROOT = Path(__file__).parents[2]


def parse(*argv: str, **options) -> cli.Arguments:
    return cli.parse(list(argv), name="train", doc="Train.", **options)


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch):
    """Undo what use_cpu writes."""
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.delenv("MOEJAX_DEBUG", raising=False)


def test_defaults_are_the_demo_on_one_device():
    arguments = parse()
    assert arguments.config.model == parse("--model", "demo").config.model
    assert arguments.config.mesh == parse("--mesh", "single").config.mesh
    assert (arguments.out, arguments.resume, arguments.smoke) == (Path("runs/train"), False, False)


def test_dotted_options_beat_smoke_which_beats_files():
    arguments = parse("--smoke", "--train.steps", "3", "--mesh.data=-1", "--model.moe.router.no-normalize")
    assert arguments.config.train.steps == 3
    assert arguments.config.train.seq_len == cli.SMOKE["train.seq_len"]
    assert arguments.config.model.embed == parse("--model", cli.SMOKE_MODEL).config.model.embed
    assert arguments.config.mesh.data == -1
    assert arguments.config.model.moe is not None
    assert not arguments.config.model.moe.router.normalize
    assert not any(arguments.out.iterdir()), "a smoke run without --out writes to a fresh directory"


@pytest.mark.parametrize(
    "words", [["--model.tie-embeddings"], ["--model.tie_embeddings=yes"], ["--model.tie-embeddings", "true"]]
)
def test_switches(words: list[str]):
    assert parse("--model", "mixtral_tiny", *words).config.model.tie_embeddings
    negated = [word.replace(".tie", ".no-tie") for word in words[:1]]
    if "=" not in negated[0]:
        assert not parse("--model", "dense_tiny", *negated).config.model.tie_embeddings


def test_own_options_come_back_apart():
    arguments = parse("--prompt", "Hi", "--train.steps", "3", "there", add_options=own_options)
    assert vars(arguments.options) == {"prompt": "Hi", "rest": "there"}


def own_options(parser):
    parser.add_argument("--prompt")
    parser.add_argument("rest")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stepz", "3"], "unknown option --stepz: did you mean --train.steps?"),
        (["--modle", "demo"], "unknown option --modle: did you mean --model?"),
        (["--train.step", "3"], "unknown option --train.step: did you mean --train.steps?"),
        (["--zzz.zzz", "3"], "unknown option --zzz.zzz"),
        (["--train.steps"], "--train.steps needs a value"),
        (["--train.steps", "--smoke"], "--train.steps needs a value"),
        (["--train.steps", "ten"], 'command line: [train] steps = "ten": should be a valid integer'),
        (["--train.microbatches", "3"], "command line: [train] global_batch (8) must divide by microbatches (3)"),
        (["--model", "demoo"], 'no model "demoo"; did you mean demo? (known: '),
        (["--mesh", "nowhere/mesh.toml"], "nowhere/mesh.toml: no such mesh file"),
        (["--fake-devices", "0"], "--fake-devices (0) must be at least 1"),
        (["surprise"], "unknown option surprise"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.run(lambda argv: cli.parse(argv, name="train", doc=None) and None, argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_help_teaches(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        parse("--help", "--model", "switch_tiny", add_options=own_options)
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for word in (
        "--fake-devices",
        "--prompt",
        "examples:",
        "tensor4_data2",
        "--model.moe.num-experts",
        "--train.steps",
    ):
        assert word in text
    assert "(default: switch)" in text, "the defaults shown are the chosen model's"


def test_fake_devices_replaces_an_earlier_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_foo=1 --xla_force_host_platform_device_count=8")
    cli.use_cpu(3)
    assert os.environ["XLA_FLAGS"] == "--xla_foo=1 --xla_force_host_platform_device_count=3"
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_fake_devices_are_seen_by_a_jax_that_is_already_imported():
    code = (
        "import jax, sys; from experiments import cli\n"
        "def main(argv):\n"
        "    arguments = cli.parse(argv, name='train', doc=None)\n"
        "    cli.setup_jax()\n"
        "    print(len(jax.devices()), jax.devices()[0].platform)\n"
        "    raise ValueError('a rule\\nwas broken')\n"
        "sys.exit(cli.run(main))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-c", code, "--fake-devices", "3"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["3", "cpu"]
    assert done.returncode == 1, "a ValueError from outside our packages keeps its traceback"


def test_out_is_made_and_holds_the_config(tmp_path: Path):
    out = tmp_path / "deep" / "run"
    assert cli.prepare_out(out, RunConfig(), resume=False) is False
    assert load.read_run(out / "config.toml") == RunConfig()
    assert [path.name for path in out.iterdir()] == ["config.toml"]


def test_out_is_never_overwritten(tmp_path: Path):
    cli.prepare_out(tmp_path / "run", RunConfig(), resume=False)
    with pytest.raises(ConfigError, match=r"run already holds a run: add --resume to go on, or choose another --out"):
        cli.prepare_out(tmp_path / "run", RunConfig(), resume=False)
    for resume in (False, True):
        with pytest.raises(ConfigError, match="is not empty and holds no run"):
            cli.prepare_out(tmp_path, RunConfig(), resume)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        cli.prepare_out(tmp_path / "file", RunConfig(), resume=False)


def test_resume_starts_fresh_where_nothing_is(tmp_path: Path):
    assert cli.prepare_out(tmp_path / "new", RunConfig(), resume=True) is False
    assert cli.prepare_out(tmp_path / "new", RunConfig(), resume=True) is True


def test_resume_may_lengthen_the_run_but_not_change_it(tmp_path: Path):
    cli.prepare_out(tmp_path, RunConfig(), resume=False)
    longer = load.override(RunConfig(), {"train.steps": 900, "train.log_every": 1, "mesh.data": 8}, "test")
    assert cli.prepare_out(tmp_path, longer, resume=True) is True
    assert load.read_run(tmp_path / "config.toml") == longer
    other = load.override(longer, {"optimizer.lr": 0.5, "train.steps": 1}, "test")
    with pytest.raises(ConfigError, match=r"cannot resume .*: optimizer\.lr was 0\.001 and is now 0\.5"):
        cli.prepare_out(tmp_path, other, resume=True)
    sparse = load.override(longer, {"model.name": "mixtral", "model.moe.num_experts": 4}, "test")
    with pytest.raises(ConfigError, match=r"model\.name was 'llama' and is now 'mixtral'"):
        cli.prepare_out(tmp_path, sparse, resume=True)
    assert load.read_run(tmp_path / "config.toml") == longer, "a refused resume changes nothing"


def test_resume_reads_the_runs_own_config(tmp_path: Path):
    first = parse("--model", "switch_tiny", "--mesh", "zero3", "--optimizer.lr", "0.5", "--out", str(tmp_path))
    cli.prepare_out(first.out, first.config, resume=False)
    again = parse("--resume", "--out", str(tmp_path), "--train.steps", "7")
    assert again.config == load.override(first.config, {"train.steps": 7}, "test")
    elsewhere = parse("--resume", "--out", str(tmp_path), "--mesh", "single")
    assert elsewhere.config.mesh == RunConfig().mesh


def raising(error: BaseException):
    def main(argv: list[str]) -> None:
        raise error

    return main


def test_users_errors_are_one_line_and_programmers_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, capsys):
    assert cli.run(raising(FileNotFoundError(errno.ENOENT, "No such file", "corpus.txt")), []) == 2
    assert "corpus.txt" in capsys.readouterr().err
    assert cli.run(raising(OSError(errno.ENOSPC, "No space left on device")), []) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
    assert cli.run(raising(KeyboardInterrupt()), []) == 130
    assert cli.run(lambda argv: load.build(RunConfig, {"model": 3}, "x") and None, []) == 2
    assert cli.run(lambda argv: RunConfig().mesh.fill(3) and None, []) == 2
    assert cli.run(lambda argv: None, []) == 0
    for error in (AssertionError(), TypeError(), ValueError("from outside our packages")):
        with pytest.raises(type(error)):
            cli.run(raising(error), [])
    monkeypatch.setenv("MOEJAX_DEBUG", "1")
    with pytest.raises(ConfigError):
        cli.run(raising(ConfigError("x")), [])


def test_a_config_class_built_by_hand_is_the_users_mistake_too(capsys: pytest.CaptureFixture[str]):
    from moejax.config.mesh import MeshConfig

    assert cli.run(lambda argv: MeshConfig(data=0) and None, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: data (0) must be a degree, or -1 for all devices that are left"
