"""What fills a device's memory while training: weights, gradients, optimizer state, activations?"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from moejax.accounting.activations import activations, width
from moejax.accounting.mixers import mixer_size
from moejax.config.model import ModelConfig
from moejax.config.run import TrainConfig
from moejax.models import FAMILIES, ModelParts
from moejax.parallel.plan import MeshPlan


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a step, by kind. The first three are exact, the others a model."""

    params: float
    gradients: float
    optimizer: float
    activations: float
    """what the forward keeps for the backward"""
    workspace: float = 0.0
    """what one layer's backward holds besides: recomputed arrays, scores, logits, gathered weights, fresh gradients"""

    @property
    def total(self) -> float:
        """Add all kinds."""
        return self.params + self.gradients + self.optimizer + self.activations + self.workspace


@dataclass(frozen=True)
class WeightBytes:
    """One device's bytes of all weights, of a moment of Adam's, and of a layer's weights as ZeRO-3 gathers them."""

    weights: float
    slices: float
    gathered: float
    frozen: float
    """weights that are not trained, under low-rank updates; and routers' biases"""

    @classmethod
    def of(cls, parts: ModelParts) -> "WeightBytes":
        """Count them; the same for every batch and remat policy."""
        specs = parts.weight_specs(), parts.state_specs()
        weights, slices = (local_bytes(parts.plan, parts.shapes, tree) for tree in specs)
        frozen = local_bytes(parts.plan, parts.buffer_shapes, parts.buffer_specs())
        return cls(weights, slices, gathered_elements(parts) * width(parts.config.precision.compute), frozen)


def estimate_memory(parts: ModelParts, train: TrainConfig, counted: WeightBytes | None = None) -> MemoryEstimate:
    """Predict one device's memory at the peak of a step; `counted` saves counting the weights again."""
    mesh, counted = parts.plan.config, counted or WeightBytes.of(parts)
    weights, slices = counted.weights, counted.slices
    # Stage 1 holds whole gradients until the step's one reduce-scatter, stage 2 only while accumulating slices.
    split = mesh.zero_stage == 3 or (mesh.zero_stage == 2 and train.microbatches > 1)
    gradients = slices if split else weights
    held = activations(parts.config, parts.plan, train)
    workspace = held.workspace + _weights_at_work(parts, train, counted)
    # The update overwrites Adam's moments before the new weights have read them: the compiler copies both.
    workspace = max(workspace, 2 * slices - held.kept)
    return MemoryEstimate(
        weights + counted.frozen, gradients, 2 * slices, held.kept + _cast_weights(parts, weights), workspace
    )


def _weights_at_work(parts: ModelParts, train: TrainConfig, counted: WeightBytes) -> float:
    """Give the weights and gradients that live beside the stored ones while a microbatch runs."""
    mesh, size = parts.plan.config, 0.0
    if train.microbatches > 1:  # a microbatch's own gradients, before they are added to the others'
        size += counted.weights / (mesh.chunks if parts.plan.size("pipeline") > 1 else 1)
    if mesh.zero_stage == 3:
        # One layer gathered, and its gradient before the reduce-scatter; and, as seen on GPUs (CPUs do without), all
        # stored parts once more, laid out for gathering before the loop over the layers.
        size += 2 * counted.gathered + counted.weights
    return size


def _cast_weights(parts: ModelParts, weights: float) -> float:
    """Give the weights as they were cast, which the backward keeps unless it recomputes."""
    precision = parts.config.precision
    if parts.config.remat != "none" or precision.compute == precision.params:
        return 0.0
    return weights * width(precision.compute) / width(precision.params)


def cache_bytes(config: ModelConfig, plan: MeshPlan, sequences: int, length: int) -> float:
    """Give one device's caches for serving: `sequences` in all, of `length` tokens each."""
    total = 0.0
    for layer in FAMILIES[config.name].layers(config):
        size = mixer_size(config, layer.mixer, plan)
        if size.is_linear:
            total += size.heads * size.key_dim * size.value_dim * max(width(config.precision.compute), 4)
        elif layer.part != "encoder":  # a decoder behind one holds its source's keys and values too, taken as long
            times = 2 if layer.part == "decoder" else 1
            total += times * length * size.cached * width(config.precision.compute)
    return total * sequences / plan.degree("batch")


def local_bytes(plan: MeshPlan, shapes: Any, specs: Any) -> float:
    """Add up one device's parts of all arrays."""
    return float(sum(jax.tree.leaves(jax.tree.map(lambda s, spec: _part(plan, s, spec), shapes, specs))))


def _part(plan: MeshPlan, shape: jax.ShapeDtypeStruct, spec: PartitionSpec) -> float:
    axes = [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    return math.prod(shape.shape) * np.dtype(shape.dtype).itemsize / math.prod(plan.size(axis) for axis in axes)


def gathered_elements(parts: ModelParts) -> float:
    """Count the split weights of one period of layers, whole over the batch axes: what ZeRO-3 gathers at once."""
    plan, total = parts.plan, 0.0
    for shape, place in zip(jax.tree.leaves(parts.shapes), jax.tree.leaves(parts.placements), strict=True):
        if len(shape.shape) > len(place.axes) and place.dim is not None:
            own = math.prod(shape.shape[-len(place.axes) :])
            total += own / plan.degree(*place.axes)
    return total
