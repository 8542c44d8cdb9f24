"""How does softmax attention run on Hopper's tensor cores without its scores in memory? The forward pass.

FlashAttention-3's schedule (arXiv 2407.08608): one warpgroup copies key/value blocks, the others own 64 queries each
and keep two products in flight (the next block's scores, this block's values) while they exponentiate; they take
turns at issuing products, so that one's softmax runs under another's. Which blocks a block of queries visits, and
which of them need a mask, XLA works out beforehand (`block_walks`): causality, windows, packed documents, the offset
of ring attention and ragged ends are one mechanism.

Roofline: 4*B*N*T*S*H FLOPs (half when causal) at 790 TFLOP/s; B*N*T*S exponentials at 3.9e12/s: binding for H = 64.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.flash_blocks import (
    LAYOUT,
    REGISTERS,
    ROWS,
    Mask,
    Options,
    TileOrder,
    Walk,
    along,
    block_walks,
    check_blocks,
    check_call,
    copy_blocks,
    heads_together,
    launch,
    pad_edge,
    whole_tiles,
)
from pallas_kernels.target import target
from pallas_kernels.tuning import bucket, op_name, tuned

Array = jax.Array

NOTHING = -1e30
"""The largest score seen before any was: finite, so that -inf minus it is -inf and it minus itself is 0."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of the forward kernel."""

    warpgroups: int = 2
    """that compute, 64 queries each"""
    block_kv: int = 128
    """keys of a step"""
    stages: int = 2
    """key/value blocks in shared memory"""

    @property
    def block_q(self) -> int:
        """Count the queries of a thread block."""
        return ROWS * self.warpgroups


def default_config(head_dim: int, value_dim: int) -> Config:
    """Pick block sizes that registers and shared memory hold: as many queries a block as they can."""
    if max(head_dim, value_dim) <= 64:
        return Config(warpgroups=3)
    return Config() if head_dim + value_dim <= 320 else Config(block_kv=64)


def flash_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKU: Array,
    *,
    offset: Array | None = None,
    q_segments_BT: Array | None = None,
    k_segments_BS: Array | None = None,
    sinks_N: Array | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    config: Config | None = None,
) -> tuple[Array, Array]:
    """Attend; give o [B, T, N, U] and the natural log of each query's softmax denominator [B, T, N], float32.

    Query i stands at key index offset + i (int32 scalar, may be traced). Causal: it sees the keys up to there, the
    last `window` of them; segments: those of its own id; a sink is a logit of its head that only the denominator has.
    A query that sees nothing gives 0 and -inf (with a sink: the sink). Head n reads key/value head n // (N/K).
    Raises Declined for what the kernel cannot take.
    """
    options = check_call(q_BTNH, k_BSKH, v_BSKU, q_segments_BT, k_segments_BS, causal, window, softcap, scale)
    length, keys = q_BTNH.shape[1], k_BSKH.shape[1]
    op = op_name("flash_attention", causal=causal, segments=q_segments_BT is not None)
    default = default_config(q_BTNH.shape[3], v_BSKU.shape[3])
    config = config or tuned(op, target().kind, bucket(q_BTNH, k_BSKH, v_BSKU, batched=True), default)
    offset_1 = jnp.asarray(0 if offset is None else offset, jnp.int32).reshape(1)
    blocks = (config.block_q, config.block_kv)
    walks = block_walks((length, keys), blocks, offset_1[0], q_segments_BT, k_segments_BS, options)
    extra = {"offset": offset_1, "walks": walks}
    if q_segments_BT is not None and k_segments_BS is not None:
        extra["q_segments"] = pad_edge(q_segments_BT, config.block_q)
        extra["k_segments"] = pad_edge(k_segments_BS, config.block_kv)
    if sinks_N is not None:
        extra["sinks"] = sinks_N.astype(jnp.float32)
    o_BTNU, lse_BNT = _forward(options, config, [whole_tiles(x) for x in (q_BTNH, k_BSKH, v_BSKU)], keys, extra)
    return o_BTNU[:, :length], lse_BNT[:, :, :length].swapaxes(1, 2)


