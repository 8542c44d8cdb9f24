"""Which blocks of keys meet a block of queries, in what order? What flash attention's three kernels have in common."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.target import INSTEAD, Declined

Array = jax.Array

ROWS = 64
"""Rows of a warpgroup's products."""
LAYOUT = plgpu.Layout.WGMMA
"""How a warpgroup's registers hold a product: `reduce(1)` holds a value for each row, `reduce(0)` for each column."""
REGISTERS = {2: (24, 240), 3: (32, 160)}
"""A thread's registers, in the warpgroup that copies and in those that compute, by the number of the latter."""
L2_BYTES = 24 * 2**20
"""Keys and values of the heads that are worked on at a time: half of the L2 cache."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static about who sees whom and how scores become probabilities."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float

    @property
    def factor(self) -> float:
        """Give what brings the masked scores to base-2 exponents."""
        return mosaic.LOG2E * (self.scale if self.softcap is None else self.softcap)

    def cap(self, s: Array) -> Array:
        """Bound raw products softly: tanh(s * scale / softcap), still to be multiplied by `factor`."""
        return s if self.softcap is None else mosaic.tanh(s * (self.scale / self.softcap))


def whole_tiles(x: Array) -> Array:
    """Lengthen a sequence [B, T, ...] to a multiple of 8: Mosaic's copies take rows in eights. Mostly it is one."""
    extra = -x.shape[1] % 8
    return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) if extra else x


def check_call(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array | None,
    k_segments: Array | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float | None,
) -> Options:
    """Decline what the kernels, forward and backward, cannot take; give the options."""
    (batch, length, heads, dim), (_, keys, kv_heads, _) = q.shape, k.shape
    value_dim = v.shape[3]
    if k.shape != (batch, keys, kv_heads, dim) or v.shape != (batch, keys, kv_heads, value_dim):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} must be [B, T, N, H], [B, S, K, H], [B, S, K, U]")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        raise Declined(
            f"dtypes of q, k, v ({q.dtype}, {k.dtype}, {v.dtype}) must be one of bfloat16, float16; {INSTEAD}"
        )
    if heads % kv_heads:
        raise ValueError(f"heads ({heads}) must divide by kv_heads ({kv_heads})")
    if not {dim, value_dim} <= {64, 128, 192}:  # 256: the backward spills
        raise Declined(f"head dims ({dim}, {value_dim}) must be multiples of 64 up to 192; pad them or {INSTEAD}")
    if not length or not keys:
        raise Declined(f"queries ({length}) and keys ({keys}) must be at least 1; {INSTEAD}")
    if window is not None and (not causal or window < 1):
        raise Declined(f"window ({window}) must be at least 1 and causal ({causal}); {INSTEAD}")
    if (q_segments is None) != (k_segments is None):
        raise ValueError("q_segments_BT and k_segments_BS must both be given, or neither")
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise Declined(f"scale ({scale}) and softcap ({softcap}) must be above 0; {INSTEAD}")
    return Options(causal, window, softcap, scale)


def check_blocks(config: Any, block: int, row_bytes: int, column_bytes: int) -> None:
    """Decline what registers, tiles or shared memory cannot hold: bytes of a tile's rows, and of each column."""
    if config.warpgroups not in REGISTERS:
        raise Declined(f"warpgroups ({config.warpgroups}) must be one of {tuple(REGISTERS)}; use 2")
    if block % 64 or not 64 <= block <= 256:
        raise Declined(f"blocks ({block}) of {config} must be multiples of 64 up to 256; use 128 or 64")
    need = row_bytes + column_bytes * block + 2048  # barriers, reductions, what alignment leaves free
    if need > mosaic.SMEM_LIMIT:
        raise Declined(f"{config} needs {need} bytes of shared memory (limit {mosaic.SMEM_LIMIT}); use smaller blocks")


