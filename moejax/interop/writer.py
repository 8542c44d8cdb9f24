"""How are weights written as a Hugging Face checkpoint's files?"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from moejax.interop.files import INDEX, SINGLE
from moejax.interop.shard import DTYPES

NewTensor = tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]
"""Name, shape, dtype, and what gives the numbers when their turn comes."""

_METADATA = {"format": "pt"}  # transformers refuses files without it


def write_weights(
    folder: Path,
    tensors: Iterable[NewTensor],
    max_shard_bytes: int = 5_000_000_000,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write `model.safetensors`, or numbered shards and their index, as transformers does; hold one shard at a time.

    A tensor of more than `max_shard_bytes` has a shard to itself. `metadata` goes into each file, by default
    {"format": "pt"}. Raises ValueError for a folder that has weights already, a name given twice, a dtype that the
    format lacks.
    """
    folder = Path(folder)
    shards = list(_shards(list(tensors), max_shard_bytes))
    _check(folder, [tensor for shard in shards for tensor in shard])
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = [SINGLE] if len(shards) == 1 else names
    total = sum(map(_num_bytes, (tensor for shard in shards for tensor in shard)))
    with tqdm(total=total, desc=f"writing {folder}", unit="B", unit_scale=True, delay=2.0, leave=False) as bar:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(folder / name, shard, _METADATA if metadata is None else metadata, bar)
    if len(shards) > 1:
        parameters = sum(math.prod(shape) for shard in shards for _, shape, _, _ in shard)
        weight_map = {tensor[0]: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        _replace(folder / INDEX, lambda path: path.write_text(text, encoding="utf-8"))


def _check(folder: Path, tensors: list[NewTensor]) -> None:
    present = sorted(path.name for path in folder.glob("*.safetensors*")) if folder.is_dir() else []
    if present:
        raise ValueError(f"{folder}: has {present[0]} already, and weights are never overwritten: give another folder")
    seen: set[str] = set()
    for name, _, dtype, _ in tensors:
        if name in seen:
            raise ValueError(f"{folder}: two tensors of the name {name} to write: names must differ")
        if dtype not in DTYPES.values():
            known = ", ".join(known.name for known in DTYPES.values())
            raise ValueError(f"{folder}: {name} is {dtype}, must be one of {known}: convert it first")
        seen.add(name)


def _shards(tensors: list[NewTensor], max_bytes: int) -> Iterator[list[NewTensor]]:
    """Fill shard after shard in the given order; at least one, were it empty."""
    shard: list[NewTensor] = []
    filled = 0
    for tensor in tensors:
        if shard and filled + _num_bytes(tensor) > max_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(tensor)
        filled += _num_bytes(tensor)
    yield shard


def _write_shard(path: Path, shard: list[NewTensor], metadata: dict[str, str], bar: tqdm) -> None:
    arrays: dict[str, np.ndarray] = {}
    for name, shape, dtype, numbers in shard:
        array = np.asarray(numbers(), order="C")  # the library writes the buffer as it lies, strides or not
        assert (array.shape, array.dtype) == (shape, dtype), f"{name}: {array.dtype} {array.shape}, not {dtype} {shape}"
        arrays[name] = array
        bar.update(array.nbytes)
    _replace(path, lambda temporary: save_file(arrays, temporary, metadata=metadata))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the path, then rename: a file under its own name is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # the library's files are their owner's alone, whatever the umask
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _num_bytes(tensor: NewTensor) -> int:
    _, shape, dtype, _ = tensor
    return math.prod(shape) * np.dtype(dtype).itemsize
