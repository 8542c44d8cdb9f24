"""Rows over `expert` and back: exact under any skew, in a buffer that skew does not change; the ragged way on paper.

The experts' stand-in gives tanh(x W_e) + slot * c for each row, so that a row at a wrong expert, with another's slot
number, twice or not at all shows; the oracle does the same to each row on one device.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from moejax.config.mesh import MeshConfig
from moejax.parallel import exchange
from moejax.parallel.exchange import exchange_rows, quota, uses_ragged
from moejax.parallel.plan import MeshPlan
from tests.conftest import assert_close

R, D, E, RANKS = 12, 3, 8, 4
pytestmark = pytest.mark.usefixtures("x64")


def plan_of(data: int = 1, **changes) -> MeshPlan:
    return MeshPlan.from_config(MeshConfig(data=data, expert=RANKS, **changes), jax.devices()[: data * RANKS])


# --- who goes where: rows per expert, [devices, E]


def even(devices: int) -> np.ndarray:
    sizes = np.ones((devices, E), int)
    sizes[:, ::2] += 1
    return sizes


def hot(devices: int) -> np.ndarray:
    """All rows of all devices to one expert."""
    sizes = np.zeros((devices, E), int)
    sizes[:, 5] = R
    return sizes


def one_sender(devices: int) -> np.ndarray:
    """One device has rows, the others none."""
    sizes = np.zeros((devices, E), int)
    sizes[2] = [0, 9, 0, 0, 0, 0, 1, 0]
    return sizes


def skewed(devices: int, seed: int = 0) -> np.ndarray:
    """Fewer rows than there is room for, some experts popular, some never chosen."""
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.full(E, 0.3))
    return np.stack([rng.multinomial(rng.integers(0, R + 1), popularity) for _ in range(devices)])


def none(devices: int) -> np.ndarray:
    return np.zeros((devices, E), int)


ROUTINGS = (even, hot, one_sender, skewed, none)


# --- the program and its oracle


def run(weights, constants, x_XD, sizes_e, slots_X):
    """Stand in for local experts; rows beyond the groups give junk, which nobody may see."""
    expert_X = jnp.searchsorted(jnp.cumsum(sizes_e), jnp.arange(x_XD.shape[0]), side="right")
    y_XD = jnp.einsum("XD,XDF->XF", x_XD, weights.at[expert_X].get(mode="clip"))
    y_XD = jnp.tanh(y_XD) + (slots_X[:, None].astype(y_XD.dtype) * constants[0] if constants else 0.0)
    return jnp.where((expert_X < sizes_e.shape[0])[:, None], y_XD, 1e6)


@functools.cache
def program(plan: MeshPlan, dropping: bool = True):
    """Give the jitted (x, weights, slots, sizes, dy) -> (y, dx, dweights)."""

    def with_gradients(x, weights, slots, sizes, dy):
        constants = (jnp.float64(1e-9),) if dropping else ()
        y, pullback = jax.vjp(lambda x, w: exchange_rows(plan, run, w, constants, x, slots, sizes), x, weights)
        return y, *pullback(dy)

    rows, numbers, experts = plan.spec("batch", None), plan.spec("batch"), plan.spec("experts", None, None)
    return jax.jit(plan.spmd(with_gradients, (rows, experts, numbers, numbers, rows), (rows, rows, experts)))


@functools.cache
def oracle(dropping: bool):
    """Give the same of [devices, R] rows on one device, every row through its own expert."""

    def forward(x, weights, slots, sizes):
        expert_PR = jax.vmap(lambda s: jnp.searchsorted(jnp.cumsum(s), jnp.arange(R), side="right"))(sizes)
        y = jnp.tanh(jnp.einsum("PRD,PRDF->PRF", x, weights.at[expert_PR].get(mode="clip")))
        y += slots[..., None].astype(y.dtype) * 1e-9 if dropping else 0.0
        return jnp.where((expert_PR < E)[..., None], y, 0.0)

    @jax.jit
    def with_gradients(x, weights, slots, sizes, dy):
        y, pullback = jax.vjp(lambda x, w: forward(x, w, slots, sizes), x, weights)
        return y, *pullback(dy)

    return with_gradients


def draw(devices: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    slots = rng.integers(0, 2**32, (devices, R), dtype=np.uint32)
    return [rng.normal(size=(devices, R, D)), rng.normal(size=(E, D, D)), slots, rng.normal(size=(devices, R, D))]


def assert_exact(plan: MeshPlan, sizes: np.ndarray, dropping: bool = True, seed: int = 0) -> None:
    devices = plan.mesh.size
    x, weights, slots, dy = draw(devices, seed)
    flat = x.reshape(-1, D), weights, slots.reshape(-1), sizes.reshape(-1), dy.reshape(-1, D)
    y, dx, dweights = program(plan, dropping)(*flat)
    expected = oracle(dropping)(x, weights, slots, sizes, dy)
    assert_close((y.reshape(x.shape), dx.reshape(x.shape), dweights), expected)
    beyond = np.arange(R) >= sizes.sum(1)[:, None]
    assert not np.asarray(y).reshape(x.shape)[beyond].any(), "rows that are not chosen give exactly nothing"
    assert not np.asarray(dx).reshape(x.shape)[beyond].any()
    assert not np.asarray(dweights)[sizes.sum(0) == 0].any(), "nor does an expert without rows learn"


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5, 100.0])
def test_every_row_meets_its_expert_and_comes_back(factor, routing):
    assert_exact(plan_of(exchange_factor=factor), routing(RANKS))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_replicas_of_the_experts_exchange_among_themselves(routing):
    """Rounds are counted over all devices: the hot group must not leave the other one behind."""
    sizes = routing(2 * RANKS)
    sizes[RANKS:] = even(RANKS)
    assert_exact(plan_of(data=2, exchange_factor=0.7), sizes, dropping=False)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_routing_is_exact(seed):
    assert_exact(plan_of(exchange_factor=0.3), skewed(RANKS, seed), seed=seed)


@pytest.mark.parametrize("exchange", ["padded", "ragged"])
def test_an_expert_runs_the_rows_it_was_sent_once_and_no_padding(monkeypatch, exchange):
    """What is run and thrown away changes no result: count it."""
    monkeypatch.setattr(lax, "ragged_all_to_all", emulated)
    plan, seen = plan_of(exchange_factor=0.5, exchange=exchange), []

    def counting(weights, constants, x_XD, sizes_e, slots_X):
        jax.debug.callback(
            lambda rank, sizes: seen.append((int(rank), np.asarray(sizes))), plan.index("experts"), sizes_e
        )
        return run(weights, constants, x_XD, sizes_e, slots_X)

    def forward(x, weights, slots, sizes):
        return exchange_rows(plan, counting, weights, (), x, slots, sizes)

    specs = (plan.spec("batch", None), plan.spec("experts", None, None), plan.spec("batch"), plan.spec("batch"))
    program = jax.jit(plan.spmd(forward, specs, specs[0]))
    x, weights, slots, _ = draw(RANKS)
    for routing, rounds in ((hot, 6), (even, 2)):
        seen.clear()
        program(x.reshape(-1, D), weights, slots.reshape(-1), routing(RANKS).reshape(-1)).block_until_ready()
        jax.effects_barrier()
        total = np.zeros((RANKS, E // RANKS), int)
        for rank, sizes in seen:
            total[rank] += sizes
        np.testing.assert_array_equal(total.reshape(-1), routing(RANKS).sum(0))
        assert len(seen) == RANKS * rounds
        assert all(sizes.sum() <= RANKS * quota(plan, R) for _, sizes in seen)


# --- rounds and memory


def test_a_hot_expert_takes_more_rounds():
    """A rank sends one peer 3 rows of 12 evenly, 12 where all go to one."""
    plan = plan_of(exchange_factor=1.0)
    assert quota(plan, R) == 3

    def count(sizes):
        return plan.agree(exchange._count(plan, sizes, quota(plan, R), R).rounds)

    rounds_of = jax.jit(plan.spmd(count, (plan.spec("batch"),), plan.spec()))
    for sizes, rounds in ((even(RANKS), 1), (hot(RANKS), 4), (one_sender(RANKS), 3), (none(RANKS), 0)):
        assert rounds_of(sizes.reshape(-1)) == rounds


def test_a_quota_is_a_multiple_of_the_even_share_and_no_more_than_all():
    assert [quota(plan_of(exchange_factor=f), R) for f in (0.1, 0.3, 1.0, 1.5, 4.0, 100.0)] == [1, 1, 3, 5, 12, 12]


@pytest.mark.parametrize("factor", [0.3, 1.5, 100.0])
def test_the_buffers_are_quotas_of_all_ranks_and_nothing_larger(factor):
    """Shapes are the program's, which knows of no routing: skew costs rounds."""
    plan = plan_of(exchange_factor=factor)
    rows = RANKS * quota(plan, R)
    seen = []

    def record(weights, constants, x_XD, sizes_e, slots_X):
        seen.append(x_XD.shape)
        return run(weights, constants, x_XD, sizes_e, slots_X)

    def forward(x, weights, slots, sizes):
        return exchange_rows(plan, record, weights, (), x, slots, sizes)

    specs = (plan.spec("batch", None), plan.spec("experts", None, None), plan.spec("batch"), plan.spec("batch"))
    x, weights, slots, _ = draw(RANKS)
    arrays = x.reshape(-1, D), weights, slots.reshape(-1), even(RANKS).reshape(-1)
    text = str(jax.make_jaxpr(plan.spmd(forward, specs, specs[0]))(*arrays))
    assert set(seen) == {(rows, D)}
    assert ("while" in text) == (quota(plan, R) < R), "with room for all there is one round, and no loop"


