import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.kernels import runner
from experiments.kernels.timing import Runnable, Timing
from pallas_kernels import tuning
from pallas_kernels.target import Target
from pallas_kernels.triton import grouped_matmul
from scripts import tune_kernels

ROOT = Path(__file__).parents[2]
S = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int = 128
    stages: int = 3


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tuned.json"
    path.write_text('{"entries": {}}')
    monkeypatch.setattr(tuning, "TABLE", path)
    return path


def test_what_was_not_measured_takes_the_default(table: Path):
    assert tuning.tuned("op", "NVIDIA H200", "bfloat16 8x8", Config(64)) == Config(64)


def test_a_measured_entry_holds_for_its_op_chip_and_bucket_alone(table: Path):
    tuning.write(table, tuning.key("op", "NVIDIA H200", "bfloat16 8x8"), {"config": {"stages": 5}, "us": 3.0})
    assert tuning.tuned("op", "NVIDIA H200 NVL", "bfloat16 8x8", Config(64)) == Config(64, 5)
    for op, chip, bucket in (("po", "H200", "bfloat16 8x8"), ("op", "H100", "bfloat16 8x8"), ("op", "H200", "8x9")):
        assert tuning.tuned(op, chip, bucket, Config()) == Config()


def test_a_later_measurement_replaces_the_earlier_one(table: Path):
    for stages in (4, 5):
        tuning.write(table, tuning.key("op", "H200", "b"), {"config": {"stages": stages}})
    assert tuning.tuned("op", "H200", "b", Config()).stages == 5
    assert len(json.loads(table.read_text())["entries"]) == 1


def test_an_entry_of_another_kernel_version_is_refused(table: Path):
    tuning.write(table, tuning.key("op", "H200", "b"), {"config": {"cluster": 2}})
    with pytest.raises(ValueError, match="cluster must be a field of Config"):
        tuning.tuned("op", "H200", "b", Config())


def test_buckets_round_long_dims_and_keep_short_ones():
    assert tuning.bucket(S((8000, 2048), jnp.bfloat16), S((60,), jnp.int32)) == "bfloat16 8192x2048 60"
    assert tuning.bucket(S((1024, 1025), jnp.float32)) == "float32 1024x2048"


def test_the_committed_table_can_be_read_and_says_how_each_entry_was_measured():
    entries = json.loads((ROOT / "pallas_kernels" / "tuned.json").read_text())["entries"]
    assert all({"config", "us", "default_us", "device", "clock"} <= set(entry) for entry in entries.values())


@pytest.mark.parametrize(
    "op", [op for op in tune_kernels.ops() if op.module == "triton.grouped_matmul"], ids=lambda op: op.name
)
def test_a_kernel_finds_what_the_tuner_wrote(op: tune_kernels.Op, table: Path, monkeypatch: pytest.MonkeyPatch):
    def called(name: str, *args: jax.Array, out: jax.ShapeDtypeStruct, launch: grouped_matmul.Launch) -> jax.Array:
        launched.append(launch.num_stages)
        return jnp.zeros(out.shape, out.dtype)

    launched = []
    monkeypatch.setattr(grouped_matmul, "triton_call", called)
    monkeypatch.setattr(grouped_matmul, "capability", lambda: 80)
    monkeypatch.setattr(grouped_matmul, "target", lambda: Target("cuda", "NVIDIA A100-SXM4-80GB"))
    name = tuning.key(op.name, "NVIDIA A100-SXM4-80GB", tune_kernels.bucket_of(op))
    tuning.write(table, name, {"config": {"stages": 7}})
    function = functools.partial(getattr(grouped_matmul, op.function), **op.static)
    jax.eval_shape(function, *jax.eval_shape(op.make, jax.random.key(0)))
    assert launched == [7]


def test_dry_says_what_would_be_tried(capsys: pytest.CaptureFixture):
    assert tune_kernels.main(["--dry", "--match", "triton"]) == 0
    said = capsys.readouterr().out
    assert "triton.grouped_matmul.grouped_matmul: bfloat16" in said and "Config(rows=128" in said


def test_without_a_gpu_nothing_is_written(table: Path):
    command = [sys.executable, "-m", "scripts.tune_kernels", "--table", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no NVIDIA GPU here" in done.stderr
    assert json.loads(table.read_text()) == {"entries": {}}


def test_the_fastest_right_candidate_is_written(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def kernel(x: jax.Array, *, config: Config) -> jax.Array:
        if config.rows == 32:
            raise NotImplementedError("rows (32) must be at least 64")
        return 2 * x + (config.rows == 64)  # wrong, whatever its speed

    def measured(runs: dict[str, Runnable]) -> dict[str, Timing]:
        seconds = {str(Config(128)): 2e-6, str(Config(256)): 1e-6}
        return {name: Timing(seconds[name], 0.0, 0.0, 90, "cupti", 1) for name in runs}

    module = type("module", (), {"kernel": kernel, "candidates": lambda x: [Config(r) for r in (128, 32, 64, 256)]})
    monkeypatch.setitem(sys.modules, "pallas_kernels.fake", module)
    monkeypatch.setattr(tune_kernels, "ops", lambda: [tune_kernels.Op("fake", "kernel", tune_kernels.normal((4, 4)))])
    monkeypatch.setattr(tune_kernels, "measure", measured)
    monkeypatch.setattr(tune_kernels.machine, "on_gpu", lambda: True)
    monkeypatch.setattr(runner, "on_gpu", lambda: False)
    monkeypatch.setattr(runner, "number_of_sets", lambda num_bytes: 1)
    assert tune_kernels.main(["--table", str(table)]) == 0
    (entry,) = json.loads(table.read_text())["entries"].values()
    assert entry["config"] == {"rows": 256, "stages": 3} and entry["us"] == 1.0 and entry["default_us"] == 2.0
    said = capsys.readouterr().out
    assert "rows (32) must be at least 64" in said and "Wrong: relative error" in said
