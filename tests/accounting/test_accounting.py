"""Numbers on paper against published ones, against the traced program, and against the compiler's."""

import dataclasses
import math

import jax
import pytest

from moejax.accounting.chips import find_chip
from moejax.accounting.model_cost import model_cost
from moejax.layers.context import Context
from moejax.models import ModelParts
from moejax.parallel.plan import MeshPlan
from tests.conftest import model_config
from tests.tiny_runs import LENGTH, make_batch


def cost_of(name: str, seq_len: int = LENGTH, **changes):
    return model_cost(ModelParts.of(dataclasses.replace(model_config(name), **changes), MeshPlan.single()), seq_len)


def test_mixtral_8x7b_has_the_published_weights():
    """arXiv 2401.04088, without making an array: 47 B in all, 13 B for a token."""
    cost = cost_of("mixtral_8x7b", 4096)
    assert cost.total_params == 46_702_792_704
    assert cost.active_params == 12_879_925_248
    lookup, norms = 32_000 * 4096, 65 * 4096
    scores = 2 * 2 * 4096 * 32 * 32 * 128  # two products over T keys: layers x heads x head dim
    assert cost.forward_flops == 2 * (12_879_925_248 - lookup - norms) + scores
    assert cost.train_flops == 3 * cost.forward_flops


@pytest.mark.parametrize(
    ("name", "matrices", "norms"),
    [
        # The papers' 671 B and 456 B, to the weight, as their configs' matrices add up; and every norm.
        ("deepseek_v3", 671_025_397_760, (2 * 61 + 1) * 7168 + 61 * (1536 + 512)),
        ("minimax_01", 456_088_092_672, (2 * 80 + 1) * 6144 + 70 * 64 * 128),
    ],
)
def test_the_largest_models_have_the_published_weights(name: str, matrices: int, norms: int):
    assert cost_of(name, 4096).total_params == matrices + norms


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek_v3", 671e9, 37.6e9),
        ("minimax_01", 456e9, 45.9e9 + 2 * 200_064 * 6144),  # the paper leaves embedding and head out
        ("qwen3_30b_a3b", 30.5e9, 3.3e9),
        ("gpt_oss_20b", 20.9e9, 3.6e9 + 201_088 * 2880),  # the embedding left out
        ("olmoe_1b_7b", 6.9e9, 1.3e9),
    ],
)
def test_released_models_have_the_published_sizes(name: str, total: float, active: float):
    cost = cost_of(name, 4096)
    assert cost.total_params == pytest.approx(total, rel=0.01)
    assert cost.active_params == pytest.approx(active, rel=0.02)


def test_dense_and_soft_models_use_every_weight():
    for name in ("dense_tiny", "soft_mixture_tiny"):
        cost = cost_of(name)
        assert cost.active_params == cost.total_params
    switch = cost_of("switch_tiny")
    assert switch.total_params - switch.active_params == 3 * (3 * 32 * 32), "three of four experts, in one layer"


def flops_of(jaxpr) -> int:
    """Count a multiply and an add as two in every matmul of a program, a scan's as often as it runs."""
    flops = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            flops += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[dim] for dim in contract)
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            flops += times * flops_of(inner) if hasattr(inner, "eqns") else 0
    return flops


@pytest.mark.parametrize("name", ["dense_tiny", "soft_mixture_tiny", "soft_mixture_competitive_tiny", "mixtral_tiny"])
def test_flops_are_those_of_the_program_s_matmuls(name):
    """With naive attention, which computes the whole square of scores that the count assumes."""
    config = model_config(name)
    config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, implementation="reference"))
    unused = 0
    if name == "mixtral_tiny":  # the dense twin runs all 4 experts where 2 count, and combines by a matmul
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, dispatch="dense"))
        unused = config.num_layers * 2 * 2 * 3 * config.embed * config.moe.expert_ffn
    parts = ModelParts.of(config, MeshPlan.single())
    batch, tokens = make_batch(0), make_batch(0)["inputs"][0].size

    def forward(params, buffers, ids, segments):
        model = parts.merge(params, buffers)
        output = model(ids, Context.of(parts.plan, segments))
        return model.head(output.hidden, model.embedding)

    arrays = (jax.numpy.asarray(batch[key][0]) for key in ("inputs", "segments"))
    traced = jax.make_jaxpr(forward)(parts.shapes, parts.buffer_shapes, *arrays)
    expected = model_cost(parts, LENGTH).forward_flops + unused
    combining = 0
    if config.moe is not None:
        sparse = config.num_layers - config.moe.competitive
        active = config.moe.router.num_active
        combining = sparse * 2 * config.moe.num_experts * (active + config.embed)
    assert flops_of(traced.jaxpr) / tokens == expected + combining


@pytest.mark.parametrize(
    ("device_kind", "found"), [("NVIDIA H200", True), ("NVIDIA A100-SXM4-80GB", True), ("cpu", False)]
)
def test_chips_are_known_by_a_part_of_their_name(device_kind, found):
    chip = find_chip(device_kind)
    assert (chip is not None) == found
    if chip is not None:
        assert chip.flops["bfloat16"] > chip.flops["float32"] > 1e14
