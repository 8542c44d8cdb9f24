"""What can a chip do at best, and what joins it to others? Data sheet peaks, by the name that jax gives the device."""

from dataclasses import dataclass

from moejax.config.load import did_you_mean


@dataclass(frozen=True)
class Chip:
    """Peaks of one device: dense matmul FLOP/s by compute dtype, memory bytes/s, memory bytes, and its links."""

    flops: dict[str, float]
    bandwidth: float
    memory: float
    nvlink: float = 0.0
    """bytes/s that one device sends inside a node, one way"""
    network: float = 50e9
    """bytes/s that one device sends to other nodes: 400 Gb/s a device is an assumption, not a data sheet's figure"""
    node: int = 8
    """devices of a node"""


_AMPERE = {"bfloat16": 312e12, "float16": 312e12, "float32": 156e12}
_HOPPER = {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12}

CHIPS = {
    "H200": Chip(_HOPPER, 4.8e12, 141e9, nvlink=450e9),
    "H100": Chip(_HOPPER, 3.35e12, 80e9, nvlink=450e9),
    "A100": Chip(_AMPERE, 2.0e12, 80e9, nvlink=300e9, network=25e9),
}
"""Matched as a part of `device_kind`; float32 is the TF32 figure, which jax uses by default on these.

NVLink is half of what the data sheets say, which count both ways."""


def find_chip(device_kind: str) -> Chip | None:
    """Give the chip whose name is part of `device_kind`; None where its peaks are not known."""
    return next((chip for name, chip in CHIPS.items() if name in device_kind), None)


def named_chip(name: str) -> Chip:
    """Give the chip of a name as a user writes it; raise ValueError for one that is not known."""
    if (chip := CHIPS.get(name.upper())) is None:
        raise ValueError(f'no chip "{name}"{did_you_mean(name.upper(), CHIPS)} (known: {", ".join(CHIPS).lower()})')
    return chip
