"""How does a batch of prompts go on? One compiled loop with a cache, and one without: the oracle."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from moejax.compat import vary, vary_like
from moejax.config.model import START_TOKEN
from moejax.layers.context import Context, Source
from moejax.models import Decoder, EncoderDecoder, ModelParts
from moejax.moe.dispatch import few_pays
from moejax.ops.random import fold
from moejax.serve.sampling import Sampling, sample

Tree = Any

PROMPT_MULTIPLE = 16
"""Prompts are padded on the left to a multiple, so that nearby lengths share one compiled program."""


@dataclass(frozen=True)
class Generator:
    """A compiled way to go on for up to `new` tokens; a token of `ends` ends a sequence."""

    parts: ModelParts
    new: int
    sampling: Sampling = Sampling()
    ends: tuple[int, ...] = ()
    cached: bool = True

    def __post_init__(self) -> None:
        moe = self.parts.config.moe
        if moe is not None and moe.router.kind == "expert_choice":
            raise ValueError(
                "expert choice looks at the whole sequence: such a model is for training, it cannot generate"
            )
        if self.new < 1:
            raise ValueError(f"the number of new tokens ({self.new}) must be at least 1")

    def compile(self) -> Any:
        """Give the jitted program (params, buffers, ids_BT, pad_B, seed) -> tokens [B, new]; B divides by the mesh."""
        plan = self.parts.plan
        ins = (self.parts.weight_specs(), self.parts.buffer_specs(), plan.spec("batch", None), plan.spec("batch"))
        return jax.jit(plan.spmd(self._program, (*ins, PartitionSpec()), plan.spec("batch", None)))

    def _program(self, params: Tree, buffers: Tree, ids_BT: Array, pad_B: Array, seed: Array) -> Array:
        """Run on this device's sequences; prompts stand right-aligned, `pad_B` counts what is before them."""
        plan = self.parts.plan
        model = self.parts.merge(params, buffers)
        source = None
        if self.parts.config.encoder is not None:  # the prompts are its source, and the decoder begins anew
            source = left_aligned(ids_BT, pad_B)
            ids_BT = vary_like(jnp.full_like(ids_BT[:, :1], START_TOKEN), ids_BT)
            pad_B = vary_like(jnp.zeros_like(pad_B), pad_B)
        batch, prompt = ids_BT.shape
        rows_B = (plan.index("batch") * batch + jnp.arange(batch)).astype(jnp.uint32)
        key = jax.random.key_data(jax.random.key(seed))
        if self.cached:
            read = CachedReader(model, batch, prompt + self.new, source)
            state, logits_BV = read.start(ids_BT, pad_B)
        else:
            read = FullReader(model, prompt + self.new, source)
            state, logits_BV = read.start(ids_BT, pad_B)
        mine, last = plan.batch_axes(), self.ends[0] if self.ends else 0

        def going(carry: tuple[Array, ...]) -> Array:
            index, _, _, _, _, active = carry
            return (index < self.new) & active

        def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            index, tokens_BI, done_B, state, logits_BV, _ = carry
            next_B = sample(logits_BV, self.sampling, fold(key, index), rows_B)
            next_B = jnp.where(done_B, last, next_B)
            tokens_BI = lax.dynamic_update_slice_in_dim(tokens_BI, next_B[:, None], index, 1)
            done_B = done_B | self._is_end(next_B)
            state, logits_BV = read.next(state, next_B, prompt + index, pad_B)
            active = plan.sum_over((~done_B).sum(), "batch") > 0
            return index + 1, tokens_BI, done_B, state, logits_BV, active

        tokens_BI = vary(jnp.zeros((batch, self.new), jnp.int32), mine)
        done_B = vary(jnp.zeros(batch, bool), mine)
        start = (jnp.int32(0), tokens_BI, done_B, state, logits_BV, jnp.bool_(True))
        tokens_BI = lax.while_loop(going, body, start)[1]
        # What was never reached, since every sequence had ended, reads as the end token.
        before_BI = jnp.cumsum(self._is_end(tokens_BI), axis=1) - self._is_end(tokens_BI)
        return jnp.where(before_BI > 0, last, tokens_BI)

    def _is_end(self, tokens: Array) -> Array:
        # Not jnp.isin: of no ends at all it crashed XLA:CPU on many devices here (jaxlib 0.11.2).
        return functools.reduce(jnp.logical_or, (tokens == end for end in self.ends), jnp.zeros_like(tokens, bool))


def last_logits(model: Decoder, output: Any) -> Array:
    """Give the last token's logits over the whole vocabulary."""
    last = output._replace(hidden=output.hidden[..., -1:, :])
    if output.log_gate_EBT is not None:
        last = last._replace(log_gate_EBT=output.log_gate_EBT[..., -1:])
    return model.plan.gather(model.logits(last)[:, 0], "vocab", 1)


def left_aligned(ids_BT: Array, pad_B: Array) -> Source:
    """Bring the padding behind the prompts: before them it would take the first of the experts' slots."""
    length = ids_BT.shape[1]
    index_T = jnp.arange(length, dtype=jnp.int32)
    ids_BT = jnp.take_along_axis(ids_BT, (index_T + pad_B[:, None]) % length, axis=1)
    return Source(ids_BT, (index_T < length - pad_B[:, None]).astype(jnp.int32))


