"""Training steps of open families, compiled for H200s: latent and lightning attention, sinks, clamped experts."""

import dataclasses
from typing import Any

import pytest

from moejax.accounting.target import missing_plugins
from moejax.config.attention import LatentConfig, LightningConfig
from moejax.config.mesh import MeshConfig
from moejax.config.model import ModelConfig, Precision
from moejax.config.run import TrainConfig
from tests.conftest import model_config
from tests.pallas_kernels.test_whole_steps import compiled_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_plugins() is not None, reason=f"{missing_plugins()}"),
]

FLASH = {"flash_attention", "flash_attention_dq", "flash_attention_dkdv"}
WIDE_FLASH = {"flash_attention", "flash_attention_dq", "flash_attention_dk", "flash_attention_dv"}
"""Keys of 192 channels: dk and dv are kernels of their own."""
LIGHTNING = {"lightning_attention"}
TRAIN = TrainConfig(global_batch=4, seq_len=512)


def wide(name: str, **changes: Any) -> ModelConfig:
    """Give a tiny model widths that kernels take."""
    config = model_config(f"{name}_tiny")
    attention = dataclasses.replace(config.attention, num_heads=4, num_kv_heads=2, **changes.pop("attention", {}))
    moe = dataclasses.replace(config.moe, num_experts=8, expert_ffn=256, shared_ffn=256 if config.moe.shared_ffn else 0)
    precision = Precision("float32", "bfloat16", "float32", "float32")
    changes = {"embed": 512, "ffn": 512, "remat": "full", "vocab": 1024} | changes
    return dataclasses.replace(config, attention=attention, moe=moe, precision=precision, **changes)


def deepseek() -> ModelConfig:
    tiny = model_config("deepseek_v3_tiny").latent
    assert tiny is not None
    sizes = LatentConfig(num_heads=4, q_rank=256, kv_rank=128, nope_dim=128, rope_dim=64, value_dim=128, rope=tiny.rope)
    return wide("deepseek_v3", latent=sizes)


MODELS = {
    "deepseek_v3": (deepseek, WIDE_FLASH),
    "minimax": (
        lambda: wide("minimax", attention={"head_dim": 128}, lightning=LightningConfig(num_heads=4, head_dim=128)),
        FLASH | LIGHTNING,
    ),
    "gpt_oss": (lambda: wide("gpt_oss", attention={"head_dim": 64, "window": 128}), FLASH),
}


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, tensor=2, sequence_parallel=True)], ids=["1", "4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_holds_the_familys_kernels(name: str, mesh: MeshConfig):
    make, kernels = MODELS[name]
    text = compiled_step(make(), mesh, TRAIN).as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="mosaic_gpu_v2"' in line]
    for kernel in kernels:
        assert any(kernel in line for line in calls), f"{kernel} is not among the {len(calls)} kernels"
    assert any("grouped" in line for line in calls)
    assert "ragged-dot" not in text
