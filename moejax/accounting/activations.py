"""What does a step hold besides weights, gradients and optimizer state? Arrays counted as autodiff keeps them.

Each term names its arrays. What a layer keeps is exact (`tests/accounting/test_memory.py` compares it with its vjp's
residuals); what lives at once while its backward runs is the compiler's choice, and these are the arrays that it must
have, without those that it fuses away.
"""

import collections
import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from moejax.accounting.mixers import MixerSize, mixer_size
from moejax.config.attention import AttentionConfig, LatentConfig, T5AttentionConfig
from moejax.config.model import ModelConfig
from moejax.config.moe import MoEConfig
from moejax.config.run import TrainConfig
from moejax.models import FAMILIES
from moejax.models.layer import Layer
from moejax.ops.blockwise_attention import BLOCK, LONG, LONG_BLOCK
from moejax.ops.cross_entropy import logits_block
from moejax.ops.linear_attention import CHUNK
from moejax.parallel.exchange import quota
from moejax.parallel.plan import MeshPlan


@dataclass(frozen=True)
class Activations:
    """Bytes on one device by what they are for."""

    kept: float
    """what the forward leaves for the backward: all layers, all microbatches in flight"""
    workspace: float
    """what one layer's recomputation and backward, and the loss, hold at once"""

    @property
    def total(self) -> float:
        """Add both."""
        return self.kept + self.workspace


