"""What is the gradient of the experts' weights? x^T @ dy over each expert's run of rows, one accumulator for each tile.

The contracted dim is ragged. Its windows of 64 rows begin at a multiple of 8 (see grouped_tiles: both operands are
copied tiled), so the first and the last window of a run may hold rows of neighbours, NaN among them: the computing
warpgroups overwrite those with zeros in shared memory, in both operands, before they multiply. All other windows
go from the copy engine to the tensor cores untouched.

Roofline: 2 R D F FLOPs; every expert's gradient is written once, 2 E D F bytes, zeros where it has no rows.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.group_tiles import group_ends
from pallas_kernels.grouped_tiles import (
    WIDTH,
    Config,
    Ring,
    cheapest_config,
    check_groups,
    cluster_of,
    for_my_tiles,
    place_of,
    ring_barriers,
)
from pallas_kernels.mosaic import matrix
from pallas_kernels.target import INSTEAD, Declined, target
from pallas_kernels.tuning import bucket, tuned

Array = jax.Array

ALIGN = 8
"""Rows of a swizzled tile: a copy begins at a multiple of it."""


def grouped_matmul_dw(x_RD: Array, dy_RF: Array, group_sizes_E: Array, *, config: Config | None = None) -> Array:
    """Give dw_EDF = x^T @ dy over each expert's run of rows, summed in float32; zeros for an expert without rows.

    Nothing leaks from rows of other runs or after the last. x and dy are copied when R is no multiple of 8.
    Raises Declined.
    """
    if x_RD.dtype != jnp.bfloat16 or dy_RF.dtype != jnp.bfloat16:
        raise Declined(
            f"dtypes ({x_RD.dtype}, {dy_RF.dtype}) must be bfloat16: wgmma rounds float32 to tf32; {INSTEAD}"
        )
    (num_rows, depth), (dy_rows, width) = x_RD.shape, dy_RF.shape
    if dy_rows != num_rows or depth % WIDTH or width % WIDTH:
        raise Declined(
            f"x ({x_RD.shape}) and dy ({dy_RF.shape}) must have equal rows and columns that are multiples of {WIDTH}; "
            f"{INSTEAD}"
        )
    check_groups(x_RD, group_sizes_E, group_sizes_E.shape[0])
    if more := -num_rows % ALIGN:
        x_RD, dy_RF = (jnp.pad(a, ((0, more), (0, 0))) for a in (x_RD, dy_RF))
    operands = bucket(x_RD, dy_RF, group_sizes_E)
    config = config or tuned("grouped_matmul_dw", target().kind, operands, cheapest_config(width))
    check_cut(config)
    num_experts = group_sizes_E.shape[0]
    config = config.for_tiles(
        num_experts * pl.cdiv(depth, config.rows) * pl.cdiv(width, config.columns * config.cluster)
    )
    end_E = group_ends(group_sizes_E, num_rows)
    bounds_E2 = jnp.stack([jnp.concatenate([jnp.zeros((1,), jnp.int32), end_E[:-1]]), end_E], axis=1)
    kernel = mosaic.kernel(
        _Kernel(num_experts, depth, width, config),
        out_type=jax.ShapeDtypeStruct((num_experts, depth, width), jnp.bfloat16),
        scratch_types=[
            *ring_barriers(config, copies=2),
            matrix((config.stages, WIDTH, config.rows), jnp.bfloat16),
            matrix((config.stages, WIDTH, config.columns), jnp.bfloat16),
            matrix((config.warpgroups, 2, WIDTH, WIDTH), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=config.warpgroups),
        ],
        grid=(config.num_sms // config.cluster,),
        grid_names=("block",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **cluster_of(config),
    )
    return kernel(bounds_E2, x_RD, dy_RF)


def check_cut(config: Config) -> None:
    """Raise Declined for a cut that the kernel cannot make."""
    stage = 2 * WIDTH * (config.warpgroups * WIDTH + config.columns)
    config.check(config.stages * stage + config.warpgroups * 2 * 2 * WIDTH * WIDTH)
    if config.rows % WIDTH:
        raise Declined(f"Config.rows ({config.rows}) must be 64 or 128 here: rows of dw")


class _Tile(NamedTuple):
    expert: Array
    depth: Array
    """first row of dw"""
    column: Array
    begin: Array
    """first row of x that belongs to the expert"""
    end: Array
    window: Array
    """first row of the first window"""
    steps: Array


class _Kernel:
    """The kernel's text, for one static shape."""

    def __init__(self, num_experts: int, depth: int, width: int, config: Config) -> None:
        self.num_experts, self.depth, self.config = num_experts, depth, config
        self.rows = pl.cdiv(depth, config.rows)
        self.columns = pl.cdiv(width, config.columns * config.cluster)
        self.__name__ = "grouped_matmul_dw"

    def __call__(
        self,
        bounds_E2: Any,
        x_RD: Any,
        dy_RF: Any,
        dw_EDF: Any,
        ready: Any,
        free: Any,
        x_memory: Any,
        dy_memory: Any,
        staging: Any,
        cleared: Any,
    ) -> None:
        """Copy in the last warpgroup, compute in the others."""
        config, ring = self.config, Ring(self.config.stages, ready, free)
        warpgroup = lax.axis_index("warpgroup")
        num_tiles = self.num_experts * self.rows * self.columns
        locate = partial(self.locate, bounds_E2=bounds_E2)

        @pl.when(warpgroup == config.warpgroups)
        def _copy() -> None:
            if config.warpgroups > 1:
                plgpu.set_max_registers(40, action="decrease")
            sharing = None if config.cluster == 1 else "half"

            def fill(tile: _Tile, step: Array) -> Array:
                def copy(k: Array, step: Array) -> Array:
                    slot = ring.acquire(step)
                    rows = pl.ds(pl.multiple_of(tile.window + k * WIDTH, ALIGN), WIDTH)
                    arrived = ring.ready.at[slot]
                    x, dy = (
                        x_RD.at[rows, pl.ds(tile.depth, config.rows)],
                        dy_RF.at[rows, pl.ds(tile.column, config.columns)],
                    )
                    plgpu.copy_gmem_to_smem(x, x_memory.at[slot], arrived, collective_axes=sharing)
                    plgpu.copy_gmem_to_smem(dy, dy_memory.at[slot], arrived)
                    return step + 1

                return lax.fori_loop(0, tile.steps, copy, step)

            ring.drain(for_my_tiles(num_tiles, config, locate, fill, jnp.int32(0)))

        @pl.when(warpgroup < config.warpgroups)
        def _compute() -> None:
            if config.warpgroups > 1:
                plgpu.set_max_registers(232, action="increase")

            def compute(tile: _Tile, step: Array) -> Array:
                value = self.accumulate(tile, step, warpgroup, ring, x_memory, dy_memory, cleared)
                self.store(tile, value, warpgroup, staging, dw_EDF)
                return step + tile.steps

            for_my_tiles(num_tiles, config, locate, compute, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    def locate(self, index: Array, bounds_E2: Any) -> _Tile:
        """Give the index-th tile of dw and its rows of x and dy."""
        expert = lax.div(index, jnp.int32(self.rows * self.columns))
        within = index - expert * (self.rows * self.columns)
        row, column = place_of(within, self.rows, self.columns, self.config.band)
        if self.config.cluster > 1:
            column = column * self.config.cluster + lax.axis_index("half")
        begin, end = bounds_E2[expert, 0], bounds_E2[expert, 1]
        window = begin & -ALIGN
        steps = jnp.where(end > begin, lax.div(end - window + (WIDTH - 1), jnp.int32(WIDTH)), 0)
        return _Tile(expert, row * self.config.rows, column * self.config.columns, begin, end, window, steps)

    def accumulate(
        self, tile: _Tile, step: Array, warpgroup: Array, ring: Ring, x_memory: Any, dy_memory: Any, cleared: Any
    ) -> Array:
        """Sum the products of a tile's windows; a slot is released one step late, when its wgmma is done."""
        own = pl.ds(warpgroup * WIDTH, WIDTH) if self.config.warpgroups > 1 else pl.ds(0, WIDTH)

        def scope(acc: Any) -> Array:
            @pl.loop(0, tile.steps)
            def _(k: Array) -> None:
                slot = ring.receive(step + k)
                x, dy = x_memory.at[slot, :, own], dy_memory.at[slot]
                first = tile.window + k * WIDTH

                @pl.when((first < tile.begin) | (first + WIDTH > tile.end))
                def _() -> None:
                    self.clear(x, dy, tile.begin - first, tile.end - first, warpgroup)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(cleared)
                    plgpu.barrier_wait(cleared)

                plgpu.wgmma(acc, x.transpose((1, 0)), dy)
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)
                def _() -> None:
                    ring.release(step + k - 1)

            value = acc[...]

            @pl.when(tile.steps > 0)
            def _() -> None:
                ring.release(step + tile.steps - 1)

            return value

        return pl.run_scoped(scope, plgpu.ACC((WIDTH, self.config.columns), jnp.float32))

    def clear(self, x: Any, dy: Any, begin: Array, end: Array, warpgroup: Array) -> None:
        """Overwrite with zeros the rows that are not in [begin, end): this warpgroup's of x and its share of dy."""
        shape = (WIDTH, WIDTH)
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        belongs = (row >= begin) & (row < end)

        def clear(slab: Any) -> None:
            slab[...] = jnp.where(belongs, slab[...], jnp.zeros(shape, slab.dtype))

        clear(x)
        for i in range(self.config.columns // WIDTH):

            @pl.when(warpgroup == i % self.config.warpgroups)
            def _(i: int = i) -> None:
                clear(dy.at[:, pl.ds(i * WIDTH, WIDTH)])

    def store(self, tile: _Tile, value: Array, warpgroup: Array, staging: Any, dw_EDF: Any) -> None:
        """Round and store this warpgroup's 64 rows of the tile."""
        row = tile.depth + warpgroup * WIDTH
        count = self.config.columns // WIDTH

        @pl.when(row < self.depth)
        def _() -> None:
            for i in range(count):
                slab = staging.at[warpgroup, i % 2]
                # An odd count of slabs comes back to the slab that was stored last.
                plgpu.wait_smem_to_gmem(0 if i == 0 and count % 2 else 1, wait_read_only=True)
                slab[...] = value[:, i * WIDTH : (i + 1) * WIDTH].astype(jnp.bfloat16)
                plgpu.commit_smem()
                column = pl.ds(tile.column + i * WIDTH, WIDTH)
                plgpu.copy_smem_to_gmem(slab, dw_EDF.at[tile.expert, pl.ds(row, WIDTH), column])
