"""What fills a device's memory while training: weights, gradients, optimizer state, activations?"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from moejax.accounting.activations import LayerMemory, activations, width
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


def estimate_memory(parts: ModelParts, train: TrainConfig) -> MemoryEstimate:
    """Predict one device's memory at the peak of a step."""
    plan, mesh = parts.plan, parts.plan.config
    weights = local_bytes(plan, parts.shapes, parts.weight_specs())
    slices = local_bytes(plan, parts.shapes, parts.state_specs())
    # Stage 1 holds whole gradients until the step's one reduce-scatter, stage 2 only while accumulating slices.
    split = mesh.zero_stage == 3 or (mesh.zero_stage == 2 and train.microbatches > 1)
    gradients = slices if split else weights
    held = activations(parts.config, plan, train)
    layer = layer_weights(parts)
    workspace = held.workspace
    if train.microbatches > 1:  # a microbatch's own gradients, before they are added to the others'
        workspace += weights / (mesh.chunks if plan.size("pipeline") > 1 else 1)
    if mesh.zero_stage == 3:  # one layer gathered, and its gradient before the reduce-scatter
        workspace += 2 * layer * width(parts.config.precision.compute)
    kept = held.kept
    if parts.config.remat == "none" and parts.config.precision.compute != parts.config.precision.params:
        # The backward keeps each weight as it was cast.
        kept += weights * width(parts.config.precision.compute) / width(parts.config.precision.params)
    return MemoryEstimate(weights, gradients, 2 * slices, kept, workspace)


def activation_bytes(config: ModelConfig, plan: MeshPlan, train: TrainConfig) -> float:
    """Give what one device holds of activations, kept and at work."""
    return activations(config, plan, train).total


def cache_bytes(config: ModelConfig, plan: MeshPlan, sequences: int, length: int) -> float:
    """Give one device's key/value caches for serving: `sequences` in all, of `length` tokens each."""
    heads = config.attention.num_kv_heads / plan.degree("kv_heads")
    local = sequences / plan.degree("batch")
    return 2.0 * config.num_layers * local * length * heads * config.attention.head_dim * width(config.precision.compute)


def local_bytes(plan: MeshPlan, shapes: Any, specs: Any) -> float:
    """Add up one device's parts of all arrays."""
    return float(sum(jax.tree.leaves(jax.tree.map(lambda s, spec: _part(plan, s, spec), shapes, specs))))


def _part(plan: MeshPlan, shape: jax.ShapeDtypeStruct, spec: PartitionSpec) -> float:
    axes = [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    return math.prod(shape.shape) * np.dtype(shape.dtype).itemsize / math.prod(plan.size(axis) for axis in axes)


def layer_weights(parts: ModelParts) -> float:
    """Count the elements of the largest layer, whole over the batch axes: what ZeRO-3 gathers at once."""
    plan, stacked = parts.plan, 0.0
    for shape, place in zip(jax.tree.leaves(parts.shapes), jax.tree.leaves(parts.placements), strict=True):
        if len(shape.shape) > len(place.axes) and place.dim is not None:
            own = math.prod(shape.shape[-len(place.axes) :])
            stacked += own / plan.degree(*place.axes)
    return stacked


__all__ = ["LayerMemory", "FAMILIES", "MemoryEstimate", "activation_bytes", "cache_bytes", "estimate_memory", "local_bytes"]
