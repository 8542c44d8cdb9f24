import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from experiments.kernels import runner
from experiments.kernels.timing import Runnable, Timing
from pallas_kernels import mosaic, tuning
from pallas_kernels.triton import grouped_matmul as triton
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


@functools.cache
def kinds_of_ops() -> dict[tuple[str, Any], tune_kernels.Op]:
    """Give an op of the tuner for each name and default: those of a kind differ in what no check looks at."""
    with tune_kernels.aimed():
        return {(lookup.op, lookup.default): op for op in tune_kernels.ops() for lookup in [op.lookup()]}


Launched = Callable[..., list[tuple[int, str]]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Give what says how an op launches its kernels on an H200: the shared memory of each, and all else that shows."""
    launches: list[tuple[int, str]] = []

    def zeros(shapes: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def mosaic_kernel(body: Any, *, out_type: Any, scratch_types: Any = (), **options: Any) -> Callable[..., Any]:
        launches.append((smem_bytes(scratch_types), repr((scratch_types, out_type, options["grid"], options))))
        return lambda *operands: zeros(out_type)

    def triton_call(name: str, *args: jax.Array, out: jax.ShapeDtypeStruct, launch: triton.Launch) -> jax.Array:
        launches.append((0, repr(launch)))
        return zeros(out)

    def run(op: tune_kernels.Op, config: Any = None) -> list[tuple[int, str]]:
        launches.clear()
        with tune_kernels.aimed():
            jax.eval_shape(functools.partial(op.kernel, config=config), *op.shapes)
        return list(launches)

    monkeypatch.setattr(mosaic.plgpu, "kernel", mosaic_kernel)
    monkeypatch.setattr(triton, "triton_call", triton_call)
    return run


def smem_bytes(memory: Any) -> int:
    """Count the bytes of a kernel's scratch, barriers left out."""
    found = [x for x in jax.tree.leaves(memory) if hasattr(x, "inner_aval")]  # a union's is of its bytes
    return sum(x.inner_aval.size * x.inner_aval.dtype.itemsize for x in found)


def test_every_kernel_takes_what_the_tuner_wrote(table: Path, launched: Launched):
    for (name, _), op in kinds_of_ops().items():
        with tune_kernels.aimed():
            lookup, configs = op.lookup(), op.configs()
        before = launched(op)
        for config in configs[1:]:
            if (expected := launched(op, config)) != before:
                tuning.write(table, tuning.key(name, "NVIDIA H200", lookup.bucket), {"config": asdict(config)})
                assert launched(op) == expected, f"{name}: {config}"
                break
        else:
            assert len(configs) == 1, f"{name}: no candidate differs"


def test_every_candidate_can_be_launched(launched: Launched):
    for (name, default), op in kinds_of_ops().items():
        with tune_kernels.aimed():
            configs = op.configs()
        assert configs[0] == default and len(set(configs)) == len(configs) <= 16, name
        for config in configs:
            smem = max(size for size, _ in launched(op, config))  # raises what the kernel declines
            assert smem + 2048 <= mosaic.SMEM_LIMIT, f"{name}: {config} needs {smem} bytes"


def test_no_two_ops_share_an_entry():
    with tune_kernels.aimed():
        names = [(lookup.op, lookup.bucket) for op in tune_kernels.ops() for lookup in [op.lookup()]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kernel", ["paged_attention", "latent_attention"])
def test_what_rounds_cannot_be_tuned(kernel: str, table: Path, launched: Launched):
    op = next(op for (name, _), op in kinds_of_ops().items() if name == kernel)
    with tune_kernels.aimed():
        name = tuning.key(kernel, "H200", op.lookup().bucket)
    tuning.write(table, name, {"config": {"split": 512}})
    with pytest.raises(ValueError, match=r"split=512.* in its stages alone"):
        launched(op)


def test_a_kernel_refuses_an_entry_with_a_field_it_has_not(table: Path, launched: Launched):
    op = next(iter(kinds_of_ops().values()))
    with tune_kernels.aimed():
        name = tuning.key(op.lookup().op, "H200", op.lookup().bucket)
    tuning.write(table, name, {"config": {"warps": 3}})
    with pytest.raises(ValueError, match="warps must be a field of Config"):
        launched(op)


def test_a_call_that_looks_nothing_up_cannot_be_tuned():
    with pytest.raises(ValueError, match="must look a config up"):
        tuning.lookup_of(jnp.sin, S((2,), jnp.float32))


def test_options_that_are_off_are_not_named():
    assert tuning.op_name("f", causal=True, segments=False, window=None) == "f causal=True"


def test_dry_says_what_would_be_tried_of_every_op(capsys: pytest.CaptureFixture):
    assert tune_kernels.main(["--dry"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: bfloat16" in said and f"    {default}" in said for name, default in kinds_of_ops())
    functions = {name.split(" causal")[0].split(" transpose")[0] for name, _ in kinds_of_ops()}
    assert {"flash_attention", "flash_attention_bwd", "latent_attention", "triton grouped_matmul"} <= functions


def test_dry_can_be_narrowed(capsys: pytest.CaptureFixture):
    assert tune_kernels.main(["--dry", "--match", "triton"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert lines and all(line.startswith("triton ") for line in lines)


def test_without_a_gpu_nothing_is_written(table: Path):
    command = [sys.executable, "-m", "scripts.tune_kernels", "--table", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no NVIDIA GPU here" in done.stderr
    assert json.loads(table.read_text()) == {"entries": {}}


def test_the_fastest_right_candidate_is_written(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def kernel(x: jax.Array, *, config: Config | None = None) -> jax.Array:
        config = config or tuning.tuned("fake", "H200", tuning.bucket(x), Config(128))
        if config.rows == 32:
            raise NotImplementedError("rows (32) must be at least 64")
        return 2 * x + (config.rows == 64)  # wrong, whatever its speed

    def measured(runs: dict[str, Runnable]) -> dict[str, Timing]:
        seconds = {str(Config(128)): 2e-6, str(Config(256)): 1e-6}
        return {name: Timing(seconds[name], 0.0, 0.0, 90, "cupti", 1) for name in runs}

    def tried(default: Config, x: jax.ShapeDtypeStruct) -> list[Config]:
        return [default, *(Config(rows) for rows in (32, 64, 256))]

    monkeypatch.setattr(tune_kernels, "ops", lambda: [tune_kernels.Op(kernel, tune_kernels.normal((4, 4)), tried)])
    monkeypatch.setattr(tune_kernels, "measure", measured)
    monkeypatch.setattr(tune_kernels.machine, "on_gpu", lambda: True)
    monkeypatch.setattr(runner, "on_gpu", lambda: False)
    monkeypatch.setattr(runner, "number_of_sets", lambda num_bytes: 1)
    assert tune_kernels.main(["--table", str(table)]) == 0
    (entry,) = json.loads(table.read_text())["entries"].values()
    assert entry["config"] == {"rows": 256, "stages": 3} and entry["us"] == 1.0 and entry["default_us"] == 2.0
    said = capsys.readouterr().out
    assert "rows (32) must be at least 64" in said and "Wrong: relative error" in said
