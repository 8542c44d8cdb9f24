"""Which weights does a Hugging Face checkpoint's folder hold, and how is a part of one read, and no more?"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.interop.quantised import Source, dequantise
from moejax.interop.shard import FileTensor, TensorInfo, open_shard

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


class WeightFiles:
    """The tensors of a folder by name; files stay mapped for as long as this lives, and hold no memory."""

    def __init__(self, folder: Path, sources: Mapping[str, Source]):
        self.folder = folder
        self._sources = sources
        self.tensors: Mapping[str, TensorInfo] = {name: source.info for name, source in sources.items()}

    @classmethod
    def open(cls, folder: Path, quantized_dtype: np.typing.DTypeLike = "bfloat16") -> "WeightFiles":
        """Read the headers of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

        Quantised tensors appear as what they stand for, of `quantized_dtype`; their scales do not appear. Raises
        ValueError, in one line that names file and tensor, for what is missing, cut short, double or does not fit.
        """
        folder = Path(folder)
        found = open_shard(folder / SINGLE) if _has_single(folder) else _open_indexed(folder)
        return cls(folder, dequantise(found, _quantization_config(folder), np.dtype(quantized_dtype)))

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Read the part `index` of a tensor, one slice (of a positive step) for each of its dims.

        The file's pages that hold the part are read, and what the kernel reads around them. Raises ValueError for a
        name that is not there.
        """
        shape = self.require(name).shape
        assert len(index) == len(shape), f"{name} of shape {shape} needs as many slices, got {index}"
        whole = tuple(slice(*part.indices(extent)) for part, extent in zip(index, shape, strict=True))
        assert all(part.step > 0 for part in whole), f"steps must be positive, got {index}"
        return self._sources[name].read(whole)

    def require(self, name: str, shape: tuple[int, ...] | None = None) -> TensorInfo:
        """Look a tensor up; with `shape`, check that it has it. Raises ValueError."""
        if name not in self.tensors:
            expected = "" if shape is None else f" (shape {shape} expected)"
            near = ", ".join(difflib.get_close_matches(name, self.tensors, n=3)) or "none"
            raise ValueError(f"{self.folder}: no tensor {name}{expected}; nearest: {near}")
        info = self.tensors[name]
        if shape is not None and info.shape != shape:
            raise ValueError(f"{info.file}: {name} has shape {info.shape}, the config asks for {shape}")
        return info


def _has_single(folder: Path) -> bool:
    """Say whether the weights are one file; raise ValueError where there are none at all."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder: give the folder of a checkpoint, with its config.json")
    if (folder / SINGLE).is_file():
        return True
    if (folder / INDEX).is_file():
        return False
    if any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder}: has {min(folder.glob('*.bin')).name}, and .bin files are not read: convert them once with "
            "transformers, model.save_pretrained(folder, safe_serialization=True)"
        )
    names = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3]) or "no .safetensors file"
    raise ValueError(f"{folder}: has {names}, must have {SINGLE}, or shards and {INDEX}: download it again")


def _open_indexed(folder: Path) -> dict[str, FileTensor]:
    index = folder / INDEX
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index}: has no weight_map of tensor to file: download it again")
    found: dict[str, FileTensor] = {}
    for shard in sorted(set(weight_map.values())):
        path = folder / shard
        if Path(shard).name != shard:
            raise ValueError(f"{index}: names the file {shard!r}, must be the name of one beside it")
        if not path.is_file():
            raise ValueError(f"{path}: no such file, but {index.name} names it: download it")
        for name, tensor in open_shard(path).items():
            if name in found:
                raise ValueError(f"{path}: has {name}, which {found[name].info.file} has too: must be in one of them")
            found[name] = tensor
    for name, shard in weight_map.items():
        if name not in found or found[name].info.file.name != shard:
            elsewhere = f"; {found[name].info.file.name} has it" if name in found else ""
            raise ValueError(f"{folder / shard}: lacks {name}, which {index.name} promises there{elsewhere}")
    return found


def _quantization_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    return (_json(path).get("quantization_config") or {}) if path.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a {type(content).__name__}, must be a JSON object: download it again")
    return content
