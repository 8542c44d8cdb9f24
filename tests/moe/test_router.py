"""Which experts a router picks and with what weight: each kind against its paper's formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from moejax.config.model import Precision
from moejax.config.moe import MoEConfig, RouterConfig
from moejax.moe.router import Router
from moejax.parallel.plan import MeshPlan
from tests.conftest import assert_close
from tests.moe.layers import B, D, E, T, context, load_of, make_router, moe_config, padded, route, tokens

pytestmark = pytest.mark.usefixtures("x64")

KINDS = {
    "mixtral": {"num_active": 2},
    "switch": {"num_active": 1, "normalize": False},
    "sigmoid": {"num_active": 2, "score": "sigmoid", "bias_update_rate": 0.1},
    "expert_choice": {"kind": "expert_choice", "num_active": 2},
    "soft": {"kind": "soft", "num_active": E},
}


def logits_of(router: Router, x_BTD) -> np.ndarray:
    return np.asarray(x_BTD) @ np.asarray(router.weight[...])


def test_mixtral_weights_are_the_softmax_over_the_kept_logits():
    router, x = make_router(moe_config(KINDS["mixtral"])), tokens()
    routing, logits = route(router, x, context()), logits_of(router, x)
    kept = np.argsort(-logits, axis=-1)[..., :2]
    np.testing.assert_array_equal(routing.experts_BTA, kept)
    assert_close(routing.weights_BTA, scipy.special.softmax(np.take_along_axis(logits, kept, -1), axis=-1))
    assert_close(routing.probs_BTE, scipy.special.softmax(logits, axis=-1))


def test_switch_weight_is_the_full_softmax_probability():
    router, x = make_router(moe_config(KINDS["switch"])), tokens()
    routing, probs = route(router, x, context()), scipy.special.softmax(logits_of(router, x), axis=-1)
    np.testing.assert_array_equal(routing.experts_BTA[..., 0], probs.argmax(-1))
    assert_close(routing.weights_BTA[..., 0], probs.max(-1))


@pytest.mark.parametrize(("normalize", "learns"), [(False, True), (True, False)])
def test_a_single_expert_s_weight_teaches_the_router_only_unnormalised(normalize, learns):
    graph, params, rest = nnx.split(make_router(moe_config({"num_active": 1, "normalize": normalize})), nnx.Param, ...)
    gradient = jax.grad(lambda p: nnx.merge(graph, p, rest)(tokens(), context()).weights_BTA.sum())(params)
    assert bool(np.abs(gradient["weight"][...]).max() > 1e-3) == learns


def test_a_kept_expert_s_weight_does_not_depend_on_the_others_logits():
    router, x = make_router(moe_config(KINDS["mixtral"]), dim=E), tokens(dim=E)
    router.weight[...] = jnp.eye(E)  # the tokens are the logits

    def weighted(x):
        routing = route(router, x, context())
        return (routing.weights_BTA * jnp.array([1.0, 3.0])).sum(), routing.experts_BTA

    gradient, experts = jax.grad(weighted, has_aux=True)(x)
    kept = np.zeros((B, T, E), bool)
    np.put_along_axis(kept, np.asarray(experts), True, axis=-1)
    assert np.abs(gradient[kept]).min() > 1e-3
    assert_close(gradient[~kept], np.zeros((~kept).sum()))


def test_a_balancing_bias_moves_the_choice_and_not_the_weights():
    router, x = make_router(moe_config(KINDS["sigmoid"])), tokens()
    before = route(router, x, context())
    bias = np.array([0.0, 0.6, -0.6, 0.0])
    router.bias[...] = jnp.asarray(bias)
    routing, scores = route(router, x, context()), scipy.special.expit(logits_of(router, x))
    expected = np.argsort(-(scores + bias), axis=-1)[..., :2]
    np.testing.assert_array_equal(routing.experts_BTA, expected)
    assert (np.asarray(before.experts_BTA) != expected).any()
    kept = np.take_along_axis(scores, expected, -1)
    assert_close(routing.weights_BTA, kept / kept.sum(-1, keepdims=True))
    assert_close(routing.probs_BTE, scores / scores.sum(-1, keepdims=True))


def test_a_balancing_bias_is_no_weight_and_has_no_gradient():
    graph, params, buffers = nnx.split(make_router(moe_config(KINDS["sigmoid"])), nnx.Param, ...)
    assert set(params) == {"weight"}
    assert set(buffers) == {"bias"}

    def everything(buffers):
        routing = nnx.merge(graph, params, buffers)(tokens(), context())
        return sum(part.sum() for part in (routing.weights_BTA, routing.probs_BTE, routing.logits_BTE))

    assert not jax.grad(everything)(buffers)["bias"][...].any()


# --- node-limited routing (DeepSeek-V3, arXiv 2412.19437)


def within_groups(scores: np.ndarray, config: RouterConfig) -> np.ndarray:
    """Pick each token's experts by a loop: groups are scored by their best few, and the best groups hold the top-k."""
    chosen = np.zeros((*scores.shape[:2], config.num_active), int)
    size, few = scores.shape[-1] // config.num_groups, config.num_active // config.groups_kept
    for b, t in np.ndindex(scores.shape[:2]):
        groups = scores[b, t].reshape(config.num_groups, size)
        best = np.argsort(-np.sort(groups, axis=1)[:, ::-1][:, :few].sum(1))[: config.groups_kept]
        allowed = [e for e in range(scores.shape[-1]) if e // size in best]
        chosen[b, t] = sorted(allowed, key=lambda e: -scores[b, t, e])[: config.num_active]
    return chosen


GROUPED = {
    "softmax": {"num_active": 4, "num_groups": 4, "groups_kept": 2},
    "one_group": {"num_active": 2, "num_groups": 3, "groups_kept": 1},
    "bias": {"num_active": 4, "num_groups": 4, "groups_kept": 2, "score": "sigmoid", "bias_update_rate": 0.1},
    "no_whole_number_each": {"num_active": 4, "num_groups": 6, "groups_kept": 3, "score": "sigmoid"},
}


@pytest.mark.parametrize("name", GROUPED)
def test_a_token_s_experts_lie_in_its_best_groups(name):
    """The bias counts for the groups as it does for the experts, and not for the weights."""
    config = RouterConfig(**GROUPED[name])
    router, x = make_router(moe_config(GROUPED[name], num_experts=12)), tokens(batch=4, length=16)
    logits = logits_of(router, x)
    scores = scipy.special.softmax(logits, -1) if config.score == "softmax" else scipy.special.expit(logits)
    bias = np.zeros(12)
    if router.bias is not None:
        bias = np.random.default_rng(1).normal(size=12) * 0.3
        router.bias[...] = jnp.asarray(bias)
    routing = route(router, x, context(batch=4, length=16))
    expected = within_groups(scores + bias, config)
    np.testing.assert_array_equal(routing.experts_BTA, expected)
    size = 12 // config.num_groups
    assert max(len(set(token // size)) for token in expected.reshape(-1, config.num_active)) <= config.groups_kept
    free = np.argsort(-(scores + bias), axis=-1)[..., : config.num_active]
    assert (np.sort(free) != np.sort(expected)).any(), "the groups limit somebody"
    kept = np.take_along_axis(scores, expected, -1)
    assert_close(routing.weights_BTA, kept / kept.sum(-1, keepdims=True))


def test_a_group_is_scored_by_its_bias_too():
    """Without it in the groups' scores the first group would be left out, whatever its experts' bias."""
    setting = {"num_active": 2, "num_groups": 2, "groups_kept": 1, "score": "sigmoid", "bias_update_rate": 0.1}
    router = make_router(moe_config(setting), dim=E)
    router.weight[...] = jnp.eye(E)
    x, where = jnp.array([[[0.0, 0.1, 1.0, 1.1]]]), context(batch=1, length=1)
    np.testing.assert_array_equal(route(router, x, where).experts_BTA[0, 0], [3, 2])
    router.bias[...] = jnp.array([1.0, 1.0, 0.0, 0.0])
    np.testing.assert_array_equal(route(router, x, where).experts_BTA[0, 0], [1, 0])


def test_keeping_every_group_limits_nothing():
    x, where = tokens(batch=4, length=16), context(batch=4, length=16)
    free, grouped = (
        route(make_router(moe_config({"num_active": 2} | groups, num_experts=12)), x, where)
        for groups in ({}, {"num_groups": 4, "groups_kept": 4})
    )
    np.testing.assert_array_equal(grouped.experts_BTA, free.experts_BTA)
    np.testing.assert_array_equal(grouped.weights_BTA, free.weights_BTA)


def test_groups_that_cannot_hold_the_choice_are_refused():
    with pytest.raises(ValueError, match=r"groups_kept \(3\) must not exceed num_groups \(2\)"):
        RouterConfig(num_groups=2, groups_kept=3)
    with pytest.raises(ValueError, match=r'num_groups \(2\) needs kind = "top_k", not "soft"'):
        RouterConfig(kind="soft", num_groups=2)
    with pytest.raises(ValueError, match=r"num_experts \(4\) must divide by num_groups \(3\)"):
        moe_config({"num_active": 1, "num_groups": 3})
    with pytest.raises(
        ValueError, match=r"num_active \(3\) must not exceed the experts of groups_kept \(1\) groups of 2"
    ):
        moe_config({"num_active": 3, "num_groups": 2})


def test_expert_choice_gives_every_expert_its_best_tokens_of_each_sequence():
    router, x = make_router(moe_config(KINDS["expert_choice"])), tokens()
    routing, probs = route(router, x, context(seed=0)), scipy.special.softmax(logits_of(router, x), axis=-1)
    slots = T * 2 // E
    np.testing.assert_array_equal(routing.chosen_BTA.sum(1), np.full((B, E), slots))
    threshold = np.sort(probs, axis=1)[:, -slots][:, None]
    np.testing.assert_array_equal(routing.chosen_BTA, probs >= threshold)
    assert_close(routing.weights_BTA, np.where(probs >= threshold, probs, 0.0))


def test_expert_choice_leaves_slots_empty_rather_than_take_padding():
    segments = np.ones((B, T), np.int32)
    segments[1, 1:] = 0
    routing = route(make_router(moe_config(KINDS["expert_choice"])), tokens(), context(segments, seed=0))
    np.testing.assert_array_equal(routing.chosen_BTA.sum(1), [[T * 2 // E] * E, [1] * E])


def test_expert_choice_cannot_generate():
    router = make_router(moe_config(KINDS["expert_choice"]))
    with pytest.raises(ValueError, match="cannot generate"):
        router(tokens(length=1), context(length=1))


def test_a_soft_mixture_gives_every_expert_its_softmax_probability():
    router, x = make_router(moe_config(KINDS["soft"])), tokens()
    routing = route(router, x, context())
    np.testing.assert_array_equal(routing.experts_BTA, np.broadcast_to(np.arange(E), (B, T, E)))
    assert routing.chosen_BTA.all()
    assert_close(routing.weights_BTA, scipy.special.softmax(logits_of(router, x), axis=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_never_chosen(kind):
    routing = route(make_router(moe_config(KINDS[kind])), tokens(), context(padded(), seed=0))
    chosen = np.asarray(routing.chosen_BTA).any(-1)
    assert not chosen[padded() == 0].any()
    if kind != "expert_choice":
        assert chosen[padded() > 0].all()


GAUSSIAN = {"num_active": 2, "noise": "gaussian"}


def test_gaussian_noise_is_the_learned_deviation_times_a_standard_normal():
    router = make_router(moe_config(GAUSSIAN))
    x, where = tokens(batch=64, length=64), context(batch=64, length=64)
    noisy = route(router, x, context(seed=0, batch=64, length=64)).logits_BTE
    assert_close(route(router, x, where).logits_BTE, logits_of(router, x))
    deviation = np.logaddexp(0.0, np.asarray(x) @ np.asarray(router.noise[...]))
    draws = (np.asarray(noisy) - logits_of(router, x)) / deviation
    count = draws.size
    assert abs(draws.mean()) < 4 / np.sqrt(count)
    assert abs(draws.var() - 1.0) < 4 * np.sqrt(2 / count)
    within_one = np.mean(np.abs(draws) < 1)
    assert abs(within_one - 0.6827) < 4 * np.sqrt(0.25 / count)
    assert abs(np.corrcoef(draws[..., 0].ravel(), draws[..., 1].ravel())[0, 1]) < 4 / np.sqrt(draws[..., 0].size)


def test_jitter_multiplies_the_router_s_input_alone():
    config = moe_config({"num_active": 1, "normalize": False, "noise": "jitter", "jitter": 0.25})
    router, x = make_router(config, dim=E), tokens(batch=32, length=32, dim=E)
    router.weight[...] = jnp.eye(E)
    factor = np.asarray(route(router, x, context(seed=0, batch=32, length=32)).logits_BTE / x)
    assert 0.75 < factor.min() < 0.76
    assert 1.24 < factor.max() < 1.25
    assert abs(factor.mean() - 1.0) < 4 * 0.25 / np.sqrt(3 * factor.size)
    assert_close(route(router, x, context(batch=32, length=32)).logits_BTE, x)


@pytest.mark.parametrize("noise", ["gaussian", "jitter"])
def test_noise_is_drawn_anew_for_each_key_layer_and_token_and_for_nothing_else(noise):
    router = make_router(moe_config({"num_active": 2, "noise": noise}))
    x = jnp.broadcast_to(tokens(batch=1, length=1), (B, T, D))

    def logits(where):
        return np.asarray(route(router, x, where).logits_BTE)

    first = logits(context(seed=0))
    np.testing.assert_array_equal(first, logits(context(seed=0)))
    assert (first != logits(context(seed=1))).all()
    assert (first != logits(context(seed=0).at_layer(1))).all()
    assert len(np.unique(first[..., 0])) == B * T


@pytest.mark.parametrize(
    ("length", "active", "experts", "factor", "slots"),
    [(16, 2, 4, 1.0, 8), (16, 1, 4, 1.25, 5), (16, 1, 3, 1.0, 6), (16, 2, 4, 4.0, 16), (4, 1, 64, 1.0, 1)],
)
def test_slots_are_rounded_up_within_one_and_the_sequence(length, active, experts, factor, slots):
    router = RouterConfig(num_active=active)
    assert MoEConfig(num_experts=experts, capacity_factor=factor, router=router).num_slots(length) == slots


def test_the_router_computes_in_its_own_precision():
    router = Router(MeshPlan.single(), nnx.Rngs(0), D, moe_config(KINDS["mixtral"]), Precision(compute="bfloat16"))
    routing = route(router, tokens().astype(jnp.bfloat16), context())
    for part in (routing.logits_BTE, routing.probs_BTE, routing.weights_BTA):
        assert part.dtype == jnp.float32


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_extreme_logits_keep_weights_and_gradients_finite(score):
    router = make_router(moe_config({"num_active": 2, "score": score}), dim=E)
    router.weight[...] = jnp.eye(E)
    x = jnp.array([[[1e4, -1e4, 0.0, 0.0], [-1e4, -1e4, -1e4, -1e4]]])
    where = context(batch=1, length=2)
    gradient = jax.grad(lambda x: (route(router, x, where).weights_BTA * jnp.array([1.0, 2.0])).sum())(x)
    weights = np.asarray(route(router, x, where).weights_BTA)
    assert np.isfinite(weights).all()
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(weights[0, 0].sum(), 1.0)


def test_load_counts_what_the_routing_says():
    routing = route(make_router(moe_config(KINDS["mixtral"])), tokens(), context(padded()))
    assert load_of(routing).sum() == 2 * (padded() > 0).sum()
