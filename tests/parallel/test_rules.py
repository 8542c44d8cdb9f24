"""Which mesh axes a logical axis lies on, and what a size that does not divide is told."""

import dataclasses

import jax
import pytest

from moejax.axes import LOGICAL_AXES
from moejax.config.mesh import MeshConfig
from moejax.models import ModelParts
from moejax.parallel.plan import MeshPlan
from moejax.parallel.rules import check_batch, check_context, check_layers, check_model, make_rules
from tests.conftest import model_config

TENSOR4 = MeshConfig(data=2, tensor=4)


def test_every_logical_axis_has_a_row():
    assert {name for name, _ in make_rules(TENSOR4).table} == set(LOGICAL_AXES)


def test_axes_of_size_one_are_left_out():
    assert not any(axes for _, axes in make_rules(MeshConfig()).table)
    rules = make_rules(MeshConfig(data=8))
    assert rules["batch"] == ("data",)
    assert rules["heads"] == ()


def test_sequence_parallelism_splits_the_residual_alone():
    plain, split = make_rules(TENSOR4), make_rules(dataclasses.replace(TENSOR4, sequence_parallel=True))
    assert plain["residual_seq"] == ()
    assert split["residual_seq"] == ("tensor",)
    assert split["seq"] == ()


def test_replicated_key_value_heads_are_on_no_axis():
    rules = make_rules(dataclasses.replace(TENSOR4, replicate_kv=True))
    assert rules["kv_heads"] == ()
    assert rules["heads"] == ("tensor",)


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r'"hedas" is no logical axis: .*moejax/axes\.py.*heads, kv_heads'):
        make_rules(TENSOR4)["hedas"]


def changed(path: str, value: int):
    """Change one field of mixtral_tiny, or of dense_tiny where only that has it."""
    model = model_config("dense_tiny" if path == "ffn" else "mixtral_tiny")
    *parents, field = path.split(".")
    inner = dataclasses.replace(getattr(model, parents[0]), **{field: value}) if parents else value
    return dataclasses.replace(model, **{parents[0] if parents else field: inner})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vocab", 66, r"vocab \(66\) must divide by tensor \(4\)$"),
        ("ffn", 66, r"ffn \(66\) must divide by tensor \(4\)$"),
        (
            "attention.num_kv_heads",
            2,
            r"num_kv_heads \(2\) must divide by tensor \(4\) or .*: set replicate_kv = true$",
        ),
        ("moe.expert_ffn", 30, r"expert_ffn \(30\) must divide by tensor \(4\)$"),
    ],
)
def test_a_size_that_does_not_divide_names_itself_its_value_and_the_axis(path, value, message):
    model = changed(path, value)
    with pytest.raises(ValueError, match=message):
        check_model(make_rules(TENSOR4), TENSOR4, model)
    check_model(make_rules(MeshConfig(data=8)), MeshConfig(data=8), model)


def test_query_heads_must_divide_even_where_key_value_heads_are_replicated():
    mesh = MeshConfig(tensor=16, replicate_kv=True)
    with pytest.raises(ValueError, match=r"num_heads \(8\) must divide by tensor \(16\)$"):
        check_model(make_rules(mesh), mesh, model_config("mixtral_tiny"))


def test_a_dense_width_that_no_layer_has_is_not_checked():
    check_model(make_rules(TENSOR4), TENSOR4, dataclasses.replace(model_config("mixtral_tiny"), ffn=66))
    with pytest.raises(ValueError, match="ffn"):
        check_model(make_rules(TENSOR4), TENSOR4, dataclasses.replace(model_config("switch_tiny"), ffn=66))


def test_a_batch_must_divide_over_its_replicas_and_a_sequence_over_its_parts():
    mesh = MeshConfig(data=2, tensor=4, sequence_parallel=True)
    rules = make_rules(mesh)
    check_batch(rules, mesh, 16, 4, 64)
    with pytest.raises(ValueError, match=r"global_batch / microbatches \(1\) must divide by data \(2\)"):
        check_batch(rules, mesh, 16, 16, 64)
    with pytest.raises(ValueError, match=r"seq_len \(66\) must divide by tensor \(4\)"):
        check_batch(rules, mesh, 16, 4, 66)


# --- positions


def with_attention(**changes):
    model = model_config("mixtral_tiny")
    return dataclasses.replace(model, attention=dataclasses.replace(model.attention, **changes))


def test_a_ring_takes_any_heads_and_an_exchange_of_heads_as_many_as_it_has_ranks():
    ring, exchange = (MeshConfig(sequence=4, tensor=2, context=context) for context in ("ring", "all_to_all"))
    check_model(make_rules(ring), ring, with_attention(num_kv_heads=4))
    with pytest.raises(ValueError, match=r'2 on a tensor rank must divide by sequence \(4\), or set context = "ring"$'):
        check_model(make_rules(exchange), exchange, with_attention(num_kv_heads=4))
    check_model(make_rules(exchange), exchange, with_attention(num_kv_heads=8))


def test_replicated_key_value_heads_are_all_on_every_tensor_rank():
    mesh = MeshConfig(sequence=4, tensor=2, context="all_to_all", replicate_kv=True)
    check_context(make_rules(mesh), mesh, with_attention(num_kv_heads=4).attention)


@pytest.mark.parametrize("context", ["ring", "all_to_all"])
def test_dropped_probabilities_have_no_split_over_positions(context):
    mesh = MeshConfig(sequence=2, context=context)
    with pytest.raises(ValueError, match=r"attention.dropout \(0.1\) .* set it to 0, or sequence \(2\) to 1$"):
        check_model(make_rules(mesh), mesh, with_attention(dropout=0.1))
    check_model(make_rules(TENSOR4), TENSOR4, with_attention(dropout=0.1))


