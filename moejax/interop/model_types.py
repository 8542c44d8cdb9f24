"""Which family is a config.json's model type, and which model type is a family?"""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from moejax.config.load import did_you_mean, explain
from moejax.config.model import ModelConfig
from moejax.interop import families
from moejax.interop.config_json import ConfigJson, Json

FAMILIES: dict[str, ModuleType] = {
    found.name: importlib.import_module(f"{families.__name__}.{found.name}")
    for found in pkgutil.iter_modules(families.__path__)
}
"""ModelConfig.name -> the file that knows its Hugging Face form."""

MODEL_TYPES = {name: module for module in FAMILIES.values() for name in module.MODEL_TYPES}
"""A config.json's model_type -> the file that reads it."""


def read_config(folder: Path) -> ModelConfig:
    """Read the model that FOLDER/config.json describes; raise ValueError naming file, key and rule."""
    hf = ConfigJson.read(folder)
    model_type = hf.get("model_type")
    if model_type not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        raise ValueError(
            f'{hf.path}: model_type = "{model_type}" is not supported{did_you_mean(model_type, MODEL_TYPES)} '
            f"(known: {known})"
        )
    try:
        return MODEL_TYPES[model_type].config(hf)
    except ValidationError as error:
        raise ValueError(f"{hf.path}: as a model: {explain(error, ModelConfig)}") from None


def family_of(config: ModelConfig) -> ModuleType:
    """Give the file of a model's family; raise ValueError for one that Hugging Face does not have."""
    if config.name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f'a model of name = "{config.name}" has no Hugging Face form (those that have: {known})')
    return FAMILIES[config.name]


def write_config(config: ModelConfig, source: Json | None = None) -> Json:
    """Give the config.json of a model; `source`, the one it came from, brings what does not concern the weights.

    Raises ValueError where the family's config.json cannot say what the model is.
    """
    family = family_of(config)
    model_type, written = family.MODEL_TYPES[0], family.to_json(config)
    again = family.config(ConfigJson(Path("config.json to be written"), written | {"model_type": model_type}))
    if lost := _lost(config, again):
        raise ValueError(f"{model_type} cannot say {', '.join(lost)}: set that as the family has it")
    kept = {key: value for key, value in (source or {}).items() if key in KEPT}
    head = {"architectures": [family.ARCHITECTURE], "model_type": model_type}
    return head | kept | written


KEPT = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
    "initializer_range",
    "use_cache",
    "block_size",
)
"""Keys that are no business of the weights."""

IRRELEVANT = (
    "lora",
    "mtp",
    "implementation",
    "dispatch",
    "dropout",
    "remat",
    "unroll",
    "init_scale",
    "capacity_factor",
    "precision",
)
"""Fields that say how a model is run or trained, not what it computes."""


def _lost(ours: ModelConfig, again: ModelConfig) -> Sequence[str]:
    """Name what a config.json would not bring back."""
    found = []
    for name, (a, b) in _differences(ours, again).items():
        parts = name.split(".")
        training = parts[:2] == ["moe", "router"] and parts[-1] in TRAINING
        unused = parts[0] == "attention" and (ours.latent is not None or ours.t5 is not None)
        unused |= parts[0] == "ffn" and ours.moe is not None and ours.encoder is None
        unused |= parts[0] == "mixers" and _spread(ours) == _spread(again)
        unused |= parts[-1] == "group_best" and ours.moe is not None and ours.moe.router.num_groups == 1
        if not set(parts) & set(IRRELEVANT) and not training and not unused:
            found.append(f"{name} = {a!r} (it would be {b!r})")
    return found


TRAINING = (
    "noise",
    "jitter",
    "load_balance",
    "balance_over",
    "z_loss",
    "importance_loss",
    "load_loss",
    "bias_update_rate",
)
"""Fields of a router that concern training alone."""


def _spread(config: ModelConfig) -> list[str]:
    return [config.mixers[n % len(config.mixers)] for n in range(config.num_layers)]


def _differences(ours: Any, theirs: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    if not is_dataclass(ours) or type(ours) is not type(theirs):
        return {} if ours == theirs else {prefix.rstrip("."): (ours, theirs)}
    found: dict[str, tuple[Any, Any]] = {}
    for field in fields(ours):
        found |= _differences(getattr(ours, field.name), getattr(theirs, field.name), f"{prefix}{field.name}.")
    return found
