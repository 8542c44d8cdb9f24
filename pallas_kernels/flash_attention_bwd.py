"""How do the gradients of flash attention run on Hopper, deterministically? Two kernels, neither of them with atomics.

dq: a block of queries walks over the key blocks that it sees; dk, dv: a block of keys walks over the blocks of queries
that see it, for each query head of its group in turn, on transposed scores K Q^T, so that what multiplies dO and Q
comes from registers. Scores are recomputed from the forward's log-sum-exp (arXiv 2205.14135), which may be over more
keys than are given here (ring attention). Blocks and masks are those of the forward (`block_walks`).

Roofline: 7 products of 2*B*N*T*S*H FLOPs each (half when causal), two more than a fused backward whose dq needs
atomics; at 790 TFLOP/s. Bytes: q, k, v, do once for each kernel, and their gradients.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
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
    block_walks,
    check_blocks,
    check_call,
    copy_blocks,
    drain,
    heads_together,
    launch,
    pad_edge,
    whole_tiles,
)
from pallas_kernels.target import target
from pallas_kernels.tuning import bucket, op_name, tuned

Array = jax.Array

WIDEST = 256
"""Columns of float32 sums that a warpgroup's registers hold beside its scores: dk and dv together, else apart."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of the two backward kernels."""

    warpgroups: int = 2
    """that compute, 64 queries (dq) or keys (dk, dv) each"""
    dq_block: int = 128
    """keys of a step of the dq kernel"""
    dq_stages: int = 2
    dkv_block: int = 64
    """queries of a step of the dk, dv kernel"""
    dkv_stages: int = 2

    @property
    def block(self) -> int:
        """Count the queries, or keys, of a thread block."""
        return ROWS * self.warpgroups


def default_config(head_dim: int, value_dim: int) -> Config:
    """Pick block sizes that registers and shared memory hold."""
    return Config(dq_block=128 if max(head_dim, value_dim) <= 128 else 64)


def check_config(config: Config, dim: int, value_dim: int) -> None:
    """Decline block sizes that the kernels cannot have."""
    for block, stages in ((config.dq_block, config.dq_stages), (config.dkv_block, config.dkv_stages)):
        check_blocks(config, block, 2 * config.block * (dim + value_dim), stages * (2 * (dim + value_dim) + 12))


