"""What do quantised tensors of a checkpoint stand for, and how is a part of one read?

Two forms: float8 with a scale per block of the matrix (DeepSeek-V3, MiniMax-M2, Qwen3-MoE-FP8), and MXFP4, pairs of
4-bit numbers with a power of two per 32 of them (gpt-oss). Each pair of tensors becomes one, under the weight's name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from moejax.interop.shard import FileTensor, TensorInfo
from moejax.interop.transpose import contiguous

METHODS = ("fp8", "mxfp4")
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_SCALE, _MX_BLOCKS, _MX_SCALES = "_scale_inv", "_blocks", "_scales"
_FLOAT8_VALUES = np.arange(256, dtype=np.uint8).view(_FLOAT8).astype(np.float32)
"""Looking a byte up is three times faster than ml_dtypes' cast."""
_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1 = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
_MX_GROUP = 32


class Source(Protocol):
    """A tensor that can be read in parts."""

    @property
    def info(self) -> TensorInfo:
        """Its shape, dtype and file."""
        ...

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Read a part; every slice has its start, stop and (positive) step."""
        ...


def dequantise(found: Mapping[str, FileTensor], config: Mapping[str, Any], dtype: np.dtype) -> dict[str, Source]:
    """Replace each pair of quantised tensors by the one that it stands for, of `dtype`.

    `config` is config.json's `quantization_config`, empty where there is none. Raises ValueError for a scale without
    its weight, a weight without its scale, a scale of the wrong shape, and ways to quantise that we do not read.
    """
    method = config.get("quant_method")
    if config and method not in METHODS:
        raise ValueError(
            f"{_folder(found)}: config.json has the quantization_config.quant_method {method!r}, must be one of "
            f"{', '.join(METHODS)}: take a checkpoint that is not quantised"
        )
    quantised = bool(config) or any(name.endswith(_SCALE) for name in found)
    sources: dict[str, Source] = {}
    for name, tensor in found.items():
        packed = tensor.info.dtype == np.uint8
        if name.endswith(_SCALE):
            _partner(found, tensor, _SCALE, "")
        elif packed and name.endswith(_MX_SCALES):
            _partner(found, tensor, _MX_SCALES, _MX_BLOCKS)
        elif packed and name.endswith(_MX_BLOCKS):
            whole = name.removesuffix(_MX_BLOCKS)
            if whole in found:
                raise ValueError(f"{tensor.info.file}: {name} stands for {whole}, which {_place(found[whole])} has too")
            sources[whole] = Mxfp4.pair(tensor, _partner(found, tensor, _MX_BLOCKS, _MX_SCALES), dtype)
        elif quantised and (tensor.info.dtype == _FLOAT8 or name + _SCALE in found):
            sources[name] = Float8Blocks.pair(
                tensor, _partner(found, tensor, "", _SCALE), _block_edges(found, config), dtype
            )
        else:
            sources[name] = tensor
    return sources


@dataclass(frozen=True)
class Float8Blocks:
    """A matrix (or a stack of them) of float8 with a float scale for each block: value = float8 * scale."""

    info: TensorInfo
    values: FileTensor
    scales: FileTensor
    edges: tuple[int, int]

    @classmethod
    def pair(cls, values: FileTensor, scales: FileTensor, edges: tuple[int, int], dtype: np.dtype) -> "Float8Blocks":
        """Check that the two fit; the last block of a row or column may be partial."""
        shape = values.info.shape
        if values.info.dtype != _FLOAT8 or len(shape) < 2:
            raise ValueError(
                f"{_place(values)} is {values.info.dtype} of shape {shape}, must be a float8_e4m3fn matrix: it has a "
                f"scale, {scales.name}"
            )
        expected = (*shape[:-2], *(-(-extent // edge) for extent, edge in zip(shape[-2:], edges, strict=True)))
        if scales.info.shape != expected:
            raise ValueError(
                f"{_place(scales)} has shape {scales.info.shape}, must be {expected}: {values.name} has shape {shape} "
                f"in blocks of {edges} (config.json's quantization_config.weight_block_size)"
            )
        return cls(TensorInfo(shape, dtype, values.info.file), values, scales, edges)

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Read a part and the scales of its blocks; the arithmetic is float32's."""
        *outer, rows, columns = index
        values = self.values.view.view(np.uint8)[index]
        out = np.empty(values.shape, self.info.dtype)
        if out.size == 0:
            return out
        row_block, column_block = (
            np.arange(part.start, part.stop, part.step) // edge
            for part, edge in zip((rows, columns), self.edges, strict=True)
        )
        scales = self.scales.view[(*outer, slice(row_block[0], row_block[-1] + 1))].astype(np.float32)
        borders = np.searchsorted(row_block, np.arange(row_block[0], row_block[-1] + 2))
        for at in np.ndindex(values.shape[:-2]):
            for block, (start, stop) in enumerate(pairwise(borders)):
                out[at][start:stop] = _FLOAT8_VALUES[values[at][start:stop]] * scales[at][block, column_block]
        return out


