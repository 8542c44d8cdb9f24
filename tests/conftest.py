"""What all tests share: 8 CPU devices, checked shapes, THE tolerances, and the config files to run over."""

import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax; -m gpu wants JAX_PLATFORMS=cuda
# A test runs its program a few times: compiling it without LLVM's optimiser saves a third of the time.
FLAGS = {"--xla_force_host_platform_device_count": 8}
if os.environ["JAX_PLATFORMS"] == "cpu":
    FLAGS["--xla_backend_optimization_level"] = 0
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()

from jaxtyping import install_import_hook

install_import_hook(["moejax.ops"], "beartype.beartype")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import CONFIGS, setup_jax
from moejax.config import load
from moejax.config.mesh import MeshConfig
from moejax.config.model import ModelConfig

setup_jax(keep_programs=True)  # found again by the next test run; 8 devices never were seen to wait for ever

TOLERANCE = {"float64": (1e-10, 1e-12), "float32": (2e-5, 2e-6), "bfloat16": (2e-2, 2e-3), "float16": (4e-3, 4e-4)}
"""rtol and atol by the dtype of the arithmetic; atol is for numbers of size one. Never widened in a test."""


def tolerance(dtype: jax.typing.DTypeLike, scale: float = 1.0) -> dict[str, float]:
    """Give assert_allclose's rtol and atol for arithmetic in `dtype` on numbers of size `scale`."""
    rtol, atol = TOLERANCE[jnp.dtype(dtype).name]
    return {"rtol": rtol, "atol": atol * scale}


def assert_close(actual: object, expected: object, dtype: jax.typing.DTypeLike | None = None) -> None:
    """Compare two pytrees leaf by leaf at the tolerance of `dtype` (default: the less precise of the two leaves').

    atol grows with the largest expected number of the leaf: a sum's error goes by its terms, not by its result.
    """
    jax.tree.map(lambda a, b: _assert_leaf_close(np.asarray(a), np.asarray(b), dtype), actual, expected)


def _assert_leaf_close(actual: np.ndarray, expected: np.ndarray, dtype: jax.typing.DTypeLike | None) -> None:
    if dtype is None:
        inexact = [x.dtype for x in (actual, expected) if jnp.issubdtype(x.dtype, jnp.inexact)]
        if not inexact:
            np.testing.assert_array_equal(actual, expected)
            return
        dtype = min(inexact, key=lambda each: -jnp.finfo(each).eps)
    wide = [x.astype(np.float64) for x in (actual, expected)]
    np.testing.assert_allclose(*wide, **tolerance(dtype, max(1.0, float(np.abs(wide[1]).max(initial=0.0)))))


def config_files(kind: load.Kind, pattern: str = "*") -> list[Path]:
    """List the config files of a kind, for parametrize."""
    return sorted((CONFIGS / kind).glob(f"{pattern}.toml"))


def tiny_models() -> list[str]:
    """Name every tiny model: what holds for one must hold for all, so a new file joins the parity tests by itself."""
    return [path.stem for path in config_files("model", "*_tiny")]


COMPOSED = {
    "deepseek_v2_tiny",
    "glm4_moe_tiny",
    "granite_moe_tiny",
    "llama_tiny",
    "minimax_m2_tiny",
    "qwen3_moe_tiny",
    "qwen3_tiny",
}
"""Families of parts that another tiny model has as well: tests/interop proves their numbers by default, and where all
tiny models are tested they are slow."""


def tiny_params() -> list[Any]:
    """Name every tiny model for parametrize."""
    return [pytest.param(name, marks=pytest.mark.slow if name in COMPOSED else ()) for name in tiny_models()]


def eight_device_meshes() -> list[str]:
    """Name every mesh file that fits the tests' 8 devices, the one-device mesh left out."""
    names = (name for name in load.config_names("mesh", CONFIGS) if name not in ("single", "auto"))
    return [name for name in names if math.prod(mesh_config(name).degrees()) == 8]


def model_config(name: str) -> ModelConfig:
    """Read a model file by its name."""
    return load.read_files(CONFIGS / "model" / f"{name}.toml", CONFIGS / "mesh" / "single.toml").model


def mesh_config(name: str) -> MeshConfig:
    """Read a mesh file by its name."""
    return load.read_files(CONFIGS / "model" / "dense_tiny.toml", CONFIGS / "mesh" / f"{name}.toml").mesh


@pytest.fixture
def x64():
    """Let a test have float64 arrays: proofs need them."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=tiny_params())
def tiny_model(request: pytest.FixtureRequest) -> ModelConfig:
    """Run the test once for each tiny model."""
    return model_config(request.param)


@pytest.fixture(params=eight_device_meshes())
def mesh(request: pytest.FixtureRequest) -> MeshConfig:
    """Run the test once for each mesh of 8 devices."""
    return mesh_config(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests on one worker (`-n 2 --dist loadgroup`): they share what is dear to make. Parity is long, and
    shares by model."""
    items.sort(key=lambda item: item.path.name != "test_processes.py")  # the longest first: nobody waits for it alone
    for item in items:
        params = getattr(item, "callspec", None)
        model = params.params.get("model", "") if params and "parity" in item.path.parts else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}/{item.path.stem}/{model}"))
