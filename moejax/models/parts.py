"""A model taken apart: its structure, apart from its weights, and where on the mesh each weight lies."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array

from moejax.config.model import ModelConfig
from moejax.layers.lora import Adapter
from moejax.models.build import FAMILIES, build
from moejax.models.decoder import Decoder, periods
from moejax.parallel.plan import MeshPlan
from moejax.parallel.zero import Placement, place, place_outside_stages

Tree = Any
STACKS = "stacks"
"""The key under which `Decoder` holds its stacked layers."""
MTP = "mtp"
"""The key under which it holds what predicts further tokens."""
WHOLE = Placement((None,), None, (), 0)
"""The place of a vector that is no weight."""


def path_name(path: Any) -> str:
    """Write a leaf's path with dots."""
    return ".".join(str(key.key) for key in path)


def trained(config: ModelConfig) -> type[nnx.Variable]:
    """Say which variables are trained."""
    return nnx.Param if config.lora is None else Adapter


def _placements(state: nnx.State) -> Tree:
    def place_of(variable: nnx.Variable) -> Placement:
        return getattr(variable, "placement", WHOLE)

    return jax.tree.map(place_of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


@dataclass(frozen=True)
class ModelParts:
    """A model without values: its structure, and for each weight its global shape and its place."""

    config: ModelConfig
    plan: MeshPlan
    graph: Any
    shapes: Tree
    placements: Tree
    buffer_shapes: Tree
    buffer_placements: Tree
    """of what is not trained: routers' balancing biases, and with low-rank updates all other weights"""

    @classmethod
    def of(cls, config: ModelConfig, plan: MeshPlan) -> "ModelParts":
        """Take a model apart without making an array."""
        model = nnx.eval_shape(lambda: build(config, plan, nnx.Rngs(0)))
        graph, params, buffers = nnx.split(model, trained(config), ...)
        trees = (params, _placements(params), buffers, _placements(buffers))
        return cls(config, plan, graph, *map(_plain, trees)).on(plan)

    def on(self, plan: MeshPlan) -> "ModelParts":
        """Lay the weights out on another mesh without building the model again: to count, not to run."""

        def place_again(path: Any, old: Placement, shape: jax.ShapeDtypeStruct) -> Placement:
            if old == WHOLE:
                return old
            own = shape.shape[shape.ndim - len(old.axes) :]
            new = place(plan, old.axes, own, is_vector=old.is_vector)
            return new if _stacked(path) else place_outside_stages(plan, new, own)

        again = jax.tree_util.tree_map_with_path
        placements = again(place_again, self.placements, self.shapes)
        of_buffers = again(place_again, self.buffer_placements, self.buffer_shapes)
        return dataclasses.replace(self, plan=plan, placements=placements, buffer_placements=of_buffers)

    def merge(self, params: Tree, buffers: Tree) -> Decoder:
        """Put a model together around values (local parts, inside the program)."""
        return nnx.merge(self.graph, nnx.State(params), nnx.State(buffers))

    def split(self, model: Decoder) -> tuple[Tree, Tree]:
        """Give a model's weights and buffers as plain trees."""
        _, params, buffers = nnx.split(model, trained(self.config), ...)
        return _plain(params), _plain(buffers)

    def weights(self) -> list[tuple[str, jax.ShapeDtypeStruct, Placement]]:
        """List all weights, trained or not, with their paths."""
        shapes = jax.tree_util.tree_leaves_with_path((self.shapes, self.buffer_shapes))
        pairs = zip(shapes, jax.tree.leaves((self.placements, self.buffer_placements)), strict=True)
        return [(path_name(path[1:]), shape, placement) for (path, shape), placement in pairs if placement != WHOLE]

    def weight_specs(self) -> Tree:
        """Give the spec of every stored weight."""
        return jax.tree.map(lambda p, s: p.weight_spec(self.plan, s.ndim), self.placements, self.shapes)

    def state_specs(self) -> Tree:
        """Give the spec of every weight's optimizer state."""
        return jax.tree.map(lambda p, s: p.state_spec(self.plan, s.ndim), self.placements, self.shapes)

    def buffer_specs(self) -> Tree:
        """Give the spec of every buffer: a frozen weight lies as any other, a router's bias is whole on all devices."""
        return jax.tree.map(lambda p, s: p.weight_spec(self.plan, s.ndim), self.buffer_placements, self.buffer_shapes)

    def init(self, seed: int) -> tuple[Tree, Tree]:
        """Draw the weights, each device its own part: no array is whole on one device before."""
        return jax.jit(lambda: self._make(seed), out_shardings=self._placed())()

    def init_some(self, seed: int, wanted: Collection[str]) -> dict[str, Array]:
        """Draw some of what is trained, by dotted path, where the rest comes from elsewhere: it is not made at all."""

        def some(params: Tree) -> dict[str, Any]:
            flat = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
            return {name: flat[name] for name in wanted}

        return jax.jit(lambda: some(self._make(seed)[0]), out_shardings=some(self._placed()[0]))()

    def _make(self, seed: int) -> tuple[Tree, Tree]:
        return self.stored(self.split(build(self.config, self.plan, nnx.Rngs(seed))))

    # --- the layers of pipeline stages: what is stacked lies under STACKS, its first dim in the order of the stages

    def stored(self, tree: Tree) -> Tree:
        """Bring stacked layers from their own order into that of the stages; others come back as they are."""
        return self._reorder(tree, self.stage_order())

    def canonical(self, tree: Tree) -> Tree:
        """Bring stacked layers back into their own order: checkpoints and proofs keep this one."""
        order = self.stage_order()
        return self._reorder(tree, None if order is None else np.argsort(order))

    def chunk(self, tree: Tree, chunk: Array) -> Tree:
        """Take the stacked layers of one of this device's chunks; what is not stacked comes as it is."""
        chunks = self.plan.config.chunks

        def take(leaf: Array) -> Array:
            size = leaf.shape[0] // chunks
            return lax.dynamic_slice_in_dim(leaf, chunk * size, size)

        return tree if chunks == 1 else _map_stacked(take, tree)

    def add_chunk(self, total: Tree, part: Tree, chunk: Array) -> Tree:
        """Add what one chunk's layers gave [l, ...] at their place, and everything else as it is."""

        def add(whole: Array, leaf: Array) -> Array:
            start = chunk * leaf.shape[0]
            old = lax.dynamic_slice_in_dim(whole, start, leaf.shape[0])
            return lax.dynamic_update_slice_in_dim(whole, old + leaf.astype(old.dtype), start, 0)

        def either(whole: Array, leaf: Array) -> Array:
            return whole + leaf.astype(whole.dtype) if whole.shape == leaf.shape else add(whole, leaf)

        return jax.tree.map(either, total, part)

    def all_layers(self, x: Array) -> Array:
        """Join what each stage has of its own layers [l, ...] to [L, ...], in the layers' order, on every device."""
        if self.plan.size("pipeline") == 1:
            return x
        joined = self.plan.gather(x, "layers", 0)
        order = self.stage_order()
        return joined if order is None else joined[np.argsort(order)]

    def stage_order(self) -> np.ndarray | None:
        """Give, for each place of a stack, the repeat that lies there; None where that is their own order."""
        stages, chunks = self.plan.size("pipeline"), self.plan.config.chunks
        if chunks == 1:
            return None
        [(_, repeats)] = periods(FAMILIES[self.config.name].layers(self.config))
        # A stage holds chunks far apart: chunk c of stage s is the (c * stages + s)-th run of layers.
        return np.arange(repeats).reshape(chunks, stages, -1).swapaxes(0, 1).reshape(-1)

    @staticmethod
    def _reorder(tree: Tree, order: np.ndarray | None) -> Tree:
        return tree if order is None else _map_stacked(lambda leaf: jnp.take(leaf, order, axis=0), tree)

    def _placed(self) -> Tree:
        return jax.tree.map(self.plan.place, (self.weight_specs(), self.buffer_specs()))


def _map_stacked(f: Any, tree: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: f(leaf) if _stacked(path) else leaf, tree)


def _stacked(path: Any) -> bool:
    return any(getattr(key, "key", None) == STACKS for key in path)


def _plain(state: nnx.State) -> Tree:
    """Turn an nnx.State into nested dicts with string keys, which every checkpoint format keeps as they are."""

    def walk(node: Any) -> Any:
        return {str(key): walk(value) for key, value in node.items()} if isinstance(node, dict) else node

    return walk(nnx.to_pure_dict(state))
