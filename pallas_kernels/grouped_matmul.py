"""How do sorted rows meet their experts' weights on Hopper? A persistent grid over tiles of one expert each.

A copying warpgroup fills a ring of slots by TMA, 64 of the contracted dim each; one or two computing warpgroups
multiply 64 rows x 256 columns each by wgmma (128 accumulators a thread) and store what they own: rows of other groups
lie in a ragged tile's slots, but a row of a product depends on its own row alone.

Roofline: 2 R D F FLOPs; 128 x 256 tiles read 48 KiB from L2 for 1024 cycles of tensor cores (40 KiB in clusters of
two that share the rows), so large groups are bound by arithmetic. With few rows per expert the weights are the
bytes, 2 D F for each expert that has rows: 21 bytes a cycle for each SM from HBM, where 64 padded rows x 128 columns
still multiply 64 bytes of weights a cycle. So decode needs no swapped operands (weights as the left side): it copies
the few rows alone (`Config.rows`), and leaves the rest of the 64-row operand unwritten, whatever it holds.

No fused gather of the rows: a Hopper TMA copies boxes, so a gather is 128 copies of 128 bytes where one copy of
16 KiB does it, 128 issues per 1024 cycles for each SM, above the copy engine's rate; cp.async by the copying
warpgroup (8 of 16 bytes a thread) would do it, but Mosaic has cp.async before Hopper alone and plain loads stall it.
The materialised gather costs 4 R D bytes: 20 % of the Qwen3 layer's first product at 4.3 TB/s.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.group_tiles import tile_map
from pallas_kernels.grouped_tiles import (
    WIDTH,
    Config,
    MatrixOfRows,
    Ring,
    any_row_matrix,
    check_groups,
    check_operands,
    cluster_of,
    default_config,
    for_my_tiles,
    place_of,
    ring_barriers,
    store_rows,
)
from pallas_kernels.mosaic import matrix
from pallas_kernels.target import INSTEAD, Declined, target
from pallas_kernels.tuning import bucket, op_name, tuned

Array = jax.Array


def grouped_matmul(
    x_RD: Array, w_EDF: Array, group_sizes_E: Array, *, transpose_w: bool = False, config: Config | None = None
) -> Array:
    """Multiply each expert's run of rows by its weights; rows after the last run give zeros, sizes beyond R are cut.

    transpose_w: the weights are w_EFD, contracted in their last dim (the gradient of x). Raises Declined.
    """
    check_operands(x_RD, [w_EDF], group_sizes_E, 2 if transpose_w else 1)
    op = op_name("grouped_matmul", transpose_w=transpose_w)
    width = w_EDF.shape[1 if transpose_w else 2]
    config = config or tuned_config(op, default_config(x_RD.shape[0], w_EDF.shape[0], width), x_RD, w_EDF)
    return multiply([x_RD], [[w_EDF]], group_sizes_E, StoreProduct(), config, transpose_w=transpose_w)[0]


def tuned_config(op: str, default: Config, x_RD: Array, w_EDF: Array) -> Config:
    """Look up a cut by the rows and the weights that they meet."""
    return tuned(op, target().kind, bucket(x_RD, w_EDF), default)


def grouped_matmul_pair(
    a_RF: Array,
    b_RF: Array,
    wa_EDF: Array,
    wb_EDF: Array,
    group_sizes_E: Array,
    *,
    config: Config | None = None,
) -> Array:
    """Give a @ wa^T + b @ wb^T for each expert's run of rows, in one accumulator: the gradient of a gated layer's x.

    Raises Declined.
    """
    check_operands(a_RF, [wa_EDF, wb_EDF], group_sizes_E, 2)
    if b_RF.shape != a_RF.shape or b_RF.dtype != a_RF.dtype:
        raise Declined(f"b ({b_RF.dtype}{b_RF.shape}) must be like a ({a_RF.dtype}{a_RF.shape}); {INSTEAD}")
    default = default_config(a_RF.shape[0], wa_EDF.shape[0], wa_EDF.shape[1])
    config = config or tuned_config("grouped_matmul_pair", default, a_RF, wa_EDF)
    return multiply([a_RF, b_RF], [[wa_EDF], [wb_EDF]], group_sizes_E, StoreProduct(), config, transpose_w=True)[0]


class Place(NamedTuple):
    """Where a computing warpgroup's part of a tile lies in the result."""

    warpgroup: Array
    first: Array
    """row"""
    num_rows: Array
    """that are its group's own, 0 to 64"""
    column: Array
    of_expert: Array
    """whether the rows have an expert: not those after the last run"""


