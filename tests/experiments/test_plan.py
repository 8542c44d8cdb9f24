"""What a plan promises: reasons that the rules gave, figures that add up, files that training takes."""

import dataclasses
import json
import math

import pytest

from experiments import cli, plan
from experiments.cli import CONFIGS
from moejax.accounting import target
from moejax.accounting.candidates import Rejected, consider, factorizations, layouts
from moejax.accounting.chips import CHIPS, named_chip
from moejax.accounting.communication import Transfer
from moejax.accounting.roofline import Assumptions, link_bytes, recomputed_forwards, step_time
from moejax.accounting.target import h200_devices, missing_plugins
from moejax.config import load
from moejax.config.mesh import MeshConfig
from moejax.config.run import TrainConfig
from moejax.models import ModelParts
from moejax.parallel.plan import MeshPlan
from tests.conftest import assert_close, model_config

H200 = CHIPS["H200"]
TRAIN = TrainConfig(global_batch=256, seq_len=4096)


def mixtral() -> ModelParts:
    return ModelParts.of(model_config("mixtral_8x7b"), MeshPlan.on_paper(MeshConfig()))


def test_all_factorizations_are_tried():
    assert len(set(factorizations(64, 5))) == math.comb(6 + 4, 4)
    assert all(math.prod(degrees) == 64 for degrees in factorizations(64, 5))


def test_tensor_parallelism_stays_in_a_node():
    tables = list(layouts(64, model_config("mixtral_8x7b"), H200))
    assert max(table["tensor"] for table in tables) == 8
    assert {table.get("schedule") for table in tables} == {None, "1f1b", "interleaved"}


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"expert": 16}, "num_experts (8) must divide by expert (16)"),
        ({"data": 2, "pipeline": 2, "zero_stage": 2}, "set zero_stage = 1, or 3"),
        ({"data": 512}, "global_batch / microbatches (256) must divide by data (512)"),
        ({"pipeline": 64}, "num_layers (32, periods of 1)"),
        ({"tensor": 8}, "does not fit: needs"),
    ],
)
def test_a_rejected_layout_says_why_in_the_rules_own_words(table, reason):
    found, refused = consider(mixtral(), table, TRAIN, 0.9 * H200.memory)
    assert not found
    assert isinstance(refused, Rejected)
    assert reason in refused.reason


def test_the_least_recomputation_that_fits_is_taken():
    table = {"data": 64, "zero_stage": 3}
    roomy, _ = consider(mixtral(), table, TRAIN, 1e15)
    tight, _ = consider(mixtral(), table, TRAIN, 0.3 * H200.memory)
    assert [c.parts.config.remat for c in roomy] == ["none"]
    assert roomy[0].train.microbatches == 1
    assert all(recomputed_forwards(c.parts) > 0 for c in tight)
    assert all(c.memory.total <= 0.3 * H200.memory for c in tight)


@pytest.mark.parametrize(
    ("mesh", "transfer", "expected"),
    [
        # 8 tensor ranks are a node; the 8 data ranks are one in each.
        (MeshConfig(data=8, tensor=8), Transfer(("tensor",), "all-gather", 7.0, ""), (7.0, 0.0)),
        (MeshConfig(data=8, tensor=8), Transfer(("data",), "all-reduce", 7.0, ""), (0.0, 7.0)),
        # 4 of the 16 data ranks share a node: every fourth step of the ring leaves it.
        (MeshConfig(data=16, tensor=2), Transfer(("data",), "all-gather", 8.0, ""), (8.0, 2.0)),
        (MeshConfig(expert=16), Transfer(("expert",), "all-to-all", 15.0, ""), (7.0, 8.0)),
        (MeshConfig(pipeline=2, tensor=8), Transfer(("pipeline",), "collective-permute", 3.0, ""), (0.0, 3.0)),
        (MeshConfig(data=2, expert=2, tensor=2), Transfer(("data", "expert"), "all-reduce", 3.0, ""), (3.0, 0.0)),
    ],
)
def test_bytes_go_over_the_link_that_joins_the_ranks(mesh, transfer, expected):
    assert_close(link_bytes(MeshPlan.on_paper(mesh), H200, transfer), expected)


def test_a_step_without_links_takes_its_arithmetic():
    parts = ModelParts.of(
        dataclasses.replace(model_config("mixtral_8x7b"), remat="none"), MeshPlan.on_paper(MeshConfig())
    )
    [candidate], _ = consider(parts, {}, dataclasses.replace(TRAIN, global_batch=1), 1e15)
    step = step_time(candidate.parts, candidate.train, candidate.memory, H200, Assumptions(matmul=0.5))
    assert step.exposed == step.bubble == step.network == 0
    assert_close(step.mfu, 0.5 * step.compute / step.total)


def run_plan(out, *options: str):
    assert plan.main(["--model", "mixtral_8x7b", "--devices", "64", "--out", str(out), *options]) == 0
    return json.loads((out / "result.json").read_text())


def test_mixtral_on_64_h200s_is_planned_into_files_that_training_takes(tmp_path, capsys):
    out = tmp_path / "plan"
    report = run_plan(out, "--global-batch", "256", "--top", "3", "--serve", "64")
    times = [row["step"]["total"] for row in report["best"]]
    assert times == sorted(times)
    assert all(row["memory"]["total"] < 0.9 * H200.memory for row in report["best"])
    assert report["fit"] + report["rejected"] == report["layouts"]
    best = report["best"][0]
    again = cli.parse(
        ["--model", str(out / "config.toml"), "--mesh", str(out / "config.toml")], name="train", doc=None
    ).config
    assert again.model.remat == best["remat"]
    assert again.train.microbatches == best["microbatches"]
    mesh = load.read_files(CONFIGS / "model" / "mixtral_8x7b.toml", out / "mesh.toml").mesh
    assert load.to_table(mesh) == best["mesh"] == load.to_table(again.mesh)
    assert (out / "memory.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "num_experts (8) must divide by expert" in shown
    assert "caches" in shown


def test_the_roofline_can_be_told_what_it_assumes(tmp_path):
    slow, fast = (
        run_plan(tmp_path / name, "--devices", "16", "--network", str(network))["best"][0]["step"]["total"]
        for name, network in (("slow", 5), ("fast", 400))
    )
    assert slow > fast


def test_what_cannot_be_planned_is_one_line(tmp_path):
    with pytest.raises(ValueError, match='no chip "h300"; did you mean H200'):
        named_chip("h300")
    with pytest.raises(ValueError, match="take more devices"):
        plan.main(["--model", "mixtral_8x22b", "--devices", "2", "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_a_missing_plugin_is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(target, "PLUGINS", ("no_such_plugin",))
    with pytest.raises(ValueError, match=r"bash scripts/venv\.sh aot, or pip install|wants jax 0\.11 and Python 3\.12"):
        plan.main(["--smoke", "--compile", "--out", str(tmp_path / "none")])


@pytest.mark.skipif(missing_plugins() is not None, reason=f"{missing_plugins()}")
def test_a_step_compiles_for_h200s_that_are_not_here(tmp_path):
    assert h200_devices(16, H200)[0].device_kind == "NVIDIA H200"
    assert plan.main(["--smoke", "--compile", "--top", "1", "--out", str(tmp_path / "aot")]) == 0
    compiled = json.loads((tmp_path / "aot" / "result.json").read_text())["compiled"]
    assert compiled["arguments"] > 0
    assert any("all-" in kind or "reduce-scatter" in kind for kind in compiled["sent"])
