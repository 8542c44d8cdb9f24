"""A decoder-only language model: embedding, a list of layers run as scanned stacks, norm, head."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.compat import vary
from moejax.config.model import ModelConfig
from moejax.layers.cache import Cache
from moejax.layers.context import Context
from moejax.layers.embedding import Embedding, Head
from moejax.layers.norm import RMSNorm
from moejax.models.block import Block
from moejax.models.layer import Layer
from moejax.models.mtp import FurtherToken
from moejax.models.remat import rematerialize
from moejax.moe.experts import Apart
from moejax.moe.layer import MoELayer
from moejax.moe.stats import RouterStats
from moejax.parallel.plan import MeshPlan
from moejax.parallel.rules import check_layers

T = TypeVar("T")


class Output(NamedTuple):
    """What the layers give, before the head.

    A competitive mixture keeps one stream for each expert: hidden is [E, B, T, D] and `log_gate_EBT` weighs them.
    `stats` holds, for each stack and each sparse layer of its period, the RouterStats of all repeats.
    """

    hidden: Float[Array, "*E B T D"]
    log_gate_EBT: Float[Array, "E B T"] | None
    stats: list[list[RouterStats]]
    stream: Float[Array, "B t D"] | None = None
    """the last layer's output, for the prediction of further tokens"""


def periods(kinds: Sequence[T]) -> list[tuple[tuple[T, ...], int]]:
    """Write a list of layers as (period, repeats): at each place the period that covers most, the shortest of those."""
    runs: list[tuple[tuple[T, ...], int]] = []
    start = 0
    while start < len(kinds):
        best = (tuple(kinds[start : start + 1]), 1)
        for size in range(1, (len(kinds) - start) // 2 + 1):
            period, repeats = tuple(kinds[start : start + size]), 1
            while tuple(kinds[start + repeats * size : start + (repeats + 1) * size]) == period:
                repeats += 1
            if repeats > 1 and repeats * size > len(best[0]) * best[1]:
                best = (period, repeats)
        runs.append(best)
        start += len(best[0]) * best[1]
    return runs


class Stack(nnx.Module):
    """A period of blocks repeated: weights stacked [repeats, ...], one compiled body, scanned."""

    def __init__(
        self, config: ModelConfig, plan: MeshPlan, rngs: nnx.Rngs, period: Sequence[Layer], repeats: int, first: int
    ) -> None:
        def make(layer: Layer) -> Block:
            @nnx.split_rngs(splits=repeats)
            @nnx.vmap
            def build(rngs: nnx.Rngs) -> Block:
                return Block(config, plan, rngs, layer)

            return build(rngs)

        self.blocks = nnx.List([make(layer) for layer in period])
        self.repeats, self.first = repeats, first
        self.remat, self.unroll, self.zero_stage = config.remat, config.unroll, plan.config.zero_stage

    def __call__(
        self, x_BtD: Float[Array, "B t D"], context: Context, before: Int[Array, ""] | int = 0
    ) -> tuple[Float[Array, "B t D"], list[RouterStats]]:
        """Run every layer that is here, after `before` repeats of the stack; stats get a leading dim of repeats."""
        graphs, states = zip(*(nnx.split(block) for block in self.blocks), strict=True)
        repeats = jax.tree.leaves(states)[0].shape[0]

        def body(x: Array, scanned: tuple[Array, tuple[nnx.State, ...]]) -> tuple[Array, list[RouterStats]]:
            repeat, states = scanned
            stats = []
            for offset, (graph, state) in enumerate(zip(graphs, states, strict=True)):
                layer = self.first + (before + repeat) * len(graphs) + offset
                x, seen, _ = nnx.merge(graph, state)(x, context.at_layer(layer))
                stats += [] if seen is None else [seen]
            return x, stats

        body = rematerialize(body, self.remat, self.zero_stage)
        if not self.unroll:
            return lax.scan(body, x_BtD, (jnp.arange(repeats), states))
        seen = []
        # A split's transpose is one concatenation; that of an index is a sum of whole stacks.
        parts = jax.tree.map(lambda leaf: lax.split(leaf, [1] * repeats), states)
        for repeat in range(repeats):
            layer = jax.tree.map(lambda _, part, r=repeat: part[r][0], states, parts)
            x_BtD, stats = body(x_BtD, (jnp.int32(repeat), layer))
            seen.append(stats)
        return x_BtD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)

    def unstacked(self) -> list[Block]:
        """Give the layers one by one, in order."""
        split = [nnx.split(block) for block in self.blocks]
        return [
            nnx.merge(graph, jax.tree.map(lambda leaf: leaf[repeat], state))  # noqa: B023 (called at once)
            for repeat in range(self.repeats)
            for graph, state in split
        ]