class Epilogue(Protocol):
    """What becomes of the accumulators of a tile."""

    def outs(self, num_rows: int, width: int) -> Sequence[Any]:
        """Give the results' types."""
        ...

    def memory(self, config: Config) -> Sequence[Any]:
        """Give the types of the shared memory and barriers it works in."""
        ...

    def begin(self, place: Place, width: int, ins: Sequence[Any], scratch: Sequence[Any]) -> None:
        """Start what can be started before the product is known; `width` columns follow place.column."""
        ...

    def finish(
        self, place: Place, values: Sequence[Array], ins: Sequence[Any], outs: Sequence[Any], scratch: Sequence[Any]
    ) -> None:
        """Store the results of a tile whose products are `values`, one for each weight matrix."""
        ...


def slabs(values: Sequence[Array]) -> list[list[Array]]:
    """Cut accumulators into slabs of WIDTH columns, those of the same columns together."""
    return [[v[:, c : c + WIDTH] for v in values] for c in range(0, values[0].shape[1], WIDTH)]


def staging(config: Config, slots: int) -> Any:
    """Give the type of `slots` slabs for each computing warpgroup, to be stored from any row on."""
    return any_row_matrix((config.warpgroups, slots, WIDTH, WIDTH), jnp.bfloat16)


def store_slab(nth: int, count: int, values: Array, staging: Any, out: Any, place: Place, column: int) -> None:
    """Round and store the nth of a tile's `count` slabs, by the one of two that was not stored last."""
    slab = staging.at[place.warpgroup, nth % 2]
    # An odd count of stores comes back to the slab that was stored last.
    plgpu.wait_smem_to_gmem(0 if nth == 0 and count % 2 else 1, wait_read_only=True)
    slab[...] = values.astype(jnp.bfloat16)
    plgpu.commit_smem()
    store_rows(slab, out, place.first, place.num_rows, place.column + column)
    plgpu.commit_smem_to_gmem_group()


class StoreProduct:
    """Store the product."""

    def outs(self, num_rows: int, width: int) -> Sequence[Any]:
        """Give y_RF."""
        return [jax.ShapeDtypeStruct((num_rows, width), jnp.bfloat16)]

    def memory(self, config: Config) -> Sequence[Any]:
        """Give two slabs: one is stored while the other is written."""
        return [staging(config, 2)]

    def begin(self, place: Place, width: int, ins: Sequence[Any], scratch: Sequence[Any]) -> None:
        """Start nothing."""

    def finish(
        self, place: Place, values: Sequence[Array], ins: Sequence[Any], outs: Sequence[Any], scratch: Sequence[Any]
    ) -> None:
        """Round and store."""
        parts = slabs(values)
        for i, (y,) in enumerate(parts):
            store_slab(i, len(parts), y, scratch[0], outs[0], place, i * WIDTH)


