"""What is a model with low-rank updates as an ordinary one?"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from moejax.layers.lora import Adapted
from moejax.models.parts import ModelParts

Tree = Any


def merge_updates(parts: ModelParts, params: Tree, buffers: Tree) -> tuple[ModelParts, Tree, Tree]:
    """Add every update to its matrix; give the parts, weights and buffers of the model without updates."""
    assert parts.config.lora is not None, "there is nothing to merge"
    plain = ModelParts.of(dataclasses.replace(parts.config, lora=None), parts.plan)

    def merge(params: Tree, buffers: Tree) -> tuple[Tree, Tree]:
        model = parts.merge(params, buffers)
        for _, node in list(nnx.iter_graph(model)):
            for name, value in list(vars(node).items()) if isinstance(node, nnx.Module) else ():
                if isinstance(value, Adapted):
                    setattr(node, name, value.merged())
        return plain.split(model)

    places = jax.tree.map(parts.plan.place, (plain.weight_specs(), plain.buffer_specs()))
    return plain, *jax.jit(merge, out_shardings=places)(params, buffers)
