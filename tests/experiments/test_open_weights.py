"""From a run to a Hugging Face folder, from there to a chat fine-tuning by low-rank updates, and out again."""

import json
from pathlib import Path

import numpy as np
import pytest

import moejax
from experiments import generate, train
from experiments.cli import ConfigError
from scripts import convert_hf

SMALL = ["--smoke", "--mesh", "auto", "--train.steps", "2", "--train.eval-batches", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("open")
    assert train.main([*SMALL, "--model", "mixtral_tiny", "--out", str(where / "run")]) == 0
    assert convert_hf.main(["to-hf", str(where / "run"), str(where / "hf")]) == 0
    return where / "hf"


def test_a_run_becomes_a_folder_that_generates(folder: Path, capsys: pytest.CaptureFixture):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "mixtral" and config["vocab_size"] == 512
    prompts = ["--new", "4", "--mesh", "auto", "--temperature", "0", *(["--prompt", "The "] * 8)]
    generate.main(["--run", str(folder.parent / "run"), *prompts])
    assert "tokens in" in capsys.readouterr().out
    generate.main(["--model", str(folder), *prompts, "--chat"])
    assert "tokens in" in capsys.readouterr().out


def test_a_folder_is_fine_tuned_on_answers_by_updates_and_written_again(folder: Path, tmp_path: Path):
    asked = ({"role": "user", "content": f"What is {n} and {n}?"} for n in range(400))
    rows = [{"messages": [row, {"role": "assistant", "content": str(2 * n)}]} for n, row in enumerate(asked)]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(map(json.dumps, rows)))
    data = ["--data.source", str(chats), "--data.format", "chat"]
    tuned = ["--model", str(folder), "--model.lora.rank", "2", "--optimizer.lr", "0.01", "--out", str(tmp_path / "run")]
    assert train.main([*SMALL, *tuned, *data]) == 0
    assert convert_hf.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "hf"), "--dtype", "bfloat16"]) == 0
    before, after = moejax.load_pretrained(folder), moejax.load_pretrained(tmp_path / "hf")
    assert after.config.lora is None and after.config.precision.params == "bfloat16"
    mixer = [np.asarray(m.params["stacks"]["0"]["blocks"]["0"]["mixer"]["out"], np.float32) for m in (before, after)]
    norm = [np.asarray(m.params["norm"]["scale"], np.float32) for m in (before, after)]
    assert np.abs(mixer[1] - mixer[0]).max() > 1e-3, "the update is in the matrix"
    np.testing.assert_array_equal(norm[0].astype("bfloat16"), norm[1].astype("bfloat16"))


def test_a_folder_becomes_a_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert convert_hf.main(["from-hf", str(folder), str(tmp_path / "run")]) == 0
    generate.main(["--run", str(tmp_path / "run"), "--mesh", "auto", "--new", "2", *(["--prompt", "The "] * 8)])
    assert "tokens in" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="already holds a run"):
        convert_hf.main(["from-hf", str(folder), str(tmp_path / "run")])


def test_generate_says_what_it_needs():
    with pytest.raises(ConfigError, match=r"give --run DIR of a training, or --model FOLDER"):
        generate.main(["--new", "3"])