class Decoder(nnx.Module):
    """The model that every file of this package lists the layers of."""

    def __init__(self, config: ModelConfig, plan: MeshPlan, rngs: nnx.Rngs, layers: Sequence[Layer]) -> None:
        precision = config.precision
        self.embedding = Embedding(plan, rngs, config.vocab, config.embed, precision)
        self.competitive = config.moe is not None and config.moe.competitive
        scanned = layers[:-1] if self.competitive else layers
        self.stacks = nnx.List([])
        first = 0
        runs = periods(scanned)
        check_layers(plan.config, runs)
        for period, repeats in runs:
            self.stacks.append(Stack(config, plan, rngs, period, repeats, first))
            first += len(period) * repeats
        self.mixture = Block(config, plan, rngs, layers[-1]) if self.competitive else None
        depth = 0 if config.mtp is None else config.mtp.depth
        self.mtp = nnx.List([FurtherToken(config, plan, rngs, layers[-1]) for _ in range(depth)])
        self.norm = RMSNorm(plan, rngs, config.embed, config.norm_eps, precision)
        self.head = Head(
            plan,
            rngs,
            config.vocab,
            config.embed,
            precision,
            config.init_scale,
            tied=config.tie_embeddings,
            divisor=config.logit_divisor,
        )
        self.plan, self.config = plan, config

    def __call__(self, ids_BT: Int[Array, "B T"], context: Context) -> Output:
        """Run whole sequences through the layers: training, evaluation, and the oracle of cached decoding."""
        x_BtD = self._embed(ids_BT)
        stats = []
        for stack in self.stacks:
            x_BtD, seen = stack(x_BtD, context)
            stats.append(seen)
        if self.mixture is None:
            return Output(self.finish(x_BtD), None, stats, x_BtD if self.mtp else None)
        x_EBtD, log_gate_EBT, seen, _ = self.mixture.uncombined(x_BtD, context.at_layer(self.config.num_layers - 1))
        return Output(self.finish(x_EBtD), log_gate_EBT, [*stats, [jax.tree.map(lambda a: a[None], seen)]])

    def stage(
        self,
        x_BtD: Float[Array, "B t D"],
        ids_BT: Int[Array, "B T"],
        context: Context,
        first: Bool[Array, ""],
        chunk: Int[Array, ""],
    ) -> tuple[Float[Array, "B t D"], list[list[RouterStats]]]:
        """Run one chunk of a pipeline stage: the layers that are here, after the embedding if it is the first."""
        stack, plan = self.stacks[0], self.plan
        here = jax.tree.leaves(nnx.state(stack, nnx.Param))[0].shape[0]
        x_BtD = lax.cond(first, lambda: vary(self._embed(ids_BT), plan.stream_axes()), lambda: x_BtD)
        before = (chunk * plan.size("pipeline") + plan.index("layers")) * here
        x_BtD, stats = stack(x_BtD, context, before)
        return x_BtD, [stats]

    def further(
        self, output: Output, tokens_DBT: Sequence[Int[Array, "B T"]], context: Context
    ) -> Iterator[tuple[Output, RouterStats | None]]:
        """Give, depth by depth, what predicts the token after `tokens_DBT[depth]`, each one place further on."""
        x_BtD = output.stream
        assert x_BtD is not None and context.training, "further tokens are predicted in training"
        for depth, (module, tokens_BT) in enumerate(zip(self.mtp, tokens_DBT, strict=True)):
            at = context.at_layer(self.config.num_layers + depth)
            x_BtD, hidden_BTD, stats = module(x_BtD, self._embed(tokens_BT), at)
            yield Output(hidden_BTD, None, []), stats

    def finish(self, x: Float[Array, "*E B t D"]) -> Float[Array, "*E B T D"]:
        """Normalise what the last layer gives, whole on every tensor rank."""
        with jax.named_scope("norm"):
            return self.plan.enter_tensor(self.norm(x))

    def cached(
        self,
        blocks: Sequence[Block],
        ids_BT: Int[Array, "B T"],
        context: Context,
        caches: Sequence[Cache],
        aparts: Sequence[Apart | None] | None = None,
    ) -> tuple[Output, list[Any]]:
        """Run tokens that continue what the caches hold.

        `blocks` comes from `unstacked` and `aparts` (for few tokens) from `experts_apart`, once for many calls.
        """
        aparts = [None] * len(blocks) if aparts is None else aparts
        x_BtD, written = self._embed(ids_BT), []
        for number, (block, cache, apart) in enumerate(zip(blocks, caches[: len(blocks)], aparts, strict=True)):
            x_BtD, _, new = block(x_BtD, context.at_layer(number), cache, apart)
            written += [new]
        if self.mixture is None:
            return Output(self.finish(x_BtD), None, []), written
        x_EBtD, log_gate_EBT, _, new = self.mixture.uncombined(x_BtD, context.at_layer(len(blocks)), caches[-1])
        return Output(self.finish(x_EBtD), log_gate_EBT, []), [*written, new]

    def unstacked(self) -> list[Block]:
        """Give all scanned layers one by one, for `cached`."""
        return [block for stack in self.stacks for block in stack.unstacked()]

    def experts_apart(self, blocks: Sequence[Block]) -> list[Apart | None]:
        """Take every sparse layer's experts apart, for `cached`."""
        return [block.ffn.apart() if isinstance(block.ffn, MoELayer) else None for block in blocks]

    def empty_caches(self, batch: int, length: int) -> list[Cache]:
        """Make a cache for every layer: `batch` local sequences of `length` tokens."""
        blocks = self.unstacked() + ([] if self.mixture is None else [self.mixture])
        return [block.mixer.empty_cache(batch, length) for block in blocks]

    def logits(self, output: Output) -> Float[Array, "B T v"]:
        """Give the local columns of the logits; of a mixture, the log of the mixed probabilities."""
        logits = self.head(output.hidden, self.embedding)
        if output.log_gate_EBT is None:
            return logits
        plan = self.plan
        shifted = logits - plan.max_over(logits.max(-1, keepdims=True), "vocab")
        log_norm = jnp.log(plan.sum_over(jnp.exp(shifted).sum(-1, keepdims=True), "vocab"))
        return jax.nn.logsumexp(output.log_gate_EBT[..., None] + shifted - log_norm, axis=0)

    def update_router_bias(self, stats: list[list[RouterStats]]) -> None:
        """Move every loss-free balancing bias by the load that its layer saw."""
        for stack, seen in zip(self.stacks, stats, strict=self.mixture is None):
            sparse = [block.ffn for block in stack.blocks if isinstance(block.ffn, MoELayer)]
            for layer, layer_stats in zip(sparse, seen, strict=True):
                layer.router.update_bias(layer_stats.load_E)

    def _embed(self, ids_BT: Array) -> Array:
        with jax.named_scope("embed"):
            x_BtD = vary(self.embedding(ids_BT), self.plan.batch_axes())
            return x_BtD if self.config.embed_scale == 1.0 else self.config.embed_scale * x_BtD
