"""Lightning attention on Hopper, in Mosaic's interpreter with races watched, against the recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.linear_attention import _chunked, linear_attention, linear_attention_reference
from pallas_kernels.lightning_attention import Config, lightning_attention, lightning_attention_bwd
from pallas_kernels.target import Declined
from tests.pallas_kernels.conftest import assert_accurate, rms

CASES = {
    "dim128_packed": {"length": 70, "heads": 1, "dim": 128, "ends": (40, 64)},
    "dim64_packed_spans": {"length": 130, "heads": 2, "dim": 64, "ends": (63, 64, 129), "span": 1},
    "dim64_slots_used_again": {"length": 129, "heads": 2, "dim": 64, "span": 3, "stages": 1},
}


def draw(length, heads, dim, batch=1, ends=None, span=None, stages=3, decay=None):
    rng = np.random.default_rng(length + dim)
    q, k, v, do = (jnp.asarray(rng.normal(size=(batch, length, heads, dim)), jnp.bfloat16) for _ in range(4))
    state, dstate = (jnp.asarray(rng.normal(size=(batch, heads, dim, dim)), jnp.float32) for _ in range(2))
    decay = -jnp.exp2(-jnp.arange(heads) * 4.0) if decay is None else jnp.full(heads, decay)
    document = None
    if ends is not None:
        document = jnp.asarray(np.searchsorted(ends, np.arange(length), side="right"), jnp.int32)
        document = jnp.broadcast_to(document, (batch, length))
    config = None if span is None else Config(span, stages)
    return (q, k, v, decay.astype(jnp.float32), state, document), (do, dstate), config


def plain_and_exact(inputs, cotangents):
    """The chunked way in the kernel's dtype, and the recurrence in float32: outputs and gradients."""

    def run(attend, q, k, v, decay, state, document, do, dstate):
        out, pullback = jax.vjp(lambda q, k, v, state: attend(q, k, v, decay, state, document), q, k, v, state)
        return (*out, *pullback((do.astype(out[0].dtype), dstate)))

    q, k, v, decay, state, document = inputs
    wide = (*(x.astype(jnp.float32) for x in (q, k, v)), decay, state, document)
    with jax.default_matmul_precision("highest"):
        return run(_chunked, *inputs, *cotangents), run(linear_attention_reference, *wide, *cotangents)


@pytest.mark.parametrize("name", CASES)
def test_it_matches_the_recurrence_forward_and_backward(interpreter, name):
    inputs, cotangents, config = draw(**CASES[name])
    out = lightning_attention(*inputs, config)
    gradients = lightning_attention_bwd(*inputs, *cotangents, config)
    for got, plain, exact in zip((*out, *gradients), *plain_and_exact(inputs, cotangents), strict=True):
        assert_accurate(got, plain.astype(jnp.bfloat16), exact)


def test_rows_and_tokens_elsewhere_do_not_leak(interpreter):
    """The last chunk reaches 63 tokens past the row's end, into the next row: NaN there."""
    (q, k, v, decay, state, _), _, _ = draw(length=65, heads=1, dim=64, batch=2)
    q, k, v, state = (x.at[1].set(jnp.nan) for x in (q, k, v, state))
    o, last = lightning_attention(q, k, v, decay, state)
    exact, exact_last = linear_attention_reference(*(x[:1].astype(jnp.float32) for x in (q, k, v)), decay, state[:1])
    plain, plain_last = _chunked(q[:1], k[:1], v[:1], decay, state[:1], None)
    assert_accurate(o[:1], plain, exact)
    assert_accurate(last[:1], plain_last.astype(jnp.bfloat16), exact_last)


@pytest.mark.parametrize("decay", [-60.0, 0.0])
def test_the_strongest_and_the_weakest_decay_stay_finite(interpreter, decay):
    inputs, _, _ = draw(length=66, heads=1, dim=64, decay=decay)
    q, k, v, *rest = inputs
    exact = linear_attention_reference(*(x.astype(jnp.float32) for x in (q, k, v)), *rest)
    for x, plain, y in zip(lightning_attention(*inputs), _chunked(*inputs), exact, strict=True):
        assert_accurate(x, plain.astype(jnp.bfloat16), y)


def test_the_op_runs_it_by_name_and_differentiates_it(interpreter):
    inputs, (do, dstate), _ = draw(length=64, heads=1, dim=64)
    q, k, v, decay, state, _ = inputs

    def gradient(implementation, q, state):
        def run(q, state):
            return linear_attention(q, k, v, decay, state, implementation=implementation)

        return jax.vjp(run, q, state)[1]((do, dstate))

    for a, b in zip(gradient("mosaic", q, state), gradient("xla", q, state), strict=True):
        assert rms(np.asarray(a - b, np.float32)) < 5e-3 * rms(np.asarray(b, np.float32))


def test_what_it_cannot_take_is_declined_with_the_rule():
    (q, k, v, decay, state, _), _, _ = draw(length=8, heads=1, dim=64)
    with pytest.raises(Declined, match=r"dtypes float32, .* must be bfloat16"):
        lightning_attention(*(x.astype(jnp.float32) for x in (q, k, v)), decay, state)
    with pytest.raises(Declined, match=r"head dims 32, 32 must be equal, 64 or 128"):
        lightning_attention(q[..., :32], k[..., :32], v[..., :32], decay, state[..., :32, :32])


@pytest.mark.parametrize(("batch", "length", "groups"), [(64, 1024, 32), (1, 65536, 32), (1, 65536, 16), (4, 100, 1)])
def test_spans_fill_the_chip_and_are_no_more_than_the_chunks(batch, length, groups):
    config = Config.of(batch, length, groups)
    chunks = -(-length // 64)
    spans = -(-chunks // config.span)
    assert 1 <= spans <= chunks
    blocks = batch * groups * spans
    assert spans == chunks or blocks / (-(-blocks // 132) * 132) > 0.9
