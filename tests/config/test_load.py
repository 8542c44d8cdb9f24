"""Configs: what goes in comes out, and a mistake is one line that names the place and the way out."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.cli import CONFIGS
from moejax.config import load
from moejax.config.attention import (
    AttentionConfig,
    LatentConfig,
    LightningConfig,
    RopeConfig,
    T5AttentionConfig,
)
from moejax.config.load import ConfigError
from moejax.config.mesh import MeshConfig
from moejax.config.model import EncoderConfig, LoRAConfig, ModelConfig, MTPConfig
from moejax.config.moe import MoEConfig, RouterConfig
from moejax.config.run import OptimizerConfig, RunConfig, TrainConfig
from tests.conftest import config_files

SINGLE = CONFIGS / "mesh" / "single.toml"
DENSE = CONFIGS / "model" / "dense_tiny.toml"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", config_files("model"), ids=lambda path: path.stem)
def test_model_file_survives_a_round_trip(path: Path, tmp_path: Path):
    config = load.read_files(path, SINGLE)
    saved = write(tmp_path / "config.toml", load.dump_toml(config))
    assert load.read_run(saved) == config
    assert load.read_files(saved, saved) == config, "a saved config must be a valid --model and --mesh file"


@pytest.mark.parametrize("path", config_files("mesh"), ids=lambda path: path.stem)
def test_mesh_file_survives_a_round_trip(path: Path, tmp_path: Path):
    config = load.read_files(DENSE, path)
    assert load.read_run(write(tmp_path / "config.toml", load.dump_toml(config))) == config
    assert config.mesh.fill(8 if config.mesh.data == -1 else math.prod(config.mesh.degrees()))


@pytest.mark.parametrize("path", [*config_files("model"), *config_files("mesh")], ids=lambda path: path.stem)
def test_first_line_says_what_the_file_is_for(path: Path):
    assert path.read_text().startswith("# ")


@given(
    lr=st.floats(1e-300, 1e300),
    seed=st.integers(-(2**63), 2**63 - 1),
    capacity=st.none() | st.floats(1e-9, 1e9),
    source=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_any_value_survives_a_round_trip(lr: float, seed: int, capacity: float | None, source: str):
    config = load.override(
        RunConfig(model=ModelConfig(name="mixtral", moe=MoEConfig(capacity_factor=capacity))),
        {"optimizer.lr": lr, "train.seed": seed, "data.source": source},
        "here",
    )
    assert config.optimizer.lr == lr
    assert load.build(RunConfig, load.tomllib.loads(load.dump_toml(config)), "there") == config


def test_missing_tables_take_the_defaults():
    assert load.build(RunConfig, {}, "x.toml") == RunConfig()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"modle": {}}, "x.toml: unknown key modle; did you mean model?"),
        ({"train": {"step": 3}}, "x.toml: [train] unknown key step; did you mean steps?"),
        (
            {"model": {"name": "mixtral", "moe": {"router": {"num_activ": 1}}}},
            "x.toml: [model.moe.router] unknown key num_activ; did you mean num_active?",
        ),
        ({"model": {"head_dim": 64}}, "x.toml: [model] unknown key head_dim; it belongs to [model.attention]"),
        ({"train": {"zzz": 3}}, "x.toml: [train] unknown key zzz"),
        ({"model": 3}, "x.toml: model = 3: should be a table"),
        ({"model": {"vocab": "3"}}, 'x.toml: [model] vocab = "3": should be a valid integer'),
        ({"model": {"vocab": 3.5}}, "x.toml: [model] vocab = 3.5: should be a valid integer"),
        ({"model": {"tie_embeddings": 1}}, "x.toml: [model] tie_embeddings = 1: should be a valid boolean"),
        ({"mesh": {"zero_stage": 4}}, "x.toml: [mesh] zero_stage = 4: should be 0, 1, 2 or 3"),
        ({"optimizer": {"lr": -1}}, "x.toml: [optimizer] lr = -1: should be greater than 0"),
        ({"optimizer": {"lr": -1, "beta1": 2}}, "x.toml: [optimizer] lr = -1: should be greater than 0 (and 1 more)"),
        (
            {"model": {"name": "mixtral", "moe": {"num_experts": 1}}},
            "x.toml: [model.moe] num_active (2) must not exceed num_experts (1)",
        ),
        ({"model": {"name": "mixtral"}}, 'x.toml: [model] name = "mixtral" needs a [moe] table'),
        (
            {"model": {"attention": {"num_heads": 6, "num_kv_heads": 4}}},
            "x.toml: [model.attention] num_heads (6) must be a multiple of num_kv_heads (4)",
        ),
    ],
)
def test_a_mistake_is_one_line(table: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        load.build(RunConfig, table, "x.toml")
    assert str(caught.value) == message


def test_mistakes_name_the_file_they_are_in(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"bad\.toml: \[mesh\] unknown key tensr; did you mean tensor\?"):
        load.read_files(DENSE, write(tmp_path / "bad.toml", "[mesh]\ntensr = 2\n"))
    with pytest.raises(ConfigError, match=r"no_mesh\.toml: has no \[mesh\] table"):
        load.read_files(DENSE, write(tmp_path / "no_mesh.toml", ""))
    with pytest.raises(ConfigError, match=r"torn\.toml: not valid TOML: .*line 1"):
        load.load_toml(write(tmp_path / "torn.toml", "[model\n"))
    with pytest.raises(ConfigError, match="is a directory"):
        load.load_toml(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        load.load_toml(tmp_path / "none.toml")


def test_find_config_knows_names_and_paths(tmp_path: Path):
    assert load.find_config("model", "dense_tiny", CONFIGS) == DENSE
    assert load.find_config("model", str(DENSE), tmp_path) == DENSE
    with pytest.raises(ConfigError, match=r'no mesh "tensr8"; did you mean tensor8\? \(known: .*auto, .*zero3'):
        load.find_config("mesh", "tensr8", CONFIGS)
    with pytest.raises(ConfigError, match="no such model file"):
        load.find_config("model", "lost/dense_tiny.toml", CONFIGS)


def test_override_makes_missing_tables_and_blames_the_command_line():
    dense = RunConfig()
    sparse = load.override(dense, {"model.name": "mixtral", "model.moe.router.num_active": 1}, "command line")
    assert sparse.model.moe == MoEConfig(router=RouterConfig(num_active=1))
    assert dense == RunConfig()
    with pytest.raises(ConfigError, match=r'command line: \[model\] name = "llama" takes no \[moe\] table'):
        load.override(dense, {"model.moe.num_experts": 4}, "command line")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "7", 7),
        ("train.steps", "7.5", "7.5"),
        ("optimizer.lr", "3", 3.0),
        ("optimizer.lr", "1e-3", 1e-3),
        ("mesh.zero_stage", "3", 3),
        ("mesh.zero_stage", "9", "9"),
        ("mesh.sequence_parallel", "True", True),
        ("mesh.sequence_parallel", "off", False),
        ("model.moe.capacity_factor", "none", None),
        ("model.moe.capacity_factor", "1.25", 1.25),
        ("data.source", "12", "12"),
        ("data.source", "none", "none"),
    ],
)
def test_parse_value_reads_what_the_field_wants(key: str, text: str, value: object):
    parsed = load.parse_value(text, load.option_hints(RunConfig)[key])
    assert parsed == value
    assert type(parsed) is type(value)


def test_every_option_is_reached_by_an_override():
    """The flat list of options and the nested config must be the same keys."""
    rope = RopeConfig(dim=8)
    model = ModelConfig(
        name="mixtral",
        moe=MoEConfig(capacity_factor=1.0, router=RouterConfig(bias_update_rate=0.0, group_best=1)),
        attention=AttentionConfig(window=8, scale=1.0, clip=1.0, rope=rope),
        latent=LatentConfig(q_rank=8, rope=rope),
        lightning=LightningConfig(),
        mixers=("lightning", "global"),
        lora=LoRAConfig(),
        mtp=MTPConfig(),
    )
    seq2seq = ModelConfig(
        name="switch_transformers",
        t5=T5AttentionConfig(),
        encoder=EncoderConfig(),
        moe=MoEConfig(slots=4, router=RouterConfig(num_active=1, normalize=False)),
    )
    configs = [RunConfig(model=model), RunConfig(model=seq2seq, train=TrainConfig(source_len=8))]
    written = set().union(*(load.flatten(load.to_table(config)) for config in configs))
    assert written == load.option_hints(RunConfig).keys()


def test_fill_names_the_arithmetic():
    assert MeshConfig(data=-1, tensor=2).fill(8) == MeshConfig(data=4, tensor=2)
    with pytest.raises(ValueError, match=r"the mesh has 6 devices .*data 3 .*tensor 2.* but jax sees 8"):
        MeshConfig(data=3, tensor=2).fill(8)
    with pytest.raises(ValueError, match=r"the mesh has 6 devices .*data 1 .*tensor 6.* but jax sees 8"):
        MeshConfig(data=-1, tensor=6).fill(8)


def test_configs_are_frozen_and_hashable():
    assert hash(RunConfig()) == hash(RunConfig())
    with pytest.raises(AttributeError):
        TrainConfig().steps = 3  # type: ignore[misc]
    assert OptimizerConfig() == OptimizerConfig(lr=1e-3)
