"""How does Hopper read from a fading sum of keys and values? Lightning attention, forward and backward (2501.08313).

A block takes one span of tokens of one 128-column group (one head of 128, two of 64), 64 tokens at a time: its state
stays in registers, float32, and in bfloat16 in shared memory as an operand. Two warpgroups hold 64 columns of the
values each and share the loads; a third fetches. Every gradient is the same pass over other inputs:

    o = attend(q, k, v)    dq = attend(do, v, k)    dv = attend reversed(k, q, do)    dk = attend reversed(v, do, q)

Roofline of H=128: 8 bytes per token and column against 112 FLOPs per byte: bound by memory, the tensor cores busy two
thirds of that time. Few heads fill the chip by several spans per row: then a first pass (4 bytes) sums each span's
keys and values alone, XLA chains these sums, and the second pass starts every span from its own.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.target import INSTEAD, Declined, target
from pallas_kernels.tuning import bucket, tuned

Array = jax.Array

CHUNK = 64
"""Tokens taken at once: an m64 tile of wgmma."""
COLUMNS = 64
"""Columns of the values that one warpgroup holds: a state of 128 x 64 in float32 is 64 of its 232 registers."""


@dataclass(frozen=True)
class Config:
    """How a row is cut."""

    span: int
    """chunks that one block takes, one after the other; a row of more is several spans, chained between two passes"""
    stages: int = 3
    """chunks on their way from memory at a time"""

    @classmethod
    def of(cls, batch: int, length: int, groups: int) -> "Config":
        """Take as many spans as fill the chip's last wave of blocks best; a second pass costs half of the first."""
        chunks = -(-length // CHUNK)

        def cost(spans: int) -> float:
            blocks = batch * groups * spans
            waste = -(-blocks // mosaic.NUM_SMS) * mosaic.NUM_SMS / blocks
            return waste * (1.0 if spans == 1 else 1.5 + 0.01 * spans)

        return cls(-(-chunks // min(range(1, min(chunks, 64) + 1), key=cost)))


def lightning_attention(
    q_BTNH: Array,
    k_BTNH: Array,
    v_BTNU: Array,
    decay_N: Array,
    state_BNHU: Array,
    document_BT: Array | None = None,
    config: Config | None = None,
) -> tuple[Array, Array]:
    """Give o_t = q_t S_t with S_t = exp(decay) S_{t-1} + k_t^T v_t, and the last state, in float32.

    Where `document` (ascending) changes, the state starts from zero; the first state is the first token's document's.
    Raises Declined for what is not bfloat16 or has head dims other than 64 and 128.
    """
    run = _Row.of("lightning_attention", q_BTNH, k_BTNH, v_BTNU, decay_N, document_BT, config)
    sums = run.sums(k_BTNH, v_BTNU)
    return run.attend(q_BTNH, k_BTNH, v_BTNU, state_BNHU, sums)


def lightning_attention_bwd(
    q_BTNH: Array,
    k_BTNH: Array,
    v_BTNU: Array,
    decay_N: Array,
    state_BNHU: Array,
    document_BT: Array | None,
    do_BTNU: Array,
    dstate_BNHU: Array,
    config: Config | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Give dq, dk, dv and the gradient of the first state. Raises Declined as the forward pass does."""
    q, k, v, do = q_BTNH, k_BTNH, v_BTNU, do_BTNU.astype(q_BTNH.dtype)
    forth = _Row.of("lightning_attention_bwd", q, k, v, decay_N, document_BT, config)
    dq, _ = forth.attend(do, v, k, _turned(state_BNHU), forth.sums(v, k))
    back = replace(forth, call=replace(forth.call, reverse=True))
    sums = back.sums(q, do)
    dv, dstate = back.attend(k, q, do, dstate_BNHU, sums)
    dk, _ = back.attend(v, do, q, _turned(dstate_BNHU), None if sums is None else _turned(sums))
    return dq, dk, dv, dstate


def _turned(state_HU: Array) -> Array:
    return state_HU.swapaxes(-1, -2)


@dataclass(frozen=True)
class _Row:
    """A row of tokens and how its passes are run."""

    call: "_Pass"
    decay_N: Array
    document_BT: Array | None

    @classmethod
    def of(
        cls, op: str, q: Array, k: Array, v: Array, decay_N: Array, document_BT: Array | None, config: Config | None
    ) -> "_Row":
        """Check what is to be attended to; raise Declined or ValueError."""
        batch, length, heads, dim = q.shape
        if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
            raise Declined(f"lightning attention: dtypes {q.dtype}, {k.dtype}, {v.dtype} must be bfloat16; {INSTEAD}")
        if dim not in (64, 128) or v.shape[-1] != dim:
            raise Declined(f"lightning attention: head dims {dim}, {v.shape[-1]} must be equal, 64 or 128; {INSTEAD}")
        if not q.shape == k.shape == v.shape:
            raise ValueError(f"lightning attention: q {q.shape}, k {k.shape} and v {v.shape} must agree")
        consumers = 1 if dim == 64 and heads % 2 else 2
        default = Config.of(batch, length, heads * dim // (consumers * COLUMNS))
        config = config or tuned(op, target().kind, bucket(q), default)
        call = _Pass(dim, length, False, config.span, config.stages, consumers, True, document_BT is not None)
        return cls(call, decay_N.astype(jnp.float32), document_BT)

    def sums(self, k: Array, v: Array) -> Array | None:
        """Sum each span's faded keys and values: the first pass of two, [B, spans, N, H, U]; None where one will do."""
        if self.call.num_spans == 1:
            return None
        batch, _, heads, dim = k.shape
        zeros = jnp.zeros((batch, self.call.num_spans, heads, dim, dim), jnp.float32)
        return self._launch(replace(self.call, attend=False), {"k": k, "v": v, "start": zeros})[1]

    def attend(self, q: Array, k: Array, v: Array, state: Array, sums: Array | None) -> tuple[Array, Array]:
        """Read the outputs off the states; give them and the last state."""
        state, call = state.astype(jnp.float32), self.call
        if sums is None:
            start = state[:, None]
        else:
            start = _chain(sums, state, self.decay_N, self.document_BT, call.length, call.span * CHUNK, call.reverse)
        o, end = self._launch(call, {"q": q, "k": k, "v": v, "start": start})
        assert o is not None
        return o[:, : call.length].reshape(q.shape), end[:, 0 if call.reverse else -1]

    def _launch(self, call: "_Pass", inputs: dict[str, Array]) -> tuple[Array | None, Array]:
        """Bring the inputs into the form that the copy engine wants: all heads' columns in one dim, whole 16 bytes."""
        rows = ((0, 0), (0, -call.length % 8), (0, 0))  # whole tiles of 8 tokens
        inputs = {name: jnp.pad(x.reshape(*x.shape[:2], -1), rows) if x.ndim == 4 else x for name, x in inputs.items()}
        inputs["decay"] = self.decay_N * mosaic.LOG2E
        if self.document_BT is not None:
            reach_BT = _reach(self.document_BT, call.reverse)
            inputs["reach"] = jnp.pad(reach_BT, ((0, 0), (0, -call.length % CHUNK)))
        return _launch(call, inputs)


def _reach(document_BT: Array, reverse: bool) -> Array:
    """Give the first token that each token sees, -1 for "all, and the row's first state"; reversed, minus the last."""
    if reverse:
        return _reach(document_BT[:, ::-1], False)[:, ::-1] - (document_BT.shape[1] - 1)
    tokens = jnp.arange(document_BT.shape[1], dtype=jnp.int32)[1:]
    starts_BT = jnp.where(document_BT[:, 1:] != document_BT[:, :-1], tokens, -1)
    return lax.cummax(jnp.pad(starts_BT, ((0, 0), (1, 0)), constant_values=-1), axis=1)


def _chain(
    sums_BXNHU: Array,
    state_BNHU: Array,
    decay_N: Array,
    document_BT: Array | None,
    length: int,
    span: int,
    reverse: bool,
) -> Array:
    """Give the state that every span starts from, by the sums of those before it (behind it, reversed)."""
    num_spans = sums_BXNHU.shape[1]
    order = np.arange(num_spans)[:: -1 if reverse else 1]
    ends = np.cumsum(np.minimum(span, length - order * span))  # tokens taken up to the end of each span, in order
    begins = np.concatenate([[0], ends[:-1]])
    earlier = order[:, None] * (-1 if reverse else 1) > order * (-1 if reverse else 1)
    distance = np.where(earlier, begins[:, None] - ends, 0)
    keep_NXY = jnp.where(earlier, jnp.exp(decay_N[:, None, None] * distance), 0)
    first_NX = jnp.exp(decay_N[:, None] * begins)
    keep_BNXY, first_BNX = keep_NXY[None], first_NX[None]
    if document_BT is not None:
        last_token = order * span if reverse else np.minimum((order + 1) * span, length) - 1
        last_BX = document_BT[:, last_token]
        own_B1 = document_BT[:, -1:] if reverse else document_BT[:, :1]
        before_BX = jnp.concatenate([own_B1, last_BX[:, :-1]], axis=1)
        keep_BNXY = jnp.where((before_BX[:, :, None] == last_BX[:, None])[:, None], keep_BNXY, 0)
        first_BNX = jnp.where((before_BX == own_B1)[:, None], first_BNX, 0)
    keep_BNXY, first_BNX = (jnp.broadcast_to(x, (sums_BXNHU.shape[0], *x.shape[1:])) for x in (keep_BNXY, first_BNX))
    sums = sums_BXNHU[:, order]
    chained = jnp.einsum("bnxy,bynhu->bxnhu", keep_BNXY, sums, precision=lax.Precision.HIGHEST)
    chained += jnp.moveaxis(first_BNX, 1, 2)[..., None, None] * state_BNHU[:, None]
    return chained[:, order]


@dataclass(frozen=True)
class _Pass:
    """One pass over a row, as the blocks see it."""

    dim: int
    length: int
    reverse: bool
    span: int
    stages: int
    consumers: int
    """warpgroups that compute"""
    attend: bool
    """whether there are queries, or keys and values are summed alone"""
    documents: bool

    @property
    def num_spans(self) -> int:
        """Blocks that share a row."""
        return -(-self.length // (self.span * CHUNK))

    @property
    def loaded(self) -> int:
        """Columns of q, k and v that a block loads: one head of 128, or a head of 64 for each warpgroup."""
        return self.dim if self.dim == 128 else self.consumers * COLUMNS

    @property
    def shares_own(self) -> bool:
        """Whether the powers of decay inside a chunk lie in shared memory: beside a state of 128 they would spill."""
        return self.attend and self.dim == 128

    @property
    def fetched(self) -> tuple[str, ...]:
        """Name what comes with every chunk."""
        return ("q",) * self.attend + ("k", "v") + ("reach",) * self.documents

    @property
    def arguments(self) -> tuple[str, ...]:
        """Name a block's inputs and outputs, in order."""
        return self.fetched + ("decay", "start") + ("o",) * self.attend + ("end",)

    def scratch(self, dtype: Any) -> dict[str, Any]:
        """Give a block's shared memory: slots for chunks on their way, and each warpgroup's operands."""
        own = {"faded": CHUNK} | ({"state": self.dim, "out": CHUNK} if self.attend else {})
        slots = mosaic.matrix((self.stages, CHUNK, self.loaded), dtype)
        scratch = {name: mosaic.matrix((self.consumers, rows, COLUMNS), dtype) for name, rows in own.items()}
        scratch |= {name: slots for name in self.fetched if name != "reach"}
        if self.documents:
            scratch["reach"] = plgpu.SMEM((self.stages, CHUNK), jnp.int32)
        if self.shares_own:
            scratch |= {"own": mosaic.matrix((CHUNK, CHUNK), jnp.float32), "own_written": plgpu.Barrier()}
        scratch["full"] = plgpu.Barrier(num_arrivals=len(self.fetched), num_barriers=self.stages)
        scratch["empty"] = plgpu.Barrier(num_arrivals=self.consumers, num_barriers=self.stages)
        return scratch


def _launch(call: _Pass, inputs: dict[str, Array]) -> tuple[Array | None, Array]:
    """Run every span from its state; give the outputs (None without queries) and the states after the spans."""
    v, start = inputs["v"], inputs["start"]
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in ([v, start] if call.attend else [start])]
    out = mosaic.kernel(
        functools.partial(_block, call),
        out_type=outs,
        grid=(v.shape[-1] // call.loaded, start.shape[1], start.shape[0]),
        grid_names=("group", "span", "batch"),
        num_threads=call.consumers + 1,
        thread_name="wg",
        kernel_name="lightning_attention" if call.attend else "lightning_states",
        scratch_types=[call.scratch(v.dtype)],
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*(inputs[name] for name in call.arguments if name in inputs))
    return (out[0], out[1]) if call.attend else (None, out[0])


def _block(call: _Pass, *refs: Any) -> None:
    """Take one span of one group of columns: the last warpgroup fetches, the others compute."""
    gmem, smem = dict(zip(call.arguments, refs[:-1], strict=True)), refs[-1]
    group, span, batch, wg = (lax.axis_index(name) for name in ("group", "span", "batch", "wg"))
    steps = jnp.minimum(call.span, -(-call.length // CHUNK) - span * call.span)

    def begin(step: Array) -> Array:
        """Give the first token of the chunk taken at a step."""
        return (span * call.span + (steps - 1 - step if call.reverse else step)) * CHUNK

    @pl.when(wg == call.consumers)
    def _fetch() -> None:
        if call.consumers == 2:
            plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, steps)
        def _step(step: Array) -> None:
            slot = lax.rem(step, jnp.int32(call.stages))
            pl.when(step >= call.stages)(lambda: plgpu.barrier_wait(smem["empty"].at[slot]))
            tokens, columns = pl.ds(begin(step), CHUNK), pl.ds(group * call.loaded, call.loaded)
            for name in call.fetched:
                where = (batch, tokens) if name == "reach" else (batch, tokens, columns)
                plgpu.copy_gmem_to_smem(gmem[name].at[where], smem[name].at[slot], smem["full"].at[slot])

    @pl.when(wg < call.consumers)
    def _compute() -> None:
        if call.consumers == 2:
            plgpu.set_max_registers(232, action="increase")
        _compute_span(call, gmem, smem, steps, begin)


def _compute_span(call: _Pass, gmem: Any, smem: Any, steps: Array, begin: Any) -> None:
    """Fold the span's chunks into the state of this warpgroup's columns, and read the outputs off it."""
    group, span, batch, wg = (lax.axis_index(name) for name in ("group", "span", "batch", "wg"))
    dtype = smem["k"].dtype
    mine = pl.ds(wg * COLUMNS, COLUMNS)
    if call.dim == 128:
        head, held, keys = group, mine, pl.ds(0, call.dim)
    else:
        head, held, keys = group * call.consumers + wg, pl.ds(0, COLUMNS), mine
    decay = gmem["decay"][head]  # log2 of what is kept per token
    layout = plgpu.Layout.WGMMA
    rows, columns = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, COLUMNS), i, layout=layout) for i in (0, 1))
    behind = columns - rows if call.reverse else rows - columns
    own = jnp.where(behind >= 0, jnp.exp2(decay * jnp.maximum(behind, 0).astype(jnp.float32)), 0.0)
    if call.shares_own:

        @pl.when(wg == 0)
        def _write() -> None:
            smem["own"][...] = own
            plgpu.barrier_arrive(smem["own_written"])

        plgpu.barrier_wait(smem["own_written"])
    row = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=layout.reduce(1))
    where = (batch, span, head, slice(None), held)
    state = plgpu.load(gmem["start"].at[where], layout=layout, optimized=False)
    # Through an accumulator, as each step's: inside shard_map only what was loaded varies over the mesh.
    state = mosaic.with_accumulators(mosaic.read, state)

    def step_of(step: Array, state: Array) -> Array:
        slot = lax.rem(step, jnp.int32(call.stages))
        count = jnp.minimum(CHUNK, call.length - begin(step))
        entered, left = row + 1, jnp.maximum(count - 1 - row, 0)
        past_distance, end_distance = (left, entered) if call.reverse else (entered, left)
        plgpu.barrier_wait(smem["full"].at[slot])
        k, v = smem["k"].at[slot, :, keys], smem["v"].at[slot, :, mine]
        past, until_end = (jnp.exp2(decay * x.astype(jnp.float32)) for x in (past_distance, end_distance))
        kept = jnp.exp2(decay * count.astype(jnp.float32))
        sign = -1 if call.reverse else 1
        reach = None
        if call.documents:  # places count along the pass: from the row's end they are negative
            ids = smem["reach"].at[slot]
            first, last = (1 - begin(step) - count, 0) if call.reverse else (begin(step), count - 1)
            reach, reach_last = plgpu.load(ids, layout=layout.reduce(1), optimized=False), ids[last]
            past = jnp.where(reach < first, past, 0.0)
            until_end = jnp.where(begin(step) * sign + row * sign >= reach_last, until_end, 0.0)
            kept = jnp.where(reach_last < first, kept, 0.0)

        def add(state_acc: Any, scores_acc: Any = None, o_acc: Any = None) -> Any:
            if call.attend:
                q = smem["q"].at[slot, :, keys]
                mosaic.wgmma(scores_acc, q, k.transpose((1, 0)))
                mosaic.wgmma(o_acc, q, smem["state"].at[wg])
            faded = plgpu.load(v, layout=layout, optimized=False).astype(jnp.float32) * lax.broadcast_in_dim(
                until_end, behind.shape, [0]
            )
            smem["faded"].at[wg][...] = faded.astype(dtype)
            plgpu.commit_smem()
            mosaic.wgmma(state_acc, k.transpose((1, 0)), smem["faded"].at[wg])
            if not call.attend:
                return mosaic.read(state_acc)
            fading = plgpu.load(smem["own"], layout=layout, optimized=False) if call.shares_own else own
            scores = mosaic.read(scores_acc, 2) * fading
            if reach is not None:
                edge = lax.broadcast_in_dim(reach * sign - begin(step), behind.shape, [0])
                scores = jnp.where(columns <= edge if call.reverse else columns >= edge, scores, 0.0)
            scores = scores.astype(dtype)
            o_acc[...] = mosaic.read(o_acc, 1) * lax.broadcast_in_dim(past, behind.shape, [0])
            mosaic.wgmma(o_acc, scores, v)
            return mosaic.read(state_acc), mosaic.read(o_acc)

        shapes = ((CHUNK, CHUNK), (CHUNK, COLUMNS)) if call.attend else ()
        out = mosaic.with_accumulators(add, state * kept, *shapes)
        pl.when(step + call.stages < steps)(lambda: plgpu.barrier_arrive(smem["empty"].at[slot]))
        if not call.attend:
            return out
        state, o = out
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem["out"].at[wg][...] = o.astype(dtype)
        smem["state"].at[wg][...] = state.astype(dtype)
        plgpu.commit_smem()
        target = pl.ds(group * call.loaded + wg * COLUMNS, COLUMNS)
        plgpu.copy_smem_to_gmem(smem["out"].at[wg], gmem["o"].at[batch, pl.ds(begin(step), CHUNK), target])
        return state

    if call.attend:
        smem["state"].at[wg][...] = state.astype(dtype)
        plgpu.commit_smem()
    state = lax.fori_loop(0, steps, step_of, state)
    gmem["end"].at[where][...] = state
    if call.attend:
        plgpu.wait_smem_to_gmem(0)
