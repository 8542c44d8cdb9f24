"""The paged kernels in the interpreter, races watched, against the reference; NaN stands wherever no token does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import paged_attention as ops
from moejax.ops.mask import Scoring
from pallas_kernels import latent_attention as latent
from pallas_kernels import paged_attention as paged
from pallas_kernels.target import Declined
from tests.ops.pages import Pages, make_pages
from tests.pallas_kernels.conftest import assert_accurate

TINY = paged.Config(split=64, stages=2, fan_in=2)
"""Splits of one tile and a merge of two at a time: every part of the kernels runs on short sequences."""


def make(lengths, queries, length=1, *, seed=0, **shape) -> Pages:
    return make_pages(seed, lengths, queries, length, dtype="bfloat16", **{"dim": 64, **shape})


def attend(pages: Pages, config: paged.Config = TINY, softcap: float | None = None, **options: Any) -> jax.Array:
    """Run the kernel and hold it to the accuracy rule."""
    out = paged.paged_attention(*pages, config=config, softcap=softcap, **options)
    options["scoring"] = Scoring(softcap=softcap)
    wide = (x.astype(jnp.float32) for x in pages[:3])
    exact = ops.paged_attention_reference(*wide, *pages[3:], **options)
    assert_accurate(out, ops.paged_attention_xla(*pages, **options), exact)
    return out


def attend_latents(pages: Pages, config: paged.Config = TINY) -> jax.Array:
    """Run the latent kernel and hold it to the accuracy rule."""
    latents, options = pages.k[:, :, 0], {"value_dim": 128, "scale": 0.1}
    out = latent.latent_attention(pages.q, latents, *pages[3:], config=config, **options)
    wide = (x.astype(jnp.float32) for x in (pages.q, latents))
    exact = ops.latent_attention_reference(*wide, *pages[3:], **options)
    assert_accurate(out, ops.latent_attention_xla(pages.q, latents, *pages[3:], **options), exact)
    return out


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint16)


@pytest.mark.usefixtures("interpreter")
class TestPaged:
    def test_decode_has_the_same_bits_in_any_batch_and_any_table(self):
        """Three splits in two levels beside an empty sequence and one of one token; then alone, with a longer table."""
        pages = make([130, 0, 1], [1, 0, 1], heads=4, kv_heads=1, page=64)
        together = attend(pages)
        assert not np.asarray(together[1]).any()
        q, tables, *lengths = (x[:1] for x in (pages.q, *pages[3:]))
        longer = jnp.pad(tables, ((0, 0), (0, 3)), constant_values=-1)
        alone = attend(Pages(q, pages.k, pages.v, longer, *lengths))
        np.testing.assert_array_equal(bits(alone[0]), bits(together[0]))

    def test_verified_tokens_have_the_bits_of_single_ones(self):
        """Small pages, a split before the window, capped scores and sinks, 3 query tokens of 8 heads a kv head."""
        options = {"window": 40, "softcap": 5.0, "sinks_N": jnp.linspace(-1.0, 2.0, 8)}
        pages = make([140, 33], [3, 2], 3, heads=8, kv_heads=1, page=16)
        many = attend(pages, **options)
        assert not np.asarray(many[1, 2]).any()
        last = jnp.stack([pages.q[0, 2:], pages.q[1, 1:2]])
        one = attend(pages._replace(q=last, query_lengths=jnp.array([1, 1], jnp.int32)), **options)
        np.testing.assert_array_equal(bits(one[:, 0]), bits(jnp.stack([many[0, 2], many[1, 1]])))

    def test_a_table_of_one_split_needs_no_merge(self):
        """A page of two tiles, a head of its own for each kv head, keys wider than values."""
        pages = make([100, 0], [1, 1], heads=2, kv_heads=2, page=128, dim=128, value_dim=64)
        out = attend(pages, paged.Config(stages=2), sinks_N=jnp.array([0.5, -0.5]))
        assert not np.asarray(out[1]).any()

    def test_a_chunk_of_a_prompt_fills_several_row_tiles(self):
        attend(make([80], [20], 24, heads=4, kv_heads=1, page=16))

    def test_latent_pages_give_keys_and_values(self):
        """Sixteen heads, splits of one tile, a merge; the same bits alone."""
        pages = make([100, 0, 1], [1, 1, 1], heads=16, kv_heads=1, dim=192, page=64)
        together = attend_latents(pages)
        assert not np.asarray(together[1]).any()
        q, tables, *lengths = (x[:1] for x in (pages.q, *pages[3:]))
        alone = attend_latents(Pages(q, pages.k, pages.v, tables, *lengths))
        np.testing.assert_array_equal(bits(alone[0]), bits(together[0]))

    def test_latent_rows_fill_several_tiles(self):
        """Heads of two tokens, more than a tile's rows; several tiles a split, small pages."""
        pages = make([150], [2], 2, heads=40, kv_heads=1, dim=192, page=16)
        attend_latents(pages, paged.Config(split=192, stages=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, r"dtypes of q, k, v \(float32\) must be one, bfloat16 or float16"),
        ({"dim": 80}, r"key head dim \(80\) must be 64, 128, 192 or 256"),
        ({"page": 48}, r"page size \(48\) must be 8, 16, 32 or a multiple of the tile \(64\)"),
        ({"heads": 3}, r"query heads \(3\) must divide by key/value heads \(2\)"),
    ],
)
def test_what_has_no_tiles_is_declined_by_value_and_rule(change, message):
    pages = make_pages(0, [5], [1], 1, **{"dim": 64, "page": 64, "dtype": "bfloat16", **change})
    with pytest.raises(Declined, match=message + '; use implementation="xla"'):
        paged.paged_attention(*pages)


def test_latent_attention_declines_other_dims():
    pages = make([5], [1], heads=4, kv_heads=1, dim=80, page=64)
    with pytest.raises(
        Declined, match=r'value dim \(64\) of latent dim \(80\) must be 128, 256 or 512.*use implementation="xla"'
    ):
        latent.latent_attention(pages.q, pages.k[:, :, 0], *pages[3:], value_dim=64, scale=0.1)


@pytest.mark.parametrize("splits", [{"split": 96}, {"tile": 32}])
def test_splits_and_tiles_must_fit(splits):
    with pytest.raises(Declined, match="must divide by tile"):
        paged.paged_attention(*make([5], [1], page=64), config=paged.Config(**splits))
