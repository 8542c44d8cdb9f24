"""Are the golden files what the recipe makes, small, and sure enough to hold another program to?"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.interop import recipe
from tests.interop.goldens import FOLDER, Golden, cases
from tests.interop.recipe import TensorSpec


@pytest.mark.parametrize("name", cases())
def test_recipe_makes_the_weights_that_transformers_ran_with(name: str) -> None:
    golden = Golden.load(name)
    assert recipe.sha256(golden.weights) == golden.facts["sha256"]
    assert (FOLDER / f"{name}.npz").stat().st_size < 100_000


@pytest.mark.parametrize("name", cases())
def test_golden_says_of_a_whole_model_what_is_sure(name: str) -> None:
    golden = Golden.load(name)
    assert golden.facts["margin"] >= 2e-3
    assert np.isfinite(golden["logits"]).all() and golden["logits"].std() > 0.1
    assert golden["logits"].shape[:2] == golden["labels"].shape
    untrained = ("_decay", "slope_rate", "coder.embed_tokens.weight")  # tables, and copies of one embedding
    trained = {key for key in golden.dequantised if not key.endswith(untrained)}
    missing = {key for key in trained - golden.grad_norms.keys() if not key.startswith(prediction_layer(golden))}
    assert not missing, f"no gradient of {missing}"
    plain = np.take_along_axis(log_softmax(shifted(golden)[0]), np.maximum(shifted(golden)[1], 0)[..., None], -1)[
        ..., 0
    ]
    # A float32 mean of 40 terms, added up in another order.
    np.testing.assert_allclose(-plain[shifted(golden)[1] != -100].mean(), golden["loss"], rtol=1e-5)


def prediction_layer(golden: Golden) -> str:
    return f"model.layers.{golden.config.get('num_hidden_layers')}."


def shifted(golden: Golden) -> tuple[np.ndarray, np.ndarray]:
    if golden.config.get("is_encoder_decoder"):
        return golden["logits"], golden["labels"]
    return golden["logits"][:, :-1], golden["labels"][:, 1:]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


WEIGHT = [[1032244372, 3197779257], [1040028377, 3194980363]]
NORM = [1064765894, 1066030865, 1064118308]


def test_recipe_never_changes() -> None:
    weight = recipe.make(7, TensorSpec("model.layers.0.mlp.gate.weight", (2, 2), "F32"))
    assert weight.view(np.uint32).tolist() == WEIGHT
    norm = recipe.make(7, TensorSpec("model.norm.weight", (3,), "F32"))
    assert norm.view(np.uint32).tolist() == NORM
    codes = recipe.make(7, TensorSpec("model.layers.0.x.weight", (4096,), "F8_E4M3"))
    assert len(set(codes.tolist())) == 254  # all but both NaN


def test_dequantisation_reads_every_code_as_ml_dtypes_does() -> None:
    codes = np.array([[code for code in range(256) if code & 127 != 127]], np.uint8)
    scale = np.full((1, 8), 1, np.float32)
    found = recipe.dequantised({"w": codes, "w_scale_inv": scale}, block=32)["w"]
    np.testing.assert_array_equal(found, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    nibbles = np.arange(16, dtype=np.uint8)
    blocks = (nibbles | nibbles[::-1] << 4).reshape(1, 1, 1, 16)
    found = recipe.dequantised({"w_blocks": blocks, "w_scales": np.full((1, 1, 1), 126, np.uint8)})["w"]
    wanted = np.stack([nibbles, nibbles[::-1]], -1).ravel().view(ml_dtypes.float4_e2m1fn).astype(np.float32) / 2
    assert found.shape == (1, 32, 1)
    np.testing.assert_array_equal(found.ravel(), wanted)


def test_written_folder_holds_the_recipes_tensors(tmp_path) -> None:
    golden = Golden.load("mixtral")
    found = load_file(golden.write(tmp_path) / "model.safetensors")
    assert found.keys() == golden.weights.keys()
    for name, values in golden.weights.items():
        np.testing.assert_array_equal(found[name], values)
    assert json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["rope_theta"] == 1e6


def test_shards_are_found_by_their_index(tmp_path) -> None:
    golden = Golden.load("llama_tied")
    golden.write(tmp_path, shard_bytes=50_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == golden.weights.keys()
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in golden.weights.values())
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="np") as shard:
            np.testing.assert_array_equal(shard.get_tensor(name), golden.weights[name])


def test_bfloat16_and_the_hubs_spelling_are_written(tmp_path) -> None:
    golden = Golden.load("qwen3_moe")
    golden.write(tmp_path, legacy=True, dtype="bfloat16")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["num_experts"] == 8 and "rope_parameters" not in config
    assert set(stored(tmp_path).values()) == {"BF16"}
    name = "model.embed_tokens.weight"
    wanted = golden.weights[name].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(recipe.to_bfloat16(golden.weights[name]), wanted.view(np.uint16))


def test_file_in_bfloat16_is_widened_exactly(tmp_path) -> None:
    golden = Golden.load("mixtral_bf16")
    golden.write(tmp_path)
    assert golden.config["dtype"] == "bfloat16" and set(stored(tmp_path).values()) == {"BF16"}
    for name, values in golden.weights.items():
        np.testing.assert_array_equal(values.view(ml_dtypes.bfloat16).astype(np.float32), golden.dequantised[name])
    golden.write(tmp_path, dtype="float32")
    assert set(stored(tmp_path).values()) == {"F32"}


def stored(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", framework="np") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("name", "suffix", "dtype"),
    [("deepseek_v3_fp8", "mlp.gate_proj.weight", "F8_E4M3"), ("gpt_oss_mxfp4", "mlp.experts.down_proj_blocks", "U8")],
)
def test_quantised_tensors_are_written_as_they_are_stored(tmp_path, name: str, suffix: str, dtype: str) -> None:
    golden = Golden.load(name)
    golden.write(tmp_path)
    dtypes = stored(tmp_path)
    assert dtypes[f"model.layers.0.{suffix}"] == dtype and dtypes["model.norm.weight"] == "BF16"
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    found = load_file(golden.write(tmp_path / "plain", quantised=False) / "model.safetensors")
    assert found.keys() == golden.dequantised.keys()
    assert set(stored(tmp_path / "plain").values()) == {"F32"}
