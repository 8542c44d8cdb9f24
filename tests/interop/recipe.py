"""Which numbers stand in a golden model's file? Those that a hash makes of the seed, the tensor's name and its shape.

The weights of tests/golden/huggingface are not committed: SHAKE-128 and IEEE arithmetic give the same bytes on every
machine and with every version of NumPy. Numbers are kept as the file keeps them: BF16 and F8_E4M3 as raw integers.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

STORAGE = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F8_E4M3": np.dtype("u1"), "U8": np.dtype("u1")}
"""safetensors' dtypes, and what NumPy holds their bytes in."""

SPREAD = 0.35
"""Weights are uniform in [-SPREAD, SPREAD): a standard deviation of 0.2, so that routers and heads decide clearly."""


class TensorSpec(NamedTuple):
    """A tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """as safetensors spells it: F32, BF16, F8_E4M3, U8"""


def make(seed: int, spec: TensorSpec) -> np.ndarray:
    """Make a tensor's numbers in the dtype that STORAGE gives for the file's."""
    if spec.dtype == "BF16":
        return to_bfloat16(make(seed, spec._replace(dtype="F32")))
    name = re.sub(
        r"^(encoder|decoder)\.embed_tokens\.", "shared.", spec.name
    )  # Switch's files hold copies of one table
    raw = hashlib.shake_128(f"{seed}/{name}".encode()).digest(4 * math.prod(spec.shape))
    words = np.frombuffer(raw, "<u4").reshape(spec.shape)
    if spec.dtype == "U8" and spec.name.endswith("_scales"):  # MXFP4: powers of two around 2**-4
        return (words % 5 + 121).astype(np.uint8)
    if spec.dtype in ("U8", "F8_E4M3"):
        codes = (words >> 24).astype(np.uint8)
        return np.where(codes & 0x7F == 0x7F, codes - 1, codes) if spec.dtype == "F8_E4M3" else codes  # no NaN
    uniform = (words >> 8).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)  # exact, in [-1, 1)
    if spec.name.endswith("weight_scale_inv"):  # half of all FP8 codes are below 1, the largest is 448
        return np.float32(0.002) * (np.float32(1) + np.float32(0.5) * uniform)
    if re.search(r"norm(_f)?\.weight$", spec.name):
        return np.float32(1) + np.float32(0.1) * uniform
    if re.search(r"Attention\.q\.weight$", spec.name):  # T5's scores are not divided by sqrt(d)
        return np.float32(0.15) * uniform
    return np.float32(SPREAD) * uniform


def sha256(tensors: Mapping[str, np.ndarray]) -> str:
    """Hash the names and the bytes of all tensors, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even, as raw 16-bit integers."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def quantised_fp8(specs: Iterable[TensorSpec], block: int) -> list[TensorSpec]:
    """Respell a float32 file's tensors as DeepSeek-V3's FP8 file does: matrices of layers, but not the router's."""
    result = []
    for name, shape, dtype in specs:
        if len(shape) == 2 and name.startswith("model.layers.") and not name.endswith("mlp.gate.weight"):
            blocks = (-(-shape[0] // block), -(-shape[1] // block))
            result += [TensorSpec(name, shape, "F8_E4M3"), TensorSpec(name + "_scale_inv", blocks, "F32")]
        else:
            result.append(TensorSpec(name, shape, dtype))
    return result


def quantised_mxfp4(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Respell a float32 file's tensors as gpt-oss' MXFP4 file does: the experts' matrices (E, in, out)."""
    result = []
    for name, shape, dtype in specs:
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = shape
            rows = (experts, outputs, inputs // 32)
            result += [TensorSpec(name + "_blocks", (*rows, 16), "U8"), TensorSpec(name + "_scales", rows, "U8")]
        else:
            result.append(TensorSpec(name, shape, dtype))
    return result


def dequantised(tensors: Mapping[str, np.ndarray], block: int = 128) -> dict[str, np.ndarray]:
    """Turn bfloat16, FP8 (blocks of `block` x `block`) and MXFP4 into the float32 tensors they stand for."""
    result = {}
    for name, values in tensors.items():
        if name.endswith("_blocks"):
            result[name.removesuffix("_blocks")] = _mxfp4(values, tensors[name.removesuffix("_blocks") + "_scales"])
        elif name + "_scale_inv" in tensors:
            scale = tensors[name + "_scale_inv"].repeat(block, axis=0).repeat(block, axis=1)
            result[name] = _e4m3()[values] * scale[: values.shape[0], : values.shape[1]]
        elif not name.endswith(("_scales", "_scale_inv")):
            result[name] = (values.astype("<u4") << 16).view("<f4") if values.dtype == STORAGE["BF16"] else values
    return result


def _e4m3() -> np.ndarray:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal) * np.where(codes >> 7, -1.0, 1.0)
    values[codes & 0x7F == 0x7F] = np.nan
    return values.astype(np.float32)


def _mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    pairs = table[np.stack([blocks & 15, blocks >> 4], axis=-1)]  # the low nibble first
    values = np.ldexp(pairs.reshape(*scales.shape, 32), scales[..., None].astype(np.int32) - 127)
    return np.ascontiguousarray(values.reshape(*scales.shape[:2], -1).swapaxes(1, 2))
