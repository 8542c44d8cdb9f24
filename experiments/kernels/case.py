"""One row of the kernel benchmark: an op at a shape, its floor on paper, and everyone who can do it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

Way = Callable[..., Any]
"""A function of the case's inputs."""


@dataclass(frozen=True)
class Case:
    """An op at a shape. `jax.eval_shape(case.make, key)` gives its abstract inputs, for compiling without a GPU."""

    family: str
    """attention, decode, moe, fused or lightning"""
    name: str
    """what tells it from the family's other rows: "forward causal S=4096 D=128 heads 16/16" """
    make: Callable[[jax.Array], tuple[jax.Array, ...]]
    """random inputs from a key; normal where they are numbers, never zeros"""
    ways: Mapping[str, Way]
    """by implementation ("mosaic", "triton", "cudnn", "xla") or peer ("tokamax", ...): jax functions, not jitted"""
    flops: float
    """arithmetic that the op needs, once"""
    bytes: float
    """bytes that the op must move, each input read once and each output written once"""
    torch_ways: Mapping[str, Way] = field(default_factory=dict)
    """peers in torch: functions of the inputs as torch tensors"""
    target: str = ""
    """the figure to reach, in words: ">= 690 TFLOP/s" """
    matmul: bool = True
    """whether the kernel multiplies on tensor cores: then its machine code must hold wgmma"""
    compiled: bool = True
    """whether the ahead-of-time test compiles it: one or a few of a grid, those that differ in code"""


def compiled_torch(f: Way) -> Way:
    """Compile a torch function when it is first called."""

    @functools.cache
    def compiled() -> Way:
        import torch  # pyright: ignore[reportMissingImports]

        return torch.compile(f, dynamic=False)

    return lambda *args: compiled()(*args)
