"""The optimizer step: accumulation, precision, recomputation, schedules, the decay mask, clipping."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from moejax.config.model import Precision
from moejax.config.run import OptimizerConfig, RunConfig
from moejax.models import ModelParts
from moejax.parallel.plan import MeshPlan
from moejax.train import optimizer
from moejax.train.gradient import Gradient
from moejax.train.state import init_state
from moejax.train.step import batch_specs, make_train_step
from tests.conftest import assert_close, model_config

VOCAB, ROWS, LENGTH = 64, 8, 16


def batch(microbatches: int = 1) -> dict[str, jax.Array]:
    """Make rows of two documents each, a sixth of their targets without weight; [Y, B, T]."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    half = np.tile(np.arange(LENGTH) >= LENGTH // 2, (ROWS, 1)).astype(np.int32)
    arrays = {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "segments": half,
        "positions": np.tile(np.arange(LENGTH) % (LENGTH // 2), (ROWS, 1)).astype(np.int32),
        "weights": (rng.random((ROWS, LENGTH)) > 1 / 6).astype(np.float32),
        "bytes": np.ones((ROWS, LENGTH), np.int32),
    }
    return {key: jnp.asarray(x.reshape(microbatches, -1, LENGTH)) for key, x in arrays.items()}


def parts_of(name: str, **changes: Any) -> ModelParts:
    return ModelParts.of(dataclasses.replace(model_config(name), **changes), MeshPlan.single())


def gradient(parts: ModelParts, weights: tuple[Any, Any], microbatches: int = 1) -> tuple[Any, dict[str, jax.Array]]:
    """Give gradient and metrics of the batch, outside of a step."""

    def run(params: Any, buffers: Any, data: Any) -> Any:
        grads, _, metrics = Gradient(parts, seed=0)(params, buffers, jnp.int32(0), data)
        return grads, {key: metrics[key] for key in ("loss", "aux", "tokens")}

    ins = (parts.weight_specs(), parts.buffer_specs(), batch_specs(parts.plan))
    program = parts.plan.spmd(run, ins, (parts.weight_specs(), PartitionSpec()))
    return jax.jit(program)(*weights, batch(microbatches))


@pytest.fixture(scope="module")
def dense() -> tuple[ModelParts, tuple[Any, Any]]:
    parts = parts_of("dense_tiny")
    return parts, parts.init(0)


@pytest.fixture(scope="module")
def dense_gradient(dense) -> tuple[Any, dict[str, jax.Array]]:
    return gradient(*dense)


def test_four_microbatches_are_one_batch(dense, dense_gradient):
    # the weights of the rows differ: a mean of means would be another number
    assert len(set(np.asarray(batch(4)["weights"].sum((1, 2))).tolist())) > 1
    assert_close(gradient(*dense, microbatches=4), dense_gradient, "float32")


@pytest.mark.parametrize("policy", ["full", "dots", "names"])
def test_what_is_recomputed_changes_no_gradient(policy: str, dense, dense_gradient):
    assert_close(gradient(parts_of("dense_tiny", remat=policy), dense[1]), dense_gradient, "float32")


def test_recomputation_repeats_dropout(dense):
    plain, again = (parts_of("dense_tiny", dropout=0.3, remat=policy) for policy in ("none", "full"))
    assert_close(gradient(again, dense[1]), gradient(plain, dense[1]), "float32")


def test_bfloat16_computes_near_float32_and_keeps_float32_weights(dense_gradient):
    mixed = parts_of("dense_tiny", precision=Precision(compute="bfloat16"))
    config = RunConfig(model=mixed.config)
    adam = optimizer.build(config.optimizer, 10, mixed.placements)
    state, before = init_state(mixed, adam, 0), mixed.init(0)[0]
    state, metrics = make_train_step(mixed, adam, config)(state, batch())
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(state.opt_state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert_close(metrics["loss"], dense_gradient[1]["loss"], "bfloat16")
    assert float(metrics["loss"]) != float(dense_gradient[1]["loss"]), "it did compute in bfloat16"
    # Steps smaller than bfloat16 can tell apart are not lost: that is what the float32 weights are for.
    moved = jax.tree.map(lambda a, b: jnp.mean(a != b), state.params, before)
    assert min(map(float, jax.tree.leaves(moved))) > 0.9


COSINE, WSD, CONSTANT = ({"lr": 1.0, "warmup_steps": 10, "schedule": name} for name in ("cosine", "wsd", "constant"))
SHORT = {"lr": 1.0, "warmup_steps": 10}


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        (COSINE, 110, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1, 200: 0.1}),
        (COSINE | {"warmup_steps": 0, "final_lr_fraction": 0.0}, 100, {0: 1.0, 50: 0.5, 100: 0.0}),
        (WSD, 110, {0: 0.1, 9: 1.0, 10: 1.0, 50: 1.0, 88: 1.0, 99: 0.55, 110: 0.1, 200: 0.1}),
        (WSD | {"decay_fraction": 1.0}, 110, {9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1}),
        (CONSTANT, 110, {0: 0.1, 9: 1.0, 10: 1.0, 110: 1.0, 200: 1.0}),
        (COSINE | {"warmup_steps": 1}, 11, {0: 1.0, 1: 1.0, 11: 0.1}),
        (COSINE, 5, {0: 0.2, 4: 1.0}),
    ],
)
def test_the_learning_rate_rises_stays_and_falls(options: dict, steps: int, expected: dict[int, float]):
    schedule = optimizer.make_schedule(OptimizerConfig(**options), steps)
    rates = {step: float(schedule(jnp.int32(step))) for step in expected}
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["mixtral_tiny", "loss_free_tiny", "noisy_top_k_tiny", "dense_tiny"])
def test_only_matrices_decay(name: str):
    parts = parts_of(name)
    config = OptimizerConfig(lr=0.5, schedule="constant", warmup_steps=0, weight_decay=0.25)
    adam = optimizer.build(config, 10, parts.placements)
    ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), parts.shapes)
    zeros = jax.tree.map(jnp.zeros_like, ones)
    after = optax.apply_updates(ones, adam.update(zeros, adam.init(ones), ones)[0])
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        where = jax.tree_util.keystr(path)
        kept = "norm" in where or "router" in where
        np.testing.assert_array_equal(leaf, 1.0 if kept else 1.0 - 0.5 * 0.25, err_msg=where)
    names = str(jax.tree.structure(after))
    assert "norm" in names and ("router" in names) == (name != "dense_tiny")


def test_gradients_are_clipped_to_the_global_norm(dense):
    parts, _ = dense
    config = RunConfig(model=parts.config, optimizer=OptimizerConfig(clip_norm=0.01))
    seen = optax.GradientTransformation(lambda _: (), lambda grads, state, params: (grads, state))  # w + gradient
    state = init_state(parts, seen, 0)
    before = jax.device_get(state.params)
    state, metrics = make_train_step(parts, seen, config)(state, batch())
    moved = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, state.params, before)
    assert float(metrics["grad_norm"]) > 0.1, "the norm that is logged is the one before clipping"
    assert float(optax.tree_utils.tree_norm(moved)) == pytest.approx(0.01, rel=1e-3)
    assert optimizer.clip_scale(jnp.float32(0.005), 0.01) == 1.0
    assert optimizer.clip_scale(jnp.float32(0.0), 0.01) == 1.0
