"""Does the flash attention kernel give softmax attention and its log-sum-exp, whoever may see whom?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import Config, flash_attention
from pallas_kernels.flash_blocks import Options, block_walks
from pallas_kernels.target import Declined
from tests.pallas_kernels.attention_reference import dense_attention
from tests.pallas_kernels.conftest import assert_accurate

SMALL = Config(warpgroups=2, block_kv=64)


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def inputs(lengths, heads, dims, batch=1, dtype=jnp.bfloat16):
    (length, keys), (q_heads, kv_heads), (dim, value_dim) = lengths, heads, dims
    q = normal(0, batch, length, q_heads, dim, dtype=dtype)
    return (
        q,
        normal(1, batch, keys, kv_heads, dim, dtype=dtype),
        normal(2, batch, keys, kv_heads, value_dim, dtype=dtype),
    )


def documents(*lengths):
    """Number the tokens of packed documents by their document."""
    return jnp.asarray([np.repeat(np.arange(len(row)), row) for row in lengths], jnp.int32)


def attend(arrays, config=None, **options):
    return jax.jit(functools.partial(flash_attention, config=config, **options))(*arrays)


def check(arrays, config=None, **options):
    o, lse = attend(arrays, config, **options)
    plain, _ = dense_attention(*arrays, **options)
    exact, exact_lse = dense_attention(*(x.astype(jnp.float32) for x in arrays), **options)
    assert_accurate(o, plain, exact)
    assert_same_lse(lse, exact_lse)


def assert_same_lse(lse, exact_lse):
    """Float32 sums of a few hundred exponentials, in another order and in base 2: some 1e-6 apart."""
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=1e-5)


def test_causal_with_three_warpgroups_and_one_row_too_many(interpreter):
    check(inputs((193, 193), (2, 1), (64, 64)))


def test_full_with_ragged_keys_at_width_128(interpreter):
    check(inputs((70, 257), (1, 1), (128, 128)), causal=False)


def test_wider_keys_than_values(interpreter):
    check(inputs((130, 130), (1, 1), (192, 128)))


def test_packed_documents_of_their_own_in_each_row(interpreter):
    ids = documents((50, 30, 120), (200,))
    check(inputs((200, 200), (2, 2), (64, 64), batch=2), SMALL, q_segments_BT=ids, k_segments_BS=ids)


def test_documents_that_are_no_runs_and_more_keys_than_queries(interpreter):
    ids = jnp.arange(150)[None] // 7 % 3
    arrays = inputs((100, 150), (1, 1), (64, 64))
    check(arrays, SMALL, q_segments_BT=ids[:, 50:], k_segments_BS=ids, offset=50, window=60)


def test_window_and_sinks_with_queries_before_all_keys(interpreter):
    arrays = inputs((150, 190), (2, 1), (64, 64))
    check(arrays, SMALL, window=40, sinks_N=jnp.array([0.5, -3.0]), offset=-20)


def test_softcap_and_scale_in_float16(interpreter):
    check(inputs((60, 130), (1, 1), (64, 64), dtype=jnp.float16), SMALL, causal=False, softcap=5.0, scale=0.5)


def test_who_sees_nothing_gets_zero_and_minus_infinity(interpreter):
    arrays = inputs((70, 70), (1, 1), (64, 64))
    o, lse = attend(arrays, SMALL, offset=jnp.int32(-65))
    assert not np.asarray(o[0, :65]).any()
    assert np.isneginf(lse[0, :65]).all()
    exact, _ = dense_attention(*(x.astype(jnp.float32) for x in arrays), offset=-65)
    assert_accurate(o, dense_attention(*arrays, offset=-65)[0], exact)


def test_nothing_leaks_from_or_into_the_next_row(interpreter):
    q, k, v = inputs((70, 70), (1, 1), (64, 64), batch=2)
    poisoned = tuple(x.at[1].set(jnp.nan) for x in (q, k, v))
    o, lse = attend(poisoned, SMALL, causal=False)
    exact, exact_lse = dense_attention(*(x[:1].astype(jnp.float32) for x in (q, k, v)), causal=False)
    assert_accurate(o[:1], dense_attention(q[:1], k[:1], v[:1], causal=False)[0], exact)
    assert_same_lse(lse[:1], exact_lse)


def test_halves_of_the_keys_merge_to_the_whole(interpreter):
    q, k, v = inputs((128, 128), (1, 1), (64, 64))
    half = jax.jit(functools.partial(flash_attention, config=SMALL))
    parts = [half(q, k[:, s : s + 64], v[:, s : s + 64], offset=jnp.int32(-s)) for s in (0, 64)]
    exact, exact_lse = dense_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    lse = jnp.logaddexp(parts[0][1], parts[1][1])
    merged = sum(o.astype(jnp.float32) * jnp.exp(part - lse)[..., None] for o, part in parts)
    assert_same_lse(lse, exact_lse)
    assert_accurate(merged.astype(jnp.bfloat16), dense_attention(q, k, v)[0], exact)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 37)])
@pytest.mark.parametrize("offset", [0, 41, -130, -1000])
@pytest.mark.parametrize("packed", [False, True])
def test_walks_visit_what_is_visible_once_and_mask_what_they_must(transposed, causal, window, offset, packed):
    (length, keys), (block_q, block_kv) = (300, 217), (64, 32)
    q_ids, k_ids = documents((10, 190, 100), (150, 150)), documents((64, 100, 53), (100, 117))
    ids = (q_ids, k_ids) if packed else (None, None)
    walks = block_walks(
        (length, keys), (block_q, block_kv), jnp.int32(offset), *ids, Options(causal, window, None, 1.0), transposed
    )
    ahead = np.arange(length)[:, None] + offset - np.arange(keys)[None]
    seen = (ahead >= 0) | (not causal)
    seen = (seen & (ahead < window) if window else seen)[None]
    if packed:
        seen = seen & (np.asarray(q_ids)[:, :, None] == np.asarray(k_ids)[:, None])
    q_blocks, k_blocks = -(-length // block_q), -(-keys // block_kv)
    for b, i in np.ndindex(len(seen), k_blocks if transposed else q_blocks):
        first, late, masked, steps = np.asarray(walks)[b, i]
        visited = [first - late + s + (steps if s < late else 0) for s in range(steps)]
        assert steps >= 1 and len(set(visited)) == steps
        for j in range(q_blocks if transposed else k_blocks):
            qb, kb = (j, i) if transposed else (i, j)
            tile = seen[b, qb * block_q : (qb + 1) * block_q, kb * block_kv : (kb + 1) * block_kv]
            assert j in visited or not tile.any()
            if j in visited[masked:]:
                assert tile.all() and (transposed or (kb + 1) * block_kv <= keys)


def test_what_the_kernel_cannot_take_is_declined_with_the_reason():
    q, k, v = inputs((64, 64), (1, 1), (64, 64))
    with pytest.raises(Declined, match=r"dtypes of q, k, v \(float32"):
        flash_attention(q.astype(jnp.float32), k, v)
    with pytest.raises(Declined, match=r"head dims \(32, 64\) must be multiples of 64"):
        flash_attention(q[..., :32], k[..., :32], v)
    with pytest.raises(Declined, match=r"window \(8\) must be at least 1 and causal \(False\)"):
        flash_attention(q, k, v, causal=False, window=8)
    with pytest.raises(Declined, match=r"needs \d+ bytes of shared memory"):
        flash_attention(q, k, v, config=Config(block_kv=256, stages=4))
    with pytest.raises(ValueError, match="both be given, or neither"):
        flash_attention(q, k, v, q_segments_BT=jnp.zeros((1, 64), jnp.int32))
