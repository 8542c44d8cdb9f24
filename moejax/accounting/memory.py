"""What fills a device's memory while training: weights, gradients, optimizer state, activations?"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config.model import ModelConfig
from moejax.config.run import TrainConfig
from moejax.models import ModelParts
from moejax.parallel.plan import MeshPlan


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, by kind. The first three are exact; activations are a model of what the backward keeps."""

    params: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """Add all kinds."""
        return self.params + self.gradients + self.optimizer + self.activations


def estimate_memory(parts: ModelParts, train: TrainConfig) -> MemoryEstimate:
    """Predict one device's memory at the peak of a step."""
    plan = parts.plan
    weights = _local_bytes(plan, parts.shapes, parts.weight_specs())
    slices = _local_bytes(plan, parts.shapes, parts.state_specs())
    # Stage 1 holds whole gradients until the step's one reduce-scatter, stage 2 only while accumulating slices.
    split = plan.config.zero_stage == 3 or (plan.config.zero_stage == 2 and train.microbatches > 1)
    gradients = slices if split else weights
    return MemoryEstimate(weights, gradients, 2 * slices, activation_bytes(parts.config, plan, train))


def _local_bytes(plan: MeshPlan, shapes: Any, specs: Any) -> float:
    def local(shape: jax.ShapeDtypeStruct, spec: Any) -> int:
        return math.prod(plan.place(spec).shard_shape(shape.shape)) * np.dtype(shape.dtype).itemsize

    return float(sum(jax.tree.leaves(jax.tree.map(local, shapes, specs))))


def activation_bytes(config: ModelConfig, plan: MeshPlan, train: TrainConfig) -> float:
    """Model what one microbatch keeps for the backward, after Korthikanti et al. (arXiv 2205.05198), for our layers."""
    width = jnp.dtype(config.precision.compute).itemsize
    tokens = train.global_batch // train.microbatches // plan.degree("batch") * train.seq_len / plan.degree("seq")
    stream = config.embed / (plan.size("tensor") if plan.config.sequence_parallel else 1)
    whole = config.embed
    tensor = plan.size("tensor")
    attention, moe = config.attention, config.moe
    heads, kv_heads = attention.num_heads / tensor, attention.num_kv_heads / plan.degree("kv_heads")
    naive = attention.implementation == "naive" or attention.dropout > 0
    scores = heads * (train.seq_len if naive else 1)
    mixer = 2 * stream + whole + (2 * heads + 2 * kv_heads) * attention.head_dim + scores
    dense = 2 * stream + whole + 3 * config.ffn / tensor
    layers = [dense] * config.num_layers
    if moe is not None:
        active = moe.num_experts if moe.router.kind == "soft" else moe.router.num_active
        rows = active * (moe.capacity_factor or 1.0) + moe.num_shared_experts
        sparse = 2 * stream + whole + rows * (2 * whole + 3 * moe.expert_ffn / tensor) + 2 * moe.num_experts
        layers = [sparse if (i + 1) % moe.every == 0 else dense for i in range(config.num_layers)]
    largest = mixer + max(layers)
    kept = {
        "none": sum(mixer + ffn for ffn in layers),
        "dots": sum(mixer - scores + ffn for ffn in layers) + largest,
        "names": 3 * stream * config.num_layers + largest,
        "full": stream * config.num_layers + largest,
    }[config.remat]
    wide = jnp.dtype(config.precision.accumulate).itemsize
    logits = 2 * config.vocab / tensor * wide
    return tokens * (kept * width + logits)