def flash_attention_bwd(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKU: Array,
    do_BTNU: Array,
    lse_BTN: Array,
    delta_BTN: Array,
    *,
    offset: Array | None = None,
    q_segments_BT: Array | None = None,
    k_segments_BS: Array | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    config: Config | None = None,
) -> tuple[Array, Array, Array]:
    """Give dq, dk, dv, in the dtypes of q, k, v.

    lse is the natural log of the softmax denominator over all keys, those of other calls and a sink included; delta is
    sum(do * o) - dlse. A query with lse = -inf has no gradient. Options as in `flash_attention`; a sink's gradient is
    the caller's. Raises Declined for what the kernels cannot take.
    """
    options = check_call(q_BTNH, k_BSKH, v_BSKU, q_segments_BT, k_segments_BS, causal, window, softcap, scale)
    batch, length, heads, dim = q_BTNH.shape
    _, keys, kv_heads, value_dim = v_BSKU.shape
    rows_BTN = (batch, length, heads)
    if do_BTNU.shape != (*rows_BTN, value_dim) or not lse_BTN.shape == delta_BTN.shape == rows_BTN:
        raise ValueError(f"do {do_BTNU.shape}, lse {lse_BTN.shape}, delta {delta_BTN.shape} must be [B, T, N, (U)]")
    op = op_name("flash_attention_bwd", causal=causal, segments=q_segments_BT is not None)
    operands = bucket(q_BTNH, k_BSKH, v_BSKU, batched=True)
    config = config or tuned(op, target().kind, operands, default_config(dim, value_dim))
    check_config(config, dim, value_dim)
    rows = math.lcm(config.block, config.dkv_block)
    shift_BNT, delta_BNT = _row_statistics(lse_BTN, delta_BTN, options, -length % rows)
    offset_1 = jnp.asarray(0 if offset is None else offset, jnp.int32).reshape(1)
    call = _Call(options, config, batch, heads, kv_heads, length, keys)
    extra = {"offset": offset_1}
    if q_segments_BT is not None and k_segments_BS is not None:
        extra["q_segments"] = pad_edge(q_segments_BT, rows)
        extra["k_segments"] = pad_edge(k_segments_BS, math.lcm(config.block, config.dq_block))
    tensors = (whole_tiles(x) for x in (q_BTNH, k_BSKH, v_BSKU, do_BTNU.astype(q_BTNH.dtype)))
    inputs = (*tensors, shift_BNT, delta_BNT)
    ids = (q_segments_BT, k_segments_BS)
    dq_BTNH = _dq(call, inputs, {**extra, "walks": call.walks((config.block, config.dq_block), offset_1[0], ids)})
    walks = call.walks((config.dkv_block, config.block), offset_1[0], ids, transposed=True)
    dkv = functools.partial(_dkv, call, inputs, {**extra, "walks": walks})
    parts = (("dk", "dv"),) if dim + value_dim <= WIDEST else (("dk",), ("dv",))
    dk_BSKH, dv_BSKU = (gradient for names in parts for gradient in dkv(names))
    return dq_BTNH[:, :length], dk_BSKH[:, :keys], dv_BSKU[:, :keys]


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static about a call."""

    options: Options
    config: Config
    batch: int
    heads: int
    kv_heads: int
    length: int
    keys: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def walks(
        self, blocks: tuple[int, int], offset: Array, ids: tuple[Array | None, Array | None], transposed: bool = False
    ) -> Array:
        return block_walks((self.length, self.keys), blocks, offset, *ids, self.options, transposed)

    def mask(self, start: Array, batch: Array, extra: dict[str, Any], transposed: bool) -> Mask:
        name = "k_segments" if transposed else "q_segments"
        return Mask(
            self.options, self.keys, start, extra["offset"][0], extra[name].at[batch] if name in extra else None
        )


def _row_statistics(lse_BTN: Array, delta_BTN: Array, options: Options, pad: int) -> tuple[Array, Array]:
    """Give where the sums of q k and of do v begin, [B, N, T + pad]: minus lse, in the units of scores, minus delta.

    Rows without a gradient begin at -inf, which makes their probabilities 0, and at 0.
    """
    lse, delta = (x.astype(jnp.float32).swapaxes(1, 2) for x in (lse_BTN, delta_BTN))
    blind, width = jnp.isneginf(lse), ((0, 0), (0, 0), (0, pad))
    shift = jnp.where(blind, -jnp.inf, -lse / (options.scale if options.softcap is None else options.softcap))
    return jnp.pad(shift, width, constant_values=-jnp.inf), jnp.pad(jnp.where(blind, 0.0, -delta), width)


def _dq(call: _Call, inputs: tuple[Array, ...], extra: dict[str, Array]) -> Array:
    (q, _, v, *_), config = inputs, call.config
    dim, value_dim, dtype = q.shape[3], v.shape[3], q.dtype
    together = heads_together(call.keys, call.kv_heads, call.heads, dim + value_dim)
    order = TileOrder(call.batch, call.heads, pl.cdiv(call.length, config.block), together)
    stage, segments = functools.partial(plgpu.Barrier, num_barriers=config.dq_stages), "q_segments" in extra
    scratch = {
        "q": mosaic.matrix((config.warpgroups, ROWS, dim), dtype),
        "do": mosaic.matrix((config.warpgroups, ROWS, value_dim), dtype),
        "k": mosaic.matrix((config.dq_stages, config.dq_block, dim), dtype),
        "v": mosaic.matrix((config.dq_stages, config.dq_block, value_dim), dtype),
        "rows_full": plgpu.Barrier(num_arrivals=2, num_barriers=config.warpgroups),
        "k_full": stage(num_arrivals=2 if segments else 1),
        "v_full": stage(),
        "k_free": stage(num_arrivals=config.warpgroups),
        "v_free": stage(num_arrivals=config.warpgroups),
    }
    if segments:
        scratch["ids"] = plgpu.SMEM((config.dq_stages, config.dq_block), jnp.int32)
    kernel, out = functools.partial(_dq_kernel, call=call), jax.ShapeDtypeStruct(q.shape, dtype)
    return launch(kernel, "flash_attention_dq", order, config.warpgroups, scratch, inputs, extra, out)


def _dq_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    do_ref: Any,
    shift_ref: Any,
    delta_ref: Any,
    *refs: Any,
    names: tuple[str, ...],
    call: _Call,
    order: TileOrder,
    **scratch: Any,
) -> None:
    """Work on one tile: a batch row, a query head, a block of queries."""
    extra, dq_ref = dict(zip(names, refs, strict=False)), refs[-1]
    config, options = call.config, call.options
    batch, head, block = order.place(lax.axis_index("tile"))
    warpgroup = lax.axis_index("warpgroup")
    walk = Walk(extra["walks"], batch, block)

    def slot_of(i: Array) -> Array:
        return lax.rem(i, jnp.int32(config.dq_stages))

    @pl.when(warpgroup == config.warpgroups)
    def _copy() -> None:
        plgpu.set_max_registers(REGISTERS[config.warpgroups][0], action="decrease")
        kv_head = lax.div(head, jnp.int32(call.group))
        sources = {"k": [("k", k_ref.at[batch, :, kv_head])], "v": [("v", v_ref.at[batch, :, kv_head])]}
        if "k_segments" in extra:
            sources["k"].append(("ids", extra["k_segments"].at[batch]))
        copy_blocks(sources, walk, config.dq_block, config.dq_stages, scratch)

    @pl.when(warpgroup < config.warpgroups)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS[config.warpgroups][1], action="increase")
        start = block * config.block + warpgroup * ROWS
        mine = (batch, pl.ds(start, ROWS), head)
        q, do, full = (scratch[name].at[warpgroup] for name in ("q", "do", "rows_full"))
        plgpu.copy_gmem_to_smem(q_ref.at[mine], q, full)
        plgpu.copy_gmem_to_smem(do_ref.at[mine], do, full)
        shift, delta = (
            plgpu.load(ref.at[batch, head, pl.ds(start, ROWS)], layout=LAYOUT.reduce(1), optimized=False)
            for ref in (shift_ref, delta_ref)
        )
        mask = call.mask(start, batch, extra, transposed=False)
        plgpu.barrier_wait(full)

        def step(i: Array, dq: Array, masked: bool = False) -> Array:
            slot = slot_of(i)
            k, v = scratch["k"].at[slot], scratch["v"].at[slot]

            def score(s_acc: Any) -> None:
                plgpu.barrier_wait(scratch["k_full"].at[slot])
                mosaic.wgmma(s_acc, q, k.transpose((1, 0)))
                plgpu.barrier_wait(scratch["v_full"].at[slot])

            def hide(s: Array) -> Array:
                ids_ref = scratch["ids"].at[slot] if mask.segments else None
                return mask(s, walk.block(i) * config.dq_block, ids_ref) if masked else s

            def multiply(dp_acc: Any) -> None:
                mosaic.wgmma(dp_acc, do, v.transpose((1, 0)))

            def add(p: Array, ds: Array, dq_acc: Any) -> Array:
                plgpu.barrier_arrive(scratch["v_free"].at[slot])
                mosaic.wgmma(dq_acc, ds.astype(q_ref.dtype), k)
                dq_next = mosaic.read(dq_acc)
                plgpu.barrier_arrive(scratch["k_free"].at[slot])
                return dq_next

            tile = (ROWS, config.dq_block)
            starts = (lax.broadcast_in_dim(shift, tile, [0]), lax.broadcast_in_dim(delta, tile, [0]))
            apart = masked and mask.segments and options.window is not None  # two masks want the registers
            return _gradients(score, hide, multiply, add, starts, (dq,), options, apart)

        needs_mask = options.causal or mask.segments or call.keys % config.dq_block != 0
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, q_ref.shape[3]), jnp.float32), LAYOUT)
        dq = _take(walk, needs_mask, step, zeros)
        q[...] = (dq * options.scale).astype(q_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, dq_ref.at[mine])
        plgpu.wait_smem_to_gmem(0)


def _dkv(call: _Call, inputs: tuple[Array, ...], extra: dict[str, Array], wanted: tuple[str, ...]) -> list[Array]:
    """Give dk or dv or both."""
    (q, k, v, *_), config = inputs, call.config
    dim, value_dim, dtype = q.shape[3], v.shape[3], q.dtype
    together = heads_together(call.length, call.kv_heads, call.kv_heads, call.group * (dim + value_dim))
    order = TileOrder(call.batch, call.kv_heads, pl.cdiv(call.keys, config.block), together, late_first=False)
    stage, segments = functools.partial(plgpu.Barrier, num_barriers=config.dkv_stages), "q_segments" in extra
    scratch = {
        "k": mosaic.matrix((config.warpgroups, ROWS, dim), dtype),
        "v": mosaic.matrix((config.warpgroups, ROWS, value_dim), dtype),
        "q": mosaic.matrix((config.dkv_stages, config.dkv_block, dim), dtype),
        "do": mosaic.matrix((config.dkv_stages, config.dkv_block, value_dim), dtype),
        "shift": plgpu.SMEM((config.dkv_stages, config.dkv_block), jnp.float32),
        "delta": plgpu.SMEM((config.dkv_stages, config.dkv_block), jnp.float32),
        "rows_full": plgpu.Barrier(num_arrivals=2, num_barriers=config.warpgroups),
        "full": stage(num_arrivals=5 if segments else 4),
        "free": stage(num_arrivals=config.warpgroups),
    }
    if segments:
        scratch["ids"] = plgpu.SMEM((config.dkv_stages, config.dkv_block), jnp.int32)
    shapes = {"dk": k.shape, "dv": v.shape}
    out = [jax.ShapeDtypeStruct(shapes[name], dtype) for name in wanted]
    kernel, name = functools.partial(_dkv_kernel, wanted=wanted, call=call), "flash_attention_" + "".join(wanted)
    return launch(kernel, name, order, config.warpgroups, scratch, inputs, extra, out)


def _dkv_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    do_ref: Any,
    shift_ref: Any,
    delta_ref: Any,
    *refs: Any,
    names: tuple[str, ...],
    wanted: tuple[str, ...],
    call: _Call,
    order: TileOrder,
    **scratch: Any,
) -> None:
    """Work on one tile: a batch row, a key/value head, a block of keys; the query heads of the group one by one."""
    extra, out_refs = dict(zip(names, refs, strict=False)), dict(zip(wanted, refs[len(names) :], strict=True))
    config, options = call.config, call.options
    batch, kv_head, block = order.place(lax.axis_index("tile"))
    warpgroup = lax.axis_index("warpgroup")
    walk = Walk(extra["walks"], batch, block)

    def slot_of(i: Array) -> Array:
        return lax.rem(i, jnp.int32(config.dkv_stages))

    @pl.when(warpgroup == config.warpgroups)
    def _copy() -> None:
        plgpu.set_max_registers(REGISTERS[config.warpgroups][0], action="decrease")

        @pl.loop(0, call.group * walk.steps)
        def _step(i: Array) -> None:
            slot, rows = slot_of(i), pl.ds(walk.block(lax.rem(i, walk.steps)) * config.dkv_block, config.dkv_block)
            head = kv_head * call.group + lax.div(i, walk.steps)
            pl.when(i >= config.dkv_stages)(functools.partial(plgpu.barrier_wait, scratch["free"].at[slot]))
            sources = [
                ("shift", shift_ref.at[batch, head, rows]),
                ("delta", delta_ref.at[batch, head, rows]),
                ("q", q_ref.at[batch, rows, head]),
                ("do", do_ref.at[batch, rows, head]),
            ]
            if "q_segments" in extra:
                sources.append(("ids", extra["q_segments"].at[batch, rows]))
            for name, ref in sources:
                plgpu.copy_gmem_to_smem(ref, scratch[name].at[slot], scratch["full"].at[slot])

        drain([scratch["free"]], call.group * walk.steps, config.dkv_stages)

    @pl.when(warpgroup < config.warpgroups)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS[config.warpgroups][1], action="increase")
        start = block * config.block + warpgroup * ROWS
        mine = (batch, pl.ds(start, ROWS), kv_head)
        k, v, full = (scratch[name].at[warpgroup] for name in ("k", "v", "rows_full"))
        plgpu.copy_gmem_to_smem(k_ref.at[mine], k, full)
        plgpu.copy_gmem_to_smem(v_ref.at[mine], v, full)
        mask = call.mask(start, batch, extra, transposed=True)
        plgpu.barrier_wait(full)

        def step(i: Array, sums: tuple[Array, ...], masked: bool = False, before: Array | int = 0) -> tuple[Array, ...]:
            slot = slot_of(before + i)
            q, do = scratch["q"].at[slot], scratch["do"].at[slot]

            def score(s_acc: Any) -> None:
                mosaic.wgmma(s_acc, k, q.transpose((1, 0)))

            def hide(s: Array) -> Array:
                ids_ref = scratch["ids"].at[slot] if mask.segments else None
                return mask(s, walk.block(i) * config.dkv_block, ids_ref, transposed=True) if masked else s

            def multiply(dp_acc: Any) -> None:
                if "dk" in wanted:
                    mosaic.wgmma(dp_acc, v, do.transpose((1, 0)))

            def add(p: Array, ds: Array, *accs: Any) -> tuple[Array, ...]:
                left = {"dk": ds.astype(q_ref.dtype), "dv": p.astype(q_ref.dtype)}
                for name, acc in zip(wanted, accs, strict=True):
                    mosaic.wgmma(acc, left[name], {"dk": q, "dv": do}[name])
                sums_next = tuple(mosaic.read(acc) for acc in accs)
                plgpu.barrier_arrive(scratch["free"].at[slot])
                return sums_next

            plgpu.barrier_wait(scratch["full"].at[slot])
            tile = (ROWS, config.dkv_block)
            shift, delta = (
                lax.broadcast_in_dim(plgpu.load(scratch[name].at[slot], layout=LAYOUT.reduce(0)), tile, [1])
                for name in ("shift", "delta")
            )
            apart = masked or "dk" not in wanted  # a mask wants the registers that products in flight hold
            return _gradients(score, hide, multiply, add, (shift, delta), sums, options, apart)

        def of_head(g: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            return _take(walk, options.causal or mask.segments, functools.partial(step, before=g * walk.steps), sums)

        dims = {"dk": k_ref.shape[3], "dv": v_ref.shape[3]}
        zeros = tuple(plgpu.layout_cast(jnp.zeros((ROWS, dims[name]), jnp.float32), LAYOUT) for name in wanted)
        sums = lax.fori_loop(0, call.group, of_head, zeros) if call.group > 1 else of_head(jnp.int32(0), zeros)
        for name, total in zip(wanted, sums, strict=True):
            out, factor = {"dk": (k, options.scale), "dv": (v, 1.0)}[name]
            out[...] = (total * factor).astype(k_ref.dtype)
        plgpu.commit_smem()
        for name in wanted:
            plgpu.copy_smem_to_gmem({"dk": k, "dv": v}[name], out_refs[name].at[mine])
        plgpu.wait_smem_to_gmem(0)


def _take(walk: Walk, needs_mask: bool, step: Callable[..., Any], carry: Any) -> Any:
    """Take the steps of a walk: those with a mask, then those without."""
    if needs_mask:
        carry = lax.fori_loop(0, walk.masked, functools.partial(step, masked=True), carry)
    return lax.fori_loop(walk.masked if needs_mask else 0, walk.steps, step, carry)


def _gradients(
    score: Callable[[Any], None],
    hide: Callable[[Array], Array],
    multiply: Callable[[Any], None],
    add: Callable[..., Any],
    starts: tuple[Array, Array],
    sums: tuple[Array, ...],
    options: Options,
    apart: bool,
) -> Any:
    """Take a tile's step: probabilities from scores, the scores' gradient from do v, and what they `add` to the sums.

    Both products begin at `starts`, minus lse and minus delta, which costs no registers. Exponentials run while do v
    is under way or, `apart`, before it.
    """
    shift, minus_delta = starts
    capped = options.softcap is not None
    s_start = jnp.zeros_like(shift) if capped else shift

    def exponentiate(s: Array) -> tuple[Array, Array]:
        t = hide(options.cap(s))
        return t, jnp.exp2((t + shift if capped else t) * options.factor)

    def finish(t: Array, p: Array, dp: Array, *accs: Any) -> Any:
        ds = p * dp
        if capped:
            t = jnp.maximum(t, -1.0)  # hidden scores are -inf, their p is 0
            ds = ds * (1.0 - t * t)
        return add(p, ds, *accs)

    def together(s_acc: Any, dp_acc: Any, *accs: Any) -> Any:
        score(s_acc)
        multiply(dp_acc)
        t, p = exponentiate(mosaic.read(s_acc, in_flight=1))
        return finish(t, p, mosaic.read(dp_acc), *accs)

    def scores_alone(s_acc: Any) -> tuple[Array, Array]:
        score(s_acc)
        return exponentiate(mosaic.read(s_acc))

    if not apart:
        return mosaic.with_accumulators(together, s_start, minus_delta, *sums)
    t, p = mosaic.with_accumulators(scores_alone, s_start)

    def the_rest(dp_acc: Any, *accs: Any) -> Any:
        multiply(dp_acc)
        return finish(t, p, mosaic.read(dp_acc), *accs)

    return mosaic.with_accumulators(the_rest, minus_delta, *sums)
