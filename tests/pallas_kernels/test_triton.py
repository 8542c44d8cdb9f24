"""Our Triton kernels: numbers in Triton's interpreter (a process of its own), machine code for the H200, refusals."""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice  # jax.sharding has it from 0.11 on
from jax.sharding import AbstractMesh

from pallas_kernels.target import Declined
from pallas_kernels.triton import call, grouped_matmul, permute

ROOT = Path(__file__).parents[2]
GROUPS = {  # group sizes of 0, 1 and unaligned; 16 rows a tile
    "unaligned": [5, 0, 1, 17, 33, 0],
    "one": [48, 0, 0],
    "none": [0, 0],
    "trailing": [3, 16, 2],
    "too many": [0, 40, 30, 5],
}
SPARE = {"none": 7, "trailing": 21, "too many": -25}
"""rows after the last group; fewer than none: the sizes add up to more than the rows"""
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_jax_triton = pytest.mark.skipif(importlib.util.find_spec("jax_triton") is None, reason="no jax-triton here")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs() -> dict[str, list[np.ndarray]]:
    """Make every case's inputs; 40 columns by 56 are no multiple of a tile."""
    found: dict[str, list[np.ndarray]] = {}
    for name, sizes in GROUPS.items():
        size, spare = np.array(sizes, np.int32), SPARE.get(name, 0)
        x = normal(1, size.sum() + spare, 40)
        dy = normal(2, len(x), 56)
        for rows in (x, dy):
            rows[size.sum() :] = np.nan  # what belongs to no expert must not be read into a sum
        found[f"forward {name}"] = [x, normal(3, len(size), 40, 56), size]
        found[f"transposed {name}"] = [dy, normal(3, len(size), 40, 56), size]
        found[f"dw {name}"] = [x, dy, size]
    found["gather"] = [normal(4, 13, 40), np.array([3, -1, 12, 0, 13, 3, 99], np.int32)]
    found["gather wide"] = [normal(5, 3, 1100), np.array([2, 1, 1, -5], np.int32)]
    y = normal(6, 11, 40)
    y[7] = np.nan  # no place names it
    found["combine"] = [y, np.array([[0, 3], [10, -1], [11, -1], [5, 5], [6, 2]], np.int32), normal(7, 5, 2)]
    return found


