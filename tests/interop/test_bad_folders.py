"""What is wrong with a folder is said in one line: file, tensor, expected and found. No weight is made up."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import moejax
from tests.interop.goldens import Golden


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Golden.load("mixtral").write(tmp_path / "model", shard_bytes=40_000)


def refusal(folder: Path) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        moejax.load_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_missing_shard(folder: Path):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(folder)


def test_a_truncated_file(folder: Path):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    message = refusal(folder)
    assert shard.name in message and re.search(r"\d+ bytes", message)


def test_a_shape_that_does_not_fit_the_config(folder: Path):
    change(folder, intermediate_size=44)
    said = r"block_sparse_moe.experts.0.w[123].weight has shape \(\d+, \d+\), the config asks for \(\d+, \d+\)"
    assert re.search(said, refusal(folder))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "mistral"}, r'model_type = "mistral" is not supported; did you mean mixtral\?'),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
            r'rope_type = "longrope" is not supported, expected',
        ),
        ({"hidden_act": "gelu"}, r'hidden_act = "gelu" is not supported, expected "silu"'),
        ({"num_attention_heads": None}, r"num_attention_heads is missing"),
        ({"num_key_value_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"num_experts_per_tok": 9}, r"num_active \(9\) must not exceed num_experts \(6\)"),
    ],
)
def test_a_config_that_is_not_ours(folder: Path, values: dict[str, Any], said: str):
    change(folder, **values)
    message = refusal(folder)
    assert "config.json" in message and re.search(said, message), message


def test_a_missing_tensor_is_not_drawn(folder: Path):
    change(folder, num_hidden_layers=3)
    assert "model.layers.2." in refusal(folder)


def test_a_tensor_too_many_is_not_passed_over(folder: Path):
    change(folder, num_hidden_layers=1)
    message = refusal(folder)
    assert "model.layers.1." in message and "does not fit" in message


def test_a_head_of_its_own_in_a_tied_model_is_left_out_and_listed(folder: Path):
    change(folder, tie_word_embeddings=True)
    assert moejax.load_pretrained(folder).left_out == ["lm_head.weight"]


def test_an_untied_model_needs_its_head(tmp_path: Path):
    folder = Golden.load("mixtral_window").write(tmp_path / "model")
    change(folder, tie_word_embeddings=False)
    assert "lm_head.weight" in refusal(folder)


def test_no_folder_and_no_json(tmp_path: Path):
    assert str(tmp_path / "nowhere" / "config.json") in refusal(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in refusal(tmp_path)


def test_ids_beyond_the_vocabulary_and_odd_shapes(folder: Path):
    model = moejax.load_pretrained(folder)
    with pytest.raises(ValueError, match="input_ids holds 5 to 96, expected 0 to 95"):
        model([[5, 96]])
    with pytest.raises(ValueError, match=r"input_ids has shape \(2,\), expected \[batch, length\]"):
        model([5, 6])
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model([[5, 6]], [[1]])
