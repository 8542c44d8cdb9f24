"""Which tensors does one safetensors file hold, and where do their bytes lie?

The library's numpy reader knows no float8, takes no strides, and says of half a file only that it is not covered. The
format is a length, a JSON header and the bytes, so we map those ourselves; the library writes (`writer.py`).
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
"""The format's dtypes whose numbers fill whole bytes, little-endian as is every machine that jax runs on."""

_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path


class _Bytes:
    """A file's bytes, mapped when first asked for: a folder of 160 shards opens by its headers alone."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def mapped(self) -> np.ndarray:
        return np.asarray(np.memmap(self.path, np.uint8, mode="r"))


@dataclass(frozen=True)
class FileTensor:
    """A tensor as it lies in a file."""

    name: str
    info: TensorInfo
    data: _Bytes
    start: int
    stop: int

    @property
    def view(self) -> np.ndarray:
        """The tensor without reading it: pages of the file are read when numbers are."""
        return self.data.mapped[self.start : self.stop].view(self.info.dtype).reshape(self.info.shape)

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Read a part, contiguous and ours: it outlives the file."""
        return np.array(self.view[index])


def open_shard(path: Path) -> dict[str, FileTensor]:
    """Read a file's header: its tensors by name, in the order of the header.

    Raises ValueError for a file that is none, is cut short, or has a dtype that we do not know.
    """
    size = path.stat().st_size
    first, header = _read_header(path, size)
    data = _Bytes(path)
    tensors = {name: _file_tensor(name, entry, first, data) for name, entry in header.items() if name != "__metadata__"}
    promised = max((tensor.stop for tensor in tensors.values()), default=first)
    if promised != size:
        raise ValueError(f"{path}: has {size} bytes, its header promises {promised}: cut short, download it again")
    return tensors


def _read_header(path: Path, size: int) -> tuple[int, dict[str, Any]]:
    """Read where the numbers begin, and the header's entries."""
    with path.open("rb") as file:
        head = file.read(len(_LFS_POINTER))
        if head == _LFS_POINTER:
            raise ValueError(f"{path}: a pointer of git-lfs ({size} bytes), no weights: run git lfs pull in its folder")
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 or length > size - 8:
            raise ValueError(
                f"{path}: has {size} bytes, its header alone promises {8 + length}: cut short or no safetensors file, "
                "download it again"
            )
        file.seek(8)
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: header is no JSON ({error}): corrupt, download it again") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: header is a {type(header).__name__}, must be an object: corrupt, download it again")
    return 8 + length, header


def _file_tensor(name: str, entry: Any, first: int, data: _Bytes) -> FileTensor:
    try:
        code, shape, (start, stop) = entry["dtype"], tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{data.path}: {name} has the header entry {entry!r}, must have dtype, shape and data_offsets: corrupt, "
            "download it again"
        ) from None
    if code not in DTYPES:
        known = ", ".join(DTYPES)
        raise ValueError(f"{data.path}: {name} has the unknown dtype {code}, must be one of {known}: convert the file")
    dtype = DTYPES[code]
    expected = math.prod(shape) * dtype.itemsize
    if start < 0 or stop - start != expected:
        raise ValueError(
            f"{data.path}: {name} has bytes {start} to {stop}, {code} of shape {shape} takes {expected}: corrupt, "
            "download it again"
        )
    return FileTensor(name, TensorInfo(shape, dtype, data.path), data, first + start, first + stop)
