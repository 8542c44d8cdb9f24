import dataclasses
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_kernels
from experiments.kernels import compiled, machine, runner, sweep, tables, timing
from experiments.kernels.case import Case
from moejax.accounting.kernels import KernelReport
from pallas_kernels.target import Declined

ROOT = Path(__file__).parents[2]
CEILINGS = {"matmul_flops": 8e14, "copy_bandwidth": 4e12, "read_bandwidth": 4.5e12, "clock": "cupti"}


def double(x: jax.Array) -> jax.Array:
    return 2 * x


def declined(x: jax.Array) -> jax.Array:
    raise Declined(f"rows ({x.shape[0]}) must be a multiple of 64; use xla")


def wrong(x: jax.Array) -> jax.Array:
    return (2 * x).at[3].add(1)


def poisoned(x: jax.Array) -> jax.Array:
    return (2 * x).at[0].set(jnp.nan)


def case(name: str, **ways) -> Case:
    return Case("fake", name, lambda key: (jax.random.normal(key, (8, 4)),), ways, flops=32, bytes=256, target="fast")


CASES = [
    case("right", triton=double, xla=double),
    case("with a mistake", triton=wrong, xla=double),
    case("with NaN", triton=poisoned, xla=double),
    case("refused", triton=declined, xla=double),
    case("without a reference", triton=double),
    case("with a broken reference", triton=double, xla=declined, reference=double),
]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Case]]:
    """A family of kernels that any CPU can run."""
    module = types.ModuleType("experiments.kernels.fake")
    cases = list(CASES)
    module.cases = lambda dry=False: cases
    monkeypatch.setitem(sys.modules, "experiments.kernels.fake", module)
    yield cases


def measured(name: str, **seconds: float) -> runner.Row:
    ways = {way: {"median": t, "p20": t, "p80": t, "clock": "cupti", "error": None} for way, t in seconds.items()}
    return {
        "family": "moe",
        "name": name,
        "flops": 8e9,
        "bytes": 4e6,
        "target": "",
        "ways": ways,
        "reads_mostly": False,
    }


