"""What can a chip do at best? Data sheet peaks, by the name that jax gives the device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Peaks of one device: dense matmul FLOP/s by compute dtype, memory bytes/s, memory bytes."""

    flops: dict[str, float]
    bandwidth: float
    memory: float


_AMPERE = {"bfloat16": 312e12, "float16": 312e12, "float32": 156e12}
_HOPPER = {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12}

CHIPS = {
    "H200": Chip(_HOPPER, 4.8e12, 141e9),
    "H100": Chip(_HOPPER, 3.35e12, 80e9),
    "A100": Chip(_AMPERE, 2.0e12, 80e9),
}
"""Matched as a part of `device_kind`; float32 is the TF32 figure, which jax uses by default on these."""


def find_chip(device_kind: str) -> Chip | None:
    """Give the chip whose name is part of `device_kind`; None where its peaks are not known."""
    return next((chip for name, chip in CHIPS.items() if name in device_kind), None)
