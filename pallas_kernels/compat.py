"""What differs between the versions of jax and jax-triton that kernels meet? One function each, and no other place."""

import inspect
from collections.abc import Callable
from typing import Any

import jax


def platform_of(device: Any) -> str:
    """Name an abstract device's platform; in some versions it has a chip's name alone, which must tell."""
    named = getattr(device, "platform", None)
    return named or ("gpu" if "NVIDIA" in device.device_kind else device.device_kind)


def interpreting() -> bool:
    """Say whether kernels traced now go to Mosaic's interpreter (`plgpu.force_gpu_interpret_mode`)."""
    from jax._src import config  # no public way to ask

    mode = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
    return mode is not None and mode.value is not None


def triton_options(triton_call: Callable[..., Any], out: jax.ShapeDtypeStruct, ptx_version: int) -> dict[str, Any]:
    """Give jax-triton's arguments for a kernel's output and compiler; jax-triton 0.3 takes no PTX version."""
    if "out_type" in inspect.signature(triton_call).parameters:  # 0.4
        return {"out_type": out, "backend_options": {"enable_fp_fusion": True, "ptx_version": ptx_version}}
    return {"out_shape": out, "enable_fp_fusion": True}
