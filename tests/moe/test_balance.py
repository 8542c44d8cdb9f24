"""What keeps the load even: every loss against its formula in numpy, and the loss-free bias in a small simulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import nnx

from moejax.config.moe import RouterConfig
from moejax.moe.balance import expert_load, load_balance, router_losses, squared_variation
from moejax.moe.router import Router, Routing
from moejax.moe.stats import imbalance
from moejax.parallel.plan import MeshPlan
from tests.conftest import assert_close
from tests.moe.layers import (
    B,
    E,
    T,
    context,
    load_of,
    make_layer,
    make_router,
    moe_config,
    padded,
    route,
    run_layer,
    tokens,
)

pytestmark = pytest.mark.usefixtures("x64")

VALID = padded() > 0


def losses_of(router: Router, routing: Routing) -> tuple[dict, jax.Array]:
    return _losses_of(router.config, routing)


@functools.partial(jax.jit, static_argnums=0)
def _losses_of(config: RouterConfig, routing: Routing) -> tuple[dict, jax.Array]:
    plan, valid = MeshPlan.single(), jnp.asarray(VALID)
    return router_losses(plan, config, routing, expert_load(plan, routing, valid), valid)


@pytest.mark.parametrize("active", [1, 2])
def test_switch_loss_is_one_when_even_and_the_number_of_experts_when_collapsed(active):
    assert_close(load_balance(jnp.full(E, 3.0 * active), jnp.full(E, 1 / E)), 1.0)
    one = jnp.eye(E)[2]
    assert_close(load_balance(12.0 * one, one), float(E))


@pytest.mark.parametrize(
    "router", [{"num_active": 1, "normalize": False}, {"num_active": 2}], ids=["switch", "mixtral"]
)
def test_switch_loss_is_the_paper_s_sum_over_the_valid_tokens(router):
    router = make_router(moe_config(router | {"load_balance": 0.25}))
    routing = route(router, tokens(), context(padded()))
    losses, total = losses_of(router, routing)
    fraction = load_of(routing) / load_of(routing).sum()
    mean_prob = scipy.special.softmax(np.asarray(routing.logits_BTE), axis=-1)[VALID].mean(0)
    expected = E * np.sum(fraction * mean_prob)
    assert_close(losses["load_balance"], expected)
    assert_close(total, 0.25 * expected)


def test_the_fraction_of_the_switch_loss_carries_no_gradient():
    router = make_router(moe_config({"num_active": 2, "load_balance": 1.0}))
    routing = route(router, tokens(), context(padded()))
    fraction = load_of(routing) / load_of(routing).sum()

    def with_constant_fraction(logits):
        return E * jnp.sum(fraction * jax.nn.softmax(logits)[VALID].mean(0))

    graph, params, rest = nnx.split(router, nnx.Param, ...)

    def through_the_router(params):
        return losses_of(router, nnx.merge(graph, params, rest)(tokens(), context(padded())))[1]

    by_logit = jax.grad(with_constant_fraction)(routing.logits_BTE)
    expected = jnp.einsum("BTD,BTE->DE", tokens(), by_logit)
    assert_close(jax.jit(jax.grad(through_the_router))(params)["weight"][...], expected)


def test_z_loss_is_the_mean_square_of_the_log_partition():
    router = make_router(moe_config({"num_active": 2, "z_loss": 0.5}))
    routing = route(router, tokens(), context(padded()))
    losses, total = losses_of(router, routing)
    expected = np.mean(scipy.special.logsumexp(np.asarray(routing.logits_BTE), axis=-1)[VALID] ** 2)
    assert_close(losses["z_loss"], expected)
    assert_close(total, 0.5 * expected)


def test_importance_loss_is_the_squared_variation_of_the_summed_gates():
    router = make_router(moe_config({"num_active": 2, "importance_loss": 0.5}))
    routing = route(router, tokens(), context(padded()))
    gates = np.zeros((B, T, E))
    np.put_along_axis(gates, np.asarray(routing.experts_BTA), np.asarray(routing.weights_BTA), axis=-1)
    importance = gates[VALID].sum(0)
    expected = (importance.std() / importance.mean()) ** 2
    losses, total = losses_of(router, routing)
    assert_close(losses["importance"], expected)
    assert_close(total, 0.5 * expected)


def test_squared_variation_is_zero_when_even_and_experts_minus_one_when_collapsed():
    assert_close(squared_variation(jnp.full(E, 5.0)), 0.0)
    assert_close(squared_variation(7.0 * jnp.eye(E)[0]), E - 1.0)


def noisy_routing() -> tuple[Router, Routing, np.ndarray, np.ndarray]:
    router = make_router(moe_config({"num_active": 2, "noise": "gaussian", "load_loss": 0.5}))
    x = np.asarray(tokens())
    deviation = np.logaddexp(0.0, x @ np.asarray(router.noise[...]))
    return router, route(router, tokens(), context(padded(), seed=3)), x @ np.asarray(router.weight[...]), deviation


def test_load_loss_is_shazeer_s_smooth_load():
    router, routing, clean, deviation = noisy_routing()
    noisy, smooth = np.asarray(routing.logits_BTE), np.empty((B, T, E))
    for i in range(E):
        kth_excluding = np.sort(np.delete(noisy, i, axis=-1), axis=-1)[..., -2]
        smooth[..., i] = scipy.stats.norm.cdf((clean[..., i] - kth_excluding) / deviation[..., i])
    assert_close(routing.smooth_load_BTE, smooth)
    load = smooth[VALID].sum(0)
    losses, total = losses_of(router, routing)
    assert_close(losses["load"], (load.std() / load.mean()) ** 2)
    assert_close(total, 0.5 * losses["load"])


def test_smooth_load_is_the_chance_of_being_chosen_with_new_noise():
    _, routing, clean, deviation = noisy_routing()
    rng, count = np.random.default_rng(0), 4000
    for i in range(E):
        noisy = np.broadcast_to(np.asarray(routing.logits_BTE), (count, B, T, E)).copy()
        noisy[..., i] = clean[..., i] + deviation[..., i] * rng.normal(size=(count, B, T))
        frequency = (np.argsort(-noisy, axis=-1)[..., :2] == i).any(-1).mean(0)
        expected = np.asarray(routing.smooth_load_BTE)[..., i]
        spread = np.sqrt(np.maximum(expected * (1 - expected), 1 / count) / count)
        assert (np.abs(frequency - expected) < 5 * spread).all()


def test_without_noise_there_is_no_load_loss():
    router = make_router(moe_config({"num_active": 2, "noise": "gaussian", "load_loss": 0.5}))
    losses, total = losses_of(router, route(router, tokens(), context(padded())))
    assert "load" not in losses
    assert total == 0.0


def test_a_layer_s_loss_is_the_weighted_sum_of_all_its_losses():
    weights = {"load_balance": 0.5, "z_loss": 0.25, "importance_loss": 2.0, "load_loss": 3.0}
    layer = make_layer(moe_config({"num_active": 2, "noise": "gaussian"} | weights))
    _, stats = run_layer(layer, tokens(), context(padded(), seed=0))
    names = {"importance_loss": "importance", "load_loss": "load"}
    expected = sum(weight * stats.losses[names.get(key, key)] for key, weight in weights.items())
    assert len(stats.losses) == len(weights)
    assert_close(stats.loss, expected)


def test_stats_count_slots_and_measure_entropy_of_the_valid_tokens():
    layer = make_layer(moe_config({"num_active": 2}))
    _, stats = run_layer(layer, tokens(), context(padded()))
    routing = route(layer.router, tokens(), context(padded()))
    np.testing.assert_array_equal(stats.load_E, load_of(routing))
    assert stats.load_E.sum() == 2 * VALID.sum()
    assert_close(stats.entropy, scipy.stats.entropy(np.asarray(routing.probs_BTE)[VALID], axis=-1).mean())
    assert_close(imbalance(stats.load_E), load_of(routing).max() / load_of(routing).mean())


# --- the loss-free bias


def test_the_bias_moves_by_one_step_towards_the_mean_load():
    router = make_router(moe_config({"num_active": 2, "score": "sigmoid", "bias_update_rate": 0.125}))
    router.update_bias(jnp.array([9.0, 1.0, 5.0, 5.0]))
    assert_close(router.bias[...], jnp.array([-0.125, 0.125, 0.0, 0.0]))


def test_the_bias_evens_out_a_skewed_load():
    """The largest violation, max / mean - 1, falls from more than 1 to under 0.1 and stays there (arXiv 2408.15664)."""
    rate, steps, batch = 0.003, 400, {"batch": 16, "length": 32}
    config = moe_config({"num_active": 2, "score": "sigmoid", "bias_update_rate": rate}, num_experts=8)
    router = make_router(config)
    router.weight[...] = 0.3 * router.weight[...]
    x = tokens(**batch) + 1.0  # a common direction: some experts suit every token
    graph, params, buffers = nnx.split(router, nnx.Param, ...)

    def step(buffers, _):
        router = nnx.merge(graph, params, buffers)
        load = expert_load(MeshPlan.single(), router(x, context(**batch)), jnp.ones(x.shape[:2], bool))
        router.update_bias(load)
        return nnx.split(router, nnx.Param, ...)[2], imbalance(load) - 1.0

    _, violation = jax.jit(lambda: jax.lax.scan(step, buffers, length=steps))()
    assert violation[0] > 1.0
    assert violation[-100:].max() < 0.1
