"""Which config.json is which model: every family has its golden, releases are read as they are, nothing is lost."""

import dataclasses
import json
from pathlib import Path

import pytest

from moejax.config.attention import RopeConfig
from moejax.interop.config_json import ConfigJson
from moejax.interop.families import minimax
from moejax.interop.model_types import FAMILIES, MODEL_TYPES, read_config, write_config
from moejax.models import FAMILIES as BUILT
from tests.conftest import model_config, tiny_models
from tests.interop.goldens import Golden, cases


def test_every_family_has_a_golden_a_layer_list_and_a_tiny_model():
    covered = {Golden.load(name).config["model_type"] for name in cases()}
    assert covered == set(MODEL_TYPES) - {minimax.MODEL_TYPES[1]}
    assert set(FAMILIES) <= set(BUILT)
    assert {f"{name}_tiny" for name in FAMILIES} <= set(tiny_models())


def test_minimax_is_read_as_it_was_released():
    """Its own keys, seven layers of lightning to one, 64 of 128 channels rotated, which transformers does not do."""
    released = {
        "model_type": "minimax_text_01",
        "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
        "head_dim": 128,
        "hidden_size": 6144,
        "intermediate_size": 9216,
        "layernorm_full_attention_alpha": 3.5565588200778455,
        "layernorm_full_attention_beta": 1.0,
        "layernorm_linear_attention_alpha": 3.5565588200778455,
        "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_alpha": 3.5565588200778455,
        "layernorm_mlp_beta": 1.0,
        "num_attention_heads": 64,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "postnorm": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000_000,
        "rotary_dim": 64,
        "shared_intermediate_size": 0,
        "vocab_size": 200064,
    }
    model = minimax.config(ConfigJson(Path("config.json"), released))
    assert model.attention.rope == RopeConfig(theta=1e7, dim=64)
    assert model.mixers[:8] == ("lightning",) * 7 + ("attention",)
    assert model.residual.of_norm
    assert model.residual.lightning == model.residual.ffn == (3.5565588200778455, 1.0)
    again = minimax.config(ConfigJson(Path("config.json"), write_config(model)))
    assert dataclasses.replace(again, moe=model.moe) == model


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_tiny_model_of_ours_can_be_written_and_read(name: str, tmp_path: Path):
    model = model_config(f"{name}_tiny")
    written = write_config(model)
    (tmp_path / "config.json").write_text(json.dumps(written))
    again = read_config(tmp_path)
    assert again.name == model.name and again.mixer_tables() == model.mixer_tables()


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("mixtral_tiny", {"embed_scale": 2.0}, r"mixtral cannot say embed_scale = 2.0 \(it would be 1.0\)"),
        ("qwen3_tiny", {"ffn_bias": True}, "qwen3 cannot say ffn_bias = True"),
        ("soft_mixture_tiny", {}, 'name = "soft_mixture" has no Hugging Face form'),
    ],
)
def test_what_a_config_json_cannot_say_is_refused(name: str, changes: dict, said: str):
    with pytest.raises(ValueError, match=said):
        write_config(dataclasses.replace(model_config(name), **changes))
