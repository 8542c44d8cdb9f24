"""What did Hugging Face's transformers say of a tiny model, and how is that model's folder written anew, without torch?

    golden = Golden.load("mixtral")
    golden.write(tmp_path)                              # config.json and model.safetensors, as the hub would have them
    ours = ...                                          # load that folder, run golden["input_ids"]
    np.testing.assert_allclose(ours, golden["logits"], atol=1e-3)

scripts/make_goldens.py makes the files and lists what each array is. Needs NumPy and safetensors alone.
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from tests.interop import recipe
from tests.interop.recipe import TensorSpec

FOLDER = Path(__file__).parent.parent / "golden" / "huggingface"
TEXTS = ("config", "config_legacy", "tensors", "grad_norms", "facts")
DTYPES = {"float32": "F32", "bfloat16": "BF16"}
SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "U8": "uint8"}


def cases() -> list[str]:
    """Name all goldens."""
    return sorted(path.stem for path in FOLDER.glob("*.npz"))


@dataclass(frozen=True)
class Golden:
    """A tiny model of a family: how its file is made, and what transformers computed with it."""

    name: str
    config: dict[str, Any]
    """config.json as transformers 5 spells it"""
    config_legacy: dict[str, Any]
    """the same as the hub's files spell it"""
    tensors: list[TensorSpec]
    """of the file, in its order"""
    grad_norms: dict[str, float]
    """L2 norm of the loss's gradient (of `total_loss`, where there is one) by the unquantised file's tensor;
    of copies of one table only `shared.weight`, with the sum"""
    facts: dict[str, Any]
    """seed, sha256 of the tensors, margin (the smallest distance of any choice), transformers' and torch's version"""
    arrays: dict[str, np.ndarray]

    @classmethod
    def load(cls, name: str, folder: Path = FOLDER) -> "Golden":
        """Read a golden by its case's name."""
        with np.load(folder / f"{name}.npz") as file:
            arrays = dict(file)
        texts = {key: json.loads(str(arrays.pop(key))) for key in TEXTS}
        texts["tensors"] = [TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in texts["tensors"]]
        return cls(name, **texts, arrays=arrays)

    def save(self, folder: Path = FOLDER) -> Path:
        """Write the golden's npz; the same golden gives the same bytes."""
        texts = {key: np.array(json.dumps(getattr(self, key))) for key in TEXTS}
        path = folder / f"{self.name}.npz"
        np.savez_compressed(path, allow_pickle=False, **texts, **self.arrays)
        return path

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The file's tensors in the file's dtypes, by name; BF16 as raw uint16, FP8 as raw uint8."""
        return {
            spec.name: self.arrays.get(f"kept/{spec.name}", recipe.make(self.facts["seed"], spec))
            for spec in self.tensors
        }

    @cached_property
    def dequantised(self) -> dict[str, np.ndarray]:
        """The file's tensors in float32, by the name that an unquantised file has."""
        block = self.config.get("quantization_config", {}).get("weight_block_size", [128])[0]
        return recipe.dequantised(self.weights, block)

    def write(
        self,
        folder: Path,
        *,
        legacy: bool = False,
        dtype: str | None = None,
        shard_bytes: int | None = None,
        quantised: bool = True,
    ) -> Path:
        """Write config.json and the safetensors, and return `folder`.

        `legacy` chooses the hub's spelling of the config; `dtype` (float32 or bfloat16) stores what is not quantised in
        that dtype, not in its own; `shard_bytes` splits the file as the hub does, with an index; `quantised=False`
        writes float32 (or `dtype`) throughout.
        """
        dtype = dtype if quantised else dtype or "float32"
        config = dict(self.config_legacy if legacy else self.config)
        if dtype:
            config["torch_dtype" if legacy else "dtype"] = dtype
        if not quantised:
            config.pop("quantization_config", None)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        kinds = {spec.name: spec.dtype for spec in self.tensors}
        tensors = {}
        for name, values in (self.weights if quantised else self.dequantised).items():
            kind = kinds.get(name, "F32")
            if dtype and name in self.dequantised and (kind in DTYPES.values() or not quantised):
                kind, values = DTYPES[dtype], self.dequantised[name]
                values = recipe.to_bfloat16(values) if kind == "BF16" else values
            tensors[name] = (kind, np.ascontiguousarray(values))
        _write_shards(folder, tensors, shard_bytes or 1 << 62)
        return folder


def _write_shards(folder: Path, tensors: dict[str, tuple[str, np.ndarray]], shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    for name, (_, values) in tensors.items():
        if shards[-1] and sum(tensors[other][1].nbytes for other in shards[-1]) + values.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        chosen = {name: tensors[name] for name in names}
        flat = {
            name: safetensors.TensorSpec(
                dtype=SAFETENSORS[kind], shape=values.shape, data_ptr=values.ctypes.data, data_len=values.nbytes
            )
            for name, (kind, values) in chosen.items()
        }
        safetensors.serialize_file(flat, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(math.prod(values.shape) * values.itemsize for _, values in tensors.values())
        index = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n")
