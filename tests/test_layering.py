"""The floors: who may import whom; and what else keeps the house in order."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    "pallas_kernels": 0,
    "moejax.axes": 0,
    "moejax.compat": 0,
    "moejax.config": 1,
    "moejax.ops": 2,
    "moejax.parallel": 3,
    "moejax.layers": 4,
    "moejax.moe": 5,
    "moejax.models": 6,
    "moejax.accounting": 7,
    "moejax.data": 7,
    "moejax.interop": 7,
    "moejax.train": 8,
    "moejax.serve": 8,
    "experiments": 9,
    "scripts": 10,
}
"""Import from your own package and from lower floors; never sideways, never up. A new package needs a row."""

MUST_NOT_IMPORT = {
    "pallas_kernels": {"flax", "moejax"},
    "moejax.axes": {"jax", "flax"},
    "moejax.config": {"jax", "flax"},
    "moejax.ops": {"flax"},
    "moejax.parallel": {"flax"},
    "moejax.parallel.schedules": {"jax"},
    "moejax.data": {"jax", "flax"},
    "moejax.serve.scheduler": {"jax", "flax"},
    "moejax.serve.block_manager": {"jax", "flax"},
    "moejax.serve.request": {"jax", "flax"},
}
"""Outer packages that a package or module must not know."""

MUST_NOT_NAME = {
    "moejax.ops": {"moejax.config"},
    "moejax.layers": {"moejax.config.model.ModelConfig", "moejax.config.run"},
    "moejax.moe": {"moejax.config.model.ModelConfig", "moejax.config.run"},
    "moejax.train": {"moejax.config.load"},
    "moejax.serve": {"moejax.config.load"},
}
"""Our own names that lie on a lower floor and must stay unknown all the same."""

SHARED_BY_EXPERIMENTS = {"experiments.cli", "experiments.process", "experiments.run_dir", "experiments.kernels"}

SOURCES = sorted(
    p for top in ("moejax", "pallas_kernels", "experiments", "scripts") for p in (ROOT / top).rglob("*.py")
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path) -> Iterator[str]:
    """Yield every imported name in full (`moejax.ops.norm.rms_norm`), wherever in the file the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def row_of(name: str) -> str | None:
    return next((package for package in FLOORS if inside(name, package)), None)


def is_ours(name: str) -> bool:
    return name.split(".")[0] in ("moejax", "pallas_kernels", "experiments", "scripts")


def violations(module: str, names: set[str]) -> Iterator[str]:
    """Say what is wrong with a module's imports; the tables above are the law."""
    own = row_of(module)
    for name in sorted(names):
        other = row_of(name)
        if is_ours(name) and name != "moejax" and other is None:
            yield f"{module} imports {name}, which has no row in FLOORS"
        elif own and other and other != own and FLOORS[other] >= FLOORS[own]:
            yield f"{module} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[other]})"
        elif other == "experiments" and not any(inside(name, shared) for shared in SHARED_BY_EXPERIMENTS):
            yield f"{module} imports {name}: an experiment is imported by nobody"
    for package, forbidden in (MUST_NOT_IMPORT | {"": set()}).items():
        if package and inside(module, package):
            yield from (f"{module} imports {name}" for name in names if name.split(".")[0] in forbidden)
    for package, forbidden in MUST_NOT_NAME.items():
        if inside(module, package):
            yield from (f"{module} names {name}" for name in names if any(inside(name, bad) for bad in forbidden))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_down(path: Path):
    module = module_name(path)
    assert module == "moejax" or row_of(module), f"{module} has no row in FLOORS"
    assert not list(violations(module, set(imported_names(path))))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("moejax.ops.norm", "moejax.parallel.plan"),
        ("moejax.train.loop", "moejax.serve.engine"),
        ("moejax.accounting.memory", "moejax.interop.safetensors"),
        ("moejax.data.corpus", "moejax.accounting.memory"),
        ("moejax.layers.norm", "moejax.config.model.ModelConfig"),
        ("moejax.config.load", "jax.numpy"),
        ("moejax.parallel.plan", "flax.nnx"),
        ("moejax.models.mixtral", "moejax.shiny.thing"),
        ("experiments.train", "experiments.generate.main"),
        ("pallas_kernels.rope", "moejax.axes"),
    ],
)
def test_a_wrong_import_is_seen(module: str, name: str):
    assert list(violations(module, {name}))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_are_short_and_named_for_what_they_hold(path: Path):
    limit = 600 if "pallas_kernels" in path.parts else 400
    assert len(path.read_text().splitlines()) <= limit
    assert not {path.stem, path.parent.name} & {"utils", "util", "common", "helpers", "misc"}


def test_configs_and_command_line_load_without_jax():
    code = "import sys, experiments.cli, moejax.config.load; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
