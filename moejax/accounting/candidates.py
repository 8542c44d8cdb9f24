"""Which layouts of a model on N devices are legal, and which of them fit?

Every rule is asked where it stands (`config/mesh.py`, `parallel/rules.py`), so that the reasons come from one place.
Left out from the start, without a count: tensor over more than a node (NVLink ends there), the residual stream whole on
all tensor ranks (split, the same bytes travel and fewer are held), GPipe (1F1B has its bubble and holds less).
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from moejax.accounting.chips import Chip
from moejax.accounting.memory import MemoryEstimate, WeightBytes, estimate_memory
from moejax.axes import MESH_AXES
from moejax.config.load import explain
from moejax.config.mesh import MeshConfig
from moejax.config.model import ModelConfig
from moejax.config.run import TrainConfig
from moejax.models import FAMILIES, ModelParts
from moejax.models.decoder import periods
from moejax.parallel.plan import MeshPlan
from moejax.parallel.rules import check_batch, check_layers, check_model

POLICIES = ("none", "dots", "names", "full")
"""Remat policies, the one that recomputes least first."""


@dataclass(frozen=True)
class Candidate:
    """A legal layout that fits."""

    parts: ModelParts
    train: TrainConfig
    memory: MemoryEstimate


@dataclass(frozen=True)
class Rejected:
    """A layout that does not go, and why."""

    mesh: dict[str, Any]
    reason: str


def factorizations(number: int, axes: int) -> Iterator[tuple[int, ...]]:
    """List all ways to write a number as an ordered product."""
    if axes == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in factorizations(number // first, axes - 1))


def layouts(devices: int, model: ModelConfig, chip: Chip) -> Iterator[dict[str, Any]]:
    """List mesh tables, legal or not: all degrees, ZeRO stages, ways of a context, and schedules."""
    for degrees in factorizations(devices, len(MESH_AXES)):
        sizes = dict(zip(MESH_AXES, degrees, strict=True))
        if sizes["tensor"] > chip.node:
            continue
        options: dict[str, Any] = {"sequence_parallel": True} if sizes["tensor"] > 1 else {}
        if model.attention.num_kv_heads % sizes["tensor"]:
            options["replicate_kv"] = True
        contexts = ("ring", "all_to_all") if sizes["sequence"] > 1 else ("ring",)
        schedules: Sequence[dict[str, Any]] = ({},)
        if sizes["pipeline"] > 1:
            schedules = ({"schedule": "1f1b"}, *({"schedule": "interleaved", "chunks": chunks} for chunks in (2, 4)))
        split = sizes["data"] * sizes["expert"] > 1
        for stage in range(4) if split else (0,):
            for context in contexts:
                for schedule in schedules:
                    yield sizes | options | schedule | {"zero_stage": stage, "context": context}


def consider(
    parts: ModelParts, table: dict[str, Any], train: TrainConfig, limit: float
) -> tuple[list[Candidate], Rejected | None]:
    """Give the ways to run a batch on a mesh that fit into `limit` bytes, or the reason why there is none."""
    try:
        mesh = MeshConfig(**table)
        plan = MeshPlan.on_paper(mesh)
        check_model(plan.rules, mesh, parts.config)
        check_layers(mesh, periods(FAMILIES[parts.config.name].layers(parts.config)))
        splits = legal_microbatches(plan, train)
    except ValidationError as error:
        return [], Rejected(table, explain(error, MeshConfig))
    except ValueError as error:
        return [], Rejected(table, str(error))
    laid = parts.on(plan)
    counted = WeightBytes.of(laid)
    policies = [dataclasses.replace(laid, config=dataclasses.replace(parts.config, remat=p)) for p in POLICIES]
    found: list[Candidate] = []
    least = math.inf
    for microbatches in splits:
        run = dataclasses.replace(train, microbatches=microbatches)
        for policy in policies:
            memory = estimate_memory(policy, run, counted)
            least = min(least, memory.total)
            if memory.total <= limit:  # what recomputes more is slower
                # Without a pipeline more microbatches help only where they allow to recompute less.
                if mesh.pipeline > 1 or policy.config.remat not in {c.parts.config.remat for c in found}:
                    found.append(Candidate(policy, run, memory))
                break
        if found and mesh.pipeline == 1 and found[-1].parts.config.remat == POLICIES[0]:
            break
    if found:
        return found, None
    return [], Rejected(table, f"does not fit: needs {least / 1e9:.0f} GB of {limit / 1e9:.0f} at least")


def legal_microbatches(plan: MeshPlan, train: TrainConfig) -> list[int]:
    """List the numbers of microbatches that divide the batch; raise ValueError, as the rules word it, if none does."""
    legal, refused = [], None
    most = max(train.global_batch // plan.degree("batch"), 1)
    for microbatches in (m for m in range(1, most + 1) if train.global_batch % m == 0):
        try:
            check_batch(plan.rules, plan.config, train.global_batch, microbatches, train.seq_len)
            legal.append(microbatches)
        except ValueError as error:
            refused = refused or error
    if not legal:
        raise refused or ValueError(f"global_batch ({train.global_batch}) has no microbatches")
    return legal
