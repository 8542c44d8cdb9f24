"""What will a kernel run on? The abstract mesh's chip first: a program can be compiled for one that is not here."""

from typing import NamedTuple

import jax

from pallas_kernels.compat import platform_of

HOPPER = ("H100", "H200", "H800", "H20", "GH200")

INSTEAD = 'use implementation="xla"'
"""What a kernel's refusal ends with, as a user would write it."""


class Declined(NotImplementedError):
    """A kernel cannot take this call: the message gives the value, the rule and what to use instead."""


class Target(NamedTuple):
    """A chip, by the names that jax gives it."""

    platform: str
    kind: str

    @property
    def is_hopper(self) -> bool:
        """Say whether Mosaic GPU kernels with TMA and wgmma run here."""
        return self.platform in ("gpu", "cuda") and any(name in self.kind for name in HOPPER)

    @property
    def is_gpu(self) -> bool:
        """Say whether this is a GPU of any kind."""
        return self.platform in ("gpu", "cuda", "rocm")


def target() -> Target:
    """Name the chip that the function being traced will run on."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return Target(platform_of(device), device.device_kind)
    if (default := jax.config.jax_default_device) is not None and not isinstance(default, str):
        return Target(default.platform, default.device_kind)
    local = jax.local_devices()[0]
    return Target(local.platform, local.device_kind)
