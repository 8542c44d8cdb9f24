import json
import re
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moejax.interop.files import WeightFiles
from moejax.interop.shard import DTYPES
from moejax.interop.writer import write_weights


def numbers(dtype: np.typing.DTypeLike, *shape: int, seed: int = 0) -> np.ndarray:
    """Random bits: every number, NaNs with their payload too."""
    dtype = np.dtype(dtype)
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return (bits & 1 if dtype.kind == "b" else bits).view(dtype).reshape(shape)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()


def whole(array: np.ndarray) -> tuple[slice, ...]:
    return (slice(None),) * array.ndim


def write_sharded(folder: Path, *shards: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"shard-{number}.safetensors")
        weight_map |= dict.fromkeys(shard, f"shard-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_raw(path: Path, header: dict | bytes, num_bytes: int) -> None:
    """A file by hand, its numbers a hole in the disk: as large as one likes."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    with path.open("r+b") as file:
        file.truncate(8 + len(content) + num_bytes)


def one_line(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        WeightFiles.open(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("code", DTYPES)
def test_a_file_of_the_library_is_read_bit_for_bit(tmp_path, code):
    array = numbers(DTYPES[code], 5, 7, 3)
    if code == "C64":
        array = np.ones((5, 7, 3), np.complex64) * np.arange(3, dtype=np.float32)
    save_file({"a": array, "scalar": np.array(array[0, 0, 0]), "none": array[:0]}, tmp_path / "model.safetensors")
    files = WeightFiles.open(tmp_path)
    assert files.tensors["a"].shape == (5, 7, 3)
    assert files.tensors["a"].dtype == array.dtype
    assert_same_bits(files.read("a", whole(array)), array)
    part = (slice(1, 4), slice(None, None, 3), slice(-1, None))
    assert_same_bits(files.read("a", part), array[part])
    assert_same_bits(files.read("scalar", ()), array[0, 0, 0])
    assert files.read("none", whole(array)).shape == (0, 7, 3)


def test_what_was_read_is_ours(tmp_path):
    array = numbers("float32", 4, 4)
    save_file({"a": array}, tmp_path / "model.safetensors")
    part = WeightFiles.open(tmp_path).read("a", (slice(1, 3), slice(0, 2)))
    assert part.flags.owndata and part.flags.writeable and part.flags.c_contiguous and part.base is None


def test_numbers_need_not_lie_at_multiples_of_their_size(tmp_path):
    array = numbers("bfloat16", 3, 5)
    header = json.dumps({"a": {"dtype": "BF16", "shape": [3, 5], "data_offsets": [0, 30]}}).encode()
    header += b" " * (1 - len(header) % 2)  # odd
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + array.tobytes())
    assert_same_bits(WeightFiles.open(tmp_path).read("a", (slice(1, 3), slice(0, 5, 2))), array[1:3, ::2])


@pytest.mark.parametrize("index", [(slice(7, 9), slice(None)), (slice(0, 1 << 24, 1 << 21), slice(5, 6))])
def test_a_part_of_a_tensor_larger_than_memory_is_read_alone(tmp_path, index):
    rows, columns = 1 << 24, 1 << 16  # 2 TiB of bfloat16, on no block of the disk
    entry = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, rows * columns * 2]}
    try:
        write_raw(tmp_path / "model.safetensors", {"a": entry}, rows * columns * 2)
    except OSError:
        pytest.skip("this file system has no files of 2 TiB")
    start = time.perf_counter()
    part = WeightFiles.open(tmp_path).read("a", index)
    assert time.perf_counter() - start < 2.0
    assert part.shape == tuple(len(range(*i.indices(extent))) for i, extent in zip(index, (rows, columns), strict=True))
    assert not part.astype(np.float32).any()


def test_opening_reads_headers_alone(tmp_path):
    folder = write_sharded(tmp_path, {"a": numbers("float32", 4)}, {"b": numbers("float32", 4)})
    files = WeightFiles.open(folder)
    (folder / "shard-1.safetensors").unlink()  # never mapped until it is read
    assert list(files.tensors) == ["a", "b"]
    assert files.read("a", (slice(None),)).shape == (4,)
    with pytest.raises(FileNotFoundError):
        files.read("b", (slice(None),))


def test_an_unknown_tensor_names_the_nearest(tmp_path):
    save_file({"model.norm.weight": numbers("float32", 4)}, tmp_path / "model.safetensors")
    files = WeightFiles.open(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: no tensor norm.weight; nearest: model.norm.weight")):
        files.read("norm.weight", (slice(None),))
    with pytest.raises(ValueError, match=r"no tensor xyz \(shape \(4,\) expected\); nearest: none"):
        files.require("xyz", (4,))
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(4,\), the config asks for \(5,\)"):
        files.require("model.norm.weight", (5,))


def test_a_folder_without_weights_says_what_to_do(tmp_path):
    one_line(tmp_path / "nowhere", "no such folder")
    one_line(tmp_path, "has no .safetensors file, must have model.safetensors, or shards and")
    save_file({"a": numbers("float32", 4)}, tmp_path / "adapter.safetensors")
    one_line(tmp_path, "has adapter.safetensors, must have model.safetensors, or shards and")
    (tmp_path / "pytorch_model.bin").touch()
    one_line(
        tmp_path,
        "has pytorch_model.bin, and .bin files are not read: convert them once with transformers, "
        "model.save_pretrained(folder, safe_serialization=True)",
    )


def test_shards_that_disagree_with_the_index_are_refused(tmp_path):
    a, b = {"a": numbers("float32", 4)}, {"b": numbers("float32", 4)}
    folder = write_sharded(tmp_path, a, b)
    save_file(a | b, folder / "shard-1.safetensors")
    one_line(folder, f"{folder}/shard-1.safetensors: has a, which {folder}/shard-0.safetensors has too")
    save_file({"c": a["a"]}, folder / "shard-1.safetensors")
    one_line(folder, "shard-1.safetensors: lacks b, which model.safetensors.index.json promises there")
    (folder / "shard-1.safetensors").unlink()
    one_line(folder, "shard-1.safetensors: no such file, but model.safetensors.index.json names it")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../shard-0.safetensors"}}')
    one_line(folder, "names the file '../shard-0.safetensors', must be the name of one beside it")
    index.write_text('{"metadata": {}}')
    one_line(folder, "has no weight_map")
    index.write_text("{")
    one_line(folder, "model.safetensors.index.json: no JSON")


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(tmp_path):
    folder = write_sharded(tmp_path, {"a": numbers("float32", 4)}, {"b": numbers("float32", 4)})
    shards = {"a": "shard-1.safetensors", "b": "shard-0.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    one_line(folder, "shard-1.safetensors: lacks a, which model.safetensors.index.json promises there; shard-0")


def test_a_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": numbers("float32", 4)}, path)
    content = path.read_bytes()
    for size in (len(content) - 3, len(content) + 1):
        path.write_bytes(content[:size].ljust(size))
        one_line(tmp_path, f"model.safetensors: has {size} bytes, its header promises {len(content)}: cut short")
    for size in (0, 7, 20):
        path.write_bytes(content[:size])
        one_line(tmp_path, f"model.safetensors: has {size} bytes, its header alone promises")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    one_line(tmp_path, "a pointer of git-lfs (56 bytes), no weights: run git lfs pull")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "header is no JSON"),
        (b"\xff\xfe\xfd\xfc", "header is no JSON"),
        (b"[]", "header is a list, must be an object"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "a has the header entry {'dtype': 'F32', 'shape': [4]}, must have"),
        ({"a": {"dtype": "F4", "shape": [32], "data_offsets": [0, 16]}}, "a has the unknown dtype F4, must be one of"),
        ({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 16]}}, "F32 of shape (2, 3) takes 24: corrupt"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}, "a has bytes -16 to 0"),
    ],
)
def test_a_corrupt_header_is_refused(tmp_path, header, message):
    write_raw(tmp_path / "model.safetensors", header, 16)
    one_line(tmp_path, message)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "bool", "int64"])
def test_what_is_written_in_shards_is_read_back_bit_for_bit(tmp_path, dtype):
    arrays = {f"w{i}": numbers(dtype, 3 + i, 5, seed=i) for i in range(5)} | {"scalar": numbers(dtype)}
    shards = {"w0": 1, "w1": 1, "w2": 1, "w3": 2, "w4": 3, "scalar": 3}
    order: list[str] = []

    def give(name: str) -> np.ndarray:
        assert len(list(tmp_path.glob("out/*.safetensors"))) == shards[name] - 1  # the earlier shards are on the disk
        order.append(name)
        return np.asarray(arrays[name], order="F")  # however it lies

    tensors = [(name, a.shape, a.dtype, lambda name=name: give(name)) for name, a in arrays.items()]
    write_weights(tmp_path / "out", tensors, max_shard_bytes=60 * np.dtype(dtype).itemsize)
    assert order == list(arrays)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    assert index["weight_map"] == {name: f"model-0000{number}-of-00003.safetensors" for name, number in shards.items()}
    files = WeightFiles.open(tmp_path / "out")
    assert set(files.tensors) == set(arrays)
    for name, array in arrays.items():
        assert_same_bits(files.read(name, whole(array)), array)


def test_few_weights_are_one_file_without_an_index(tmp_path):
    array = numbers("bfloat16", 4, 4)
    write_weights(tmp_path / "out", [("a", array.shape, array.dtype, lambda: array)])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert b'"__metadata__":{"format":"pt"}' in (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "plain").touch()
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(ValueError, match=r"has model.safetensors already, and weights are never overwritten"):
        write_weights(tmp_path / "out", [("a", array.shape, array.dtype, lambda: array)])


def test_a_tensor_larger_than_a_shard_has_one_to_itself(tmp_path):
    arrays = {"a": numbers("float32", 9), "b": numbers("float32", 1), "c": numbers("float32", 9)}
    write_weights(tmp_path, [(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()], max_shard_bytes=8)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert {WeightFiles.open(tmp_path).tensors[name].file.name[6:11] for name in arrays} == {"00001", "00002", "00003"}


def test_a_failed_write_leaves_no_file_that_looks_whole(tmp_path):
    array = numbers("float32", 4)

    def fail() -> np.ndarray:
        raise RuntimeError("lost")

    tensors = [("a", array.shape, array.dtype, lambda: array), ("b", array.shape, array.dtype, fail)]
    with pytest.raises(RuntimeError, match="lost"):
        write_weights(tmp_path, tensors, max_shard_bytes=16)
    assert [path.name for path in tmp_path.iterdir()] == ["model-00001-of-00002.safetensors"]  # no index, no second
    one_line(tmp_path, "must have model.safetensors, or shards and model.safetensors.index.json")


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def half(_: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("moejax.interop.writer.save_file", half)
    with pytest.raises(OSError, match="no space"):
        write_weights(tmp_path, [("a", (4,), np.dtype(np.float32), lambda: numbers("float32", 4))])
    assert list(tmp_path.iterdir()) == []


def test_what_the_format_cannot_hold_is_refused_before_writing(tmp_path):
    four = np.dtype(ml_dtypes.int4)
    with pytest.raises(ValueError, match="a is int4, must be one of bool"):
        write_weights(tmp_path / "out", [("a", (4,), four, lambda: np.zeros(4, four))])
    twice = ("a", (4,), np.dtype(np.float32), lambda: np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="two tensors of the name a"):
        write_weights(tmp_path / "out", [twice, twice])
    assert not (tmp_path / "out").exists()
