"""A language model that reads a source whole and writes beside it: an encoder's stacks, then a decoder's."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config.model import ModelConfig
from moejax.layers.cache import Cache, SourceCache
from moejax.layers.context import Context, Memory
from moejax.layers.norm import RMSNorm
from moejax.layers.t5_attention import RelativeBias
from moejax.models.block import Block
from moejax.models.decoder import Decoder, Output, Stack
from moejax.models.layer import Layer
from moejax.moe.balance import SequenceBalance, stack_losses
from moejax.moe.experts import Apart
from moejax.moe.stats import RouterStats
from moejax.parallel.plan import MeshPlan

Stats = list[list[RouterStats]]


class EncoderDecoder(Decoder):
    """T5 (arXiv 1910.10683): the first stacks read `context.source`, the others the ids, looking into what those made.

    Both share the embedding, each has its norm and its table of scores by distance.
    """

    def __init__(self, config: ModelConfig, plan: MeshPlan, rngs: nnx.Rngs, layers: Sequence[Layer]) -> None:
        super().__init__(config, plan, rngs, layers)
        assert config.t5 is not None
        self.encoder_norm = RMSNorm(plan, rngs, config.embed, config.norm_eps, config.precision)
        self.encoder_bias = RelativeBias(plan, rngs, config.t5, config.precision, bidirectional=True)
        self.decoder_bias = RelativeBias(plan, rngs, config.t5, config.precision, bidirectional=False)
        if config.tie_embeddings:  # T5 draws its table of size one per channel, and shrinks what meets it as a head
            self.head.divisor *= config.embed**0.5
            self.embedding.table[...] *= config.embed**0.5

    def __call__(self, ids_BT: Int[Array, "B T"], context: Context) -> Output:
        """Read the source and run whole sequences beside it."""
        memory, read = self.encode(context)
        bias_NTS = self.decoder_bias(context.index_BT[0], context.index_BT[0])
        context = dataclasses.replace(context, memory=memory, bias_NTS=bias_NTS)
        x_BtD, written = self._run(self._stacks("decoder"), self._embed(ids_BT), context)
        return Output(self.finish(x_BtD), None, [*read, *written])

    def encode(self, context: Context) -> tuple[Memory, Stats]:
        """Run the encoder over the context's source; what it gives is whole on every tensor rank."""
        source, plan = context.source, self.plan
        assert source is not None, "an encoder-decoder's context has a source"
        inside = Context.of(plan, source.segments_BS, None, context.rows_B, context.key)
        bias_NTS = self.encoder_bias(inside.index_BT[0], inside.index_BT[0])
        inside = dataclasses.replace(inside, keep_logits=context.keep_logits, bias_NTS=bias_NTS)
        x_BtD, stats = self._run(self._stacks("encoder"), self._embed(source.ids_BS), inside)
        with jax.named_scope("encoder_norm"):
            return Memory(plan.enter_tensor(self.encoder_norm(x_BtD)), source.segments_BS), stats

    def cached(
        self,
        blocks: Sequence[Block],
        ids_BT: Int[Array, "B T"],
        context: Context,
        caches: Sequence[Cache],
        aparts: Sequence[Apart | None] | None = None,
    ) -> tuple[Output, list[Any]]:
        """Run tokens that continue what the caches hold; they hold the source's keys and values too."""
        first = caches[0]
        assert isinstance(first, SourceCache)
        bias_NTS = self.decoder_bias(context.index_BT[0], jnp.arange(first.own.k_BKSH.shape[2], dtype=jnp.int32))
        return super().cached(blocks, ids_BT, dataclasses.replace(context, bias_NTS=bias_NTS), caches, aparts)

    def unstacked(self) -> list[Block]:
        """Give the decoder's layers one by one, for `cached`."""
        return [block for stack in self._stacks("decoder") for block in stack.unstacked()]

    def caches_of(self, memory: Memory, length: int) -> list[Cache]:
        """Make a cache for every layer of the decoder: the source's keys and values, and room for `length` tokens."""
        caches = []
        for block in self.unstacked():
            assert block.cross is not None
            own = block.mixer.empty_cache(memory.x_BSD.shape[0], length)
            caches.append(SourceCache(own, block.cross.remember(memory)))  # type: ignore[arg-type]
        return caches

    def _stacks(self, part: str) -> list[Stack]:
        return [stack for stack in self.stacks if stack.blocks[0].layer.part == part]

    def _run(
        self, stacks: Sequence[Stack], x_BtD: Float[Array, "B t D"], context: Context
    ) -> tuple[Float[Array, "B t D"], Stats]:
        stats = []
        for stack in stacks:
            x_BtD, seen = stack(x_BtD, context)
            stats.append(seen)
        every = all(block.layer.ffn == "sparse" for stack in stacks for block in stack.blocks)
        return x_BtD, self._share_losses(stats, every)

    def _share_losses(self, stats: Stats, all_sparse: bool) -> Stats:
        """Compute what the routers of these stacks add together, and book an equal part of it on each of them."""
        balances = [seen.balance for stack in stats for seen in stack if isinstance(seen.balance, SequenceBalance)]
        if not balances or self.config.moe is None:
            return stats
        router = self.config.moe.router
        layers = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *balances)
        count = layers.square_B.shape[0]
        # transformers 5 leaves the losses of a stack out that has experts in every layer
        losses = {name: (0.0 if all_sparse else 1 / count) * x for name, x in stack_losses(self.plan, layers).items()}
        added = router.load_balance * losses["load_balance"] + router.z_loss * losses["z_loss"]

        def book(seen: RouterStats) -> RouterStats:
            each = {name: jnp.broadcast_to(loss, seen.loss.shape) for name, loss in losses.items()}
            return seen._replace(loss=seen.loss + added, losses=seen.losses | each, balance=None)

        return [[book(seen) for seen in stack] for stack in stats]
