"""What was measured on, and what can it do at best? Device, versions and clocks; ceilings measured in the same run."""

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernels.timing import Enqueued, Runnable, measure

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "torch", "triton", "jax-triton", "tokamax", "transformers")
QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu")
MATMUL = 8192
STREAM_ROWS = 65536
"""of 8192 float32: 2 GiB"""
NO_CEILINGS = {"matmul_flops": None, "copy_bandwidth": None, "read_bandwidth": None}


def on_gpu() -> bool:
    """Say whether jax runs on an NVIDIA GPU here."""
    return jax.default_backend() in ("gpu", "cuda")


def describe() -> dict[str, Any]:
    """Name the device, its driver and clocks (read, never set), and the versions of the libraries."""
    return {
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **smi(),
    }


def smi() -> dict[str, str]:
    """Ask nvidia-smi for the driver and the clocks of now; nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(QUERY, (word.strip() for word in said.strip().split(",")), strict=False))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def ceilings() -> dict[str, Any]:
    """Measure the two ceilings, reads alone too, and how far the two clocks lie apart on a kernel of a millisecond."""
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (jax.random.normal(key, (MATMUL, MATMUL), jnp.bfloat16) for key in keys[:2])
    x = jax.random.normal(keys[2], (STREAM_ROWS, 8192), jnp.float32)
    runs = {
        "matmul": _jitted(jnp.matmul, a, b),
        "copy": _jitted(lambda x: -x, x),  # a plain copy is no kernel but a memcpy, which CUPTI does not count
        "read": _jitted(lambda x: jnp.max(x, axis=1), x),
    }
    found = measure(runs)
    by_host = sorted(Enqueued().samples(runs["copy"], 0, 30)[0])[1]
    return {
        "matmul_flops": 2 * MATMUL**3 / found["matmul"].median,
        "copy_bandwidth": 2 * x.nbytes / found["copy"].median,
        "read_bandwidth": x.nbytes / found["read"].median,
        "clock": found["copy"].clock,
        "enqueued_over_clock": by_host / found["copy"].median,
        "clocks.sm.busy": smi().get("clocks.sm"),
    }


def _jitted(f: Any, *args: jax.Array) -> Runnable:
    compiled = jax.jit(f).lower(*args).compile()
    return Runnable(lambda i: compiled(*args), jax.block_until_ready)
