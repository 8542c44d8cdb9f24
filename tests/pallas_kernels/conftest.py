"""What the kernels' tests share: Mosaic's interpreter, the accuracy rule, and inputs."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def interpreter_missing() -> str | None:
    """Say why Mosaic's interpreter cannot be had; None where it can."""
    if sys.version_info < (3, 12) or tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11):
        return f"Mosaic's interpreter wants Python 3.12 and jax 0.11.2 (here {sys.version_info[1]}, {jax.__version__})"
    return None


@pytest.fixture
def interpreter(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Run kernels in Mosaic's interpreter; a race, which it only prints, fails the test."""
    if (missing := interpreter_missing()) is not None:
        pytest.skip(missing)
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    said = capsys.readouterr().out
    assert "RACE DETECTED" not in said, said


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def assert_accurate(out: jax.Array, plain: jax.Array, exact: jax.Array) -> None:
    """Hold a kernel to the accuracy rule: `plain` is the reference in the kernel's dtype, `exact` in float32 or wider.

    The largest error at most twice that of the plain computation (and of float32's own rounding), and the root mean
    square error below 5e-3 of the result's for bfloat16, 1e-5 for float32.
    """
    assert out.shape == exact.shape, f"{out.shape} != {exact.shape}"
    limit = {"bfloat16": 5e-3, "float16": 5e-3, "float32": 1e-5}[jnp.dtype(plain.dtype).name]
    a, b, e = (np.asarray(x).astype(np.float64) for x in (out, plain, exact))
    assert np.isfinite(a).all(), "not finite, or not written"
    exact32 = e.astype(np.float32)
    rounding = float(np.abs((exact32 + np.float32(0.3) - np.float32(0.3)).astype(np.float64) - e).max())
    error, allowed = float(np.abs(a - e).max()), 2 * float(np.abs(b - e).max()) + 2 * rounding
    assert error <= allowed, f"largest error {error:.2e}, allowed {allowed:.2e}"
    assert rms(a - e) <= limit * rms(e), f"relative rms error {rms(a - e) / rms(e):.2e}, allowed {limit:.0e}"


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls of Mosaic kernels give zeros: what is checked before a kernel, without the time to trace it."""
    from pallas_kernels import mosaic

    def kernel(body: Callable, *, out_type: Any, **options: Any) -> Callable:
        return lambda *operands: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_type)

    monkeypatch.setattr(mosaic.plgpu, "kernel", kernel)
