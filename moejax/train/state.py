"""What a run carries from step to step, and how it is born already split over the mesh."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from moejax.config.model import ModelConfig
from moejax.models import build
from moejax.models.decoder import Decoder
from moejax.parallel.plan import MeshPlan

Tree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Weights, router buffers and optimizer state, as trees of arrays; and the counts of steps."""

    step: Int[Array, ""]
    params: Tree
    buffers: Tree
    opt_state: Tree
    skipped: Int[Array, ""]
    """steps left out because their gradient was not finite"""
    skipped_in_a_row: Int[Array, ""]


@dataclass(frozen=True)
class ModelParts:
    """A model without values: its structure, and for each weight its global shape and its place."""

    config: ModelConfig
    plan: MeshPlan
    graph: Any
    shapes: Tree
    placements: Tree
    buffer_shapes: Tree

    @classmethod
    def of(cls, config: ModelConfig, plan: MeshPlan) -> "ModelParts":
        """Take a model apart without making an array."""
        model = nnx.eval_shape(lambda: build(config, plan, nnx.Rngs(0)))
        graph, params, buffers = nnx.split(model, nnx.Param, ...)
        placements = jax.tree.map(lambda p: p.placement, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return cls(config, plan, graph, *map(_plain, (params, placements, buffers)))

    def merge(self, params: Tree, buffers: Tree) -> Decoder:
        """Put a model together around values (local parts, inside the program)."""
        return nnx.merge(self.graph, nnx.State(params), nnx.State(buffers))

    def split(self, model: Decoder) -> tuple[Tree, Tree]:
        """Give a model's weights and buffers as plain trees."""
        _, params, buffers = nnx.split(model, nnx.Param, ...)
        return _plain(params), _plain(buffers)

    def weight_specs(self) -> Tree:
        """Give the spec of every stored weight."""
        return jax.tree.map(lambda p, s: p.weight_spec(self.plan, s.ndim), self.placements, self.shapes)

    def state_specs(self) -> Tree:
        """Give the spec of every weight's optimizer state."""
        return jax.tree.map(lambda p, s: p.state_spec(self.plan, s.ndim), self.placements, self.shapes)

    def buffer_specs(self) -> Tree:
        """Give the spec of every buffer: whole on all devices."""
        return jax.tree.map(lambda _: PartitionSpec(), self.buffer_shapes)

    def init(self, seed: int) -> tuple[Tree, Tree]:
        """Draw the weights, each device its own part: no array is whole on one device before."""
        make = jax.jit(lambda: self.split(build(self.config, self.plan, nnx.Rngs(seed))), out_shardings=self._placed())
        return make()

    def _placed(self) -> Tree:
        return jax.tree.map(self.plan.place, (self.weight_specs(), self.buffer_specs()))


def _plain(state: nnx.State) -> Tree:
    """Turn an nnx.State into nested dicts with string keys, which every checkpoint format keeps as they are."""

    def walk(node: Any) -> Any:
        return {str(key): walk(value) for key, value in node.items()} if isinstance(node, dict) else node

    return walk(nnx.to_pure_dict(state))


def state_specs(parts: ModelParts, optimizer: optax.GradientTransformation) -> TrainState:
    """Give the specs of a whole train state."""
    abstract = jax.eval_shape(optimizer.init, parts.shapes)
    opt_specs = optax.tree_utils.tree_map_params(
        optimizer, lambda _, spec: spec, abstract, parts.state_specs(), transform_non_params=lambda _: PartitionSpec()
    )
    scalar = PartitionSpec()
    return TrainState(scalar, parts.weight_specs(), parts.buffer_specs(), opt_specs, scalar, scalar)


def init_state(parts: ModelParts, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Make the state of step 0, every array born in its place."""
    params, buffers = parts.init(seed)
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