def multiply(
    lefts: Sequence[Array],
    rights: Sequence[Sequence[Array]],
    group_sizes_E: Array,
    epilogue: Epilogue,
    config: Config,
    *,
    ins: Sequence[Array] = (),
    transpose_w: bool = False,
) -> tuple[Array, ...]:
    """Run the kernel: for each tile sum lefts[i] @ rights[i][p] over i, and hand the parts p to `epilogue`.

    rights: for each left the same number of parts, alike in shape; ins: what the epilogue reads besides.
    """
    num_rows, depth = lefts[0].shape
    num_experts, parts = rights[0][0].shape[0], len(rights[0])
    width = rights[0][0].shape[1 if transpose_w else 2]
    check_groups(lefts[0], group_sizes_E, num_experts)
    check_cut(config, parts, epilogue)
    wide = config.columns // parts
    x_rows = max(config.rows, WIDTH)
    part = (config.stages, wide, WIDTH) if transpose_w else (config.stages, WIDTH, wide)
    scratch = [MatrixOfRows.memory(config.stages, x_rows, jnp.bfloat16)]
    scratch += [matrix(part, jnp.bfloat16)] * parts
    fixed = epilogue.memory(config)
    shape = _Shape(depth // WIDTH, len(lefts), parts, wide, width, num_experts, transpose_w)
    tiles_T3, count_1 = tile_map(group_sizes_E, num_rows, config.rows)
    config = config.for_tiles(len(tiles_T3) * pl.cdiv(width, wide * config.cluster))
    outs = epilogue.outs(num_rows, width)
    kernel = mosaic.kernel(
        _Kernel(shape, config, epilogue, len(ins), len(outs)),
        out_type=outs,
        scratch_types=[*ring_barriers(config, 1 + parts), *scratch, *fixed],
        grid=(config.num_sms // config.cluster,),
        grid_names=("block",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=False
        ),
        **cluster_of(config),
    )
    return tuple(kernel(tiles_T3, count_1, *lefts, *(w for ws in rights for w in ws), *ins))


def check_cut(config: Config, parts: int, epilogue: Epilogue) -> None:
    """Raise Declined for a cut that the kernel cannot make of `parts` weight matrices side by side."""
    if config.columns % (WIDTH * parts):
        raise Declined(f"Config.columns ({config.columns}) must be a multiple of {WIDTH * parts} for {parts} weights")
    ring = 2 * WIDTH * config.stages * (max(config.rows, WIDTH) + config.columns)
    config.check(ring + sum(map(_smem_bytes, epilogue.memory(config))))


def _smem_bytes(memory: Any) -> int:
    return memory.inner_aval.size * 2 if hasattr(memory, "inner_aval") else 0


class _Shape(NamedTuple):
    steps: int
    """of WIDTH in the contracted dim of one left"""
    lefts: int
    parts: int
    wide: int
    """columns of a part of a tile"""
    width: int
    """columns of the result"""
    experts: int
    transpose_w: bool


class _Tile(NamedTuple):
    expert: Array
    first: Array
    """row"""
    num_rows: Array
    column: Array
    steps: Array
    """of the contracted dim of one left"""


class _Kernel:
    """The kernel's text, for one static shape."""

    def __init__(self, shape: _Shape, config: Config, epilogue: Epilogue, num_ins: int, num_outs: int) -> None:
        self.shape, self.config, self.epilogue = shape, config, epilogue
        self.counts = (shape.lefts, shape.lefts * shape.parts, num_ins, num_outs)
        self.columns = pl.cdiv(shape.width, shape.wide * config.cluster)
        self.__name__ = f"grouped_matmul_{type(epilogue).__name__}"

    def __call__(self, tiles_T3: Any, count_1: Any, *refs: Any) -> None:
        """Copy in the last warpgroup, compute in the others."""
        split, start = [], 0
        for count in self.counts:
            split.append(refs[start : start + count])
            start += count
        lefts, rights, ins, outs = split
        ready, free, x_memory, *scratch = refs[start:]
        w_memory, fixed = scratch[: self.shape.parts], scratch[self.shape.parts :]
        ring, x_memory = Ring(self.config.stages, ready, free), MatrixOfRows(x_memory)
        warpgroup = lax.axis_index("warpgroup")
        num_tiles = count_1[0] * self.columns
        locate = partial(self.locate, tiles_T3=tiles_T3, count_1=count_1)

        @pl.when(warpgroup == self.config.warpgroups)
        def _copy() -> None:
            if self.config.warpgroups > 1:
                plgpu.set_max_registers(40, action="decrease")
            fill = self.filler(lefts, rights, ring, x_memory.any_row, w_memory)
            ring.drain(for_my_tiles(num_tiles, self.config, locate, fill, jnp.int32(0)))

        @pl.when(warpgroup < self.config.warpgroups)
        def _compute() -> None:
            if self.config.warpgroups > 1:
                plgpu.set_max_registers(232, action="increase")

            def compute(tile: _Tile, step: Array) -> Array:
                rows = jnp.clip(tile.num_rows - warpgroup * WIDTH, 0, WIDTH)
                place = Place(warpgroup, tile.first + warpgroup * WIDTH, rows, tile.column, tile.steps > 0)
                own = rows > 0  # the second warpgroup may have no rows: then it only keeps step
                num_steps = self.shape.lefts * tile.steps

                pl.when(own)(lambda: self.epilogue.begin(place, self.shape.wide, ins, fixed))
                values = self.accumulate(place, num_steps, step, ring, x_memory.tiled, w_memory)
                pl.when(own)(lambda: self.epilogue.finish(place, values, ins, outs, fixed))
                return step + num_steps

            for_my_tiles(num_tiles, self.config, locate, compute, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    def locate(self, index: Array, tiles_T3: Any, count_1: Any) -> _Tile:
        """Give the index-th tile; rows after the last run take no steps."""
        row, column = place_of(index, count_1[0], self.columns, self.config.band)
        if self.config.cluster > 1:
            column = column * self.config.cluster + lax.axis_index("half")
        expert, first, num_rows = (tiles_T3[row, i] for i in range(3))
        steps = jnp.where(expert < self.shape.experts, self.shape.steps, 0)
        return _Tile(expert, first, num_rows, column * self.shape.wide, steps)

    def filler(
        self, lefts: Any, rights: Any, ring: Ring, x_memory: Any, w_memory: Any
    ) -> Callable[[_Tile, Array], Array]:
        """Give the loop body that copies one tile's operands into the ring."""
        shape, rows = self.shape, self.config.rows
        sharing = None if self.config.cluster == 1 else "half"

        def fill(tile: _Tile, step: Array) -> Array:
            columns = pl.ds(tile.column, shape.wide)
            for i, x in enumerate(lefts):
                weights = rights[i * shape.parts : (i + 1) * shape.parts]

                def copy(k: Array, step: Array, x: Any = x, weights: Any = weights) -> Array:
                    slot, depth = ring.acquire(step), pl.ds(k * WIDTH, WIDTH)
                    target = x_memory.at[slot] if rows >= WIDTH else x_memory.at[slot, pl.ds(0, rows)]
                    arrived = ring.ready.at[slot]
                    plgpu.copy_gmem_to_smem(
                        x.at[pl.ds(tile.first, rows), depth], target, arrived, collective_axes=sharing
                    )
                    place = (columns, depth) if shape.transpose_w else (depth, columns)
                    for w, memory in zip(weights, w_memory, strict=True):
                        plgpu.copy_gmem_to_smem(w.at[tile.expert, *place], memory.at[slot], arrived)
                    return step + 1

                step = lax.fori_loop(0, tile.steps, copy, step)
            return step

        return fill

    def accumulate(
        self, place: Place, num_steps: Array, step: Array, ring: Ring, x_memory: Any, w_memory: Any
    ) -> Sequence[Array]:
        """Sum the products of a tile's steps; a slot is released one step late, when its wgmma is done."""
        own = pl.ds(place.warpgroup * WIDTH, WIDTH)

        def scope(*accs: Any) -> Sequence[Array]:
            @pl.loop(0, num_steps)
            def _(k: Array) -> None:
                slot = ring.receive(step + k)
                x = x_memory.at[slot, own] if self.config.warpgroups > 1 else x_memory.at[slot]
                for acc, memory in zip(accs, w_memory, strict=True):
                    w = memory.at[slot]
                    plgpu.wgmma(acc, x, w.transpose((1, 0)) if self.shape.transpose_w else w)
                plgpu.wgmma_wait(self.shape.parts)

                @pl.when(k > 0)
                def _() -> None:
                    ring.release(step + k - 1)

            values = [acc[...] for acc in accs]

            @pl.when(num_steps > 0)
            def _() -> None:
                ring.release(step + num_steps - 1)

            return values

        accumulators = [plgpu.ACC((WIDTH, self.shape.wide), jnp.float32)] * self.shape.parts
        return pl.run_scoped(scope, *accumulators)
