"""Which mesh axes a logical axis lies on, and what a size that does not divide is told."""

import dataclasses

import pytest

from moejax.axes import LOGICAL_AXES
from moejax.config.mesh import MeshConfig
from moejax.parallel.rules import check_batch, check_model, make_rules
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
