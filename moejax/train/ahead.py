"""How is a training step compiled for devices that are not here? From shapes alone."""

from collections.abc import Sequence
from typing import Any

import jax

from moejax.config.run import RunConfig
from moejax.models import ModelParts
from moejax.parallel.plan import MeshPlan
from moejax.train import optimizer as optimizers
from moejax.train.state import abstract_state
from moejax.train.step import abstract_batch, make_train_step


def lower_train_step(config: RunConfig, devices: Sequence[Any]) -> tuple[jax.stages.Lowered, ModelParts]:
    """Lower the step of a config for the devices of its mesh; `.compile()` of it needs no GPU."""
    plan = MeshPlan.from_config(config.mesh, devices)
    parts = ModelParts.of(config.model, plan)
    optimizer = optimizers.build(config.optimizer, config.train.steps, parts.placements)
    step = make_train_step(parts, optimizer, config)
    state, batch = (
        abstract_state(parts, optimizer),
        abstract_batch(plan, config.train, config.model.encoder is not None),
    )
    with jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh):  # kernels read their chip from it
        return step.trace(state, batch).lower(lowering_platforms=("cuda",)), parts