def heads_together(keys: int, kv_heads: int, heads: int, dims: int) -> int:
    """Count the query heads whose keys and values stay in the L2 cache together."""
    fit = max(1, L2_BYTES // (2 * keys * dims))
    return max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= max(fit, 1)) * (heads // kv_heads)


@dataclasses.dataclass(frozen=True)
class TileOrder:
    """In which order thread blocks take their tiles: heads that share a cache together, long rows of blocks first."""

    batch: int
    heads: int
    num_blocks: int
    together: int
    late_first: bool = True

    @property
    def size(self) -> int:
        """Count the tiles."""
        return self.batch * self.heads * self.num_blocks

    def place(self, tile: Array) -> tuple[Array, Array, Array]:
        """Give the batch row, head and block of a tile; under causality late queries and early keys have most to do."""
        tile, head = lax.div(tile, jnp.int32(self.together)), lax.rem(tile, jnp.int32(self.together))
        tile, block = lax.div(tile, jnp.int32(self.num_blocks)), lax.rem(tile, jnp.int32(self.num_blocks))
        block = self.num_blocks - 1 - block if self.late_first else block
        groups = jnp.int32(self.heads // self.together)
        return lax.div(tile, groups), lax.rem(tile, groups) * self.together + head, block


def pad_edge(segments: Array, block: int) -> Array:
    """Lengthen segment ids to whole blocks by their last one, which widens no block's range of ids."""
    return jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, -segments.shape[1] % block)), mode="edge")


def block_walks(
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    offset: Array,
    q_segments_BT: Array | None,
    k_segments_BS: Array | None,
    options: Options,
    transposed: bool = False,
) -> Array:
    """Say for each block of queries which key blocks it visits: a `Walk`'s four numbers, int32 [1 or B, blocks, 4].

    Outside of them no pair is visible; at least one is visited. Transposed: for each block of keys the blocks of
    queries, where what lies beyond either end needs no mask.
    """
    (length, keys), (block_q, block_kv) = lengths, blocks
    q0 = jnp.arange(0, length, block_q, dtype=jnp.int32)[:, None]
    k0 = jnp.arange(0, keys, block_kv, dtype=jnp.int32)[None, :]
    q1, k1 = jnp.minimum(q0 + block_q, length) - 1, k0 + block_kv - 1
    some, every = (q0 >= 0) & (k0 >= 0), (q0 >= 0) & ((k1 < keys) | transposed)
    if options.causal:
        some, every = some & (k0 <= offset + q1), every & (k1 <= offset + q0)
    if options.window is not None:
        some, every = some & (offset + q0 - k1 < options.window), every & (offset + q1 - k0 < options.window)
    some, every = some[None], every[None]
    if q_segments_BT is not None and k_segments_BS is not None:
        q_low, q_high = _block_extremes(q_segments_BT, block_q)
        k_low, k_high = _block_extremes(k_segments_BS, block_kv)
        q_low, q_high, k_low, k_high = q_low[:, :, None], q_high[:, :, None], k_low[:, None], k_high[:, None]
        some &= (q_low <= k_high) & (k_low <= q_high)
        every &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    if transposed:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    index, end = jnp.arange(some.shape[2], dtype=jnp.int32), jnp.int32(some.shape[2])
    first = jnp.where(some, index, end).min(2)
    last = jnp.where(some, index + 1, 0).max(2)
    first, last = jnp.where(first < last, first, 0), jnp.maximum(last, 1)
    every &= (index >= first[..., None]) & (index < last[..., None])
    inner_first = jnp.where(every, index, end).min(2)
    inner_last = jnp.where(every | (index < inner_first[..., None]), end, index).min(2)
    inner_last = jnp.where(inner_first == end, first, jnp.minimum(inner_last, last))
    inner = jnp.where(inner_first == end, 0, inner_last - inner_first)
    return jnp.stack([first, last - inner_last, last - first - inner, last - first], axis=2)


class Walk:
    """The blocks that one tile visits, those that need a mask first: the late ones, then from the first one on."""

    def __init__(self, walks_ref: Any, batch: Array, block: Array) -> None:
        row = batch if walks_ref.shape[0] > 1 else 0
        self.first, self.late, self.masked, self.steps = (walks_ref[row, block, i] for i in range(4))

    def block(self, i: Array) -> Array:
        """Name the block of step i."""
        return self.first - self.late + i + jnp.where(i < self.late, self.steps, 0)