# --- the ragged way


def test_auto_pads_on_a_cpu_and_is_ragged_elsewhere():
    assert not uses_ragged(plan_of())
    assert uses_ragged(plan_of(exchange="ragged"))
    assert not uses_ragged(plan_of(exchange="padded"))
    for platform, ragged in (("gpu", True), ("tpu", True), ("cpu", False)):
        mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
        assert uses_ragged(SimpleNamespace(config=MeshConfig(), mesh=mesh)) == ragged  # type: ignore[arg-type]


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Do by dense all-to-alls what jax's documentation of ragged_all_to_all says; where its rules are broken, junk."""
    most = jnp.arange(max(operand.shape[0], output.shape[0]))
    source = input_offsets[:, None] + most
    sent = most < send_sizes[:, None]
    parts = jnp.where(sent[..., None], operand.at[source].get(mode="fill", fill_value=0), 0)
    parts = lax.all_to_all(parts, axis_name, 0, 0, tiled=True)
    lands = lax.all_to_all(output_offsets, axis_name, 0, 0, tiled=True)
    come = most < recv_sizes[:, None]
    places = jnp.where(come, lands[:, None] + most, output.shape[0])
    agreed = (lax.all_to_all(recv_sizes, axis_name, 0, 0, tiled=True) == send_sizes).all()
    inside = jnp.where(sent, (source >= 0) & (source < operand.shape[0]), True).all()
    inside &= jnp.where(come, (lands[:, None] >= 0) & (places < output.shape[0]), True).all()
    result = output.at[places.reshape(-1)].set(parts.reshape(-1, operand.shape[1]), mode="drop")
    broken = jnp.nan if jnp.issubdtype(result.dtype, jnp.inexact) else -(2**30)
    return jnp.where(agreed & inside, result, jnp.asarray(broken, result.dtype))


