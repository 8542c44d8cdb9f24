"""Typed, frozen configs: what a model, a mesh and a run are, and how TOML files become them; imports no jax."""

from moejax.config.attention import AttentionConfig
from moejax.config.mesh import MeshConfig
from moejax.config.model import ModelConfig, Precision
from moejax.config.moe import MoEConfig, RouterConfig
from moejax.config.run import DataConfig, OptimizerConfig, RunConfig, TrainConfig

__all__ = [
    "AttentionConfig",
    "DataConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Precision",
    "RouterConfig",
    "RunConfig",
    "TrainConfig",
]
