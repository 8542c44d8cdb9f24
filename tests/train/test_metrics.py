"""metrics.jsonl, the lines that are printed, the pictures, and config.toml."""

import errno
import io
import json
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from experiments import cli, train
from moejax.config import load
from moejax.train.metrics import MetricsWriter, read_metrics
from moejax.train.plots import plot_loss, plot_router_load
from tests.train.conftest import SPARSE, small_argv

KEYS = {"step", "loss", "aux", "z_loss", "grad_norm", "lr", "tokens_per_s_per_device", "tflops", "dropped_pct"}
KEYS |= {"load_imbalance", "memory_gb"}


def write(out: Path, start: int, *records: dict) -> None:
    writer = MetricsWriter(out, start, steps=100)
    for record in records:
        writer.write(record)
    writer.close()


def test_a_run_leaves_its_story(small_config, tmp_path: Path, capsys):
    config = small_config(*SPARSE, train__steps=6, train__eval_every=3)
    assert cli.run(train.main, small_argv(config, tmp_path)) == 0
    out, run = capsys.readouterr().out, tmp_path / "run"
    assert load.read_run(run / "config.toml") == config
    (line,) = [line for line in out.splitlines() if line.startswith("step=5 ")]
    shown = dict(word.split("=") for word in line.split())
    assert shown.keys() >= KEYS
    assert all(np.isfinite(float(value)) for value in shown.values())

    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "val_loss" in record] == [3, 6]
    assert records[-2].keys() >= KEYS
    assert np.sum(records[0]["load"]) == 2 * 8 * 16 * 2, "layers * tokens * experts per token"
    result = json.loads((run / "result.json").read_text())
    assert result["val_bits_per_byte"] == records[-1]["val_bits_per_byte"]
    for name in ("loss.png", "router_load.png"):
        picture = matplotlib.image.imread(run / name)
        assert picture.shape[:2] == (480, 1320)
        assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 50
    assert not list(run.glob("*.part*"))


def test_a_crash_leaves_no_record_twice(tmp_path: Path):
    write(tmp_path, 0, *({"step": step, "loss": 1.0} for step in (1, 2, 3)), {"step": 3, "val_loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 3]
    write(tmp_path, 2, {"step": 3, "loss": 1.5})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 1.5}]
    write(tmp_path, 0, {"step": 1, "loss": 9.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 9.0}]
    assert read_metrics(tmp_path / "nowhere") == []


def test_what_is_not_finite_is_null(tmp_path: Path, capsys):
    write(tmp_path, 0, {"step": 1, "loss": float("nan"), "norm": float("inf"), "load": [[1, 2]]})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "norm": None, "load": [[1, 2]]}]
    assert capsys.readouterr().out == "step=1 loss=nan norm=inf\n"


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path):
    writer = MetricsWriter(tmp_path, 0, steps=10)
    writer._file.close()
    writer._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'") as caught:
        writer.write({"step": 1})
    assert caught.value.errno == errno.ENOSPC
    writer.close()


def test_a_terminal_shows_a_bar_and_no_step_lines(tmp_path: Path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    writer = MetricsWriter(tmp_path, 2, steps=4)
    assert "compiling the first step" in err.getvalue()
    writer.say("resumed")
    record = {"step": 3, "loss": 2.5, "tokens_per_s_per_device": 12_345.6, "lr": 1e-3, "load_imbalance": 1.25}
    writer.write(record)
    writer.advance(3)
    writer.write({"step": 3, "val_loss": 2.0})
    writer.write(record | {"step": 4})
    writer.advance(4)
    writer.close()
    assert out.getvalue() == "resumed\nstep=3 val_loss=2\n"
    assert "4/4" in err.getvalue()
    assert "loss=2.5 tokens/s=12,346 lr=0.001 imbalance=1.25" in err.getvalue()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    piped = MetricsWriter(tmp_path, 4, steps=6)
    piped.write({"step": 5, "loss": 2.5})
    piped.close()
    assert sys.stdout.getvalue() == "step=5 loss=2.5\n", "`> log.txt` gets every line, and no bar"


@pytest.mark.parametrize("records", [[], [{"step": 1, "loss": None}], [{"step": 1, "loss": 2.0, "load": [[4, 0]]}]])
def test_pictures_of_short_runs_can_be_drawn(records: list[dict], tmp_path: Path):
    plot_loss(records, tmp_path / "loss.png", {"byte unigram": 4.5})
    plot_router_load(records, tmp_path / "router_load.png")
    assert (tmp_path / "loss.png").stat().st_size > 5000
    assert (tmp_path / "router_load.png").exists() == any("load" in record for record in records)


def test_pictures_of_many_layers_and_experts_can_be_drawn(tmp_path: Path):
    load_LE = np.random.default_rng(0).integers(0, 100, (60, 256))
    plot_router_load([{"step": step, "load": load_LE.tolist()} for step in (1, 10)], tmp_path / "router_load.png")
    assert matplotlib.image.imread(tmp_path / "router_load.png").shape[:2] == (480, 1320)
