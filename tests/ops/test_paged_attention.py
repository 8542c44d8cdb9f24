"""Attention through a block table against attention over whole sequences: pages anywhere, any lengths, any rubbish."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from moejax.ops.mask import Scoring
from moejax.ops.paged_attention import (
    latent_attention,
    latent_attention_reference,
    paged_attention,
    paged_attention_reference,
    write_pages,
)
from tests.conftest import assert_close
from tests.ops.pages import Pages, make_pages

IMPLEMENTATIONS = ("reference", "xla")
LENGTHS, QUERIES = (37, 0, 1, 20), (3, 0, 1, 2)


def make(lengths=LENGTHS, queries=QUERIES, *, length=3, page=4, dtype="float32", **shape) -> Pages:
    return make_pages(0, lengths, queries, length, page=page, dtype=dtype, **shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("window", [None, 5])
def test_pages_give_what_whole_sequences_give(implementation, heads, kv_heads, window):
    pages = make(heads=heads, kv_heads=kv_heads)
    out = np.asarray(paged_attention(*pages, window=window, implementation=implementation))
    for b, (length, queries) in enumerate(zip(LENGTHS, QUERIES, strict=True)):
        assert not out[b, queries:].any()
        if not queries:
            continue
        q, *kv = (np.asarray(x, np.float64) for x in (pages.q[b], pages.k, pages.v))
        k, v = (np.repeat(pages.sequence(b, x, length), heads // kv_heads, axis=1) for x in kv)
        for t in range(queries):
            end = length - queries + t + 1
            seen = slice(max(0, end - (window or length)), end)
            weights = np.exp(np.einsum("nh,snh->ns", q[t], k[seen]) / np.sqrt(8))
            expected = np.einsum("ns,snh->nh", weights / weights.sum(1, keepdims=True), v[seen])
            assert_close(out[b, t], expected, "float32")


@pytest.mark.parametrize(
    "options",
    [{"scoring": Scoring(softcap=2.0)}, {"scoring": Scoring(0.7)}, {"sinks": True}, {"sinks": True, "window": 4}],
)
def test_xla_equals_the_reference_under_every_option(options):
    pages = make()
    if options.pop("sinks", False):
        options["sinks_N"] = jnp.array([1.0, -2.0, 0.0, 3.0])
    assert_close(paged_attention(*pages, implementation="xla", **options), paged_attention_reference(*pages, **options))


def test_xla_joins_runs_of_pages(monkeypatch):
    monkeypatch.setattr("moejax.ops.paged_attention.XLA_SPLIT", 8)
    pages = make((37, 5, 0, 12), (3, 3, 0, 1))
    expected = paged_attention_reference(*pages)
    assert_close(paged_attention(*pages, implementation="xla"), expected)
    assert_close(jax.jit(lambda *x: paged_attention(*x, implementation="xla"))(*pages), expected)


def test_a_sink_takes_weight_but_gives_nothing():
    pages = make()
    plain = paged_attention_reference(*pages)
    weak = paged_attention_reference(*pages, sinks_N=jnp.full((4,), -1e4))
    strong = paged_attention_reference(*pages, sinks_N=jnp.full((4,), 1e4))
    assert_close(weak, plain)
    assert not np.asarray(strong).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_latents_are_one_key_head_and_hold_the_values(implementation):
    pages = make(heads=4, kv_heads=1, dim=6)
    latent = pages.k[:, :, 0]
    out = latent_attention(pages.q, latent, *pages[3:], value_dim=4, scale=0.3, implementation=implementation)
    expected = paged_attention_reference(pages.q, pages.k, pages.k[..., :4], *pages[3:], scoring=Scoring(0.3))
    assert out.shape == (4, 3, 4, 4)
    assert_close(out, expected)
    assert_close(latent_attention_reference(pages.q, latent, *pages[3:], value_dim=4, scale=0.3), expected)


def test_reference_computes_in_float64(x64):
    pages = make(dtype="float64")
    assert paged_attention_reference(*pages).dtype == jnp.float64
    assert_close(paged_attention(*pages, implementation="xla"), paged_attention_reference(*pages))


def test_inside_a_manual_program_that_splits_the_batch():
    pages = make()
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("data"), PartitionSpec()
    specs = (split, whole, whole, split, split, split)
    run = jax.shard_map(paged_attention, mesh=mesh, in_specs=specs, out_specs=split)
    assert_close(jax.jit(run)(*pages), paged_attention_reference(*pages))


def test_written_tokens_are_read_back_and_others_stay():
    pages = make((9, 6, 0), (3, 2, 0))
    new = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 2, 8)), jnp.float32)
    first = pages.lengths - pages.query_lengths
    out = write_pages(pages.k, new, pages.tables, first, pages.query_lengths)
    expected = np.array(pages.k)
    for b, (length, queries) in enumerate([(9, 3), (6, 2)]):
        for t in range(queries):
            position = length - queries + t
            expected[pages.tables[b, position // 4], position % 4] = new[b, t]
    np.testing.assert_array_equal(np.asarray(out), expected)


def test_nothing_is_written_past_the_table_or_outside_the_pool():
    k = jnp.zeros((3, 4, 1, 2))
    new = jnp.ones((4, 2, 1, 2))
    tables = jnp.array([[-1, -1], [0, 7], [1, -1], [2, 2]])
    positions = jnp.array([0, 4, 7, -2])  # an unused entry, a page past the pool, past the table's end, before it
    out = write_pages(k, new, tables, positions, jnp.array([2, 2, 2, 2]))
    assert not np.asarray(out).any()


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match='implementation "cuda" must be one of auto, mosaic, xla, reference'):
        paged_attention(*make(), implementation="cuda")
