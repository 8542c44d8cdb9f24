"""Does a Hugging Face folder give transformers' numbers: logits, losses, gradients, tokens? And back again?"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax.interop import weights
from moejax.interop.files import WeightFiles
from moejax.interop.pretrained import Pretrained
from moejax.serve.generate import Generator, generate
from moejax.serve.sampling import Sampling
from moejax.train.gradient import Gradient
from tests.interop.goldens import Golden, cases

LOGITS, LOSS, NORM = 1e-3, 1e-4, 2e-3
"""Pass lines: absolute for logits and losses, relative for gradient norms. transformers' own kernels differ by 2e-5."""

DECODERS = [name for name in cases() if "decoder_input_ids" not in Golden.load(name)]


@pytest.fixture(scope="module", params=DECODERS)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden.load(request.param)


@pytest.fixture(scope="module")
def folder(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write(tmp_path_factory.mktemp(golden.name) / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Pretrained:
    return moejax.load_pretrained(folder, dtype="float32")


def test_logits_are_those_of_transformers(golden: Golden, model: Pretrained):
    logits, routers = model(golden["input_ids"], router_logits=True)
    np.testing.assert_allclose(logits, golden["logits"], atol=LOGITS, rtol=0)
    if "router_logits" in golden:
        expected = golden["router_logits"]
        assert len(routers) == expected.shape[0]
        np.testing.assert_allclose(np.stack(routers), expected, atol=LOGITS, rtol=0)


def test_what_stands_left_of_a_prompt_changes_nothing(golden: Golden, model: Pretrained):
    mask = golden["leftpad_mask"].astype(bool)
    logits = np.asarray(model(golden["leftpad_ids"], mask))
    np.testing.assert_allclose(logits[mask], golden["leftpad_logits"][mask], atol=LOGITS, rtol=0)


def test_the_hubs_spelling_of_the_config_is_the_same_model(golden: Golden, model: Pretrained, tmp_path: Path):
    legacy = moejax.load_pretrained(golden.write(tmp_path / "hub", legacy=True), dtype="float32")
    assert legacy.config == model.config


def test_greedy_tokens_are_those_of_transformers(golden: Golden, model: Pretrained):
    new = golden["greedy"].shape[1]
    prompts = [row[:8].tolist() for row in golden["input_ids"]]
    generator = Generator(model.parts, new, Sampling(temperature=0.0))
    assert generate(generator, model.params, model.buffers, prompts) == golden["greedy"].tolist()


def test_loss_and_gradients_are_those_of_transformers(golden: Golden, model: Pretrained):
    loss, aux, gradient = loss_and_gradient(golden, model)
    assert loss == pytest.approx(float(golden["loss"]), abs=LOSS)
    if "aux_loss" in golden:
        assert aux == pytest.approx(float(golden["total_loss"]) - float(golden["loss"]), abs=LOSS)
    none = jax.tree.map(np.zeros_like, model.buffers)
    norms = {name: np.linalg.norm(make()) for name, _, _, make in weights.tensors(model.parts, gradient, none)}
    expected = {name: norm for name, norm in golden.grad_norms.items() if name in norms}
    left = set(golden.grad_norms) - set(norms)
    assert all(name in model.left_out for name in left), left
    largest = max(expected.values())
    for name, norm in expected.items():
        assert norms[name] == pytest.approx(norm, rel=NORM, abs=NORM * 1e-2 * largest), name


def loss_and_gradient(golden: Golden, model: Pretrained) -> tuple[float, float, Any]:
    """Run the training step's own gradient on the golden's labels, shifted."""
    ids, labels = golden["input_ids"].astype(np.int32), golden["labels"][:, 1:]
    counted = labels != -100
    batch = {
        "inputs": ids,
        "targets": np.pad(np.where(counted, labels, 0), ((0, 0), (0, 1))),
        "segments": np.ones_like(ids),
        "positions": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
        "weights": np.pad(counted.astype(np.float32), ((0, 0), (0, 1))),
        "bytes": np.ones_like(ids),
    }
    # transformers has no noise in this run: neither have we
    run = Gradient(model.parts, seed=0)
    _, grads, metrics = run_once(run, model, {key: value[None] for key, value in batch.items()})
    return float(metrics["loss"]), float(metrics["aux"]), grads


def run_once(run: Gradient, model: Pretrained, batch: dict[str, np.ndarray]) -> tuple[Any, Any, Any]:
    plan, parts = model.parts.plan, model.parts
    specs = jax.tree.map(lambda _: plan.spec(), batch)

    def step(params: Any, buffers: Any, batch: Any) -> Any:
        grads, moved, metrics = run(params, buffers, jnp.int32(0), batch)
        return moved, grads, metrics

    ins = (parts.weight_specs(), parts.buffer_specs(), specs)
    outs = (parts.buffer_specs(), parts.state_specs(), plan.spec())
    return jax.jit(plan.spmd(step, ins, outs))(model.params, model.buffers, batch)


@pytest.mark.parametrize("shard_bytes", [None, 20_000])
def test_what_was_read_is_written_bit_for_bit(golden: Golden, tmp_path: Path, shard_bytes: int | None):
    """Twice through: what is written, whole or in shards, is what was read, and reads as the same model."""
    dtype = "bfloat16" if shard_bytes else "float32"
    source = golden.write(tmp_path / "in", dtype=dtype, shard_bytes=shard_bytes, quantised=False)
    model = moejax.load_pretrained(source)
    moejax.save_pretrained(model, tmp_path / "out", max_shard_bytes=shard_bytes or 10**9)
    before, after = WeightFiles.open(source), WeightFiles.open(tmp_path / "out")
    assert set(before.tensors) - set(after.tensors) == set(model.left_out)
    for name, info in after.tensors.items():
        whole = (slice(None),) * len(info.shape)
        assert before.tensors[name].dtype == info.dtype, name
        assert before.read(name, whole).tobytes() == after.read(name, whole).tobytes(), name
    again = moejax.load_pretrained(tmp_path / "out")
    assert again.config == model.config
    kept = {"bos_token_id", "eos_token_id", "max_position_embeddings"}
    assert {key: again.source[key] for key in kept} == {key: model.source[key] for key in kept}
