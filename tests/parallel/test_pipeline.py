"""The pipeline's executor: what it holds at a time, many microbatches, evaluation, and in which order layers lie."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.attention import AttentionConfig
from moejax.config.mesh import MeshConfig
from moejax.config.model import ModelConfig
from moejax.models import ModelParts
from moejax.parallel.plan import MeshPlan
from moejax.train.state import abstract_state
from moejax.train.step import make_eval_step, make_train_step, place_batch
from tests.conftest import assert_close, mesh_config, model_config
from tests.tiny_runs import TinyRun, assert_same, make_batch, proof_model, to_numpy

MANY = 8
"""Microbatches: more than the stages hold at a time, so that slots are used again."""
INTERLEAVED = MeshConfig(pipeline=2, schedule="interleaved", chunks=2)
RINGS = dataclasses.replace(INTERLEAVED, sequence=2)


# --- memory


ROWS, LENGTH, DIM = 2, 64, 256
SLOT = ROWS * LENGTH * DIM * 4
"""Bytes of one microbatch's residual stream between stages; everything else in the model is small beside it."""


def temporaries(schedule: str, microbatches: int) -> int:
    """Give the bytes that one device's compiled step needs beside its state and its batch; runs nothing."""
    attention = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=2)
    model = ModelConfig(vocab=8, embed=DIM, num_layers=4, ffn=8, attention=attention, tie_embeddings=True)
    sizes = {"global_batch": ROWS * microbatches, "seq_len": LENGTH, "microbatches": microbatches}
    run = TinyRun.of(model, MeshConfig(pipeline=4, schedule=schedule), **sizes)  # type: ignore[arg-type]
    step = make_train_step(run.parts, run.optimizer, run.config)
    tiny = make_batch(0, rows=microbatches, microbatches=microbatches)
    shape = (microbatches, ROWS, LENGTH)
    batch = {key: jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(x.dtype)) for key, x in tiny.items()}
    compiled = step.lower(abstract_state(run.parts, run.optimizer), batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_1f1b_holds_what_the_stages_need_and_gpipe_every_microbatch():
    """At 4 stages 1F1B has 7 slots, GPipe as many as there are microbatches."""
    few, many, gpipe = (temporaries(*case) for case in (("1f1b", 8), ("1f1b", 48), ("gpipe", 48)))
    assert abs(many - few) < SLOT / 4
    np.testing.assert_allclose((gpipe - many) / SLOT, 48 - 7, rtol=0.05)
    assert many < gpipe / 2


# --- many microbatches


DEEP = proof_model("mixtral_tiny", num_layers=4)


@functools.cache
def start():
    return to_numpy(TinyRun.of(DEEP, mesh_config("single")).init())


def train(mesh: MeshConfig):
    run = TinyRun.of(DEEP, mesh, microbatches=MANY)
    return run.train(start(), [make_batch(0, microbatches=MANY)])


@functools.cache
def one_device():
    return train(mesh_config("single"))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mesh", [MeshConfig(pipeline=2), RINGS], ids=["1f1b", "interleaved-ring"])
def test_slots_that_are_used_again_change_nothing(mesh):
    """The parity tests have two microbatches, which never share a slot.

    With a ring inside a stage nothing is skipped: what is not due runs on zeros, and must add nothing.
    """
    actual, expected = train(mesh), one_device()
    assert_same(actual.gradient, expected.gradient)
    assert_same(actual.metrics, expected.metrics)
    assert_same(actual.state, expected.state)


# --- evaluation


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "mesh",
    [dataclasses.replace(INTERLEAVED, data=2), MeshConfig(pipeline=4, sequence=2)],
    ids=["interleaved", "ring"],
)
def test_evaluation_in_stages_is_one_device_s(mesh):
    seen = []
    for config in (mesh_config("single"), mesh):
        run = TinyRun.of(DEEP, config)
        state, batch = run.place(start()), make_batch(1, microbatches=1)
        seen.append(make_eval_step(run.parts)(state.params, state.buffers, place_batch(run.parts.plan, batch)))
    assert_close(*seen)
    assert seen[0]["tokens"] == batch["weights"].sum() > 0


# --- the order of layers


def interleaved_parts() -> ModelParts:
    plan = MeshPlan.from_config(INTERLEAVED, jax.devices()[:2])
    return ModelParts.of(dataclasses.replace(model_config("dense_tiny"), num_layers=8), plan)


def test_a_stage_holds_every_other_run_of_layers():
    """Stage 0 has chunks 0 and 2 of the model's four, of two layers each: what the tables call its chunks 0 and 1."""
    parts = interleaved_parts()
    tree = {"stacks": {"0": jnp.arange(8)}, "head": jnp.arange(8)}
    stored = parts.stored(tree)
    np.testing.assert_array_equal(stored["stacks"]["0"], [0, 1, 4, 5, 2, 3, 6, 7])
    np.testing.assert_array_equal(stored["head"], np.arange(8))
    stage_0 = {"stacks": {"0": stored["stacks"]["0"][:4]}, "head": stored["head"]}
    np.testing.assert_array_equal(parts.chunk(stage_0, jnp.int32(0))["stacks"]["0"], [0, 1])
    np.testing.assert_array_equal(parts.chunk(stage_0, jnp.int32(1))["stacks"]["0"], [4, 5])
    np.testing.assert_array_equal(parts.chunk(stage_0, jnp.int32(1))["head"], np.arange(8))


def test_checkpoints_have_the_layers_own_order_whatever_the_schedule():
    """Three chunks on two stages: a permutation that is not its own inverse."""
    plan = MeshPlan.from_config(dataclasses.replace(INTERLEAVED, chunks=3), jax.devices()[:2])
    parts = ModelParts.of(dataclasses.replace(model_config("dense_tiny"), num_layers=6), plan)
    tree = {"stacks": {"0": jnp.arange(6)}, "head": jnp.arange(6)}
    stored = parts.stored(tree)
    np.testing.assert_array_equal(stored["stacks"]["0"], [0, 2, 4, 1, 3, 5])
    for there_and_back in (parts.canonical(stored), parts.stored(parts.canonical(tree))):
        jax.tree.map(np.testing.assert_array_equal, there_and_back, tree)
    plain = ModelParts.of(parts.config, MeshPlan.single())
    assert plain.stored(tree) is tree
    assert plain.canonical(tree) is tree


def test_interleaved_stages_draw_one_device_s_weights():
    parts = interleaved_parts()
    one = ModelParts.of(parts.config, MeshPlan.single()).init(3)
    born = parts.init(3)
    jax.tree.map(np.testing.assert_array_equal, parts.canonical(born), one)
    in_place = jax.tree.leaves(jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), born, one))
    assert not all(in_place), "they lie in another order"