def _block_extremes(segments: Array, block: int) -> tuple[Array, Array]:
    """Give the least and the greatest segment id of each block."""
    blocks = pad_edge(segments, block).reshape(segments.shape[0], -1, block)
    return blocks.min(2), blocks.max(2)


class Mask:
    """Which scores of a tile count: its rows are a warpgroup's queries and its columns keys, or transposed.

    One comparison a bound, of a column index that changes with the block: LLVM would keep what does not in registers.
    """

    def __init__(self, options: Options, keys: int, start: Array, offset: Array, ids_ref: Any) -> None:
        """Begin at row `start`; `ids_ref` holds the segments of all rows in global memory, or is None."""
        self.options, self.keys, self.start, self.offset = options, keys, start, offset
        self.segments = ids_ref is not None
        if self.segments:
            self._rows = plgpu.load(ids_ref.at[pl.ds(start, ROWS)], layout=LAYOUT.reduce(1), optimized=False)

    def __call__(self, s: Array, column_start: Array, ids_ref: Any, transposed: bool = False) -> Array:
        """Set to -inf what may not be seen of a tile; `ids_ref` holds its columns' segments in shared memory."""
        options = self.options
        columns = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=LAYOUT)
        ragged = not transposed and self.keys % s.shape[1] != 0
        if options.causal:
            row_index = self.start - self.offset if transposed else self.start + self.offset
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=LAYOUT.reduce(1)) + row_index
            last = jnp.minimum(row, self.keys - 1) if ragged else row
            column = columns + column_start
            seen = column >= along(row, 0, s) if transposed else column <= along(last, 0, s)
            s = jnp.where(seen, s, -jnp.inf)
            if options.window is not None and transposed:
                s = jnp.where(columns + (column_start - options.window) < along(row, 0, s), s, -jnp.inf)
            elif options.window is not None:
                s = jnp.where(columns + (column_start + options.window) > along(row, 0, s), s, -jnp.inf)
        elif ragged:
            s = jnp.where(columns < self.keys - column_start, s, -jnp.inf)
        if self.segments:
            ids = plgpu.load(ids_ref, layout=LAYOUT.reduce(0))
            plgpu.commit_smem()  # before the copy engine may write the next block's ids there
            s = jnp.where(along(self._rows, 0, s) == along(ids, 1, s), s, -jnp.inf)
        return s


def along(vector: Array, dim: int, like: Array) -> Array:
    """Repeat a vector that lies along `dim` to the shape of a tile."""
    return lax.broadcast_in_dim(vector, like.shape, [dim])


def copy_blocks(
    sources: dict[str, list[tuple[str, Any]]], walk: Walk, block: int, stages: int, scratch: dict[str, Any]
) -> None:
    """Copy the blocks of a walk, each into a stage that every warpgroup has left.

    Sources that share a barrier stand together: {barrier: [(name in scratch, rows in global memory)]}.
    """

    @pl.loop(0, walk.steps)
    def _step(i: Array) -> None:
        slot, rows = lax.rem(i, jnp.int32(stages)), pl.ds(walk.block(i) * block, block)
        for barrier, refs in sources.items():
            pl.when(i >= stages)(functools.partial(plgpu.barrier_wait, scratch[f"{barrier}_free"].at[slot]))
            for name, ref in refs:
                plgpu.copy_gmem_to_smem(ref.at[rows], scratch[name].at[slot], scratch[f"{barrier}_full"].at[slot])

    drain([scratch[f"{barrier}_free"] for barrier in sources], walk.steps, stages)


def drain(barriers: list[Any], steps: Array, stages: int) -> None:
    """Wait until the last stages are left."""

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _step(i: Array) -> None:
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[lax.rem(i, jnp.int32(stages))])


def launch(
    kernel: Callable[..., None],
    name: str,
    order: TileOrder,
    warpgroups: int,
    scratch: dict[str, Any],
    inputs: Sequence[Array],
    extra: dict[str, Array],
    out: Any,
) -> Any:
    """Run a kernel on the tiles of an order: `warpgroups` compute, one copies. `extra` reaches it by its names."""
    return mosaic.kernel(
        functools.partial(kernel, names=tuple(extra), order=order),
        out_type=out,
        scratch_types=scratch,
        grid=(order.size,),
        grid_names=("tile",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs, *extra.values())
