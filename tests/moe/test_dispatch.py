"""How rows reach their experts and come back: three ways, one sum; every slot processed once or counted as dropped.

Two stand-ins take the experts' place. `Stamp` writes into an output which expert saw which row under which slot number;
`Table` has a free parameter for each expert's output on each token, so that its gradient is dL/dE_i itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.layers.context import Context
from moejax.moe.dispatch import Dispatched, dispatch_capacity, dispatch_dense, dispatch_sorted
from moejax.moe.experts import Experts
from moejax.moe.router import Routing
from moejax.parallel.plan import MeshPlan
from tests.conftest import assert_close
from tests.moe.layers import context, load_of, make_layer, moe_config, padded, route, run_layer, tokens
from tests.tiny_runs import FLOAT64

B, T, A, E, D = 2, 6, 2, 4, 5
M = B * T
WAYS = ("dense", "sorted", "capacity")


def dispatch(way: str, experts, x, routing: Routing, where: Context, slots: int = T) -> Dispatched:
    if way == "capacity":
        return dispatch_capacity(experts, x, routing, where, slots)
    return {"dense": dispatch_dense, "sorted": dispatch_sorted}[way](experts, x, routing, where)


def draw_routing(seed: int, rate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw different experts for each token, any weights, and which slots are chosen."""
    rng = np.random.default_rng(seed)
    popularity = rng.gumbel(size=E) * 2  # skewed: some experts overflow
    scores = popularity + rng.gumbel(size=(B, T, E))
    experts = np.argsort(-scores, axis=-1)[..., :A].astype(np.int32)
    return experts, rng.normal(size=(B, T, A)), rng.random((B, T, A)) < rate


def to_routing(experts, weights, chosen) -> Routing:
    experts, weights, chosen = jnp.asarray(experts), jnp.asarray(weights), jnp.asarray(chosen)
    zeros = jnp.zeros((B, T, E), weights.dtype)
    return Routing(experts, weights, chosen, zeros, zeros)


def kept_by_numpy(experts: np.ndarray, chosen: np.ndarray, slots: int) -> np.ndarray:
    """Fill each sequence's places in order: all first choices by token, then all second choices."""
    kept = np.zeros(chosen.shape, bool)
    for b in range(B):
        used = np.zeros(E, int)
        for a in range(A):
            for t in range(T):
                if chosen[b, t, a]:
                    kept[b, t, a] = used[experts[b, t, a]] < slots
                    used[experts[b, t, a]] += 1
    return kept


class Stamp:
    """Expert e gives x * (slot + 1) in the columns of its own block, [token, expert], and zeros elsewhere."""

    plan = MeshPlan.single()

    def dropping(self, context):
        return True

    def _stamp(self, rows, expert, slots):
        own = expert[..., None] == jnp.arange(E)
        blocks = rows.reshape(*rows.shape[:-1], M, E) * (slots[..., None, None] + 1.0) * own[..., None, :]
        return blocks.reshape(rows.shape)

    def all_rows(self, x_MD, slots_EM, context):
        return jax.vmap(self._stamp, in_axes=(None, 0, 0))(x_MD, jnp.arange(E), slots_EM)

    def batched(self, x_ECD, slots_EC, context):
        return self._stamp(x_ECD, jnp.broadcast_to(jnp.arange(E)[:, None], slots_EC.shape), slots_EC)

    implementation = "auto"

    def grouped(self, x_RD, group_sizes_E, slots_R, context):
        expert_R = jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(x_RD.shape[0]), side="right")
        return self._stamp(x_RD, expert_R, slots_R)


