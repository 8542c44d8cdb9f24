"""How many weights has a model, how many does a token use, and what does that cost in FLOPs?"""

import math
from dataclasses import dataclass

import jax

from moejax.accounting.mixers import score_products
from moejax.models import FAMILIES, ModelParts


@dataclass(frozen=True)
class ModelCost:
    """Counts for one model at one sequence length; FLOPs count a multiply and an add as two."""

    total_params: int
    active_params: int
    """weights that one token's forward uses, its embedding row's whole table included, as papers count"""
    forward_flops: float
    """per token, matmuls alone"""

    @property
    def train_flops(self) -> float:
        """Give the model FLOPs of a training step per token: forward, and twice that backward; no recomputation."""
        return 3 * self.forward_flops


def model_cost(parts: ModelParts, seq_len: int) -> ModelCost:
    """Count weights and matmul FLOPs; attention scores count as the full T x T square (PaLM, arXiv 2204.02311, B)."""
    config, moe = parts.config, parts.config.moe
    total = active = matmul = 0
    leaves = zip(jax.tree.leaves(parts.shapes), jax.tree.leaves(parts.placements), strict=True)
    for shape, place in leaves:
        size = math.prod(shape.shape)
        used = size
        if "experts" in place.axes and moe is not None and moe.router.kind != "soft":
            used = size * moe.router.num_active // moe.num_experts
        total, active = total + size, active + used
        # A lookup is no matmul, but a tied table is the head's matrix as well.
        lookup = place.axes == ("vocab", "embed") and not config.tie_embeddings
        matmul += used if not place.is_vector and not lookup else 0
    layers = FAMILIES[config.name].layers(config)
    scores = sum(score_products(layer.mixer, seq_len)[0] for layer in layers)
    head = 0
    if moe is not None and moe.competitive:
        head = (moe.num_experts - 1) * config.vocab * config.embed
    return ModelCost(total, active, 2.0 * (matmul + head + scores))
