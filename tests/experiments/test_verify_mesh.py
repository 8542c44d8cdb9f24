"""The proof of a layout, as its user runs it: all five axes at once; and what a breach looks like."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cli, verify_mesh
from moejax.accounting.contract import Line


def test_all_five_axes_at_once_are_proven(tmp_path: Path):
    argv = ["--model", "mixtral_tiny", "--mesh", "all_axes", "--out", str(tmp_path / "proof")]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.verify_mesh", *argv],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("proven")
    report = json.loads((tmp_path / "proof" / "result.json").read_text())
    assert report["proven"]
    assert all(0 <= worst["error"] <= 1e-10 for worst in report["equality"].values())
    whats = {line["what"] for line in report["contract"]}
    axes = ("pipeline", "data", "sequence", "expert", "tensor")
    assert all(any(axis in what for what in whats) for axis in axes)
    assert {"expert rows really sent", "matmul FLOPs"} <= whats


@pytest.mark.parametrize(
    ("error", "found", "code"), [(0.0, 100.0, 0), (1e-9, 100.0, 1), (0.0, 106.0, 1), (float("inf"), 0.0, 1)]
)
def test_a_breach_is_marked_and_ends_with_exit_code_1(error, found, code, tmp_path: Path, monkeypatch, capsys):
    errors = {"gradient": {"['head']": error}, "metrics": {"loss": 0.0}, "state": {"step": 0.0}}
    lines = [Line("data all-reduce", 100.0, found, 1.05, "gradients")]
    monkeypatch.setattr(verify_mesh, "compare", lambda config, devices: (errors, None, {}, [0.0]))
    monkeypatch.setattr(verify_mesh, "contracts", lambda trial, batch, rows: lines)
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    argv = ["--model", "dense_tiny", "--mesh", "data8", "--out", str(tmp_path / "proof")]
    assert cli.run(verify_mesh.main, argv) == code
    output = capsys.readouterr().out
    assert ("BREACH" in output) == bool(code)
    assert any(line.startswith("! ") for line in output.splitlines()) == bool(code)
    assert json.loads((tmp_path / "proof" / "result.json").read_text())["proven"] == (code == 0)
