"""How many bytes must a training step move, over which mesh axes? The analytic bound of every collective in the source.

Bytes are those that one device sends in a step, by ring algorithms: all-reduce 2(n-1)/n X, all-gather, reduce-scatter
and all-to-all (n-1)/n X of the whole array X, a permute X. Of a pipeline it is the busiest device, as if it held both
the embedding and the head; bubbles send nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from moejax.accounting.activations import width
from moejax.accounting.mixers import MixerSize, mixer_size
from moejax.config.attention import AttentionConfig
from moejax.config.run import TrainConfig
from moejax.models import FAMILIES, ModelParts
from moejax.parallel.exchange import quota
from moejax.parallel.zero import Placement

RECOMPUTED = {
    "none": (),
    "names": ("enter", "mixer", "experts"),
    "dots": ("enter", "leave", "mixer", "experts"),
    "full": ("enter", "leave", "mixer", "experts"),
}
"""What each remat policy runs again for the backward: entering tensor, the mixer's leaving, the ring, the exchange."""


@dataclass(frozen=True)
class Transfer:
    """One kind of traffic of a step."""

    axes: tuple[str, ...]
    kind: str
    bytes: float
    """sent by one device"""
    why: str


def expected_transfers(parts: ModelParts, train: TrainConfig) -> list[Transfer]:
    """List what a step must send; equal (axes, kind, why) are added up."""
    total: dict[tuple[tuple[str, ...], str, str], float] = {}
    for transfer in _Step(parts, train).transfers():
        key = (transfer.axes, transfer.kind, transfer.why)
        total[key] = total.get(key, 0.0) + transfer.bytes
    return [Transfer(axes, kind, size, why) for (axes, kind, why), size in total.items() if size]


