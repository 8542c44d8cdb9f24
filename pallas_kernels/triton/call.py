"""How does a Triton kernel come into a JAX program? Through jax-triton; where it is not installed, by no way."""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import jax

from pallas_kernels.compat import triton_options
from pallas_kernels.target import INSTEAD, Declined, target

CAPABILITIES = {
    80: ("A100", "A800", "A30"),
    86: ("A10", "A40", "A16", "A6000", "RTX 30"),
    89: ("L4", "L40", "RTX 40", "Ada"),
    90: ("H100", "H200", "H800", "H20", "GH200"),
}
"""Compute capability by a part of the chip's name, for programs that are compiled for a chip that is not here."""

PTX_VERSION = 87
"""CUDA 12.8's: triton 3.9 would write that of its own ptxas (13.4), which the one that XLA finds may not read."""


class Launch(NamedTuple):
    """How a kernel is launched: what jax-triton and Triton's interpreter are given alike."""

    grid: tuple[int, ...]
    constants: dict[str, Any]
    """the kernel's compile-time arguments"""
    num_warps: int = 4
    num_stages: int = 3


def capability() -> int:
    """Give the compute capability, times ten, of the chip that the traced program is for.

    Raises Declined for anything but an NVIDIA GPU of capability 8.0 or more.
    """
    chip = target()
    if not chip.is_gpu or chip.platform == "rocm":
        raise Declined(f"chip ({chip.kind}) must be an NVIDIA GPU: {INSTEAD}")
    found = _by_name(chip.kind)
    if found is None:
        said = getattr(jax.local_devices()[0], "compute_capability", None)  # "8.6"
        if said is None:
            raise Declined(f"chip ({chip.kind}) must be one whose compute capability is known: {INSTEAD}")
        found = round(10 * float(said))
    if found < 80:
        raise Declined(f"compute capability ({found / 10}) must be at least 8.0: {INSTEAD}")
    return found


def _by_name(kind: str) -> int | None:
    """Look a chip up by the longest name that is part of `kind`: "A10" is part of "A100" too."""
    matches = [(len(name), number) for number, names in CAPABILITIES.items() for name in names if name in kind]
    return max(matches)[1] if matches else None


def kernels() -> ModuleType:
    """Import the kernels; raise Declined where there is no triton."""
    return _module("pallas_kernels.triton.kernels", "triton")


def triton_call(name: str, *args: jax.Array, out: jax.ShapeDtypeStruct, launch: Launch) -> jax.Array:
    """Call a kernel of kernels.py on arrays: it is given their pointers, then the output's; raise Declined."""
    number = capability()
    library = _module("jax_triton", "jax_triton")
    return library.triton_call(
        *args,
        kernel=getattr(kernels(), name),
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        compute_capability=number,
        **triton_options(library.triton_call, out, PTX_VERSION),
        **launch.constants,
    )


def _module(name: str, needed: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").split(".")[0] not in (needed, "triton"):
            raise
        raise Declined(f"{error.name} must be installed (pip install jax-triton); {INSTEAD}") from error
