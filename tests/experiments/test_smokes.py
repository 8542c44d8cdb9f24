"""Every experiment runs with --smoke, as a user would start it: a new one is picked up by its file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import experiments

ROOT = Path(__file__).parents[2]
HELPERS = ("__init__", "cli", "process", "run_dir")
NAMES = sorted(path.stem for path in Path(experiments.__file__).parent.glob("*.py") if path.stem not in HELPERS)


def run(name: str, *arguments: str) -> str:
    """Run an experiment in a process of its own, on one CPU device; give what it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-m", f"experiments.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr and "WARNING" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for a moment: what the experiments that read a run are given."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    run("train", "--smoke", "--out", str(out))
    return out


def test_train_leaves_everything_that_the_readme_promises(trained: Path) -> None:
    left = {path.name for path in trained.iterdir()}
    promised = {"config.toml", "metrics.jsonl", "tokenizer.json", "checkpoints", "loss.png", "router_load.png"}
    assert promised | {"result.json"} <= left


@pytest.mark.parametrize("name", [name for name in NAMES if name != "train"])
def test_experiment_runs_with_smoke(name: str, trained: Path) -> None:
    own = ["--run", str(trained), "--new", "16"] if name == "generate" else []
    assert run(name, "--smoke", *own).strip()
