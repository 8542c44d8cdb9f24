"""Linear attention with decay: the chunked way against the recurrence, forward and backward, whole and in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from jax.test_util import check_grads

from moejax.ops import linear_attention as module
from moejax.ops.linear_attention import linear_attention, linear_attention_reference, linear_attention_step
from tests.conftest import assert_close

B, N, H, U = 2, 3, 4, 5
SLOPES = jnp.asarray([-1e-5, -0.3, -9.0])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 8)


def draw(length, dtype=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, length, N, H), (B, length, N, H), (B, length, N, U), (B, N, H, U))
    q, k, v, state = (jnp.asarray(rng.normal(size=s), dtype or jnp.result_type(float)) for s in shapes)
    return q, k, v, SLOPES.astype(state.dtype), state.astype(jnp.promote_types(state.dtype, "float32"))


def packed(length, seed=1):
    """Ids of documents of random lengths, ascending in each row."""
    return jnp.cumsum(jnp.asarray(np.random.default_rng(seed).random((B, length)) < 0.2, jnp.int32), axis=1)


def test_the_recurrence_is_the_sum_over_the_past(x64):
    q, k, v, decay, state = draw(7)
    o, _ = linear_attention_reference(q, k, v, decay, state)
    t = np.arange(7)
    kept = np.where(t[:, None] >= t, np.exp(np.asarray(decay)[:, None, None] * (t[:, None] - t)), 0)
    scores = np.einsum("bink,bjnk->bnij", q, k) * kept
    past = np.einsum("bink,bnku->binu", q, state) * np.exp(np.asarray(decay) * (t[:, None] + 1))[None, ..., None]
    assert_close(o, np.einsum("bnij,bjnu->binu", scores, v) + past)


@pytest.mark.parametrize("length", [1, 8, 21])
@pytest.mark.parametrize("segmented", [False, True], ids=["one_document", "packed"])
def test_chunks_match_the_recurrence_forward_and_backward(x64, length, segmented):
    q, k, v, decay, state = draw(length)
    segments = packed(length) if segmented else None

    def loss(attend, q, k, v, state):
        o, last = attend(q, k, v, decay, state, segments)
        return (jnp.sin(o) ** 2).sum() + jnp.cos(last).sum(), (o, last)

    expected, fast = (
        jax.value_and_grad(lambda *args, f=f: loss(f, *args), (0, 1, 2, 3), has_aux=True)(q, k, v, state)
        for f in (linear_attention_reference, linear_attention)
    )
    assert_close(fast, expected)


def test_a_row_in_parts_is_the_whole_row(x64):
    """The state that goes out of one part comes into the next: what ranks of a sequence exchange."""
    q, k, v, decay, state = draw(20)
    whole = linear_attention(q, k, v, decay, state)
    first, between = linear_attention(q[:, :9], k[:, :9], v[:, :9], decay, state)
    second, last = linear_attention(q[:, 9:], k[:, 9:], v[:, 9:], decay, between)
    assert_close((jnp.concatenate([first, second], 1), last), whole)


def test_decoding_token_by_token_continues_a_prompt(x64):
    q, k, v, decay, _ = draw(11)
    whole, _ = linear_attention(q, k, v, decay)
    _, state = linear_attention(q[:, :10], k[:, :10], v[:, :10], decay)
    o, _ = linear_attention_step(q[:, 10], k[:, 10], v[:, 10], decay, state)
    assert_close(o, whole[:, 10])


def test_documents_packed_into_a_row_do_not_see_each_other(x64):
    q, k, v, decay, _ = draw(20)
    segments = jnp.broadcast_to(jnp.where(jnp.arange(20) < 11, 3, 7), (B, 20))
    both, last = linear_attention(q, k, v, decay, None, segments)
    first, _ = linear_attention(q[:, :11], k[:, :11], v[:, :11], decay)
    second, state = linear_attention(q[:, 11:], k[:, 11:], v[:, 11:], decay)
    assert_close((both, last), (jnp.concatenate([first, second], 1), state))


def test_strong_decay_over_a_long_row_neither_overflows_nor_divides(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 128)
    q, k, v, _, state = draw(500, jnp.float32)
    decay = jnp.asarray([-50.0, -0.0, -1e-6], jnp.float32)
    value, gradients = jax.value_and_grad(lambda *a: linear_attention(*a[:3], decay, a[3])[0].sum(), (0, 1, 2, 3))(
        q, k, v, state
    )
    assert all(np.isfinite(x).all() for x in (value, *gradients))


def test_gradients_match_finite_differences(x64):
    q, k, v, decay, state = draw(10)
    f = jax.jit(lambda q, k, v, state: linear_attention(q, k, v, decay, state, packed(10)))
    # Differences over 2e-4 differ from the derivative by some 1e-9 third ones, large in a product of three arrays.
    check_grads(f, (q, k, v, state), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_the_decay_belongs_to_the_architecture_and_gets_no_gradient():
    q, k, v, decay, state = draw(9, jnp.float32)
    for attend in (linear_attention, linear_attention_reference):
        assert not jax.grad(lambda decay, f=attend: f(q, k, v, decay, state)[0].sum())(decay).any()


def test_low_precision_inputs_keep_a_float32_state():
    q, k, v, decay, _ = draw(40, jnp.bfloat16)
    o, state = linear_attention(q, k, v, decay)
    assert (o.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    exact, exact_state = linear_attention_reference(*(x.astype(jnp.float32) for x in (q, k, v)), decay)
    assert_close(o, exact)
    assert_close(state, exact_state, "bfloat16")


def test_the_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match='linear_attention: implementation "flash" must be one of auto, mosaic, xla'):
        linear_attention(*draw(8)[:4], implementation="flash")


def test_heads_and_rows_split_over_devices_match_the_whole(x64):
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    q, k, v, decay, _ = draw(12)
    rows = PartitionSpec("data")

    def loss(q, k, v, decay):
        return jnp.sin(linear_attention(q, k, v, decay)[0]).sum(keepdims=True)[:, 0, 0, 0]

    split = jax.shard_map(loss, mesh=mesh, in_specs=(rows, rows, rows, PartitionSpec()), out_specs=rows)
    gradient = jax.jit(jax.grad(lambda *a: split(*a).sum(), (0, 1, 2)))(q, k, v, decay)
    assert_close(gradient, jax.grad(lambda *a: loss(*a).sum(), (0, 1, 2))(q, k, v, decay))
