"""How is a program compiled for machines that are not here? A description of their chips stands in for the devices."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from moejax.accounting.chips import Chip

PLUGINS = ("jax_cuda13_plugin", "jax_plugins.xla_cuda13")
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150109880320
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
"""XLA's own description of the chip (`stream_executor.GpuTargetConfigProto`), as the CUDA driver reports it."""


def missing_plugins() -> str | None:
    """Say in one line what must be installed to compile for GPUs on a machine without one; None if it is there."""
    if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11):
        return f"compiling for GPUs that are not here wants jax 0.11 and Python 3.12 (here jax {jax.__version__})"
    try:
        found = all(importlib.util.find_spec(name) for name in PLUGINS)
    except ModuleNotFoundError:
        found = False
    if found:
        return None
    return (
        "compiling for GPUs wants jax's CUDA plugin (no GPU, no CUDA): bash scripts/venv.sh aot, or "
        f"pip install jax-cuda13-plugin=={jax.__version__}"
    )


def h200_devices(number: int, chip: Chip) -> list[Any]:
    """Describe `number` H200s in nodes; raise ValueError without the plugins, or for a node that is not full."""
    if (missing := missing_plugins()) is not None:
        raise ValueError(missing)
    node = min(number, chip.node)
    if number % node:
        raise ValueError(f"devices ({number}) must fill nodes of {node}")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the driver that it looks for is not here
    from jax.experimental import topologies

    shape = f"1x{number // node}x{node}"
    return list(
        topologies.get_topology_desc(platform="cuda", topology_name="", topology=shape, target_config=H200).devices
    )


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Compile without jax's cache on disk: a program for a chip that is not here can be kept but not read back."""
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether it is used is asked once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()
