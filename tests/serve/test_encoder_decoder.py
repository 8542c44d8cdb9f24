"""An encoder-decoder's cached decoding: the source is read once, and each token is routed by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.mesh import MeshConfig
from moejax.layers.context import Context, Source
from moejax.models import EncoderDecoder, ModelParts
from moejax.parallel.plan import MeshPlan
from moejax.serve.generate import Generator, generate
from moejax.serve.sampling import Sampling
from tests.conftest import assert_close, mesh_config
from tests.serve.test_generate import PROMPTS, exact

NAME, GREEDY = "switch_transformers_tiny", Sampling(temperature=0.0)

pytestmark = pytest.mark.usefixtures("x64")


def model_and_context(length: int) -> tuple[EncoderDecoder, jax.Array, Context]:
    """Make a model, ids and the context of a source whose second row ends in padding."""
    plan = MeshPlan.single()
    parts = ModelParts.of(exact(NAME), plan)
    model = parts.merge(*parts.init(0))
    assert isinstance(model, EncoderDecoder)
    for bias in (model.encoder_bias, model.decoder_bias):  # as trained: at first all distances are alike
        bias.table[...] = jax.random.normal(jax.random.key(bias.bidirectional), bias.table[...].shape, jnp.float64)
    rng = np.random.default_rng(0)
    ids_BT, source_BS = (jnp.asarray(rng.integers(0, 64, (2, size)), jnp.int32) for size in (length, 9))
    segments_BS = (jnp.arange(9) < jnp.asarray([[9], [6]])).astype(jnp.int32)
    context = Context.of(plan, jnp.ones_like(ids_BT), source=Source(source_BS, segments_BS))
    return model, ids_BT, context


def decode(model: EncoderDecoder, ids_BT: jax.Array, context: Context, chunks: list[tuple[int, int]]) -> jax.Array:
    blocks, logits = model.unstacked(), []
    caches = model.caches_of(model.encode(context)[0], ids_BT.shape[1])
    for start, stop in chunks:
        names = ("positions_BT", "index_BT", "segments_BT")
        part = dataclasses.replace(context, **{n: getattr(context, n)[:, start:stop] for n in names})
        output, caches = model.cached(blocks, ids_BT[:, start:stop], part, caches)
        logits.append(model.logits(output))
    return jnp.concatenate(logits, axis=1)


def test_cached_tokens_get_the_full_forwards_logits_where_tokens_are_routed_one_by_one() -> None:
    model, ids_BT, context = model_and_context(11)
    context = dataclasses.replace(context, one_by_one=True)
    full = model.logits(model(ids_BT, context))
    assert_close(decode(model, ids_BT, context, [(0, 5), (5, 10), (10, 11)]), full, jnp.float64)


def test_a_capacity_binds_over_whole_sequences_and_never_token_by_token() -> None:
    """As in transformers, where greedy decoding with a cache is not that without one."""
    model, ids_BT, context = model_and_context(11)
    cached = decode(model, ids_BT, context, [(at, at + 1) for at in range(11)])
    output = model(ids_BT, context)
    assert sum(float(layer.dropped.sum()) for layer in output.stats[1]) > 0
    assert np.abs(np.asarray(cached - model.logits(output))).max() > 1e-3
    free = model.logits(model(ids_BT, dataclasses.replace(context, one_by_one=True)))
    assert_close(cached, free, jnp.float64)


def test_what_a_source_is_padded_with_changes_nothing() -> None:
    model, ids_BT, context = model_and_context(4)
    assert context.source is not None
    other = jnp.where(context.source.segments_BS > 0, context.source.ids_BS, 63)
    changed = dataclasses.replace(context, source=dataclasses.replace(context.source, ids_BS=other))
    assert (other != context.source.ids_BS).any()
    assert_close(model.logits(model(ids_BT, changed)), model.logits(model(ids_BT, context)), jnp.float64)


@pytest.mark.parametrize("mesh", ["data2_expert2_tensor2_sp", "zero3"])
def test_generation_on_a_mesh_writes_one_devices_tokens(mesh: str) -> None:
    written = []
    for config, count in ((MeshConfig(), 1), (mesh_config(mesh).for_decoding(), 8)):
        parts = ModelParts.of(exact(NAME), MeshPlan.from_config(config, jax.devices()[:count]))
        written.append(generate(Generator(parts, 5, GREEDY), *parts.init(0), PROMPTS))
    assert written[0] == written[1]