def test_a_sequence_must_divide_into_two_parts_for_each_rank_of_a_ring():
    for context, fits, fails, zig_zag in (("ring", 48, 52, r"2 \* "), ("all_to_all", 52, 50, "")):
        mesh = MeshConfig(sequence=4, context=context)
        check_batch(make_rules(mesh), mesh, 8, 1, fits)
        with pytest.raises(ValueError, match=rf"seq_len \({fails}\) must divide by {zig_zag}sequence \(4\)"):
            check_batch(make_rules(mesh), mesh, 8, 1, fails)


# --- experts


def test_experts_must_divide_over_their_ranks():
    mesh = MeshConfig(expert=8)
    with pytest.raises(ValueError, match=r"num_experts \(4\) must divide by expert \(8\)$"):
        check_model(make_rules(mesh), mesh, model_config("mixtral_tiny"))
    check_model(make_rules(mesh), mesh, changed("moe.num_experts", 16))


def test_a_dense_model_has_no_experts_to_split():
    mesh = MeshConfig(expert=2)
    with pytest.raises(ValueError, match=r"expert \(2\) splits experts, and the model has none: .* to data$"):
        check_model(make_rules(mesh), mesh, model_config("dense_tiny"))


def test_expert_ranks_split_the_batch_too():
    mesh = MeshConfig(data=2, expert=4)
    assert make_rules(mesh)["batch"] == ("data", "expert")
    with pytest.raises(
        ValueError, match=r"global_batch / microbatches \(4\) must divide by data \(2\) \* expert \(4\)$"
    ):
        check_batch(make_rules(mesh), mesh, 8, 2, 64)
    check_batch(make_rules(mesh), mesh, 16, 2, 64)


# --- stages


def test_stages_want_one_period_repeated_as_often_as_there_are_stages():
    mesh = MeshConfig(pipeline=4)
    check_layers(mesh, [(("dense", "sparse"), 8)])
    with pytest.raises(ValueError, match=r"not 1 x \(dense\) \+ 3 x \(sparse\)$"):
        check_layers(mesh, [(("dense",), 1), (("sparse",), 3)])
    with pytest.raises(
        ValueError, match=r"num_layers \(12, periods of 2\) .* pipeline \(4\) .*: 6 does not divide by 4$"
    ):
        check_layers(mesh, [(("dense", "sparse"), 6)])
    check_layers(MeshConfig(), [(("dense",), 1), (("sparse",), 3)])


def test_interleaved_stages_want_a_period_for_every_chunk():
    mesh = MeshConfig(pipeline=2, schedule="interleaved", chunks=3)
    check_layers(mesh, [(("dense",), 6)])
    with pytest.raises(
        ValueError, match=r"pipeline \(2\) \* chunks \(3\) stages as many periods: 4 does not divide by 6$"
    ):
        check_layers(mesh, [(("dense",), 4)])


def test_a_model_says_at_once_that_its_layers_do_not_make_equal_stages():
    with pytest.raises(ValueError, match=r"num_layers \(2, periods of 1\)"):
        ModelParts.of(model_config("dense_tiny"), MeshPlan.from_config(MeshConfig(pipeline=4), jax.devices()[:4]))


def test_interleaving_goes_round_in_groups_of_microbatches():
    mesh = MeshConfig(pipeline=4, schedule="interleaved", chunks=2)
    check_batch(make_rules(mesh), mesh, 16, 8, 64)
    with pytest.raises(ValueError, match=r"microbatches \(6\) must divide by pipeline \(4\): an interleaved schedule"):
        check_batch(make_rules(mesh), mesh, 18, 6, 64)
    check_batch(make_rules(MeshConfig(pipeline=4)), MeshConfig(pipeline=4), 18, 6, 64)


def test_a_competitive_mixture_has_no_stages():
    mesh = MeshConfig(pipeline=2)
    model = model_config("soft_mixture_competitive_tiny")
    with pytest.raises(ValueError, match=r"moe.competitive .* pipeline \(2\) .* set pipeline = 1$"):
        check_model(make_rules(mesh), mesh, model)
    check_model(make_rules(TENSOR4), TENSOR4, model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "interleaved", "pipeline": 2}, r'schedule = "interleaved" and chunks \(1\): .* chunks > 1'),
        ({"schedule": "1f1b", "pipeline": 2, "chunks": 2}, r'schedule = "1f1b" and chunks \(2\)'),
        ({"schedule": "interleaved", "chunks": 2}, r"chunks \(2\) interleave a pipeline: set pipeline > 1"),
        ({"pipeline": 2, "zero_stage": 2}, r"zero_stage \(2\) .*pipeline = 2\).* set zero_stage = 1, or 3"),
        ({"tensor": 2, "overlap_tensor": True}, r"overlap_tensor .* set sequence_parallel = true"),
        ({"data": 0}, r"data \(0\) must be a degree"),
        ({"sequence_parallel": True}, r"sequence_parallel .* set tensor > 1"),
        ({"exchange_factor": 0.0}, r"exchange_factor"),
        ({"pipeline": 0}, r"pipeline"),
    ],
)
def test_a_mesh_that_contradicts_itself_says_what_to_set(fields, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**fields)


@pytest.mark.parametrize("axis", ["pipeline", "sequence"])
def test_decoding_wants_whole_layers_and_whole_positions(axis):
    with pytest.raises(ValueError, match=rf"{axis} \(2\) is for training: generate on another mesh"):
        MeshConfig(**{axis: 2}).for_decoding()
    mesh = MeshConfig(expert=2, tensor=2, sequence_parallel=True, overlap_tensor=True)
    assert mesh.for_decoding() == MeshConfig(expert=2, tensor=2)