class _Step:
    """One training step's sizes, and its traffic by cause."""

    def __init__(self, parts: ModelParts, train: TrainConfig) -> None:
        self.parts, self.plan, self.config, self.train = parts, parts.plan, parts.config, train
        precision = self.config.precision
        self.width, self.wide = width(precision.compute), max(width(precision.accumulate), 4)
        self.router_width = width(precision.router)
        self.microbatches = train.microbatches
        self.rows = train.global_batch // train.microbatches // self.plan.degree("batch")
        self.length = train.seq_len // self.plan.degree("seq")
        self.tokens = self.rows * self.length
        layers = FAMILIES[self.config.name].layers(self.config)
        stages = self.plan.size("pipeline")
        self.num_sparse = sum(layer.ffn == "sparse" for layer in layers) / stages
        # Of an encoder-decoder what counts is each layer's own tokens, as multiples of the decoder's.
        weights = [layer.length(train.seq_len, train.num_source()) / train.seq_len for layer in layers]
        self.source = 0.0 if self.config.encoder is None else train.num_source() / train.seq_len
        self.num_norms = sum(layer.sublayers for layer in layers) / stages + (self.config.encoder is not None)
        self.sublayers = sum(w * layer.sublayers for w, layer in zip(weights, layers, strict=True)) / stages
        self.layers = sum(weights) / stages
        self.sparse_lengths = [
            layer.length(train.seq_len, train.num_source()) for layer in layers if layer.ffn == "sparse"
        ]
        self.mixers = [(mixer_size(self.config, layer.mixer, self.plan), layer.mixer) for layer in layers]
        self.stages_count = stages
        self.moe = self.config.moe
        self.way = self.moe.way(training=True) if self.moe is not None else "dense"
        self.competitive = self.moe is not None and self.moe.competitive
        # A pipeline runs a stage forward once to hand on, and once more before its backward.
        self.forwards = 2 if stages > 1 else 1

    def transfers(self) -> list[Transfer]:
        """List all traffic."""
        return [*self.weights(), *self.tensor(), *self.context(), *self.experts(), *self.stages(), *self.statistics()]

    def send(self, axes: Sequence[str], kind: str, payload: float, times: float, why: str) -> list[Transfer]:
        """Give the traffic of `times` collectives on a whole array of `payload` bytes."""
        axes = tuple(axis for axis in axes if self.plan.size(axis) > 1)
        ranks = math.prod(self.plan.size(axis) for axis in axes)
        if ranks == 1 or not times:
            return []
        factor = (ranks - 1) / ranks * (2 if kind == "all-reduce" else 1)
        return [Transfer(axes, kind, payload * times * (1 if kind == "collective-permute" else factor), why)]

    # --- weights and gradients

    def weights(self) -> list[Transfer]:
        """Reduce gradients, and gather split weights (arXiv 1910.02054)."""
        leaves = jax.tree_util.tree_leaves_with_path(self.parts.shapes)
        placements = jax.tree.leaves(self.parts.placements)
        return [
            transfer
            for (path, shape), placement in zip(leaves, placements, strict=True)
            for transfer in self._leaf(jax.tree_util.keystr(path), shape, placement)
        ]

    def _leaf(self, name: str, shape: jax.ShapeDtypeStruct, place: Placement) -> list[Transfer]:
        plan, params = self.plan, width(self.config.precision.params)
        own = plan.axes_of(*place.axes) + place.stacked_over(plan, len(shape.shape))
        elements = math.prod(shape.shape) / math.prod(plan.size(axis) for axis in own)
        reduced = elements * max(params, width(self.config.precision.accumulate))
        rest = tuple(axis for axis in plan.gradient_axes() if axis not in (*own, *place.over))
        times = self.microbatches if place.stage == 2 else 1
        if place.dim is None:
            return self.send(rest, "all-reduce", reduced, times, "gradients")
        part = reduced / math.prod(plan.size(axis) for axis in place.over)
        sent = self.send(rest, "all-reduce", part, times, "gradients")
        if place.stage < 3:
            sent += self.send(place.over, "reduce-scatter", reduced, times, "gradients")
            return sent + self.send(place.over, "all-gather", elements * params, 1, "weights")
        stacked = len(shape.shape) > len(place.axes)
        uses = self._uses(name)
        gathers = uses * (self.forwards if stacked or "embedding" in name else 1) + (1 if stacked else 0)
        whole = elements * self.width
        sent += self.send(place.over, "all-gather", whole, gathers * self.microbatches, "weights")
        return sent + self.send(place.over, "reduce-scatter", whole, uses * self.microbatches, "gradients")

    def _uses(self, name: str) -> int:
        """Count how often a step's forward reads a weight: a table once for each embedding and, tied, for the head."""
        heads = 2 * self.moe.num_experts if self.moe is not None and self.competitive else 1
        if "embedding" in name:
            return 1 + (self.config.encoder is not None) + heads * self.config.tie_embeddings
        return heads if "head" in name else 1

    # --- activations

    def tensor(self) -> list[Transfer]:
        """Enter and leave each sublayer, embed and read out (arXiv 1909.08053, 2205.05198)."""
        if self.plan.size("tensor") == 1:
            return []
        streams = self.moe.num_experts if self.moe is not None and self.competitive else 1
        again = RECOMPUTED[self.config.remat]
        forwards, layers, source = self.forwards, self.sublayers, self.source
        # A mixture's last layer leaves, and the norm before the head enters, once for each expert's stream.
        extra = streams - 1
        enter = layers * (forwards + ("enter" in again)) + streams + source
        leave = (layers + extra + 1 + source) * forwards + ("leave" in again) * (layers - self.layers)
        enter_back, leave_back = layers + streams + source, layers + extra + 1 + source
        payload, times, why = self.tokens * self.config.embed * self.width, self.microbatches, "tensor parallelism"
        if self.plan.config.overlap_tensor:
            sent = self._rings(payload, streams)
            return [*sent, *self._whole_on_tensor(), *self._loss(streams), *self._norms()]
        if self.plan.config.sequence_parallel:
            sent = self.send(("tensor",), "all-gather", payload, times * (enter + leave_back), why)
            sent += self.send(("tensor",), "reduce-scatter", payload, times * (leave + enter_back), why)
        else:
            sent = self.send(("tensor",), "all-reduce", payload, times * (leave + enter_back), why)
        return [*sent, *self._whole_on_tensor(), *self._loss(streams), *self._norms()]

    def _norms(self) -> list[Transfer]:
        """Average squares over all heads, and their gradients, where a norm is of all of them together."""
        norms = sum(size.norms_over_heads for size, _ in self.mixers) / self.stages_count
        passes = self.forwards + ("mixer" in RECOMPUTED[self.config.remat]) + 1
        payload = self.tokens * self.wide * norms * passes
        return self.send(("tensor",), "all-reduce", payload, self.microbatches, "norms over all heads")

    def _rings(self, payload: float, streams: int) -> list[Transfer]:
        """Send the same bytes step by step, but around sparse layers, the embedding and the head."""
        again, times, forwards = RECOMPUTED[self.config.remat], self.microbatches, self.forwards
        sparse = sum(self.sparse_lengths) / self.train.seq_len / self.stages_count
        ringed = self.sublayers - sparse
        extra = streams - 1
        part, ranks = payload / self.plan.size("tensor"), self.plan.size("tensor")
        passes = 2 * (forwards + 1) + ("enter" in again) + ("leave" in again) / 2
        sent = self.send(("tensor",), "collective-permute", (ranks - 1) * part, times * passes * ringed, "tensor rings")
        gathers = times * (sparse * (forwards + 1 + ("enter" in again)) + streams + extra + 1 + 2 * self.source)
        scatters = times * (sparse * (forwards + 1) + (extra + 1 + self.source) * forwards + streams + self.source)
        sent += self.send(("tensor",), "all-gather", payload, gathers, "tensor parallelism")
        return sent + self.send(("tensor",), "reduce-scatter", payload, scatters, "tensor parallelism")

    def _whole_on_tensor(self) -> list[Transfer]:
        """Sum the gradients of weights that every tensor rank holds and uses on its own part."""
        config, embed, norms = self.config, self.config.embed, self.plan.config.sequence_parallel
        size = embed * self.width * (self.num_norms + 1) * norms
        moe = self.moe
        if moe is not None:
            routers = 2 if moe.router.noise == "gaussian" else 1
            size += routers * embed * moe.num_experts * self.router_width * self.num_sparse
            size += moe.router.bias * moe.num_experts * self.router_width * self.num_sparse
            size += moe.shared_gate * embed * self.width * self.num_sparse
            size += moe.bias * moe.num_experts / self.plan.degree("experts") * embed * self.width * self.num_sparse
        size += sum(size_.whole for size_, _ in self.mixers) / self.stages_count * self.width
        biases = sum(isinstance(mixer, AttentionConfig) and mixer.out_bias for _, mixer in self.mixers)
        biases += (len(self.mixers) - self.num_sparse * self.stages_count) * config.ffn_bias
        size += norms * biases / self.stages_count * embed * self.width
        return self.send(("tensor",), "all-reduce", size, self.microbatches, "gradients of whole weights")

    def _loss(self, streams: int) -> list[Transfer]:
        """Join the split vocabulary's maxima, sums and targets; a mixture's experts are read out twice, one by one."""
        reads = streams * (2 if self.competitive else 1)
        sent = self.send(("tensor",), "all-reduce", 3 * reads * self.tokens * self.wide, self.microbatches, "loss")
        gates = 2 * streams * self.tokens * self.router_width if self.competitive else 0
        return sent + self.send(("tensor",), "all-reduce", gates, self.microbatches, "loss")

    def context(self) -> list[Transfer]:
        """Turn keys and values round the ring, or exchange heads for positions."""
        if self.plan.size("sequence") == 1:
            return []
        return [transfer for size, _ in self.mixers for transfer in self._context_of(size)]

    def _context_of(self, size: MixerSize) -> list[Transfer]:
        ranks, layers = self.plan.size("sequence"), self.microbatches / self.stages_count
        forwards = self.forwards + ("mixer" in RECOMPUTED[self.config.remat])
        segments = self.tokens * 4
        keys, axes, why = self.tokens * size.keys, ("sequence",), "context parallelism"
        if size.is_linear:  # what each run of each rank adds to the state, and its documents' ends
            runs = ranks * (2 if self.plan.config.context == "ring" else 1)
            states = runs * self.rows * size.heads * size.key_dim * size.value_dim * max(self.width, 4)
            ends = 2 * runs * self.rows * 4
            sent = self.send(axes, "all-gather", states + ends, forwards * layers, why)
            return sent + self.send(axes, "reduce-scatter", states, layers, why)
        if self.plan.config.context == "ring":
            wide = max(self.width, 4)
            forward = (ranks - 1) * (keys * self.width + segments)
            backward = (ranks - 1) * (keys * self.width + segments) + ranks * keys * wide
            return self.send(axes, "collective-permute", forwards * forward + backward, layers, why)
        queries = self.tokens * (size.queries + size.outputs)
        sent = self.send(axes, "all-to-all", (queries + keys) * self.width, (forwards + 1) * layers, why)
        return sent + self.send(axes, "all-gather", segments * ranks, forwards * layers, why)

    def experts(self) -> list[Transfer]:
        """Send rows to their experts and back (arXiv 2006.16668); the padded way, whole buffers."""
        if self.moe is None:
            return []
        backwards = self.microbatches / self.stages_count
        forwards = (self.forwards + ("experts" in RECOMPUTED[self.config.remat])) * backwards
        sent = []
        for seq_len in self.sparse_lengths:
            length = seq_len // self.plan.degree("seq")
            sent += self._places(forwards, length) + self._exchange(forwards, backwards, seq_len, length)
        return sent

    def _exchange(self, forwards: float, backwards: float, seq_len: int, length: int) -> list[Transfer]:
        moe, ranks = self.moe, self.plan.size("expert")
        if moe is None or ranks == 1:
            return []
        axes, why, embed, tokens = ("expert",), "expert exchange", self.config.embed, self.rows * length
        if self.way == "dense":
            group = tokens * ranks
            # ZeRO-3's policy recomputes what is gathered over batch axes, weights or not.
            again = backwards if self.plan.config.zero_stage == 3 and self.config.remat == "none" else 0
            sent = self.send(axes, "all-gather", group * (embed * self.width + 4), forwards + again, why)
            sent += self.send(axes, "reduce-scatter", group * embed * self.width, backwards, why)
            payload = moe.num_experts * tokens * embed * self.width
            return sent + self.send(axes, "all-to-all", payload, forwards + backwards, why)
        if self.way == "capacity":
            places = self.rows * moe.num_experts * min(moe.num_slots(seq_len), length)
        else:
            places = ranks * quota(self.plan, tokens * moe.router.num_active)
        sent = self.send(axes, "all-to-all", places * embed * self.width, 2 * (forwards + backwards), why)
        numbers = places * 4 if moe.dropout else 0
        sent += self.send(axes, "all-to-all", numbers, forwards, why)
        counts = ranks * moe.num_experts * 4 if self.way == "sorted" else 0
        return sent + self.send(axes, "all-gather", counts, forwards, why)

    def _places(self, forwards: float, length: int) -> list[Transfer]:
        """Number a split sequence's slots: counts of what stands before, or expert choice's whole columns."""
        moe, ranks = self.moe, self.plan.size("sequence")
        if moe is None or self.way != "capacity" or ranks == 1:
            return []
        axes, why = ("sequence",), "capacity over a split sequence"
        runs = 2 if self.plan.config.context == "ring" else 1
        active = moe.router.num_active
        if moe.router.kind == "expert_choice":
            active = moe.num_experts
            scores = self.rows * moe.num_experts * length * ranks * self.router_width
            sent = self.send(axes, "all-gather", scores, forwards, why)
        else:
            sent = []
        counts = ranks * runs * self.rows * active * moe.num_experts * 4
        return sent + self.send(axes, "all-gather", counts, forwards, why)

    def stages(self) -> list[Transfer]:
        """Hand the residual stream on to the next stage, and its gradient back; every chunk does."""
        stream = (
            self.tokens
            * self.config.embed
            * self.width
            / (self.plan.size("tensor") if self.plan.config.sequence_parallel else 1)
        )
        times = 2 * self.microbatches * self.plan.config.chunks
        return self.send(("pipeline",), "collective-permute", stream, times, "pipeline")

    def statistics(self) -> list[Transfer]:
        """Count tokens and load, and agree on them."""
        plan, experts = self.plan, self.moe.num_experts if self.moe is not None else 0
        layers, wide = self.num_sparse * self.microbatches, max(self.router_width, self.wide)
        spread, forwards = plan.axes_of("batch", "seq"), self.forwards + 1
        sent = self.send(spread, "all-reduce", (3 * experts + 8) * wide, forwards * layers, "router statistics")
        sent += self.send(("tensor",), "all-reduce", (2 * experts + 8) * wide, forwards * layers, "router statistics")
        whole = self.num_sparse * plan.size("pipeline") * (experts + 8) * wide
        return sent + self.send(("pipeline",), "all-gather", whole, 1, "router statistics")


def by_axes(transfers: Sequence[Transfer]) -> dict[tuple[tuple[str, ...], str], float]:
    """Add up the bytes by axes and kind."""
    total: dict[tuple[tuple[str, ...], str], Any] = {}
    for transfer in transfers:
        key = (transfer.axes, transfer.kind)
        total[key] = total.get(key, 0.0) + transfer.bytes
    return total
