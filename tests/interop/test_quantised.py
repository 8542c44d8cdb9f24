import json
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moejax.interop.files import WeightFiles
from moejax.interop.shard import FileTensor

BF16, FLOAT8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def float8_folder(folder, shape, edges, seed=0, scale_dtype=np.float32):
    """Write a float8 weight in blocks; give the float32 numbers that it stands for, by the definition."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 50, shape).astype(FLOAT8)
    grid = (*shape[:-2], -(-shape[-2] // edges[0]), -(-shape[-1] // edges[1]))
    scale = rng.uniform(1e-4, 2, grid).astype(scale_dtype)
    save_file({"x.weight": weight, "x.weight_scale_inv": scale, "bias": scale}, folder / "model.safetensors")
    write_config(folder, quant_method="fp8", weight_block_size=list(edges))
    expected = np.zeros(shape, np.float32)
    for at in np.ndindex(*shape):
        block = (*at[:-2], at[-2] // edges[0], at[-1] // edges[1])
        expected[at] = np.float32(weight[at]) * np.float32(scale[block])
    return expected


def mxfp4_folder(folder, experts, inner, out, seed=0):
    """Write an MXFP4 weight; give the numbers that it stands for, by the definition."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (experts, out, inner // 32, 16), dtype=np.uint8)
    scales = rng.integers(100, 140, (experts, out, inner // 32), dtype=np.uint8)
    save_file({"up_blocks": blocks, "up_scales": scales}, folder / "model.safetensors")
    write_config(folder, quant_method="mxfp4")
    expected = np.zeros((experts, inner, out))
    for e, i, o in np.ndindex(*expected.shape):
        group, within = divmod(i, 32)
        byte = int(blocks[e, o, group, within // 2])
        nibble = byte >> 4 if within % 2 else byte & 15
        expected[e, i, o] = E2M1[nibble] * 2.0 ** (int(scales[e, o, group]) - 127)
    return expected


def write_config(folder, **quantization_config):
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization_config}))


def slices(shape):
    """Any parts of an array of this shape, empty ones and steps too."""
    bounds = [st.tuples(st.integers(0, n), st.integers(0, n), st.integers(1, 3)) for n in shape]
    return st.tuples(*bounds).map(lambda parts: tuple(slice(*part) for part in parts))


@pytest.mark.parametrize("scale_dtype", [np.float32, BF16])
@pytest.mark.parametrize("shape", [(70, 45), (32, 64), (1, 1), (3, 33, 40)])
def test_float8_blocks_are_weight_times_scale(tmp_path, shape, scale_dtype):
    expected = float8_folder(tmp_path, shape, (32, 16), scale_dtype=scale_dtype)
    every = (slice(None),) * len(shape)
    files = WeightFiles.open(tmp_path)
    assert list(files.tensors) == ["bias", "x.weight"]
    assert files.tensors["x.weight"].shape == shape
    assert files.tensors["x.weight"].dtype == files.read("x.weight", every).dtype == BF16
    np.testing.assert_array_equal(files.read("x.weight", every), expected.astype(BF16))
    exact = WeightFiles.open(tmp_path, quantized_dtype="float32")
    np.testing.assert_array_equal(exact.read("x.weight", every), expected, strict=True)


@pytest.fixture(scope="module")
def float8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float8")
    return float8_folder(folder, (2, 70, 45), (32, 16)), WeightFiles.open(folder, quantized_dtype=np.float32)


@given(index=slices((2, 70, 45)))
def test_any_part_of_float8_blocks_is_that_part_of_the_whole(float8, index):
    expected, files = float8
    np.testing.assert_array_equal(files.read("x.weight", index), expected[index], strict=True)


def test_blocks_are_of_128_where_no_config_says_otherwise(tmp_path):
    expected = float8_folder(tmp_path, (130, 129), (128, 128))
    (tmp_path / "config.json").unlink()
    files = WeightFiles.open(tmp_path, quantized_dtype="float32")
    np.testing.assert_array_equal(files.read("x.weight", (slice(None), slice(None))), expected)


def test_weight_and_scale_may_lie_in_two_shards(tmp_path):
    expected = float8_folder(tmp_path, (20, 20), (16, 16))
    files = WeightFiles.open(tmp_path)
    weight, scale = (files._sources["x.weight"].__dict__[part].view for part in ("values", "scales"))
    save_file({"x.weight": weight}, tmp_path / "a.safetensors")
    save_file({"x.weight_scale_inv": scale}, tmp_path / "b.safetensors")
    shards = {"x.weight": "a.safetensors", "x.weight_scale_inv": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "model.safetensors").unlink()
    read = WeightFiles.open(tmp_path, quantized_dtype="float32").read("x.weight", (slice(None), slice(None)))
    np.testing.assert_array_equal(read, expected)


def test_mxfp4_is_low_nibble_first_times_a_power_of_two_and_transposed(tmp_path):
    expected = mxfp4_folder(tmp_path, 2, 64, 5)
    files = WeightFiles.open(tmp_path)
    assert {name: info.shape for name, info in files.tensors.items()} == {"up": (2, 64, 5)}
    read = files.read("up", (slice(None),) * 3)
    assert read.dtype == files.tensors["up"].dtype == BF16  # holds every product: 2 bits of mantissa
    np.testing.assert_array_equal(read.astype(np.float64), expected)
    assert (np.signbit(read.astype(np.float64)) == np.signbit(expected)).all()


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mxfp4")
    return mxfp4_folder(folder, 3, 96, 6), WeightFiles.open(folder, quantized_dtype=np.float64)


@given(index=slices((3, 96, 6)))
def test_any_part_of_mxfp4_is_that_part_of_the_whole(mxfp4, index):
    expected, files = mxfp4
    np.testing.assert_array_equal(files.read("up", index), expected[index], strict=True)


@settings(max_examples=1)
@given(st.none())
def test_a_part_reads_the_blocks_that_it_needs(mxfp4, float8, _):
    read: list[tuple[str, int]] = []

    class Counted(np.ndarray):
        def __getitem__(self, index):
            part = super().__getitem__(index)
            read.append((str(self.dtype), part.size))
            return np.asarray(part)

    with pytest.MonkeyPatch.context() as patch:
        view = FileTensor.view.fget
        patch.setattr(FileTensor, "view", property(lambda tensor: view(tensor).view(Counted)))
        mxfp4[1].read("up", (slice(1, 2), slice(40, 50), slice(2, 4)))
        float8[1].read("x.weight", (slice(0, 1), slice(30, 40), slice(3, 5)))
    assert read == [("uint8", 2 * 16), ("uint8", 2), ("uint8", 10 * 2), ("float32", 2 * 3)]


def refused(folder, message, tensors):
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        WeightFiles.open(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_quantised_tensor_without_its_partner_is_refused(tmp_path):
    weight, scale, packed = np.zeros((4, 4), FLOAT8), np.ones((1, 1), np.float32), np.zeros((1, 4, 2, 16), np.uint8)
    file = f"{tmp_path}/model.safetensors"
    refused(tmp_path, f"{file}: w_scale_inv is float32 without its w: quantised", {"w_scale_inv": scale})
    other = {"v": weight, "w": weight, "w_scale_inv": scale}
    refused(tmp_path, f"{file}: v is float8_e4m3fn without its v_scale_inv", other)
    refused(tmp_path, f"{file}: u_blocks is uint8 without its u_scales", {"u_blocks": packed})
    refused(tmp_path, f"{file}: u_scales is uint8 without its u_blocks", {"u_scales": packed[..., 0]})
    write_config(tmp_path, quant_method="fp8", weight_block_size=[128, 128])
    refused(tmp_path, f"{file}: w is float8_e4m3fn without its w_scale_inv", {"w": weight})


def test_quantised_tensors_that_do_not_fit_are_refused(tmp_path):
    weight, scale, packed = np.zeros((130, 4), FLOAT8), np.ones((1, 1), np.float32), np.zeros((1, 4, 2, 16), np.uint8)
    refused(tmp_path, "w_scale_inv has shape (1, 1), must be (2, 1): w has", {"w": weight, "w_scale_inv": scale})
    half = weight.astype(np.float16)
    refused(tmp_path, "w is float16 of shape (130, 4), must be a float8", {"w": half, "w_scale_inv": scale})
    pair = {"u_blocks": packed, "u_scales": packed[0, ..., 0]}
    refused(tmp_path, "u_scales is uint8 of shape (4, 2), must be uint8 of shape (1, 4, 2)", pair)
    pair = {"u_blocks": packed[..., :8].copy(), "u_scales": packed[..., 0].copy()}
    refused(tmp_path, "u_blocks has shape (1, 4, 2, 8), must be (experts, out, in / 32, 16)", pair)
    pair = {"u_blocks": packed, "u_scales": packed[..., 0].copy(), "u": half}
    refused(tmp_path, "u_blocks stands for u, which", pair)


def test_other_ways_to_quantise_are_refused(tmp_path):
    write_config(tmp_path, quant_method="gptq", bits=4)
    refused(tmp_path, "quantization_config.quant_method 'gptq', must be one of fp8, mxfp4", {"w": np.zeros(4)})
    write_config(tmp_path, quant_method="fp8", weight_block_size=None)
    tensors = {"w": np.zeros((4, 4), FLOAT8), "w_scale_inv": np.ones(1, np.float32)}
    refused(tmp_path, "quantization_config.weight_block_size None, must be the two edges", tensors)
