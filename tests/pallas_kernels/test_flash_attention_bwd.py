"""Do the two backward kernels give the gradients of softmax attention, whoever may see whom?"""

import functools
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention_bwd import Config, flash_attention_bwd
from pallas_kernels.target import Declined
from tests.pallas_kernels.attention_reference import dense_attention
from tests.pallas_kernels.conftest import assert_accurate
from tests.pallas_kernels.test_flash_attention import documents, inputs, normal

SMALL = Config(dq_block=64)


def gradients(arrays, cotangents, dtype, **options):
    """Give the reference's o, lse and gradients, worked out in a dtype."""
    attention = functools.partial(dense_attention, **options)
    (o, lse), vjp = jax.vjp(attention, *(x.astype(dtype) for x in arrays))
    do, dlse = cotangents
    return o, lse, vjp((do.astype(o.dtype), dlse.astype(lse.dtype)))


def check(arrays, config=None, **options):
    q, _, v = arrays
    do = normal(3, *q.shape[:3], v.shape[3], dtype=q.dtype)
    seen = ~jnp.isneginf(dense_attention(*arrays, **options)[1])
    dlse = jnp.where(seen, normal(4, *q.shape[:3], dtype=jnp.float32), 0.0)
    o, lse, exact = gradients(arrays, (do, dlse), jnp.float32, **options)
    delta = (do.astype(jnp.float32) * o).sum(-1) - dlse
    known = {name: value for name, value in options.items() if name != "sinks_N"}
    kernel = jax.jit(functools.partial(flash_attention_bwd, config=config, **known))
    found = kernel(*arrays, do, lse, delta)
    _, _, plain = gradients(arrays, (do, dlse), q.dtype, **options)
    for each in zip(found, plain, exact, strict=True):
        assert_accurate(*each)


def test_causal_gradients_at_an_offset_sum_over_a_group_of_heads(interpreter):
    check(inputs((100, 140), (2, 1), (64, 64)), SMALL, offset=50)


def test_full_gradients_with_ragged_ends_at_width_128(interpreter):
    check(inputs((70, 150), (1, 1), (128, 128)), causal=False)


def test_gradients_of_wider_keys_than_values(interpreter):
    check(inputs((70, 70), (1, 1), (192, 128)))


def test_gradients_in_packed_documents_under_a_window_with_sinks(interpreter):
    ids = documents((30, 30, 40), (100,))
    arrays = inputs((100, 100), (1, 1), (64, 64), batch=2)
    check(arrays, SMALL, q_segments_BT=ids, k_segments_BS=ids, window=45, sinks_N=jnp.array([0.7]))


def test_softcap_gradients_and_queries_that_see_nothing(interpreter):
    check(inputs((100, 70), (1, 1), (64, 64)), SMALL, softcap=1.5, scale=0.5, offset=-30)


def test_parts_of_the_keys_sum_to_the_whole(interpreter):
    q, k, v = arrays = inputs((128, 128), (1, 1), (64, 64))
    do = normal(3, *v.shape)
    o, lse, exact = gradients(arrays, (do, jnp.zeros(q.shape[:3])), jnp.float32)
    delta = (do.astype(jnp.float32) * o).sum(-1)
    part = jax.jit(functools.partial(flash_attention_bwd, config=SMALL))
    parts = [part(q, k[:, s : s + 64], v[:, s : s + 64], do, lse, delta, offset=jnp.int32(-s)) for s in (0, 64)]
    dq = sum(dq.astype(jnp.float32) for dq, _, _ in parts).astype(q.dtype)
    dk, dv = (jnp.concatenate(halves, axis=1) for halves in zip(*(rest for _, *rest in parts), strict=True))
    _, _, plain = gradients(arrays, (do, jnp.zeros(q.shape[:3])), q.dtype)
    for each in zip((dq, dk, dv), plain, exact, strict=True):
        assert_accurate(*each)


def test_the_reference_agrees_with_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        arrays = [jnp.asarray(rng.standard_normal((1, 5, heads, 4))) for heads in (2, 1, 1)]
        attention = functools.partial(dense_attention, softcap=2.0, window=3, sinks_N=jnp.array([0.3, -1.0]))
        check_grads(attention, arrays, order=1, modes=["rev"])


@pytest.mark.usefixtures("untraced")
def test_what_the_forward_takes_the_backward_takes():
    """A backward pass that declines would come too late for another way."""
    refused = set()
    for dims, dtype in product(product((32, 64, 128, 192, 256), repeat=2), (jnp.bfloat16, jnp.float16)):
        for causal, packed in product((True, False), repeat=2):
            q, k, v = (jax.ShapeDtypeStruct((1, 300, 2, dim), dtype) for dim in (dims[0], *dims))
            row = jax.ShapeDtypeStruct((1, 300, 2), jnp.float32)
            ids = [jnp.zeros((1, 300), jnp.int32)] * packed
            options = dict(zip(("q_segments_BT", "k_segments_BS"), ids * 2, strict=False), causal=causal)
            try:
                o, lse = jax.eval_shape(functools.partial(flash_attention, **options), q, k, v)
            except Declined:
                refused.add(dims)
                continue
            assert lse == row
            jax.eval_shape(functools.partial(flash_attention_bwd, **options), q, k, v, o, row, row)
    assert refused == {dims for dims in product((32, 64, 128, 192, 256), repeat=2) if {32, 256} & {*dims}}
