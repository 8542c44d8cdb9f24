"""How many weights has a model, how many does a token use, and what does that cost in FLOPs?"""

import math
from dataclasses import dataclass

from moejax.accounting.mixers import score_products
from moejax.models import FAMILIES, ModelParts
from moejax.models.decoder import periods
from moejax.models.layer import Layer
from moejax.models.parts import STACKS


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


def model_cost(parts: ModelParts, seq_len: int, source_len: int | None = None) -> ModelCost:
    """Count weights and matmul FLOPs; attention scores count as the full T x T square (PaLM, arXiv 2204.02311, B).

    Of an encoder-decoder a token is one of the decoder's, with its share of a source of `source_len` (default: as
    many).
    """
    config, moe = parts.config, parts.config.moe
    source_len = seq_len if source_len is None else source_len
    total, active, matmul = 0, 0, 0.0
    for path, shape, place in parts.weights():
        size = math.prod(shape.shape)
        used = size
        if "experts" in place.axes and moe is not None and moe.router.kind != "soft":
            used = size * moe.router.num_active // moe.num_experts
        total, active = total + size, active + used
        # A lookup is no matmul, but a tied table is the head's matrix as well.
        lookup = place.axes == ("vocab", "embed") and not config.tie_embeddings
        if not place.is_vector and not lookup:
            matmul += used * (source_len / seq_len if _meets_source(parts, path) else 1)
    scores = sum(scores_of(layer, seq_len, source_len)[0] for layer in FAMILIES[config.name].layers(config))
    head = 0
    if moe is not None and moe.competitive:
        head = (moe.num_experts - 1) * config.vocab * config.embed
    return ModelCost(total, active, 2.0 * (matmul + head + scores))


def _meets_source(parts: ModelParts, path: str) -> bool:
    """Say whether a weight is the encoder's, or makes keys and values of what the encoder gives."""
    keys = path.split(".")
    if parts.config.encoder is None or keys[0] != STACKS:
        return False
    period, _ = periods(FAMILIES[parts.config.name].layers(parts.config))[int(keys[1])]
    return period[0].part == "encoder" or any(f".cross.{name}" in path for name in "kv")


def scores_of(layer: Layer, seq_len: int, source_len: int) -> tuple[float, float]:
    """Count a layer's products of queries and keys for each token of the sequence, and those that a backward repeats;
    of a decoder behind an encoder those with the source's keys too."""
    length = layer.length(seq_len, source_len)
    lengths = [length, source_len] if layer.part == "decoder" else [length]
    counts = [score_products(layer.mixer, keys) for keys in lengths]
    made, repeated = (sum(each) * length / seq_len for each in zip(*counts, strict=True))
    return made, repeated