@dataclass(frozen=True)
class Mxfp4:
    """Experts' matrices (E, in, out), stored as `blocks` (E, out, in / 32, 16) and `scales` (E, out, in / 32)."""

    info: TensorInfo
    blocks: FileTensor
    scales: FileTensor

    @classmethod
    def pair(cls, blocks: FileTensor, scales: FileTensor, dtype: np.dtype) -> "Mxfp4":
        """Check that the two fit."""
        shape = blocks.info.shape
        if len(shape) != 4 or shape[-1] != _MX_GROUP // 2:
            raise ValueError(f"{_place(blocks)} has shape {shape}, must be (experts, out, in / 32, 16) to be MXFP4")
        if scales.info.shape != shape[:3] or scales.info.dtype != np.uint8:
            raise ValueError(
                f"{_place(scales)} is {scales.info.dtype} of shape {scales.info.shape}, must be uint8 of shape "
                f"{shape[:3]}: {blocks.name} has shape {shape}"
            )
        experts, out, groups, _ = shape
        return cls(TensorInfo((experts, groups * _MX_GROUP, out), dtype, blocks.info.file), blocks, scales)

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Read a part and the scales of its groups of 32; exact but for what `dtype` cannot hold."""
        experts, inner, outer = index
        num_inner = len(range(inner.start, inner.stop, inner.step))
        first = inner.start // _MX_GROUP
        groups = slice(first, -(-inner.stop // _MX_GROUP) if num_inner else first)
        cut = slice(inner.start - first * _MX_GROUP, inner.stop - first * _MX_GROUP, inner.step)
        blocks, scales = self.blocks.view[experts, outer, groups], self.scales.view[experts, outer, groups]
        out = np.empty((blocks.shape[0], num_inner, blocks.shape[1]), self.info.dtype)
        pairs = _mxfp4_pairs(self.info.dtype)
        for expert in range(len(out)):  # one at a time: what lies between is several times larger than the result
            keys = scales[expert][..., None].astype(np.uint16) << 8 | blocks[expert]
            values = pairs[keys].view(self.info.dtype).reshape(keys.shape[0], keys.shape[1] * _MX_GROUP)
            out[expert] = contiguous(values[:, cut].T)
        return out


@cache
def _mxfp4_pairs(dtype: np.dtype) -> np.ndarray:
    """Tabulate the two numbers of a byte, low nibble first, times the scale: one item at scale * 256 + byte."""
    byte, power = np.arange(256), np.arange(256)[:, None, None] - 127
    numbers = np.ldexp(_E2M1[np.stack([byte & 15, byte >> 4], axis=-1)], power)
    with np.errstate(over="ignore"):  # 6 * 2^127 is infinite in float32, and nobody's weight
        return numbers.astype(dtype).reshape(-1).view(f"V{2 * dtype.itemsize}")


def _block_edges(found: Mapping[str, FileTensor], config: Mapping[str, Any]) -> tuple[int, int]:
    match config.get("weight_block_size", (128, 128)):
        case [int(rows), int(columns)] if min(rows, columns) > 0:
            return rows, columns
        case other:
            raise ValueError(
                f"{_folder(found)}: config.json has the quantization_config.weight_block_size {other}, must be the two "
                "edges of a block: take a checkpoint in blocks"
            )


def _partner(found: Mapping[str, FileTensor], tensor: FileTensor, suffix: str, other: str) -> FileTensor:
    name = tensor.name.removesuffix(suffix) + other
    if name not in found:
        raise ValueError(
            f"{_place(tensor)} is {tensor.info.dtype} without its {name}: quantised tensors come in pairs, "
            "download the folder again"
        )
    return found[name]


def _place(tensor: FileTensor) -> str:
    return f"{tensor.info.file}: {tensor.name}"


def _folder(found: Mapping[str, FileTensor]) -> Path | str:
    return next((tensor.info.file.parent for tensor in found.values()), "checkpoint")