def test_the_emulation_gives_the_documentation_s_example():
    plan = MeshPlan.from_config(MeshConfig(expert=2), jax.devices()[:2])
    arrays = [[1, 2, 2, 3, 4, 0], [0] * 8, [0, 1] * 2, [1, 2, 1, 1], [0, 0, 1, 2], [1, 1, 2, 1]]

    def f(operand, output, *rest):
        return emulated(operand[:, None], output[:, None], *rest, axis_name="expert")[:, 0]

    spec = plan.spec("experts")
    result = jax.jit(plan.spmd(f, (spec,) * 6, spec))(*map(jnp.asarray, arrays))
    np.testing.assert_array_equal(result, [1, 3, 0, 0, 2, 2, 4, 0])


@pytest.mark.parametrize(("factor", "dropping"), [(0.5, True), (1.5, False)])
def test_the_ragged_way_sends_the_same_rows(monkeypatch, factor, dropping):
    calls = []

    def counted(*args, **options):
        calls.append(args[0].shape)
        return emulated(*args, **options)

    monkeypatch.setattr(exchange.lax, "ragged_all_to_all", counted)
    for routing in ROUTINGS:
        assert_exact(plan_of(exchange="ragged", exchange_factor=factor), routing(RANKS), dropping)
    assert calls, "it was not the padded way"


def test_the_ragged_way_lowers_for_a_gpu():
    """XLA:CPU cannot run it, but what is sent, and its gradient, is a program that jax accepts."""
    plan = plan_of(exchange="ragged")
    x, weights, slots, dy = draw(RANKS)
    arrays = x.reshape(-1, D), weights, slots.reshape(-1), even(RANKS).reshape(-1), dy.reshape(-1, D)
    text = program.__wrapped__(plan, True).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    # Out and home, forward and backward, in the first round and in the loop; slot numbers go out alone.
    assert text.count("ragged_all_to_all") >= 8