def width(dtype: str) -> int:
    """Give an element's bytes."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


class LayerMemory:
    """One device's part of a microbatch, layer by layer, in bytes."""

    def __init__(self, config: ModelConfig, plan: MeshPlan, train: TrainConfig) -> None:
        self.config, self.plan, self.train, self.moe = config, plan, train, config.moe
        self.way = config.moe.way(training=True) if config.moe is not None else "dense"
        precision = config.precision
        self.width, self.wide = width(precision.compute), max(width(precision.compute), 4)
        self.router_width = width(precision.router)
        self.rows = train.global_batch // train.microbatches / plan.degree("batch")
        self.length = train.seq_len / plan.degree("seq")
        self.tokens = self.rows * self.length
        tensor = plan.size("tensor")
        self.stream = self.tokens * config.embed / (tensor if plan.config.sequence_parallel else 1)
        self.whole = self.tokens * config.embed

    # --- what the forward keeps of one layer

    def kept(self, layer: Layer, policy: str) -> float:
        """Give the bytes that a layer leaves for its backward under a remat policy."""
        if policy == "none":
            return self.norms() + self.mixer(layer) + (self.dense() if layer.ffn == "dense" else self.sparse())
        block_input = self.stream * self.width
        if policy == "full":
            return block_input
        if policy == "names":  # the second sublayer's output is only added: no backward asks for it
            return 2 * block_input
        dots = self.whole + self.tokens * self.size(layer).projected
        if layer.ffn == "dense":
            dots += 2 * self.tokens * self.config.ffn / self.plan.size("tensor")
        elif self.moe is not None:
            dots += 2 * self.tokens * self.shared_ffn
            block_input += self.tokens * self.moe.num_experts * self.router_width
        return block_input + dots * self.width

    def norms(self) -> float:
        """Two norms: 2x and x in the wide type, the normalised x."""
        return 2 * self.stream * (2 * self.wide + self.width)

    def mixer(self, layer: Layer) -> float:
        """Its input; q, k, v, the output; their log-sum-exp, four rotary tables, and the mask of what is seen."""
        mixer = self.size(layer)
        queries, outputs, keys = (self.tokens * x for x in (mixer.queries, mixer.outputs, mixer.keys))
        if mixer.is_linear:  # before silu as well; the gate, the norm's input and what the gate multiplies
            return (self.whole + 2 * (queries + keys) + 4 * outputs) * self.width
        if isinstance(layer.mixer, T5AttentionConfig):
            return self._t5(layer, mixer)
        size = (self.whole + queries + outputs + keys + 2 * self.tokens * mixer.key_dim) * self.width
        size += self.tokens * mixer.heads * self.wide
        if isinstance(layer.mixer, LatentConfig):  # what the heads' keys grow out of, before and after its norm
            size += self.tokens * 3 * (mixer.cached + (layer.mixer.q_rank or 0)) * self.width
        if self.plan.size("sequence") > 1 and self.plan.config.context == "ring":
            return size + outputs * self.wide  # the ring keeps its output before rounding; it makes masks anew
        size += self.tokens * self.train.seq_len
        if naive(layer):  # scores, their exponentials, and what the mask and the norm need
            size += 3 * self.rows * mixer.heads * self.length * self.train.seq_len * self.wide
        return size

    def _t5(self, layer: Layer, mixer: MixerSize) -> float:
        """Its input; q, k, v, the output; the scores' exponentials, masked or not, and the mask; and of the source."""

        def attend(keys: float, length: int) -> float:
            size = (self.whole + self.tokens * (mixer.queries + mixer.outputs) + keys * mixer.keys) * self.width
            return size + self.rows * mixer.heads * self.length * length * (2 * self.wide + 1)

        size = attend(self.tokens, self.train.seq_len)
        if layer.part == "decoder":  # and a third norm
            source = self.train.num_source()
            size += attend(self.rows * source, source) + self.norms() / 2
        return size

    def dense(self) -> float:
        """Its input; gate, up, and the four factors of silu(gate) * up; of relu its input, its output and its sign."""
        units = self.tokens * self.config.ffn / self.plan.size("tensor")
        return self.whole * self.width + units * self.unit(self.config.ffn_activation)

    def unit(self, activation: str) -> float:
        """Give the bytes that a hidden unit leaves."""
        return 2 * self.width + 1 if activation == "relu" else 6 * self.width

    def sparse(self) -> float:
        """The router's input and probabilities; the experts' rows, in and out, and their hidden units."""
        moe = self._moe
        size = self.whole * self.router_width + 3 * self.tokens * moe.num_experts * self.router_width
        size += 6 * self.tokens * self.shared_ffn * self.width
        places, hidden = self.places, self.expert_ffn
        if self.way == "dense":
            every = self.tokens * moe.num_experts
            return size + every * (self.config.embed + 6 * hidden + self.config.embed) * self.width
        if self.way == "capacity":
            size += places * (self.config.embed * self.width + hidden * self.unit(moe.activation))
            return size + self.routed * self.config.embed * self.router_width
        # Rows as they were sorted and as they came back; sent to another rank, the places there have a copy.
        rows = 2 * self.routed * self.config.embed
        if self.plan.size("expert") > 1:
            rows += places * self.config.embed
        return size + (rows + 2 * places * hidden) * self.width

    # --- what a layer's backward holds at once

    def scores(self, layer: Layer) -> float:
        """All short blocks' scores and exponentials, since nothing orders them, and each padded dk; or a loop's."""
        mixer = self.size(layer)
        if mixer.is_linear:  # scores within chunks, and each chunk's state
            chunk = min(CHUNK, self.train.seq_len)
            states = self.tokens / chunk * mixer.key_dim * mixer.value_dim
            return 2 * mixer.heads * (self.tokens * chunk + states) * self.wide
        if self.plan.size("sequence") > 1 and self.plan.config.context == "ring":
            # The own square whole, or half a square of another rank's: probabilities and their gradient.
            keys = 2 * self.tokens * mixer.keys * self.wide
            return 2 * self.rows * mixer.heads * self.length**2 * self.wide + keys
        length, heads = self.train.seq_len, mixer.heads / self.plan.size("sequence")
        if isinstance(layer.mixer, T5AttentionConfig):  # biased, masked, their exponentials, and both gradients
            keys = max(length, self.train.num_source()) if layer.part == "decoder" else length
            return 5 * self.rows * heads * length * keys * self.wide
        if naive(layer):
            return 2 * self.rows * heads * length**2 * self.wide
        kv_heads = mixer.kv_heads / self.plan.size("sequence")
        if length >= LONG:  # one block's; and dq, dk and dv not yet rounded
            gradients = length * (heads * mixer.key_dim + kv_heads * (mixer.key_dim + mixer.value_dim))
            return self.rows * (2 * heads * LONG_BLOCK**2 + gradients) * self.wide
        blocks = math.ceil(length / BLOCK)
        triangle = length * (length + min(length, BLOCK)) / 2
        padded = blocks * length * kv_heads * mixer.key_dim
        return self.rows * (2 * heads * triangle + padded) * self.wide

    def recomputed(self, layer: Layer) -> float:
        """A layer's matmuls' operands and results once more, each with its gradient; what is elementwise is fused."""
        streams = 4 * self.stream + 4 * self.whole
        mixer = self.size(layer)
        projections = self.tokens * (mixer.projected + mixer.outputs)
        return (streams + projections) * self.width + self.feed_forward(layer)

    def feed_forward(self, layer: Layer) -> float:
        """A feed-forward layer's hidden units and their gradients; of experts the rows as well, in, out and back."""
        if layer.ffn == "dense":
            return 4 * self.tokens * self.config.ffn / self.plan.size("tensor") * self.width
        rows = 4 * self.config.embed * self.places
        if self.plan.size("expert") > 1 and self.way == "sorted":
            rows = (2 * self.routed + 4 * self.places) * self.config.embed
        hidden = (4 if self.way != "sorted" else 2) * self.places * self.expert_ffn
        shared = 4 * self.tokens * self.shared_ffn
        return (rows + hidden + shared) * self.width

    def loss(self) -> float:
        """The logits and their gradient, for each expert of a competitive mixture in turn; many: a block of them."""
        vocab = self.config.vocab // self.plan.size("tensor")
        return 2 * self.tokens * logits_block(int(self.tokens), vocab, self.wide) * self.wide

    # --- sizes

    @property
    def _moe(self) -> MoEConfig:
        assert self.moe is not None
        return self.moe

    def size(self, layer: Layer) -> MixerSize:
        """Give the sizes of a layer's mixer."""
        return mixer_size(self.config, layer.mixer, self.plan)

    @property
    def shared_ffn(self) -> float:
        """Hidden units of the shared experts on this tensor rank."""
        return self._moe.shared_ffn / self.plan.size("tensor")

    @property
    def expert_ffn(self) -> float:
        """Hidden units of an expert on this tensor rank."""
        return self._moe.expert_ffn / self.plan.size("tensor")

    @property
    def routed(self) -> float:
        """Rows that this device's tokens send."""
        return self.tokens * (self._moe.num_experts if self.way == "dense" else self._moe.router.num_active)

    @property
    def places(self) -> float:
        """Rows that this device's experts have room for."""
        moe = self._moe
        if self.way == "capacity":
            slots = moe.num_slots(self.train.seq_len)
            return self.rows * moe.num_experts * min(slots, self.length)
        ranks = self.plan.size("expert")
        if ranks == 1 or self.way == "dense":
            return self.routed
        return ranks * quota(self.plan, int(self.routed))


