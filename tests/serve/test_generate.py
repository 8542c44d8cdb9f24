"""Cached decoding writes what the full forward writes, for every model and on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.mesh import MeshConfig
from moejax.config.model import ModelConfig, Precision
from moejax.layers.context import Context
from moejax.models import ModelParts
from moejax.parallel.plan import MeshPlan
from moejax.serve.generate import Generator, _context, generate, pad_prompts
from moejax.serve.sampling import Sampling
from tests.conftest import assert_close, mesh_config, model_config, tiny_params

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [11] * 20]
GREEDY = Sampling(temperature=0.0)
WRITERS = [param for param in tiny_params() if "expert_choice_tiny" not in param.values]
DECODERS = [param for param in WRITERS if "switch_transformers_tiny" not in param.values]
"""An encoder-decoder's caches hold its source too: test_encoder_decoder.py."""


def exact(name: str) -> ModelConfig:
    """Give a tiny model in float64: greedy choices then have no ties by rounding."""
    return dataclasses.replace(model_config(name), precision=Precision(*["float64"] * 4))


def parts_on(name: str, mesh: MeshConfig, num_devices: int) -> ModelParts:
    """Take a tiny model apart on the first devices."""
    return ModelParts.of(exact(name), MeshPlan.from_config(mesh, jax.devices()[:num_devices]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", WRITERS)
def test_cached_generation_writes_the_oracles_tokens(name: str) -> None:
    parts = parts_on(name, MeshConfig(), 1)
    params, buffers = parts.init(0)
    written = [
        generate(Generator(parts, 8, GREEDY, cached=cached), params, buffers, PROMPTS) for cached in (True, False)
    ]
    assert written[0] == written[1]
    assert len({tuple(row) for row in written[0]}) > 1, "prompts of other tokens should not all go on alike"


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "window"), [*(pytest.param(*p.values, None, marks=p.marks) for p in DECODERS), ("dense_tiny", 5)]
)
def test_prefill_and_decode_give_the_full_forwards_logits(name: str, window: int | None) -> None:
    """Two chunks and a single token through the cache, left padding included, against one forward."""
    config = exact(name)
    config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, window=window))
    parts = ModelParts.of(config, MeshPlan.single())
    model = parts.merge(*parts.init(0))
    ids_BT = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 14)), jnp.int32)
    pad_B = jnp.asarray([0, 3], jnp.int32)
    index_BT = jnp.broadcast_to(jnp.arange(14, dtype=jnp.int32), ids_BT.shape)
    context = _context(index_BT, pad_B, (index_BT >= pad_B[:, None]).astype(jnp.int32))

    @jax.jit
    def both() -> tuple[jax.Array, jax.Array]:
        blocks, caches, chunks = model.unstacked(), model.empty_caches(2, 14), []
        for start, stop in ((0, 9), (9, 13), (13, 14)):
            names = ("positions_BT", "index_BT", "segments_BT")
            part = dataclasses.replace(context, **{n: getattr(context, n)[:, start:stop] for n in names})
            output, caches = model.cached(blocks, ids_BT[:, start:stop], part, caches)
            chunks.append(model.logits(output))
        return model.logits(model(ids_BT, context)), jnp.concatenate(chunks, axis=1)

    full_BTV, cached_BTV = both()
    valid = np.asarray(context.segments_BT) > 0
    assert_close(cached_BTV[valid], full_BTV[valid], jnp.float64)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mesh", ["data2_expert2_tensor2_sp", "zero3", "tensor8"])
def test_generation_on_a_mesh_writes_one_devices_tokens(mesh: str) -> None:
    written = []
    for config, count in ((MeshConfig(), 1), (mesh_config(mesh).for_decoding(), 8)):
        parts = parts_on("mixtral_tiny", config, count)
        written.append(generate(Generator(parts, 6, GREEDY), *parts.init(0), PROMPTS))
    assert written[0] == written[1]


def test_sampled_tokens_do_not_depend_on_the_neighbours() -> None:
    """A row's draws come from the seed and its own number: what stands in the other rows changes nothing."""
    parts = ModelParts.of(model_config("mixtral_tiny"), MeshPlan.single())
    weights = parts.init(0)
    generator = Generator(parts, 8, Sampling(temperature=1.0, top_k=20))
    one = generate(generator, *weights, [PROMPTS[0], PROMPTS[1]], seed=3)
    other = generate(generator, *weights, [PROMPTS[0], [5, 5, 5, 5]], seed=3)
    assert one[0] == other[0]
    assert one != generate(generator, *weights, [PROMPTS[0], PROMPTS[1]], seed=4)


def test_a_sequence_ends_at_its_end_token_and_the_others_go_on() -> None:
    parts = ModelParts.of(model_config("dense_tiny"), MeshPlan.single())
    weights = parts.init(0)
    free = generate(Generator(parts, 10, GREEDY), *weights, PROMPTS)
    eos = free[0][4]
    assert not any(63 in row for row in free), "63 is an end that nobody writes"
    ended = generate(Generator(parts, 10, GREEDY, ends=(eos, 63)), *weights, PROMPTS)
    for row, whole in zip(ended, free, strict=True):
        assert row == (whole[: whole.index(eos)] if eos in whole else whole)


def test_expert_choice_refuses_to_generate() -> None:
    parts = ModelParts.of(model_config("expert_choice_tiny"), MeshPlan.single())
    with pytest.raises(ValueError, match="cannot generate"):
        Generator(parts, 4)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        pad_prompts([[1], []])


def test_prompts_stand_right_aligned_and_fill_the_mesh() -> None:
    ids_BT, pad_B = pad_prompts([[1, 2], [3]], multiple=4)
    assert ids_BT.shape == (4, 16) and pad_B.tolist() == [14, 15, 14, 15]
    assert ids_BT[0, -2:].tolist() == [1, 2] and ids_BT[3, -1] == 3


def test_inference_drops_no_token_where_training_overflows() -> None:
    """All tokens alike overflow a Switch expert in training; at inference each one reaches its expert."""
    parts = ModelParts.of(model_config("switch_tiny"), MeshPlan.single())
    model = parts.merge(*parts.init(0))
    ids_BT = jnp.full((1, 16), 7, jnp.int32)
    segments = jnp.ones_like(ids_BT)
    key = jax.random.key_data(jax.random.key(0))
    dropped = [
        sum(float(layer.dropped.sum()) for stack in model(ids_BT, context).stats for layer in stack)
        for context in (
            Context.of(MeshPlan.single(), segments, segments * 0, key=key),
            Context.of(MeshPlan.single(), segments, segments * 0),
        )
    ]
    assert dropped[0] > 0 and dropped[1] == 0
