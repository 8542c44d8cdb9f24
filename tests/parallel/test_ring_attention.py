"""Attention over a split sequence: both ways against naive attention on one device, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.mesh import MeshConfig
from moejax.ops.attention import attention
from moejax.ops.mask import PLAIN, Mask
from moejax.parallel import ring_attention as ring
from moejax.parallel.plan import MeshPlan
from moejax.parallel.ring_attention import context_attention
from tests.conftest import assert_close

B, T, N, K, H = 2, 16, 8, 4, 4


def plan_of(context: str, ranks: int, data: int = 1, tensor: int = 1) -> MeshPlan:
    config = MeshConfig(data=data, sequence=ranks, tensor=tensor, context=context)  # type: ignore[arg-type]
    return MeshPlan.from_config(config, jax.devices()[: data * ranks * tensor])


def draw(dtype: str = "float64", heads: int = N, kv_heads: int = K, seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, T, n, H)), dtype) for n in (heads, kv_heads, kv_heads, heads)]


def segments(kind: str = "packed") -> jax.Array:
    """One sequence of two documents and padding at its end, one of three with padding between; or whole ones."""
    rows = np.ones((2, T)) if kind == "whole" else [[1] * 7 + [2] * 6 + [0] * 3, [1] + [0] * 2 + [2] * 8 + [3] * 5]
    return jnp.asarray(rows, jnp.int32)


def with_pullback(attend, q, k, v, do):
    out, pullback = jax.vjp(attend, q, k, v)
    return out, *pullback(do)


@functools.partial(jax.jit, static_argnums=0)
def expected(window, segments, q, k, v, do):
    mask = Mask.of_segments(segments, window)
    return with_pullback(lambda *a: attention(*a, mask, implementation="reference"), q, k, v, do)


@functools.cache
def program(plan: MeshPlan, window: int | None):
    def f(segments, q, k, v, do):
        return with_pullback(lambda *a: context_attention(plan, *a, segments, window), q, k, v, do)

    heads, keys = plan.spec("batch", "seq", "heads", None), plan.spec("batch", "seq", "kv_heads", None)
    order = plan.sequence_order(T)
    run = jax.jit(plan.spmd(f, (plan.spec("batch", "seq"), heads, keys, keys, heads), (heads, heads, keys, keys)))
    back = np.argsort(order)
    return lambda *arrays: [x[:, back] for x in run(*(x[:, order] for x in arrays))]


CASES = [
    pytest.param("ring", {"ranks": 2}, None, id="ring2"),
    pytest.param("ring", {"ranks": 4}, 5, id="ring4-window"),
    pytest.param("ring", {"ranks": 4, "data": 2}, None, id="ring4-data2"),
    pytest.param("ring", {"ranks": 8}, None, id="ring8"),
    pytest.param("all_to_all", {"ranks": 2, "tensor": 2}, 5, id="all_to_all2-tensor2-window"),
    pytest.param("all_to_all", {"ranks": 4, "data": 2}, None, id="all_to_all4-data2"),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("context", "degrees", "window"), CASES)
def test_attention_and_its_gradients_are_those_of_one_device(context, degrees, window):
    run = program(plan_of(context, **degrees), window)
    for kind in ("packed", "whole"):
        q, k, v, do = draw()
        assert_close(run(segments(kind), q, k, v, do), list(expected(window, segments(kind), q, k, v, do)))


@pytest.mark.usefixtures("x64")
def test_one_key_value_head_serves_all_queries_of_a_ring():
    arrays = draw(heads=3, kv_heads=1)
    actual = program(plan_of("ring", 4, data=2), None)(segments(), *arrays)
    assert_close(actual, list(expected(None, segments(), *arrays)))


@pytest.mark.parametrize("context", ["ring", "all_to_all"])
def test_bfloat16_rounds_inputs_and_outputs_and_nothing_between(context):
    """A ring of four merges four partial results: in bfloat16 they would be rounded four times."""
    arrays = draw("bfloat16")
    actual = program(plan_of(context, 4, data=2), None)(segments(), *arrays)
    assert all(x.dtype == jnp.bfloat16 for x in actual)
    exact = expected(None, segments(), *(x.astype("float32") for x in arrays))
    assert_close(actual, list(exact), "bfloat16")


# --- who has what


@pytest.mark.parametrize("context", ["ring", "all_to_all"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_host_lays_a_sequence_out_as_the_devices_number_it(context, ranks):
    plan = plan_of(context, ranks)
    order, local = plan.sequence_order(T), T // ranks
    np.testing.assert_array_equal(np.sort(order), np.arange(T))
    np.testing.assert_array_equal(order.reshape(ranks, local), [plan.sequence_index(local, r) for r in range(ranks)])
    own = jax.jit(plan.spmd(lambda: plan.sequence_index(local), (), plan.spec("seq")))()
    np.testing.assert_array_equal(own, order)
    if context == "all_to_all":
        np.testing.assert_array_equal(order, np.arange(T))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_causality_leaves_every_rank_of_a_ring_the_same_work(ranks):
    plan, local = plan_of("ring", ranks), T // ranks
    pairs = [int((np.asarray(plan.sequence_index(local, r)) + 1).sum()) for r in range(ranks)]
    assert len(set(pairs)) == 1
    assert sum(pairs) == T * (T + 1) // 2


def test_a_step_of_the_ring_scores_half_a_square(monkeypatch):
    """The own keys cost a square; whichever other rank's keys come, half of one: the other half cannot be seen."""
    scored, honest = [], ring.partial_attention

    def recorded(q, k, *rest, **options):
        scored.append((q.shape[1], k.shape[1]))
        return honest(q, k, *rest, **options)

    monkeypatch.setattr(ring, "partial_attention", recorded)
    plan = plan_of("ring", 4)
    specs = [plan.spec("batch", "seq", None, None)] * 3 + [plan.spec("batch", "seq")]
    q, k, v, _ = draw("float32")
    jax.eval_shape(plan.spmd(lambda *a: ring.ring_attention(plan, *a), tuple(specs), specs[0]), q, k, v, segments())
    assert set(scored) == {(4, 4), (4, 2), (2, 4)}


# --- what is kept


def test_the_backward_keeps_no_rotated_keys():
    """Plain autodiff through the same forward keeps every step's keys and scores; the ring's own keeps one device's."""
    plan, length = plan_of("ring", 8), 512

    def temporaries(attend) -> int:
        def f(q, k, v, segments):
            return jax.grad(lambda *a: jnp.square(attend(*a, segments)).sum(), (0, 1, 2))(q, k, v)

        wide, flat = plan.spec(None, "seq", None, None), plan.spec(None, "seq")
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32, sharding=plan.place(wide))
        s = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=plan.place(flat))
        compiled = jax.jit(plan.spmd(f, (wide, wide, wide, flat), (wide,) * 3)).lower(x, x, x, s).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporaries(lambda *a: ring.ring_attention(plan, *a))
    plain = temporaries(lambda *a: ring._ring_fwd(plan, None, "auto", PLAIN, *a, None)[0])
    assert ours < plain / 4