@functools.cache
def stamping_program(way: str, slots: int):
    x = jnp.broadcast_to(jnp.eye(M)[:, :, None], (M, M, E)).reshape(B, T, M * E)

    def run(experts, weights, chosen):
        return dispatch(way, Stamp(), x, to_routing(experts, weights, chosen), context(batch=B, length=T), slots)

    return jax.jit(run)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("way", "slots"), [("dense", T), ("sorted", T), ("capacity", T), ("capacity", 2), ("capacity", 1)]
)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rate=st.sampled_from((0.0, 0.5, 1.0)))
def test_every_slot_is_processed_once_by_its_expert_or_counted_as_dropped(way, slots, seed, rate):
    experts, weights, chosen = draw_routing(seed, rate)
    done = stamping_program(way, slots)(experts, weights, chosen)
    kept = kept_by_numpy(experts, chosen, slots)
    np.testing.assert_array_equal(done.kept_BTA, kept)
    expected = np.zeros((M, M, E))
    for b, t, a in zip(*np.nonzero(kept), strict=True):
        token, expert = b * T + t, experts[b, t, a]
        expected[token, token, expert] = weights[b, t, a] * (token * E + expert + 1)
    assert_close(done.y_BTD.reshape(M, M, E), expected)


@functools.cache
def gradient_program(way: str):
    """Run real experts, a third of their hidden units dropped: the bits are the slots', whatever the way."""
    experts = Experts(MeshPlan.single(), nnx.Rngs(0), D, moe_config({"num_active": A}, dropout=0.3), FLOAT64)
    graph, params = nnx.split(experts)

    def run(params, x, weights, experts, chosen):
        where = context(seed=0, batch=B, length=T)
        done = dispatch(way, nnx.merge(graph, params), x, to_routing(experts, weights, chosen), where)
        return jnp.sum(jnp.sin(done.y_BTD)), done

    program = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))
    return lambda *arrays: program(params, *arrays)


@pytest.mark.usefixtures("x64")
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rate=st.sampled_from((0.0, 0.5, 1.0)))
def test_all_ways_give_the_same_outputs_and_gradients(seed, rate):
    experts, weights, chosen = draw_routing(seed, rate)
    x = tokens(seed, B, T, D)
    (_, dense), dense_gradients = gradient_program("dense")(x, weights, experts, chosen)
    for way in ("sorted", "capacity"):
        (_, done), gradients = gradient_program(way)(x, weights, experts, chosen)
        assert_close(done, dense)
        assert_close(gradients, dense_gradients)


class Table:
    """Expert e's output on token m is the parameter table[e, m]; the slot's number says which one is asked for."""

    plan = MeshPlan.single()

    def dropping(self, context):
        return True

    def __init__(self, table_EMD):
        self.table_EMD = table_EMD

    def _look_up(self, slots):
        return self.table_EMD[slots % E, slots // E]

    def all_rows(self, x_MD, slots_EM, context):
        return self._look_up(slots_EM)

    def batched(self, x_ECD, slots_EC, context):
        return self._look_up(slots_EC)

    implementation = "auto"

    def grouped(self, x_RD, group_sizes_E, slots_R, context):
        return self._look_up(slots_R)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("way", "slots"), [("dense", T), ("sorted", T), ("capacity", T), ("capacity", 2)])
def test_gradients_of_experts_and_weights_have_their_closed_form(way, slots):
    """For y = sum G_i E_i(x): dL/dE_i = G_i dL/dy and dL/dG_i = E_i(x) . dL/dy, exactly 0 where i was not chosen."""
    experts, weights, chosen = draw_routing(1, 0.7)
    kept = kept_by_numpy(experts, chosen, slots)
    assert kept.any()
    assert not kept.all()
    rng = np.random.default_rng(0)
    table, dy = rng.normal(size=(E, M, D)), rng.normal(size=(B, T, D))

    def run(table, weights):
        routing = to_routing(experts, weights, chosen)
        return dispatch(way, Table(table), jnp.zeros((B, T, D)), routing, context(batch=B, length=T), slots).y_BTD

    dtable, dweights = jax.jit(lambda *a: jax.vjp(run, *a)[1](jnp.asarray(dy)))(
        jnp.asarray(table), jnp.asarray(weights)
    )
    expected_table, expected_weights = np.zeros_like(table), np.zeros_like(weights)
    for b, t, a in zip(*np.nonzero(kept), strict=True):
        expert, token = experts[b, t, a], b * T + t
        expected_table[expert, token] = weights[b, t, a] * dy[b, t]
        expected_weights[b, t, a] = table[expert, token] @ dy[b, t]
    assert_close(dtable, expected_table)
    assert_close(dweights, expected_weights)
    assert not np.asarray(dtable)[expected_table == 0].any()
    assert not np.asarray(dweights)[~kept].any()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("way", WAYS)
