"""A model taken apart: its structure, apart from its weights, and where on the mesh each weight lies."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from moejax.config.model import ModelConfig
from moejax.models.build import build
from moejax.models.decoder import Decoder
from moejax.parallel.plan import MeshPlan

Tree = Any


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