def exact(name: str, args: list[np.ndarray]) -> np.ndarray:
    """Compute a case in float64, row by row."""
    kind = name.split(" ")[0]
    a, b, *rest = [x.astype(np.float64) if x.dtype == np.float32 else x for x in args]
    if kind == "gather":
        return np.stack([a[i] if 0 <= i < len(a) else np.zeros(a.shape[1]) for i in b])
    if kind == "combine":
        out = np.zeros((len(b), a.shape[1]))
        for m, places in enumerate(b):
            out[m] = sum(rest[0][m, i] * a[p] for i, p in enumerate(places) if 0 <= p < len(a))
        return out
    starts = np.cumsum(rest[0]) - rest[0]
    runs = [slice(start, start + size) for start, size in zip(starts, rest[0], strict=True)]
    if kind == "dw":
        return np.stack([a[run].T @ b[run] for run in runs])
    out = np.zeros((len(a), b.shape[1 if kind == "transposed" else 2]))
    for expert, run in enumerate(runs):
        out[run] = a[run] @ (b[expert].T if kind == "transposed" else b[expert])
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Run all cases in one process under TRITON_INTERPRET=1."""
    folder = tmp_path_factory.mktemp("triton")
    arrays = {f"{name}/{i}": x for name, args in inputs().items() for i, x in enumerate(args)}
    np.savez(folder / "cases.npz", **arrays)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("triton_on_numpy.py")
    command = [sys.executable, str(script), str(folder / "cases.npz"), str(folder / "out.npz")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "out.npz"))


@needs_triton
@pytest.mark.parametrize("name", list(inputs()))
def test_kernel_matches_float64(name: str, results: dict[str, np.ndarray]):
    found, expected = results[name].astype(np.float64), exact(name, inputs()[name])
    assert np.isfinite(found).all(), "not finite, or not written"
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


BF16 = jnp.bfloat16
S = jax.ShapeDtypeStruct
COMPILED = {
    "forward": (grouped_matmul.grouped_matmul, [S((8192, 2048), BF16), S((64, 2048, 1024), BF16), S((64,), jnp.int32)]),
    "transposed": (
        lambda x, w, sizes: grouped_matmul.grouped_matmul(x, w, sizes, transpose_w=True),
        [S((8192, 1024), BF16), S((64, 2048, 1024), BF16), S((64,), jnp.int32)],
    ),
    "dw": (
        grouped_matmul.grouped_matmul_dw,
        [S((8192, 2048), BF16), S((8192, 1024), BF16), S((64,), jnp.int32)],
    ),
    "few rows": (grouped_matmul.grouped_matmul, [S((64, 2048), BF16), S((64, 2048, 1024), BF16), S((64,), jnp.int32)]),
    "gather": (permute.gather_rows, [S((8192, 2048), BF16), S((65536,), jnp.int32)]),
    "combine": (permute.combine_rows, [S((65536, 2048), BF16), S((8192, 8), jnp.int32), S((8192, 8), jnp.float32)]),
}


@needs_jax_triton
@pytest.mark.parametrize("name", list(COMPILED))
def test_kernel_compiles_for_the_h200_without_spills(name: str):
    from experiments.kernels.case import Case
    from experiments.kernels.compiled import compile_case
    from moejax.accounting.target import missing_plugins

    if missing_plugins():
        pytest.skip(missing_plugins())
    function, args = COMPILED[name]
    case = Case("moe", name, lambda key: tuple(jnp.zeros(x.shape, x.dtype) for x in args), {"triton": function}, 0, 0)
    (line,) = compile_case(case)
    report = line.report
    assert report and not line.breaches, (line.breaches, line.note)
    assert report.spills == 0 and 0 < report.registers <= 255 and report.shared_memory <= 163 * 1024
    if "matmul" in report.name and name != "few rows":
        assert report.wgmma > 0


@needs_jax_triton
@pytest.mark.parametrize("name", ["forward", "dw"])
@pytest.mark.parametrize(
    ("kind", "target", "limit"),
    [("NVIDIA A100-SXM4-80GB", "sm_80", 163), ("NVIDIA L40S", "sm_89", 99), ("NVIDIA A10G", "sm_86", 99)],
)
def test_matmul_is_machine_code_of_older_chips_too(kind: str, target: str, limit: int, name: str, tmp_path: Path):
    from experiments.kernels.compiled import triton_dumps, triton_line

    function, args = COMPILED[name]
    parameters = {"device_kind": kind, "num_cores": None, "platform": "gpu"}
    known = inspect.signature(AbstractDevice).parameters
    device = AbstractDevice(**{key: value for key, value in parameters.items() if key in known})
    mesh = AbstractMesh((1,), ("device",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), triton_dumps(str(tmp_path)):
        jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    (ptx,) = tmp_path.rglob("*.ptx")
    assert f".target {target}" in ptx.read_text() and "mma.sync" in ptx.read_text()
    line = triton_line("", "triton", ptx, 0)
    report = line.report
    assert report and not line.breaches and report.registers <= 255 and report.shared_memory <= limit * 1024


def test_what_a_kernel_cannot_take_is_declined_with_the_reason():
    x, w, sizes = S((8, 32), BF16), S((2, 32, 16), BF16), S((2,), jnp.int32)
    with pytest.raises(Declined, match=r'must be an NVIDIA GPU: use implementation="xla"'):
        jax.eval_shape(grouped_matmul.grouped_matmul, x, w, sizes)
    with pytest.raises(Declined, match=r"must contract x's columns \(8, 32\) in dim 2"):
        jax.eval_shape(lambda *a: grouped_matmul.grouped_matmul(*a, transpose_w=True), x, w, sizes)
    with pytest.raises(Declined, match=r"dtype \(int8\) must be one of bfloat16"):
        jax.eval_shape(grouped_matmul.grouped_matmul, S((8, 32), jnp.int8), S((2, 32, 16), jnp.int8), sizes)
    with pytest.raises(Declined, match="must have the same rows"):
        jax.eval_shape(grouped_matmul.grouped_matmul_dw, x, S((9, 16), BF16), sizes)
    with pytest.raises(Declined, match="index dtype"):
        jax.eval_shape(permute.gather_rows, x, S((4,), jnp.float32))
    with pytest.raises(Declined, match="matrices of one shape"):
        jax.eval_shape(permute.combine_rows, x, S((4, 2), jnp.int32), S((4, 3), jnp.float32))


def test_a_missing_package_is_declined(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(call, "capability", lambda: 80)
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with pytest.raises(Declined, match="jax_triton must be installed"):
        jax.eval_shape(permute.gather_rows, S((8, 32), BF16), S((4,), jnp.int32))


@pytest.mark.parametrize(
    ("kind", "number"), [("NVIDIA A100-SXM4-80GB", 80), ("NVIDIA A10G", 86), ("NVIDIA L40S", 89), ("Tesla V100", None)]
)
def test_chips_are_known_by_the_longest_name(kind: str, number: int | None):
    assert call._by_name(kind) == number
