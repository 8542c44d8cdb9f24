"""Does a Switch Transformers folder give transformers' numbers, and is it written back whole?"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moejax
from moejax.interop import weights
from moejax.interop.files import WeightFiles
from moejax.interop.pretrained import Pretrained
from moejax.serve.generate import Generator, generate
from moejax.serve.sampling import Sampling
from moejax.train.gradient import Gradient
from tests.interop.goldens import Golden

LOGITS, LOSS, NORM = 1e-3, 1e-4, 2e-3


@pytest.fixture(scope="module", params=["switch", "switch_untied"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden.load(request.param)


@pytest.fixture(scope="module")
def model(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    folder = golden.write(tmp_path_factory.mktemp(golden.name) / "model")
    return moejax.load_pretrained(folder, dtype="float32", dropout=0.0)


def test_logits_are_those_of_transformers(golden: Golden, model: Pretrained) -> None:
    """Padding takes part in the routing, and capacities bind: both show in the encoder's logits."""
    logits, routers = model(golden["input_ids"], golden["attention_mask"], True, golden["decoder_input_ids"])
    np.testing.assert_allclose(logits, golden["logits"], atol=LOGITS, rtol=0)
    for expected in (golden["encoder_router_logits"], golden["decoder_router_logits"]):
        found, routers = routers[: len(expected)], routers[len(expected) :]
        np.testing.assert_allclose(np.stack(found), expected, atol=LOGITS, rtol=0)
    assert not routers


def test_the_hubs_spelling_of_the_config_is_the_same_model(golden: Golden, model: Pretrained, tmp_path: Path) -> None:
    legacy = moejax.load_pretrained(golden.write(tmp_path / "hub", legacy=True), dtype="float32", dropout=0.0)
    assert legacy.config == model.config
    if model.config.tie_embeddings:
        assert "tie_word_embeddings" not in golden.config_legacy


def test_greedy_tokens_are_those_of_transformers(golden: Golden, model: Pretrained) -> None:
    lengths = golden["attention_mask"].sum(1)
    prompts = [row[:length].tolist() for row, length in zip(golden["input_ids"], lengths, strict=True)]
    generator = Generator(model.parts, golden["greedy"].shape[1], Sampling(temperature=0.0))
    assert generate(generator, model.params, model.buffers, prompts) == golden["greedy"].tolist()


def test_losses_and_gradients_are_those_of_transformers(golden: Golden, model: Pretrained) -> None:
    config = json.loads(json.dumps(golden.config))
    metrics, gradient = metrics_and_gradient(golden, model)
    aux = float(golden["total_loss"]) - float(golden["loss"])
    assert float(metrics["loss"]) == pytest.approx(float(golden["loss"]), abs=LOSS)
    assert float(metrics["aux"]) == pytest.approx(aux, abs=LOSS)
    layers = len(golden["encoder_router_logits"])
    for name, coefficient in (("z_loss", "router_z_loss_coef"), ("load_balance", "router_aux_loss_coef")):
        assert config[coefficient] > 0
        parts = metrics["router"].losses[name]
        hf = "z_loss" if name == "z_loss" else "aux_loss"
        assert float(parts[:layers].sum()) == pytest.approx(float(golden[f"encoder_{hf}"]), abs=LOSS)
        assert float(parts[layers:].sum()) == pytest.approx(float(golden[f"decoder_{hf}"]), abs=LOSS)
    norms = {name: np.linalg.norm(make()) for name, _, _, make in weights.tensors(model.parts, gradient, {})}
    largest = max(golden.grad_norms.values())
    assert set(golden.grad_norms) <= set(norms)
    for name, norm in golden.grad_norms.items():
        assert norms[name] == pytest.approx(norm, rel=NORM, abs=NORM * 1e-2 * largest), name


def metrics_and_gradient(golden: Golden, model: Pretrained) -> tuple[Any, Any]:
    """Run the training step's own gradient on the golden's labels."""
    labels = golden["labels"]
    counted = labels != -100
    batch = {
        "inputs": golden["decoder_input_ids"],
        "targets": np.where(counted, labels, 0),
        "segments": np.ones_like(labels),
        "positions": np.broadcast_to(np.arange(labels.shape[1], dtype=np.int32), labels.shape),
        "weights": counted.astype(np.float32),
        "bytes": np.ones_like(labels),
        "source": golden["input_ids"],
        "source_segments": golden["attention_mask"],
    }
    parts, plan = without_noise(model).parts, model.parts.plan
    run = Gradient(parts, seed=0)

    def step(params: Any, batch: Any) -> Any:
        grads, _, metrics = run(params, {}, jnp.int32(0), batch)
        return metrics, grads

    specs = jax.tree.map(lambda _: plan.spec(), batch)
    program = plan.spmd(step, (parts.weight_specs(), specs), (plan.spec(), parts.state_specs()))
    return jax.jit(program)(model.params, {key: value[None] for key, value in batch.items()})


def without_noise(model: Pretrained) -> Pretrained:
    """Load the same model without jitter: transformers ran its loss in evaluation mode."""
    assert model.folder is not None and model.config.moe is not None
    import dataclasses

    router = dataclasses.replace(model.config.moe.router, noise="none")
    moe = dataclasses.replace(model.config.moe, router=router)
    return moejax.load_pretrained(model.folder, dtype="float32", dropout=0.0, moe=moe)


def test_what_was_read_is_written_bit_for_bit(golden: Golden, tmp_path: Path) -> None:
    """Copies of the embedding included, which transformers wants of an untied model."""
    source = golden.write(tmp_path / "in")
    model = moejax.load_pretrained(source)
    moejax.save_pretrained(model, tmp_path / "out")
    before, after = WeightFiles.open(source), WeightFiles.open(tmp_path / "out")
    assert set(before.tensors) == set(after.tensors)
    for name, info in after.tensors.items():
        whole = (slice(None),) * len(info.shape)
        assert before.read(name, whole).tobytes() == after.read(name, whole).tobytes(), name
    again = moejax.load_pretrained(tmp_path / "out")
    assert again.config == model.config


def test_copies_of_the_embedding_that_differ_are_refused(tmp_path: Path) -> None:
    folder = Golden.load("switch_untied").write(tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["encoder.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"encoder\.embed_tokens\.weight differs from shared\.weight"):
        moejax.load_pretrained(folder)


def test_an_encoder_decoder_asks_for_decoder_ids(model: Pretrained) -> None:
    with pytest.raises(ValueError, match="needs decoder_input_ids"):
        model([[1, 2, 3]])