def _forward(options: Options, config: Config, inputs: list[Array], keys: int, extra: dict[str, Array]) -> list[Array]:
    """Run the kernel; its lse is [B, N, whole blocks]: rows of a copy must begin at 16 bytes."""
    (q, _, v), dtype = inputs, inputs[0].dtype
    batch, length, heads, dim = q.shape
    kv_heads, value_dim = v.shape[2:]
    check_config(config, dim, value_dim)
    num_blocks = pl.cdiv(length, config.block_q)
    order = TileOrder(batch, heads, num_blocks, heads_together(keys, kv_heads, heads, dim + value_dim))
    kernel = functools.partial(_kernel, options=options, config=config, group=heads // kv_heads, keys=keys)
    scratch = _scratch(config, dim, value_dim, dtype, "q_segments" in extra)
    out = [
        jax.ShapeDtypeStruct((batch, length, heads, value_dim), dtype),
        jax.ShapeDtypeStruct((batch, heads, num_blocks * config.block_q), jnp.float32),
    ]
    return launch(kernel, "flash_attention", order, config.warpgroups, scratch, inputs, extra, out)


def check_config(config: Config, dim: int, value_dim: int) -> None:
    """Decline block sizes that the forward kernel cannot have."""
    rows = 2 * config.block_q * max(dim, value_dim) + 4 * config.block_q
    check_blocks(config, config.block_kv, rows, config.stages * (2 * (dim + value_dim) + 4))


def _scratch(config: Config, dim: int, value_dim: int, dtype: Any, segments: bool) -> dict[str, Any]:
    per_stage = functools.partial(plgpu.Barrier, num_barriers=config.stages)
    queries = mosaic.matrix((config.warpgroups, ROWS, dim), dtype)
    outputs = mosaic.matrix((config.warpgroups, ROWS, value_dim), dtype)
    ids = {"ids": plgpu.SMEM((config.stages, config.block_kv), jnp.int32)} if segments else {}
    return ids | {
        "queries_outputs": plgpu.RefUnion(queries, outputs),
        "k": mosaic.matrix((config.stages, config.block_kv, dim), dtype),
        "v": mosaic.matrix((config.stages, config.block_kv, value_dim), dtype),
        "lse": plgpu.SMEM((config.warpgroups, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=config.warpgroups),
        "q_free": plgpu.Barrier(num_arrivals=config.warpgroups),
        "k_full": per_stage(num_arrivals=2 if segments else 1),
        "v_full": per_stage(),
        "k_free": per_stage(num_arrivals=config.warpgroups),
        "v_free": per_stage(num_arrivals=config.warpgroups),
        "turn": plgpu.Barrier(num_barriers=config.warpgroups),
    }


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    names: tuple[str, ...],
    options: Options,
    config: Config,
    order: TileOrder,
    group: int,
    keys: int,
    **scratch: Any,
) -> None:
    """Work on one tile: a batch row, a head, a block of queries."""
    extra, (o_ref, lse_ref) = dict(zip(names, refs, strict=False)), refs[len(names) :]
    batch, head, block = order.place(lax.axis_index("tile"))
    warpgroup = lax.axis_index("warpgroup")
    walk = Walk(extra["walks"], batch, block)

    @pl.when(warpgroup == config.warpgroups)
    def _copy() -> None:
        plgpu.set_max_registers(REGISTERS[config.warpgroups][0], action="decrease")
        kv_head = lax.div(head, jnp.int32(group))
        sources = {"k": [("k", k_ref.at[batch, :, kv_head])], "v": [("v", v_ref.at[batch, :, kv_head])]}
        if "k_segments" in extra:
            sources["k"].append(("ids", extra["k_segments"].at[batch]))
        copy_blocks(sources, walk, config.block_kv, config.stages, scratch)

    @pl.when(warpgroup < config.warpgroups)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS[config.warpgroups][1], action="increase")
        start = block * config.block_q + warpgroup * ROWS
        queries, outputs = (member.at[warpgroup] for member in scratch["queries_outputs"])
        q_full = scratch["q_full"].at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(start, ROWS), head], queries, q_full)
        ids_ref = extra["q_segments"].at[batch] if "q_segments" in extra else None
        mask = Mask(options, keys, start, extra["offset"][0], ids_ref)
        needs_mask = options.causal or mask.segments or keys % config.block_kv != 0
        softmax = _Softmax(options, config, queries, warpgroup, mask, walk, scratch)
        plgpu.barrier_wait(q_full)
        sink = extra["sinks"][head] * mosaic.LOG2E if "sinks" in extra else None
        carry = softmax.start(sink, needs_mask)
        unmasked = jnp.maximum(walk.masked, 1)
        if options.causal or mask.segments:
            carry = lax.fori_loop(1, unmasked, functools.partial(softmax.step, masked=True), carry)
        carry = lax.fori_loop(unmasked if needs_mask else 1, walk.steps, softmax.step, carry)
        o, lse = softmax.finish(carry)
        scratch["lse"].at[warpgroup][...] = lse
        outputs[...] = o.astype(o_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(outputs, o_ref.at[batch, pl.ds(start, ROWS), head])
        plgpu.copy_smem_to_gmem(scratch["lse"].at[warpgroup], lse_ref.at[batch, head, pl.ds(start, ROWS)])
        plgpu.wait_smem_to_gmem(0)


class _Softmax:
    """A warpgroup's walk over the key blocks: block i's scores are multiplied while block i-1's values are.

    The carry is (unnormalised o, largest score so far in base-2 units, sum of exponentials, last probabilities).
    """

    def __init__(
        self,
        options: Options,
        config: Config,
        queries: Any,
        warpgroup: Array,
        mask: Mask,
        walk: Walk,
        scratch: dict[str, Any],
    ) -> None:
        self.options, self.config, self.queries, self.mask = options, config, queries, mask
        self.warpgroup, self.walk, self.scratch = warpgroup, walk, scratch
        self.value_dim, self.dtype = scratch["v"].shape[2], scratch["v"].dtype

    def start(self, sink: Array | None, masked: bool) -> tuple[Array, ...]:
        """Score the first block."""
        rows = LAYOUT.reduce(1)
        zero = jnp.float32(0.0)
        highest = plgpu.layout_cast(jnp.full((ROWS,), NOTHING if sink is None else sink, jnp.float32), rows)
        total = plgpu.layout_cast(jnp.full((ROWS,), zero if sink is None else zero + 1, jnp.float32), rows)
        o = plgpu.layout_cast(jnp.zeros((ROWS, self.value_dim), jnp.float32), LAYOUT)

        @pl.when(self.warpgroup == self.config.warpgroups - 1)
        def _() -> None:
            plgpu.barrier_arrive(self.scratch["turn"].at[0])

        def score(s_acc: Any) -> tuple[Array, ...]:
            self._await_turn()
            self._issue_scores(s_acc, jnp.int32(0))
            self._pass_turn()
            return self._exponentiate(mosaic.read(s_acc), jnp.int32(0), highest, total, masked)

        p, highest, total, _ = mosaic.with_accumulators(score, (ROWS, self.config.block_kv))
        self._await_turn()
        return o, highest, total, self._narrow(p)

    def step(self, i: Array, carry: tuple[Array, ...], masked: bool = False) -> tuple[Array, ...]:
        """Score the block of step i while the values of the one before are added up."""
        o, highest, total, p = carry

        def overlapped(s_acc: Any, o_acc: Any) -> tuple[Array, ...]:
            self._issue_scores(s_acc, i)
            before = self._issue_values(o_acc, p, i - 1)
            self._pass_turn()
            s = mosaic.read(s_acc, in_flight=0 if masked and self.mask.segments else 1)  # ids take p's registers
            p_next, high, sums, shrink = self._exponentiate(s, i, highest, total, masked)
            self._await_turn()  # here, for ptxas moves no exponential across its loop: none waits for the values
            o_next = mosaic.read(o_acc) * along(shrink, 0, o)
            plgpu.barrier_arrive(self.scratch["v_free"].at[before])
            return o_next, high, sums, self._narrow(p_next)

        return mosaic.with_accumulators(overlapped, (ROWS, self.config.block_kv), o)

    def finish(self, carry: tuple[Array, ...]) -> tuple[Array, Array]:
        """Add the last block's values; give the normalised o and the natural log of the denominator."""
        o, highest, total, p = carry
        plgpu.barrier_arrive(self.scratch["q_free"])

        def values(o_acc: Any) -> Array:
            before = self._issue_values(o_acc, p, self.walk.steps - 1)
            self._pass_turn()
            o_last = mosaic.read(o_acc)
            plgpu.barrier_arrive(self.scratch["v_free"].at[before])
            return o_last

        o = mosaic.with_accumulators(values, o)

        pl.when(self.warpgroup == 0)(self._await_turn)  # what `start` gave away
        plgpu.barrier_wait(self.scratch["q_free"])  # outputs lie where the queries of all warpgroups lay
        share = 1.0 / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return o * along(share, 0, o), highest * math.log(2.0) + jnp.log(total)

    def _issue_scores(self, s_acc: Any, i: Array) -> None:
        slot = lax.rem(i, jnp.int32(self.config.stages))
        plgpu.barrier_wait(self.scratch["k_full"].at[slot])
        mosaic.wgmma(s_acc, self.queries, self.scratch["k"].at[slot].transpose((1, 0)))

    def _issue_values(self, o_acc: Any, p: Array, i: Array) -> Array:
        slot = lax.rem(i, jnp.int32(self.config.stages))
        plgpu.barrier_wait(self.scratch["v_full"].at[slot])
        mosaic.wgmma(o_acc, p, self.scratch["v"].at[slot])
        return slot

    def _await_turn(self) -> None:
        plgpu.barrier_wait(self.scratch["turn"].at[self.warpgroup])

    def _pass_turn(self) -> None:
        following = lax.rem(self.warpgroup + 1, jnp.int32(self.config.warpgroups))
        plgpu.barrier_arrive(self.scratch["turn"].at[following])

    def _exponentiate(
        self, s: Array, i: Array, highest: Array, total: Array, masked: bool
    ) -> tuple[Array, Array, Array, Array]:
        """Give block i's probabilities against the new maximum, that, the new sum, and what old sums shrink by."""
        slot = lax.rem(i, jnp.int32(self.config.stages))
        if not (masked and self.mask.segments):
            plgpu.barrier_arrive(self.scratch["k_free"].at[slot])
        s = self.options.cap(s)
        if masked:
            ids_ref = self.scratch["ids"].at[slot] if self.mask.segments else None
            s = self.mask(s, self.walk.block(i) * self.config.block_kv, ids_ref)
            if self.mask.segments:
                plgpu.barrier_arrive(self.scratch["k_free"].at[slot])
        factor = self.options.factor
        high = jnp.maximum(highest, s.max(axis=1) * factor)
        shrink = jnp.exp2(highest - high)
        p = jnp.exp2(s * factor - along(high, 0, s))
        total = total * shrink + p.sum(axis=1)
        return p, high, total, shrink

    def _narrow(self, p: Array) -> Array:
        """Narrow probabilities here, neither before (a product reads those registers) nor after: LLVM would move it."""
        return lax.optimization_barrier(lax.optimization_barrier(p).astype(self.dtype))