def test_an_expert_that_no_token_chose_has_exactly_no_gradient(way):
    experts, weights, chosen = draw_routing(2, 1.0)
    experts = np.where(experts == 3, (experts[..., ::-1] + 1) % 3, experts).astype(np.int32)
    x = tokens(0, B, T, D)
    _, (dparams, _, _) = gradient_program(way)(x, weights, experts, chosen)
    for name in ("gate", "up", "down"):
        gradient = np.asarray(dparams[name][...])
        assert not gradient[3].any()
        assert np.abs(gradient[:3]).max(axis=(1, 2)).min() > 1e-6


# --- the whole layer


def run(config, x, where):
    return run_layer(make_layer(config), x, where)


LAYERS = {
    "sorted": moe_config({"num_active": 2, "load_balance": 0.1}),
    "dense": moe_config({"num_active": 2, "load_balance": 0.1}, dispatch="dense"),
    "capacity": moe_config({"num_active": 2, "load_balance": 0.1}, capacity_factor=0.5),
    "expert_choice": moe_config({"kind": "expert_choice", "num_active": 2}),
    "soft": moe_config({"kind": "soft", "num_active": 4}),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS)
def test_what_padding_holds_changes_nothing(config):
    where, x = context(padded(), seed=0), tokens()
    y, stats = run(config, x, where)
    y2, stats2 = run(config, jnp.where(padded()[..., None] == 0, 9.0, x), where)
    assert not np.asarray(y)[padded() == 0].any()
    np.testing.assert_array_equal(y2, y)
    jax.tree.map(np.testing.assert_array_equal, stats2, stats)


@pytest.mark.usefixtures("x64")
def test_a_full_capacity_is_counted_and_left_to_the_residual_in_training_alone():
    config = LAYERS["capacity"]
    y, stats = run(config, tokens(), context(padded(), seed=0))
    layer = make_layer(config)
    routing = route(layer.router, tokens(), context(padded(), seed=0))
    used = np.stack([load_of(jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], routing)) for b in range(2)])
    slots = 2  # 0.5 * 8 tokens * 2 / 4 experts
    assert stats.dropped == np.maximum(used - slots, 0).sum() > 0
    np.testing.assert_array_equal(stats.load_E, used.sum(0))
    y_kept, all_kept = run(config, tokens(), context(padded()))
    assert all_kept.dropped == 0
    assert_close(y_kept, run(LAYERS["sorted"], tokens(), context(padded()))[0])
    assert np.abs(y - y_kept).max() > 1e-3


@pytest.mark.usefixtures("x64")
def test_enough_slots_drop_nothing():
    config = moe_config({"num_active": 2, "load_balance": 0.1}, capacity_factor=2.0)
    y, stats = run(config, tokens(), context(padded(), seed=0))
    assert stats.dropped == 0
    assert_close(y, run(LAYERS["dense"], tokens(), context(padded(), seed=0))[0])


@pytest.mark.usefixtures("x64")
def test_expert_choice_loads_every_expert_with_exactly_its_slots():
    _, stats = run(LAYERS["expert_choice"], tokens(), context(seed=0))
    np.testing.assert_array_equal(stats.load_E, [2 * 4] * 4)
    assert stats.dropped == 0


@pytest.mark.usefixtures("x64")
def test_expert_choice_is_the_same_dense_and_by_slots():
    dense = moe_config({"kind": "expert_choice", "num_active": 2}, dispatch="dense")
    where = context(padded(), seed=0)
    assert_close(run(LAYERS["expert_choice"], tokens(), where)[0], run(dense, tokens(), where)[0])


@pytest.mark.usefixtures("x64")
def test_shared_experts_see_every_token_ungated():
    layer = make_layer(moe_config({"num_active": 2}, shared_ffn=10))
    x, where = tokens(), context()
    assert layer.shared.gate[...].shape == (6, 2 * 5)
    whole, shared = run_layer(layer, x, where)[0], layer.shared(x)
    layer.shared = None
    assert_close(whole, run_layer(layer, x, where)[0] + shared)