def _context(index_BT: Array, pad_B: Array, segments_BT: Array, source: Source | None = None) -> Context:
    rows_B = jnp.arange(index_BT.shape[0], dtype=jnp.uint32)
    positions_BT, length = jnp.maximum(index_BT - pad_B[:, None], 0), index_BT.shape[1]
    return Context(positions_BT, index_BT, segments_BT, rows_B, length, one_by_one=True, source=source)


class CachedReader:
    """Reads the prompt once, then token by token; layers are taken out of their stacks once, before the loop."""

    def __init__(self, model: Decoder, batch: int, length: int, source: Source | None = None) -> None:
        self.model, self.blocks, self.source = model, model.unstacked(), source
        few = few_pays(batch) and model.plan.size("expert") == 1
        self.aparts = model.experts_apart(self.blocks) if few else None
        self.batch, self.length = batch, length

    def start(self, ids_BT: Array, pad_B: Array) -> tuple[Any, Array]:
        """Read the prompts; give the caches and the next token's logits."""
        index_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1], dtype=jnp.int32), ids_BT.shape)
        segments_BT = (index_BT >= pad_B[:, None]).astype(jnp.int32)
        context = _context(index_BT, pad_B, segments_BT, self.source)
        if isinstance(self.model, EncoderDecoder):
            caches = self.model.caches_of(self.model.encode(context)[0], self.length)
        else:
            caches = self.model.empty_caches(self.batch, self.length)
        return self._run(caches, ids_BT, context)

    def next(self, caches: Any, next_B: Array, index: Array, pad_B: Array) -> tuple[Any, Array]:
        """Read one token of each sequence, standing at `index`."""
        index_B1 = jnp.broadcast_to(index, (next_B.shape[0], 1))
        segments_B1 = vary(jnp.ones_like(index_B1), self.model.plan.batch_axes())
        return self._run(caches, next_B[:, None], _context(index_B1, pad_B, segments_B1), self.aparts)

    def _run(self, caches: Any, ids_BT: Array, context: Context, aparts: Any = None) -> tuple[Any, Array]:
        output, caches = self.model.cached(self.blocks, ids_BT, context, caches, aparts)
        return caches, last_logits(self.model, output)


class FullReader:
    """Reads everything again for every token: slow, simple, right."""

    def __init__(self, model: Decoder, length: int, source: Source | None = None) -> None:
        self.model, self.length, self.source = model, length, source

    def start(self, ids_BT: Array, pad_B: Array) -> tuple[Any, Array]:
        """Put the prompts into buffers of full length and read them."""
        ids_BS = jnp.pad(ids_BT, ((0, 0), (0, self.length - ids_BT.shape[1])))
        return ids_BS, self._logits(ids_BS, jnp.int32(ids_BT.shape[1] - 1), pad_B)

    def next(self, ids_BS: Any, next_B: Array, index: Array, pad_B: Array) -> tuple[Any, Array]:
        """Add one token at `index` and read the whole sequences."""
        ids_BS = lax.dynamic_update_slice_in_dim(ids_BS, next_B[:, None], index, 1)
        return ids_BS, self._logits(ids_BS, index, pad_B)

    def _logits(self, ids_BS: Array, last: Array, pad_B: Array) -> Array:
        index_BS = jnp.broadcast_to(jnp.arange(self.length, dtype=jnp.int32), ids_BS.shape)
        segments_BS = ((index_BS >= pad_B[:, None]) & (index_BS <= last)).astype(jnp.int32)
        output = self.model(ids_BS, _context(index_BS, pad_B, segments_BS, self.source))
        hidden = lax.dynamic_slice_in_dim(output.hidden, last, 1, output.hidden.ndim - 2)
        gate = output.log_gate_EBT
        gate = None if gate is None else lax.dynamic_slice_in_dim(gate, last, 1, 2)
        return last_logits(self.model, output._replace(hidden=hidden, log_gate_EBT=gate))


def pad_prompts(prompts: Sequence[Sequence[int]], multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Right-align prompts into ids [B, T] and count the padding before each; B is filled up to `multiple` by repeats.

    Raise ValueError for an empty prompt.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt must hold at least one token")
    longest = max(map(len, prompts))
    length = -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    filled = [prompts[i % len(prompts)] for i in range(-(-len(prompts) // multiple) * multiple)]
    ids_BT = np.zeros((len(filled), length), np.int32)
    for row, prompt in zip(ids_BT, filled, strict=True):
        row[length - len(prompt) :] = prompt
    return ids_BT, np.asarray([length - len(prompt) for prompt in filled], np.int32)


def generate(
    generator: Generator, params: Tree, buffers: Tree, prompts: Sequence[Sequence[int]], seed: int = 0
) -> list[list[int]]:
    """Give each prompt's continuation, without its end token."""
    ids_BT, pad_B = pad_prompts(prompts, generator.parts.plan.degree("batch"))
    tokens = np.asarray(generator.compile()(params, buffers, ids_BT, pad_B, np.int32(seed)))[: len(prompts)]
    rows = [row.tolist() for row in tokens]
    return [list(itertools.takewhile(lambda token: token not in generator.ends, row)) for row in rows]