def test_smoke_compares_every_way_and_writes_everything(
    fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(bench_kernels, "SMOKE_SECONDS", 600.0)  # all rows, however busy the machine is
    assert bench_kernels.main(["--smoke", "--family", "fake", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"fake.jsonl", "result.json", "roofline.png"}
    rows = {row["name"]: row for row in json.loads((tmp_path / "result.json").read_text())["rows"]}
    ways = {name: row["ways"].get("triton") for name, row in rows.items()}
    assert ways["right"] == {"error": 0.0}
    assert "relative error" in ways["with a mistake"]["wrong"] and "nan" in ways["with NaN"]["wrong"]
    assert ways["refused"] == {"skipped": "Declined: rows (8) must be a multiple of 64; use xla"}
    assert ways["without a reference"] == {"error": None} and rows["without a reference"]["against"] is None
    assert rows["with a broken reference"]["against"] == "reference"
    said = capsys.readouterr().out
    assert "WRONG" in said and "not measured" in said
    assert not any("median" in way for row in rows.values() for way in row["ways"].values())


def test_on_a_gpu_every_right_way_is_timed(fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(bench_kernels.os, "environ", dict(os.environ))
    monkeypatch.setattr(machine, "on_gpu", lambda: True)
    monkeypatch.setattr(machine, "ceilings", lambda: CEILINGS)
    monkeypatch.setattr(runner, "LONGEST_CALL", 10.0)
    fake[:] = [dataclasses.replace(CASES[0], torch_ways={"eager": double}), CASES[1]]
    assert bench_kernels.main(["--family", "fake", "--out", str(tmp_path)]) == 0
    right, mistaken = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert right["measured"] and right["sets"] == timing.MOST_SETS
    assert all(right["ways"][name]["median"] > 0 for name in ("triton", "xla"))
    assert "skipped" in right["ways"]["torch eager"]  # no torch, or no GPU
    assert "median" not in mistaken["ways"]["triton"] and "median" in mistaken["ways"]["xla"]
    assert "matmul 800 TFLOP/s, copy 4.00 TB/s" in capsys.readouterr().out


def test_rows_that_are_there_are_not_measured_again(fake, tmp_path: Path):
    bench_kernels.main(["--smoke", "--family", "fake", "--match", "mistake", "--out", str(tmp_path)])
    before = (tmp_path / "fake.jsonl").read_text()
    bench_kernels.main(["--smoke", "--family", "fake", "--match", "mistake", "--out", str(tmp_path)])
    after = (tmp_path / "fake.jsonl").read_text()
    assert after.startswith(before) and [list(json.loads(line)) for line in after[len(before) :].splitlines()] == [
        ["machine"]
    ]


def test_no_row_is_begun_when_the_budget_is_spent(fake, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert bench_kernels.main(["--smoke", "--family", "fake", "--budget", "0", "--out", str(tmp_path)]) == 0
    assert f"fake: {len(CASES)} rows are left" in capsys.readouterr().out


def test_a_piece_of_work_needs_half_as_long_again_as_the_longest(monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 1.0, 5.0, 5.0, 5.0])
    monkeypatch.setattr(sweep.time, "monotonic", lambda: next(now))
    deadline = sweep.Deadline(12)
    with deadline.piece():
        pass
    assert deadline.allows_another()  # 5 + 1.5 * 4 < 12
    monkeypatch.setattr(sweep.time, "monotonic", lambda: 6.0)
    assert not deadline.allows_another()


def test_a_way_that_never_came_back_is_not_tried_again(fake, tmp_path: Path):
    results = sweep.Results(tmp_path / "fake.jsonl")
    results.add(machine={})
    results.add(began=["right", "xla"])
    results.add(began=["right", "triton"])  # and here the process ended
    (row, *_) = sweep.sweep(sweep.Results(results.path), CASES[:1], sweep.Deadline(None), dry=True)
    assert row["ways"] == {"xla": {"error": None}, "triton": {"skipped": sweep.CUT_OFF}}
    assert list(sweep.sweep(sweep.Results(results.path), CASES[:1], sweep.Deadline(None), dry=True)) == []


def test_a_half_written_line_is_no_row(fake, tmp_path: Path):
    list(sweep.sweep(sweep.Results(tmp_path / "fake.jsonl"), CASES[:1], sweep.Deadline(None), dry=True))
    with (tmp_path / "fake.jsonl").open("a") as file:
        file.write('{"row": {"name": "refu')
    assert list(sweep.Results(tmp_path / "fake.jsonl").rows) == ["right"]


def test_a_lost_context_ends_the_process_and_the_next_one_leaves_the_way_out(
    fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def breaks(x: jax.Array) -> jax.Array:
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")

    monkeypatch.setattr(runner, "on_gpu", lambda: True)
    fake[:] = [case("fatal", triton=breaks, xla=double)]
    arguments = ["--smoke", "--family", "fake", "--out", str(tmp_path)]
    assert bench_kernels.main(arguments) == sweep.AGAIN
    assert bench_kernels.main(arguments) == 0
    (row,) = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert "ILLEGAL_ADDRESS" in row["ways"]["triton"]["skipped"] and row["ways"]["xla"] == {"error": None}


def test_a_way_that_hangs_ends_the_process(tmp_path: Path):
    code = (
        "import pathlib, sys, time; from experiments.kernels import sweep\n"
        "sweep.LONGEST_WAY = 0.2; sweep.on_gpu = lambda: True\n"
        "with sweep.watched(sweep.Results(pathlib.Path(sys.argv[1])), 'row', 'mosaic'): time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "f.jsonl")], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == sweep.AGAIN
    assert "hung" in sweep.Results(tmp_path / "f.jsonl").dead["row"]["mosaic"]


def test_wrong_arguments_and_a_missing_gpu_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert bench_kernels.main(["--smoke", "--family", "atention", "--out", str(tmp_path)]) == 2
    assert bench_kernels.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert 'no family of kernels "atention"' in said and "no NVIDIA GPU" in said


def test_ways_take_turns_and_the_median_is_of_all_rounds(monkeypatch: pytest.MonkeyPatch):
    called = []
    runs = {
        name: timing.Runnable(lambda i, name=name: called.append(name), lambda out: None) for name in ("ours", "peer")
    }
    found = timing.measure(runs)
    turns = [name for i, name in enumerate(called) if i == 0 or called[i - 1] != name]
    assert turns[-6:] == ["ours", "peer"] * timing.ROUNDS
    each = called.count("ours")
    assert each >= timing.WARM_UPS + timing.ROUNDS * timing.CALLS
    assert found["ours"].calls == timing.ROUNDS * timing.CALLS / timing.Enqueued.group  # groups of ten, no CUPTI here
    assert found["ours"].p20 <= found["ours"].median <= found["ours"].p80


def test_kernel_times_are_cut_into_calls():
    records = [("a", 1.0), ("b", 2.0), ("b", 3.0), ("a", 4.0)]
    assert timing.split_calls(records, 2) == ([0.003, 0.007], 2)
    for other in ([], records[:3], [*records[:2], ("a", 3.0), ("a", 4.0)]):
        with pytest.raises(timing.ClockFailed, match="not the same ones for each"):
            timing.split_calls(other, 2)


@pytest.mark.parametrize(
    ("num_bytes", "sets"), [(1 << 40, 1), (256 << 20, 1), (100 << 20, 3), (2 << 20, 128), (8, 128)]
)
def test_inputs_are_rotated_until_the_cache_is_cold(num_bytes: int, sets: int):
    assert timing.number_of_sets(num_bytes) == sets


def test_the_floor_is_the_longer_of_arithmetic_and_bytes():
    row = measured("x", mosaic=2e-5)
    assert runner.floor_seconds(row, CEILINGS) == pytest.approx(1e-5)  # 8e9 FLOP at 8e14; 4e6 bytes take 1e-6
    assert runner.floor_seconds(row | {"flops": 0.0}, CEILINGS) == pytest.approx(1e-6)
    assert runner.floor_seconds(row | {"flops": 0.0, "reads_mostly": True}, CEILINGS) == pytest.approx(4e6 / 4.5e12)


def test_the_summary_gives_rates_share_and_the_best_peer(tmp_path: Path):
    rows = [
        measured("x", mosaic=2e-5, cudnn=3e-5, xla=4e-5),
        measured("no kernel is owed", xla=1e-5, tokamax=5e-6),
        measured("not ours", tokamax=1e-5),
    ]
    _, first, second, third = tables.summary(rows, CEILINGS)
    for text in ("400.0 TFLOP/s", "0.20 TB/s", "50 %", "1.50 cudnn", "20.0"):
        assert text in first
    assert "0.50 tokamax" in second and "no way of ours" in third
    tables.plot_roofline(rows, CEILINGS, "a chip", tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_comparison_takes_trees_and_sees_shapes():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.bfloat16)
    assert runner.compare((x, [x]), [x, x]) == 0.0
    for other in ((x,), (x, x[:2]), (x, 1.1 * x)):
        with pytest.raises(runner.Wrong):
            runner.compare(other, [x, x])


def test_the_benchmark_runs_where_only_jax_and_matplotlib_are(tmp_path: Path):
    missing = ("pydantic", "tyro", "grain", "jax_triton", "tomli_w", "beartype", "chex", "tokamax", "torch")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
        "from experiments import bench_kernels; sys.exit(bench_kernels.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--smoke", "--budget", "0", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ModuleNotFoundError" not in done.stdout and "import of" not in done.stdout, done.stdout


def gpu_check(*arguments: str, seconds: int) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment |= {"PYTHON": sys.executable, "GPU_CHECK_SECONDS": str(seconds)}
    command = ["bash", "scripts/gpu_check.sh", *arguments, "--dry"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_gpu_check_goes_through_its_stages_without_a_gpu(tmp_path: Path):
    said = gpu_check("all", str(tmp_path), seconds=0)
    stages = [line for line in said.splitlines() if line.startswith("== ")]
    assert stages == [f"== {stage}" for stage in ("numerics", *sweep.FAMILIES)]
    assert len(list(tmp_path.iterdir())) <= 8  # as many files as come back from a lent machine


@pytest.mark.slow
def test_gpu_check_goes_on_with_what_an_earlier_run_left(tmp_path: Path):
    first = gpu_check("numerics", str(tmp_path / "first"), seconds=1)  # one row at least
    again = gpu_check("numerics", str(tmp_path / "again"), str(tmp_path / "first"), seconds=0)
    assert "passed" in first and "passed in an earlier run" in again


@pytest.mark.parametrize("arguments", [["attention"], ["atention", "out"], ["all", "out", "earlier", "more"]])
def test_gpu_check_says_how_it_is_called(arguments: list[str]):
    done = subprocess.run(
        ["bash", "scripts/gpu_check.sh", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "STAGE OUT [EARLIER]" in done.stderr


def kernel(name: str, wgmma: int, tma: int) -> KernelReport:
    return KernelReport(name, 100, 0, 1000, wgmma, tma, sass=True, ignored_setmaxnreg=False)


def test_a_merge_owes_no_tensor_cores_but_the_kernel_beside_it_does():
    merge = kernel("merge", 0, 0)
    for reports, broken in (
        ([kernel("attend", 24, 12), merge], []),
        ([kernel("attend", 0, 12), merge], ["attend has no wgmma"]),
        ([merge], ["merge has no wgmma"]),  # nobody multiplies
    ):
        owed = compiled.multipliers(reports)
        assert [breach for report in reports for breach in report.breaches(report.name in owed)] == broken
