"""How configs come out of TOML files and dotted options, and go back into one file.

A model file holds `[model]` and the run defaults that suit it (`[train]`, `[optimizer]`, `[data]`), a mesh file holds
`[mesh]`, and a run's own config.toml holds all five: it can be given as a model file and as a mesh file again.
Every mistake becomes one line that names the file, the table, the key and the rule.
"""

import copy
import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import TypeAdapter, ValidationError

from moejax.config.run import RunConfig

Kind = Literal["model", "mesh"]
Table = dict[str, Any]
T = TypeVar("T")

TRUE_WORDS, FALSE_WORDS, NONE_WORDS = ("true", "yes", "on"), ("false", "no", "off"), ("none", "null")


class ConfigError(ValueError):
    """Say in one line what is wrong with a config, and where."""


def load_toml(path: Path | str) -> Table:
    """Read a TOML file; raise ConfigError if it is missing or does not parse."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory, not a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def config_names(kind: Kind, root: Path) -> list[str]:
    """List the names of the config files of one kind under `root`."""
    return sorted(path.stem for path in (root / kind).glob("*.toml"))


def find_config(kind: Kind, name_or_path: str, root: Path) -> Path:
    """Turn a bare name into root/kind/NAME.toml, leave a path as it is; raise ConfigError if there is no such file."""
    if "/" in name_or_path or name_or_path.endswith(".toml"):
        path = Path(name_or_path).expanduser()
        if path.is_file():
            return path
        raise ConfigError(f"{path}: no such {kind} file")
    path = root / kind / f"{name_or_path}.toml"
    if path.is_file():
        return path
    names = config_names(kind, root)
    raise ConfigError(f'no {kind} "{name_or_path}"{did_you_mean(name_or_path, names)} (known: {", ".join(names)})')


def build(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Validate `mapping` into the config class `cls`; raise ConfigError beginning with `where`.

    Strict: a number in quotes is no number, and 1 is no boolean.
    """
    try:
        # By way of JSON, because strict validation of Python objects refuses a dict where a dataclass is meant.
        return TypeAdapter(cls).validate_json(json.dumps(mapping, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, cls)}") from None


def read_run(path: Path) -> RunConfig:
    """Read a run's whole config from the config.toml saved beside it."""
    return build(RunConfig, load_toml(path), str(path))


def read_files(model: Path, mesh: Path) -> RunConfig:
    """Join a model file, with its run defaults, and a mesh file."""
    tables: Table = {}
    for path, needed in ((model, "model"), (mesh, "mesh")):
        tables[needed] = load_toml(path)
        build(RunConfig, tables[needed], str(path))  # blames the right file
        if needed not in tables[needed]:
            raise ConfigError(f"{path}: has no [{needed}] table")
    return build(RunConfig, {**tables["model"], "mesh": tables["mesh"]["mesh"]}, f"{model} and {mesh}")


def to_table(config: Any) -> Table:
    """Turn a config into nested dicts without its None values, which TOML cannot write."""
    return _without_none(dataclasses.asdict(config))


def dump_toml(config: RunConfig) -> str:
    """Write a run's config as TOML, such that reading it gives an equal config."""
    return tomli_w.dumps(to_table(config))


def flatten(table: Mapping[str, Any], prefix: str = "") -> Table:
    """Turn nested tables into one of dotted keys."""
    flat: Table = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def option_hints(cls: type, prefix: str = "") -> dict[str, Any]:
    """Map every dotted key that a config class takes to its type; raise nothing."""
    hints: dict[str, Any] = {}
    for name, hint in _field_hints(cls).items():
        table = _table_class(hint)
        hints |= {f"{prefix}{name}": hint} if table is None else option_hints(table, f"{prefix}{name}.")
    return hints


def parse_value(text: str, hint: Any) -> Any:
    """Read an option's text as its type wants it; text that does not fit stays text, for `build` to refuse."""
    members = get_args(hint)
    if NoneType in members:
        if text.lower() in NONE_WORDS:
            return None
        hint = next(member for member in members if member is not NoneType)
    if get_origin(hint) is Literal:
        return next((choice for choice in get_args(hint) if str(choice) == text), text)
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        return [parse_value(part.strip(), kind) for part in text.strip("[]()").split(",") if part.strip()]
    if hint is bool and text.lower() in TRUE_WORDS + FALSE_WORDS:
        return text.lower() in TRUE_WORDS
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            return text
    return text


def override(config: RunConfig, values: Mapping[str, Any], where: str) -> RunConfig:
    """Set dotted keys (`train.steps`) to new values; raise ConfigError beginning with `where`."""
    table = copy.deepcopy(dataclasses.asdict(config))
    for dotted, value in values.items():
        *parents, key = dotted.split(".")
        inner = table
        for parent in parents:
            if inner.get(parent) is None:
                inner[parent] = {}
            inner = inner[parent]
        inner[key] = value
    return build(RunConfig, table, where)


def explain(error: ValidationError, cls: type = RunConfig) -> str:
    """Put pydantic's first complaint into one line: `[table] key = value: rule`."""
    first, *others = error.errors(include_url=False)
    *path, key = (str(part) for part in first["loc"]) if first["loc"] else ("",)
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "value_error":  # a rule of the whole table, written by us
        return f"{_header([*path, key])}{first['msg'].removeprefix('Value error, ')}{more}"
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{_header(path)}unknown key {key}{_nearest_key(cls, path, key)}{more}"
    rule = first["msg"].removeprefix("Input ").replace("an object", "a table")
    return f"{_header(path)}{key} = {json.dumps(first['input'], default=str)}: {rule}{more}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Give "; did you mean X?" for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _without_none(table: Table) -> Table:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}


def _field_hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _table_class(hint: Any) -> type | None:
    """Find the config class in `Config` or `Config | None`."""
    return next((t for t in (hint, *get_args(hint)) if isinstance(t, type) and dataclasses.is_dataclass(t)), None)


def _header(path: list[str]) -> str:
    return f"[{'.'.join(path)}] " if any(path) else ""


def _nearest_key(cls: type, path: list[str], key: str) -> str:
    """Name the nearest key of the same table, or else the table that has such a key."""
    owner: type | None = cls
    for name in path:
        owner = _table_class(_field_hints(owner).get(name)) if owner else None
    if owner and (near := did_you_mean(key, _field_hints(owner))):
        return near
    elsewhere = [dotted.rpartition(".")[0] for dotted in option_hints(cls) if dotted.rpartition(".")[2] == key]
    return f"; it belongs to [{elsewhere[0]}]" if elsewhere else ""
