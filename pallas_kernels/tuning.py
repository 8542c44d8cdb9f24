"""Which block sizes were measured to be best? One lookup; the data is tuned.json, which scripts/tune_kernels.py writes.

An entry holds for one op, one chip and one bucket of shapes. A kernel that finds none takes the defaults that its own
file computes from the shapes; nothing in the table is guessed.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

Config = TypeVar("Config")

TABLE = Path(__file__).with_name("tuned.json")
CHIPS = ("GH200", "H200", "H100", "H800", "H20", "A100", "L40S", "L40", "L4")
"""Looked for in this order in the device's name, so that one entry serves every card of a chip."""


def bucket(*arrays: jax.Array | jax.ShapeDtypeStruct, batched: bool = False) -> str:
    """Name the bucket of some operands: "bfloat16 8192x2048 64x2048x1024 64".

    Sizes over 1024 are rounded up to powers of two; smaller ones stay: head dims, experts and heads choose the code.
    batched: the first dim, of sequences, is left out.
    """
    sizes = ("x".join(str(_rounded(size)) for size in x.shape[batched:]) for x in arrays)
    return " ".join([jnp.dtype(arrays[0].dtype).name, *sizes])


def _rounded(size: int) -> int:
    return size if size <= 1024 else 1 << (size - 1).bit_length()


def op_name(function: str, **options: object) -> str:
    """Name an op by its function and what else chooses the code: "grouped_matmul transpose_w=True".

    Options that are off (False, None, 0) are left out; the names of Triton's kernels begin with "triton ".
    """
    return " ".join([function, *(f"{name}={value}" for name, value in options.items() if value)])


def chip_of(device_kind: str) -> str:
    """Give a chip's name in the table: "NVIDIA H200" is H200; a chip that is not listed keeps its own name."""
    return next((chip for chip in CHIPS if chip in device_kind), device_kind)


def tuned(op: str, chip_kind: str, bucket: str, default: Config) -> Config:
    """Give the measured config of an op on a chip for a bucket of shapes; `default` where nothing was measured.

    The entry's fields replace the default's. Raises ValueError for an entry with a field that the config has not: the
    kernel has changed since it was measured.
    """
    if _asking.get():
        raise _Asked(Lookup(op, bucket, default))
    entry = _entries(TABLE).get(key(op, chip_kind, bucket))
    if entry is None:
        return default
    config: Any = default
    known = {field.name for field in dataclasses.fields(config)}
    if unknown := sorted(set(entry) - known):
        raise ValueError(
            f"{TABLE.name}: {key(op, chip_kind, bucket)}: {', '.join(unknown)} must be a field of "
            f"{type(default).__name__}: run scripts/tune_kernels.py again"
        )
    return dataclasses.replace(config, **entry)


class Lookup(NamedTuple):
    """What a kernel looks up."""

    op: str
    bucket: str
    default: Any
    """the config that it takes where nothing was measured"""


class _Asked(Exception):
    """Ends a call that is made for its lookup alone."""


_asking: ContextVar[bool] = ContextVar("asking", default=False)


def lookup_of(call: Callable[..., Any], *operands: jax.ShapeDtypeStruct) -> Lookup:
    """Ask a kernel what it looks up for such operands; nothing behind the lookup is traced. May raise Declined."""
    token = _asking.set(True)
    try:
        jax.eval_shape(call, *operands)
    except _Asked as asked:
        return asked.args[0]
    finally:
        _asking.reset(token)
    raise ValueError(f"{call} must look a config up: it did not")


def key(op: str, chip_kind: str, bucket: str) -> str:
    """Join what an entry holds for."""
    return f"{op} | {chip_of(chip_kind)} | {bucket}"


@functools.cache
def _entries(path: Path) -> Mapping[str, dict[str, Any]]:
    return {name: entry["config"] for name, entry in json.loads(path.read_text())["entries"].items()}


def write(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Put a measured entry, {"config": its fields, ...: how it was measured}, in the place of an earlier one."""
    table = json.loads((path if path.exists() else TABLE).read_text())
    table["entries"] = dict(sorted({**table["entries"], name: dict(entry)}.items()))
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(table, indent=1) + "\n")
    scratch.replace(path)
    _entries.cache_clear()
