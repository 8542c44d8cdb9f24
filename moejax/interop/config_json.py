"""What does a config.json say, in either of its spellings, and how is one written?

transformers 5 writes `rope_parameters` and `dtype`, every file on the hub has `rope_theta`, `rope_scaling` and
`torch_dtype`: both are read. The hub's spelling is written, since every version reads it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.config.attention import RopeConfig
from moejax.config.moe import RouterConfig

Json = dict[str, Any]
KINDS = ("default", "linear", "llama3", "yarn")
_MISSING = object()


class ConfigJson:
    """A config.json's values; every complaint names the file and the key."""

    def __init__(self, path: Path, values: Json) -> None:
        self.path, self.values = path, values

    @classmethod
    def read(cls, folder: Path, name: str = "config.json") -> "ConfigJson":
        """Read FOLDER/config.json; raise ValueError if there is none, or it is no JSON object."""
        path = Path(folder).expanduser() / name
        if not path.is_file():
            raise ValueError(f"{path}: no such file: a Hugging Face folder holds config.json beside its safetensors")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: holds a {type(values).__name__}, expected an object")
        return cls(path, values)

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """Give a value, the default where it is missing or null; raise ValueError where there is no default."""
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise ValueError(f"{self.path}: {key} is missing: the model type {self.values.get('model_type')} needs it")
        return default

    def must_be(self, key: str, allowed: Sequence[Any], default: Any) -> None:
        """Raise ValueError unless a value is one that we compute as its authors do."""
        value = self.get(key, default)
        if value not in allowed:
            choices = ", ".join(map(json.dumps, allowed))
            raise ValueError(f"{self.path}: {key} = {json.dumps(value)} is not supported, expected {choices}")

    def dtype(self) -> str:
        """Name the weights' dtype; of quantised files what they are turned into, bfloat16."""
        quantised = "quantization_config" in self.values
        name = str(self.get("dtype", self.get("torch_dtype", "float32"))).removeprefix("torch.")
        if name not in ("float64", "float32", "bfloat16", "float16"):
            raise ValueError(f"{self.path}: torch_dtype = {name} is not supported, expected float32, bfloat16, float16")
        return "bfloat16" if quantised and name == "float32" else name

    def rope(self, theta: float, head_dim: int, **fixed: Any) -> RopeConfig:
        """Read rotary positions; `theta` is the model type's own default base."""
        table = self.get("rope_parameters", None) or self.get("rope_scaling", None) or {}
        kind = table.get("rope_type", table.get("type")) or "default"
        if kind not in KINDS:
            raise ValueError(
                f"{self.path}: rope_type = {json.dumps(kind)} is not supported, expected {', '.join(KINDS)}"
            )
        if table.get("attention_factor") is not None:
            raise ValueError(f"{self.path}: attention_factor = {table['attention_factor']} is not supported: remove it")
        base = table.get("rope_theta") or self.get("rope_theta", theta)
        fraction = table.get("partial_rotary_factor") or self.get("partial_rotary_factor", 1.0)
        rotated = self.get("rotary_dim", int(head_dim * fraction))
        values: Json = {"theta": float(base), "dim": None if rotated == head_dim else rotated} | fixed
        if kind == "default":
            return RopeConfig(**values)
        length = table.get("original_max_position_embeddings") or self.get("original_max_position_embeddings", 0)
        values |= {"kind": kind, "factor": float(table.get("factor") or self._factor(length))}
        if kind in ("llama3", "yarn"):
            values["original_length"] = length or self.get("max_position_embeddings")
        names = {"llama3": ("low_freq_factor", "high_freq_factor"), "linear": ()}
        floats = names.get(kind, ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"))
        values |= {name: float(table[name]) for name in floats if table.get(name) is not None}
        if kind == "yarn":
            values["truncate"] = table.get("truncate", True)
        return RopeConfig(**values)

    def _factor(self, length: int) -> float:
        if not length:
            raise ValueError(f"{self.path}: rope_scaling has neither factor nor original_max_position_embeddings")
        return self.get("max_position_embeddings") / length

    def router(self, **values: Any) -> RouterConfig:
        """Read what routers of the library's shared loss have in common: the loss's weight, and jitter."""
        jitter = self.get("router_jitter_noise", 0.0)
        noise: Json = {"noise": "jitter", "jitter": jitter} if jitter else {}
        loss = {"load_balance": self.get("router_aux_loss_coef", 0.001), "balance_over": "model"}
        return RouterConfig(num_active=self.get("num_experts_per_tok"), **loss, **noise, **values)


def rope_json(rope: RopeConfig, head_dim: int) -> Json:
    """Write rotary positions."""
    written: Json = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.dim is not None:
        written["partial_rotary_factor"] = rope.dim / head_dim
    if rope.kind == "default":
        return written
    table: Json = {"rope_type": rope.kind, "factor": rope.factor}
    defaults = RopeConfig()
    if rope.kind in ("llama3", "yarn"):
        table["original_max_position_embeddings"] = rope.original_length
    if rope.kind == "llama3":
        table |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        table |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        scales = {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
        table |= {name: value for name, value in scales.items() if value != getattr(defaults, name)}
    return written | {"rope_scaling": table}


def router_json(router: RouterConfig) -> Json:
    """Write what `ConfigJson.router` reads."""
    return {
        "num_experts_per_tok": router.num_active,
        "router_aux_loss_coef": router.load_balance,
        "router_jitter_noise": router.jitter if router.noise == "jitter" else 0.0,
    }
