"""Weights go from files straight to where they belong: every mesh gives the same logits and reads its parts alone."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import moejax
from moejax.interop.files import WeightFiles
from moejax.interop.pretrained import Pretrained
from moejax.models import ModelParts
from moejax.parallel.plan import MeshPlan
from tests.conftest import mesh_config, model_config
from tests.interop.goldens import Golden


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden.load(request.param)


@pytest.fixture(scope="module")
def folder(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write(tmp_path_factory.mktemp(golden.name) / "model", shard_bytes=50_000)


def load(folder: Path, mesh: str) -> Pretrained:
    return moejax.load_pretrained(folder, dtype="float32", plan=MeshPlan.from_config(mesh_config(mesh)))


@pytest.mark.parametrize("mesh", ["data2_expert2_tensor2_sp", "zero3_tensor2_sp", "data2_sequence2_tensor2_sp"])
def test_a_mesh_gives_transformers_logits(golden: Golden, folder: Path, mesh: str):
    """Of 2 rows and 23 tokens: neither number divides by its axes."""
    logits = load(folder, mesh)(golden["input_ids"][:, :23])
    assert logits.shape == golden["logits"][:, :23].shape
    # The goldens' pass line: transformers' own kernels differ by 2e-5 on logits of size one.
    np.testing.assert_allclose(logits, golden["logits"][:, :23], atol=1e-3, rtol=0)


def test_each_device_reads_its_own_part(golden: Golden, folder: Path, monkeypatch: pytest.MonkeyPatch):
    read: dict[str, list[int]] = {}
    honest = WeightFiles.read

    def counting(files: WeightFiles, name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = honest(files, name, index)
        read.setdefault(name, []).append(part.size)
        return part

    monkeypatch.setattr(WeightFiles, "read", counting)
    load(folder, "zero3_tensor2_sp")
    sizes = {name: int(np.prod(info.shape)) for name, info in WeightFiles.open(folder).tensors.items()}
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        assert max(read[name]) == sizes[name] // 8, "no device reads more than its eighth"


def test_interleaved_stages_keep_an_order_of_their_own_and_files_keep_theirs(tmp_path: Path):
    config = dataclasses.replace(model_config("dense_tiny"), num_layers=4)
    plan = MeshPlan.from_config(mesh_config("pipeline2_interleaved"))
    parts = ModelParts.of(config, plan)
    staged = Pretrained(parts, *parts.init(0))
    assert parts.stage_order().tolist() != [0, 1, 2, 3]
    moejax.save_pretrained(staged, tmp_path / "out")
    plain, again = moejax.load_pretrained(tmp_path / "out"), moejax.load_pretrained(tmp_path / "out", plan=plan)
    for params in (parts.canonical(staged.params), parts.canonical(again.params)):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, plain.params)
    with pytest.raises(ValueError, match="load with pipeline = 1"):
        staged([[1, 2]])
