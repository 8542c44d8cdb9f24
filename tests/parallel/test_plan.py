"""MeshPlan: layout by logical name, and collectives against plain numpy on the whole array."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moejax.compat import vary
from moejax.config.mesh import MeshConfig
from moejax.parallel.plan import MeshPlan
from tests.conftest import assert_close

MESH = MeshConfig(data=2, tensor=4)
PARTS = PartitionSpec(("data", "tensor"))


def plan_of(**changes) -> MeshPlan:
    return MeshPlan.from_config(dataclasses.replace(MESH, **changes))


def test_a_spec_names_only_axes_that_split():
    assert plan_of().spec("batch", "seq", "heads", None, "embed") == PartitionSpec(
        ("data",), None, ("tensor",), None, None
    )
    assert MeshPlan.single().spec("batch", "seq", "heads") == PartitionSpec(None, None, None)


def test_two_dims_on_one_mesh_axis_are_an_error_that_names_both():
    with pytest.raises(ValueError, match='"heads" and "vocab" would both be split over mesh axis "tensor"'):
        plan_of().spec("heads", "embed", "vocab")
    MeshPlan.single().spec("heads", "embed", "vocab")


def test_degrees_multiply_the_sizes_of_the_axes():
    plan = plan_of(sequence_parallel=True)
    assert (plan.degree("batch"), plan.degree("heads"), plan.degree("embed"), plan.degree("residual_seq")) == (
        2,
        4,
        1,
        4,
    )
    assert plan.degree("batch", "heads") == 8
    assert plan.degree("heads", "vocab") == 4, "an axis counts once"
    assert plan.axes_of("heads", "batch") == ("data", "tensor")
    assert (plan.size("tensor"), plan.size("pipeline")) == (4, 1)


def test_a_plan_is_a_value():
    assert plan_of() == plan_of()
    assert hash(plan_of()) == hash(plan_of())
    assert plan_of() != plan_of(zero_stage=1)


def test_a_mesh_that_does_not_fit_the_devices_is_an_error_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"the mesh has 4 devices .*tensor 4.* but jax sees 8"):
        MeshPlan.from_config(MeshConfig(tensor=4))


def test_tensor_ranks_are_neighbours():
    """`tensor` is innermost: it talks most."""
    assert [d.id for d in plan_of().mesh.devices.reshape(2, 4)[0]] == [0, 1, 2, 3]


def run(plan: MeshPlan, f, *arrays, outs=PartitionSpec()):
    return jax.jit(plan.spmd(f, (PARTS,) * len(arrays), outs))(*arrays)


def test_collectives_match_numpy_on_the_whole_array():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    by_rank = np.asarray(x).reshape(2, 4, 3)
    plan = plan_of()

    def everything(x):
        (row,) = x
        one_tensor = plan.sum_over(row, "heads")
        return {
            "sum": plan.sum_over(row, "batch", "heads"),
            "sum over tensor, mean over data": plan.mean_over(one_tensor, "batch"),
            "max": plan.max_over(plan.max_over(row, "heads"), "batch"),
            "gathered": plan.gather(plan.gather(x, "heads", 0)[None], "batch", 0),
            "agreed": plan.agree(vary(one_tensor * 0 + 5.0, ("data", "tensor"))),
            "rank": plan.sum_over(10 * plan.index("batch") + plan.index("heads"), "batch", "heads"),
        }

    seen = run(plan, everything, x)
    expected = {
        "sum": by_rank.sum((0, 1)),
        "sum over tensor, mean over data": by_rank.sum(1).mean(0),
        "max": by_rank.max((0, 1)),
        "gathered": by_rank,
        "agreed": np.full(3, 5.0, np.float32),
        "rank": np.int32(sum(10 * d + t for d in range(2) for t in range(4))),
    }
    assert_close(seen, expected)


def test_a_maximum_has_no_gradient():
    plan = plan_of()
    x = jnp.arange(8.0)
    gradient = run(
        plan, jax.grad(lambda x: plan.sum_over((x * plan.max_over(x, "heads")).sum(), "batch", "heads")), x, outs=PARTS
    )
    assert_close(gradient, np.repeat([3.0, 7.0], 4).astype(np.float32))


def test_one_device_needs_no_collective():
    plan = MeshPlan.single()

    def everything(x):
        x = plan.leave_tensor(plan.enter_tensor(x[None])) + plan.sum_over(x, "batch") + plan.mean_over(x, "heads")
        return plan.agree(x) + plan.gather(x, "heads", 0) + plan.max_over(x, "vocab") + plan.index("heads")

    text = str(jax.make_jaxpr(plan.spmd(everything, (PartitionSpec(),), PartitionSpec()))(jnp.ones((2, 2))))
    assert not re.search(r"psum|pmax|all_gather|reduce_scatter|axis_index", text)


def test_an_output_that_was_not_reduced_is_a_type_error():
    with pytest.raises(ValueError, match="replication"):
        run(plan_of(), lambda x: x.sum(), jnp.arange(8.0))


# --- Megatron's f and g


def block(plan: MeshPlan):
    """A column-split then row-split layer: rank r multiplies by r + 1, the whole by 1 + 2 + 3 + 4."""
    return lambda x: plan.leave_tensor(plan.enter_tensor(x) * (plan.index("heads") + 1.0))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_block_sums_its_ranks_and_so_does_its_gradient(sequence_parallel):
    plan = plan_of(sequence_parallel=sequence_parallel)
    spec = plan.spec("batch", "residual_seq", "embed")
    x = jnp.arange(48.0).reshape(2, 8, 3)

    def value_and_gradient(x):
        y, pullback = jax.vjp(block(plan), x)
        return y, pullback(2.0 * x)[0]

    y, gradient = jax.jit(plan.spmd(value_and_gradient, (spec,), (spec, spec)))(x)
    assert_close(y, 10.0 * x)
    assert_close(gradient, 20.0 * x)


def test_a_block_moves_the_bytes_of_megatron_s_view_and_no_others():
    """One all-reduce forward, one backward; with sequence parallelism an all-gather and a reduce-scatter each."""
    # The gradient of a square needs the forward pass, the block's own does not.
    for sequence_parallel, per_pass in ((False, ["all-reduce"]), (True, ["all-gather", "reduce-scatter"])):
        plan = plan_of(sequence_parallel=sequence_parallel)
        spec = plan.spec("batch", "residual_seq", "embed")
        for passes, f in (
            (1, block(plan)),
            (2, lambda x, plan=plan: jax.grad(lambda x: jnp.square(block(plan)(x)).sum())(x)),
        ):
            text = jax.jit(plan.spmd(f, (spec,), spec)).lower(jnp.ones((2, 8, 3))).compile().as_text()
            found = re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", text)
            assert sorted(found) == sorted(per_pass * passes), (sequence_parallel, passes)