def activations(config: ModelConfig, plan: MeshPlan, train: TrainConfig) -> Activations:
    """Count what one device holds of activations at the peak of a step."""
    memory = LayerMemory(config, plan, train)
    reading = LayerMemory(config, plan, dataclasses.replace(train, seq_len=train.num_source()))
    layers = collections.Counter(FAMILIES[config.name].layers(config))
    stages = plan.size("pipeline")
    kept = sum(
        number * (reading if layer.part == "encoder" else memory).kept(layer, config.remat)
        for layer, number in layers.items()
    ) / (stages * plan.config.chunks)
    if config.encoder is not None:  # what every layer of the decoder looks into
        kept += reading.whole * reading.width
    stash = 0.0
    if stages > 1:  # a stage keeps its inputs alone, and a message each way; a chunk's layers are run again backward
        _, _, slots = plan.schedule(train.microbatches).slots
        stash = (slots + 1 + 4) * memory.stream * memory.width
    heaviest = max(layers, key=memory.feed_forward)
    workspace = _workspace(memory, heaviest, config.remat)
    if config.encoder is not None:
        workspace = max(workspace, _workspace(reading, heaviest, config.remat))
    return Activations(kept + stash, workspace)


def naive(layer: Layer) -> bool:
    """Say whether a layer attends with all scores in memory."""
    if isinstance(layer.mixer, T5AttentionConfig):
        return True
    return layer.mixer.implementation == "reference" or (
        isinstance(layer.mixer, AttentionConfig) and layer.mixer.dropout > 0
    )


def _workspace(memory: LayerMemory, layer: Layer, policy: str) -> float:
    """Give what is at work beside what is kept: the arrays that the compiler may hold at the same time.

    The loops over sorted experts stand between loss, attention and experts: the largest counts. An exchange stands
    between the loss and the rest, and the scores are made before it. Without either everything may overlap.
    """
    attention, hidden, loss = memory.scores(layer), memory.feed_forward(layer), memory.loss()
    work = 0.0 if policy == "none" else memory.recomputed(layer) - hidden
    if policy == "none":  # nothing is recomputed: gradients alone
        hidden /= 2
    exchanged = memory.plan.size("expert") > 1
    if layer.ffn == "sparse" and memory.way == "sorted" and not exchanged:
        return work + max(attention, hidden, loss)
    if layer.ffn == "sparse" and exchanged:
        return work + max(attention + hidden, loss)
    if policy == "none" or memory.plan.size("pipeline") > 1:
        return work + attention + max(hidden, loss)
    return work + attention + hidden + loss
