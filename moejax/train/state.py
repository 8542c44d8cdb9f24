"""What a run carries from step to step, and how it is born already split over the mesh."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from moejax.models import ModelParts

Tree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Weights, router buffers and optimizer state; and int32 counts. Leaves may also be specs, places or shapes."""

    step: Any
    params: Tree
    buffers: Tree
    opt_state: Tree
    skipped: Any
    """steps left out because their gradient was not finite"""
    skipped_in_a_row: Any


def state_specs(parts: ModelParts, optimizer: optax.GradientTransformation) -> TrainState:
    """Give the specs of a whole train state."""
    abstract = jax.eval_shape(optimizer.init, parts.shapes)
    opt_specs = optax.tree_utils.tree_map_params(
        optimizer, lambda _, spec: spec, abstract, parts.state_specs(), transform_non_params=lambda _: PartitionSpec()
    )
    scalar = PartitionSpec()
    return TrainState(scalar, parts.weight_specs(), parts.buffer_specs(), opt_specs, scalar, scalar)


def init_state(
    parts: ModelParts, optimizer: optax.GradientTransformation, seed: int, weights: tuple[Tree, Tree] | None = None
) -> TrainState:
    """Make the state of step 0, every array born in its place; `weights` are the params and buffers to start from."""
    params, buffers = parts.init(seed) if weights is None else weights
    places = jax.tree.map(parts.plan.place, state_specs(parts, optimizer))
    opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(params)
    zeros = [jax.device_put(jnp.int32(0), parts.plan.place(PartitionSpec())) for _ in range(3)]
    return TrainState(zeros[0], params, buffers, opt_state, zeros[1], zeros[2])


def abstract_state(parts: ModelParts, optimizer: optax.GradientTransformation) -> TrainState:
    """Give the state's shapes, dtypes and shardings: what a checkpoint is restored onto."""
    opt_state = jax.eval_shape(optimizer.init, parts.shapes)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = TrainState(count, parts.shapes, parts.buffer_shapes, opt_state, count, count)
    specs = state_specs(parts, optimizer)
    return jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=parts.plan.place(spec)), shapes, specs
    )
