import math
import re
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moejax.interop import layout
from moejax.interop.files import WeightFiles
from moejax.interop.layout import Stored, file_shape, file_tensors, to_file
from moejax.interop.shard import DTYPES
from moejax.interop.transpose import contiguous
from moejax.interop.writer import write_weights

SIZES = {"E": 3, "N": 2, "K": 4, "H": 5, "D": 6, "F": 7, "g": 2}


def bits(dtype, *shape):
    dtype = np.dtype(dtype)
    return np.random.default_rng(0).integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype).reshape(shape)


def assert_same_bits(actual, expected):
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()


@dataclass
class InMemory(WeightFiles):
    """Files that count what is read of them."""

    arrays: dict[str, np.ndarray]
    num_read: int = field(default=0)

    def require(self, name, shape=None):
        assert shape is None or self.arrays[name].shape == shape
        return self.arrays[name]

    def read(self, name, index):
        part = self.arrays[name][index]
        self.num_read += part.size
        return part


def oracle(stored: Stored, tensor: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
    """One number after the other: where does it lie?"""
    out = np.empty([sizes[dim] for dim in stored.our_dims], tensor.dtype)
    for at in np.ndindex(*out.shape):
        place = dict(zip(stored.our_dims, at, strict=True)) | ({stored.pick[0]: stored.pick[1]} if stored.pick else {})
        position = []
        for factors in stored.file_dims:
            flat = 0
            for factor in factors:
                flat = flat * sizes[factor] + place[factor]
            position.append(flat)
        out[at] = tensor[tuple(position)]
    return out


LAYOUTS = [
    Stored("w", "D -> D"),
    Stored("w", "F D -> D F"),
    Stored("w", "(N H) D -> D N H"),
    Stored("w", "(N H) -> N H"),
    Stored("w", "D (N H) -> N H D"),
    Stored("w", "E D (F g) -> E D F", ("g", 1, 2)),
    Stored("w", "E (g F) D -> E D F", ("g", 1, 2)),
    Stored("w", "(N g H) D -> D N H", ("g", 2, 3)),
    Stored("w", "(g N H) D -> N D H", ("g", 0, 2)),
    Stored("w", "(N H g) -> H N", ("g", 1, 4)),
    Stored("w", "g D -> D", ("g", 0, 1)),
    Stored("w", "(K N H) (F g D) -> H D F N K", ("g", 1, 3)),
]


@given(st.data())
def test_any_part_of_any_layout_is_what_the_dims_say(data):
    stored = data.draw(st.sampled_from(LAYOUTS))
    sizes = {dim: data.draw(st.integers(1, 5), dim) for dim in stored.our_dims}
    sizes |= {stored.pick[0]: stored.pick[2]} if stored.pick else {}
    shape = tuple(sizes[dim] for dim in stored.our_dims)
    tensor = np.arange(math.prod(file_shape(stored, shape))).reshape(file_shape(stored, shape))
    index = tuple(slice(*data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape)
    part = layout.read(InMemory({"w": tensor}), stored, shape, index)
    np.testing.assert_array_equal(part, oracle(stored, tensor, sizes)[index])
    assert part.flags.c_contiguous


@pytest.mark.parametrize(
    ("stored", "index", "num"),
    [
        (Stored("w", "F D -> D F"), {"D": 2, "F": 3}, 2 * 3),
        (Stored("w", "(N H) D -> D N H"), {"N": 1, "D": 2}, 1 * 5 * 2),
        (Stored("w", "(N H) D -> D N H"), {"N": 1, "H": 3}, 3 * 6),
        (Stored("w", "(N H) D -> D N H"), {"H": 3}, 2 * 5 * 6),  # no rectangle of the file: heads are read whole
        (Stored("w", "E (g F) D -> E D F", ("g", 1, 2)), {"F": 3}, 3 * 3 * 6),
        (Stored("w", "E D (F g) -> E D F", ("g", 1, 2)), {"E": 1, "F": 3}, 6 * 3),
        (Stored("w", "(N g H) D -> D N H", ("g", 1, 2)), {"N": 1}, 5 * 6),
    ],
)
def test_little_is_read_beside_the_part(stored, index, num):
    shape = tuple(SIZES[dim] for dim in stored.our_dims)
    files = InMemory({"w": np.zeros(file_shape(stored, shape))})
    layout.read(files, stored, shape, tuple(slice(SIZES[d] - index.get(d, SIZES[d]), None) for d in stored.our_dims))
    assert files.num_read == num


WEIGHTS = [dtype for dtype in DTYPES.values() if dtype not in (np.dtype(bool), np.dtype(np.complex64))]


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
def test_leaves_are_written_and_read_back_bit_for_bit(tmp_path, dtype):
    leaves = [
        (Stored("q", "(N H) D -> D N H"), bits(dtype, 6, 2, 5)),
        (Stored("norm", "D -> D"), bits(dtype, 6)),
        (Stored("gate_up", "E D (F g) -> E D F", ("g", 0, 2)), bits(dtype, 3, 6, 7)),
        (Stored("gate_up", "E D (F g) -> E D F", ("g", 1, 2)), bits(dtype, 3, 6, 7)[::-1].copy()),
        (Stored("x.{expert}.in", "(g F) D -> D F", ("g", 1, 2)), bits(dtype, 3, 6, 7)),
        (Stored("x.{expert}.in", "(g F) D -> D F", ("g", 0, 2)), bits(dtype, 3, 6, 7)[::-1].copy()),
        (Stored("x.{expert}.down", "D F -> F D"), bits(dtype, 3, 7, 6)),
    ]
    write_weights(tmp_path / "out", file_tensors(leaves), max_shard_bytes=100)
    files = WeightFiles.open(tmp_path / "out")
    names = ["q", "norm", "gate_up", *(f"x.{expert}.{part}" for part in ("in", "down") for expert in range(3))]
    assert sorted(files.tensors) == sorted(names)
    for stored, leaf in leaves:
        assert_same_bits(layout.read(files, stored, leaf.shape, (slice(None),) * leaf.ndim), leaf)


def test_two_leaves_make_the_tensor_that_the_formula_says():
    gate, up = np.arange(6).reshape(1, 2, 3), np.arange(6, 12).reshape(1, 2, 3)
    interleaved = [Stored("w", "E D (F g) -> E D F", ("g", number, 2)) for number in (0, 1)]
    stacked = [Stored("w", "E (g F) D -> E D F", ("g", number, 2)) for number in (0, 1)]
    for layouts, expected in (
        (interleaved, np.stack([gate, up], axis=-1).reshape(1, 2, 6)),
        (stacked, np.concatenate([gate, up], axis=-1).transpose(0, 2, 1)),
    ):
        ((name, shape, dtype, make),) = file_tensors(zip(layouts, (gate, up), strict=True))
        assert (name, shape, dtype) == ("w", expected.shape, gate.dtype)
        np.testing.assert_array_equal(make(), expected)
        tensor = np.zeros(expected.shape, gate.dtype)
        for stored, leaf in zip(layouts, (gate, up), strict=True):
            (part,) = to_file(stored, leaf)
            assert (part.name, part.shape) == ("w", expected.shape)
            part.put(tensor)
        np.testing.assert_array_equal(tensor, expected)


def test_a_leaf_that_lacks_its_other_half_is_not_written():
    with pytest.raises(AssertionError, match="w: its leaves do not make one tensor"):
        list(file_tensors([(Stored("w", "(g F) D -> D F", ("g", 1, 2)), np.zeros((6, 7)))]))


def test_experts_are_read_from_their_own_tensors_alone(tmp_path):
    stored = Stored("experts.{expert}.w1.weight", "F D -> D F")
    leaf = bits(ml_dtypes.bfloat16, 4, 6, 7)
    arrays = {name: part.values for name, part in ((part.name, part) for part in to_file(stored, leaf))}
    assert {name: a.shape for name, a in arrays.items()} == {f"experts.{e}.w1.weight": (7, 6) for e in range(4)}
    files = InMemory(arrays)
    part = (slice(1, 3), slice(2, 4), slice(0, 3))
    assert_same_bits(layout.read(files, stored, leaf.shape, part), leaf[part])
    assert files.num_read == 2 * 2 * 3
    assert layout.read(files, stored, leaf.shape, (slice(4, 4), slice(None), slice(None))).shape == (0, 6, 7)


def test_a_leaf_is_asked_for_one_expert_at_a_time():
    class Lazy:
        shape, dtype = (3, 6, 7), np.dtype(np.float32)
        asked: list[int] = []  # noqa: RUF012

        def __getitem__(self, expert):
            self.asked.append(expert)
            return np.full((6, 7), expert, self.dtype)

    tensors = list(file_tensors([(Stored("{expert}", "F D -> D F"), Lazy())]))
    assert Lazy.asked == []
    assert [int(make()[0, 0]) for _, _, _, make in tensors] == Lazy.asked == [0, 1, 2]


def test_tensors_that_are_not_what_the_config_asks_for_are_refused(tmp_path):
    expert = np.zeros((7, 6), np.float32)
    save_file(
        {"q.weight": np.zeros((8, 6)), "e.0": expert, "e.1": expert.astype(np.float16)}, tmp_path / "model.safetensors"
    )
    files, every = WeightFiles.open(tmp_path), (slice(None),) * 3
    file = f"{tmp_path}/model.safetensors"
    for stored, shape, message in (
        (
            Stored("q.weight", "(N H) D -> D N H"),
            (6, 2, 5),
            f"{file}: q.weight has shape (8, 6), the config asks for (10, 6)",
        ),
        (
            Stored("k.weight", "(N H) D -> D N H"),
            (6, 2, 5),
            f"{tmp_path}: no tensor k.weight (shape (10, 6) expected); nearest: q",
        ),
        (Stored("e.{expert}", "F D -> D F"), (2, 6, 7), f"{file}: e.1 is float16, must be as e.0, float32"),
        (Stored("e.{expert}", "F D -> D F"), (3, 6, 7), f"{tmp_path}: no tensor e.2 (shape (7, 6) expected)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            if shape[0] == 3:
                files.require("e.2", (7, 6))
            layout.read(files, stored, shape, every)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize("shape", [(3, 200, 300), (150, 2, 260), (1, 256, 129), (130, 140, 1)])
def test_large_arrays_are_transposed_as_numpy_does(shape, order):
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape).transpose(order)
    copy = contiguous(array)
    np.testing.assert_array_equal(copy, array)
    assert copy.flags.c_contiguous and copy.base is None
    np.testing.assert_array_equal(contiguous(array[:, ::3, ::-1]), array[:, ::3, ::-1])


@pytest.mark.parametrize("dims", ["F D -> D", "F -> D F", "(D D) -> D", "(F g) -> F"])
def test_dims_that_differ_between_left_and_right_are_a_mistake(dims):
    with pytest.raises(AssertionError, match=r"dims differ|stands twice"):
        Stored("w", dims)
