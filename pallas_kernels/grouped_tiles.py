"""Which tile of a grouped matmul does a block compute next, and how do a ragged tile's rows reach memory?

Rows are sorted by expert. XLA cuts every expert's run into tiles of `rows` rows that begin where the run begins, so no
row is computed twice; the rows after the last run form one more group, of no expert, whose tiles hold zeros.
The kernels read this map; nothing in them is unrolled over experts.

Two facts of the copy engine decide the layouts. A matrix tiled (8, 64), as wgmma wants it, can only be copied from a
row that is a multiple of 8: the row's place within 8 is a dim of its own, and what crosses it is filled with zeros.
Tiled (1, 64) it can be copied from any row, and one 64 columns wide lies in the same bytes: `MatrixOfRows` gives both
views. And a copy's size is fixed: a ragged tile is stored by a ladder of copies of 32, 16, ... 1 rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import interpreting
from pallas_kernels.mosaic import NUM_SMS, SMEM_LIMIT, tiles
from pallas_kernels.target import INSTEAD, Declined

Array = jax.Array
Tile = TypeVar("Tile")

WIDTH = 64
"""Columns of one swizzled slab (128 bytes of bfloat16), and rows of one warpgroup's wgmma."""


@dataclass(frozen=True)
class Config:
    """How a grouped matmul is cut into tiles and stages."""

    rows: int = 128
    """of a tile; 64 for each computing warpgroup, fewer for decode"""
    columns: int = 256
    """of a tile, over all of its weight matrices (gate and up: half each)"""
    stages: int = 4
    """slots of the ring that the copying warpgroup fills, WIDTH of the contracted dim each"""
    cluster: int = 1
    """neighbouring blocks that take neighbouring columns of the same rows and load these rows once"""
    band: int = 8
    """row tiles whose columns are swept together: what is in flight at once must fit in L2"""
    num_sms: int = NUM_SMS
    """blocks of the persistent grid"""

    @property
    def warpgroups(self) -> int:
        """Count the computing warpgroups."""
        return pl.cdiv(self.rows, WIDTH)

    def for_tiles(self, number: int) -> "Config":
        """Give this cut without the blocks that would find none of `number` tiles (of a cluster)."""
        return replace(self, num_sms=min(self.num_sms, number * self.cluster))

    def check(self, smem_bytes: int) -> None:
        """Raise Declined for a cut that the kernels cannot make."""
        if self.rows not in (8, 16, 32, 64, 128):
            raise Declined(f"Config.rows ({self.rows}) must be 8, 16, 32, 64 or 128")
        if self.columns % WIDTH or self.columns > 256:
            raise Declined(f"Config.columns ({self.columns}) must be a multiple of {WIDTH}, at most 256")
        if self.cluster not in (1, 2) or self.num_sms % self.cluster:
            raise Declined(f"Config.cluster ({self.cluster}) must be 1 or 2 and divide num_sms ({self.num_sms})")
        if self.stages < 2:
            raise Declined(f"Config.stages ({self.stages}) must be at least 2")
        if smem_bytes > SMEM_LIMIT:
            raise Declined(f"{self} needs {smem_bytes} bytes of shared memory (limit {SMEM_LIMIT}): fewer stages")


def default_config(num_rows: int, num_experts: int, width: int, parts: int = 1) -> Config:
    """Choose a cut by shapes: 128 rows where an expert's even share fills more than 64, else as for decode."""
    if num_rows <= 64 * num_experts:
        return decode_config(num_rows, num_experts, width, parts)
    return cheapest_config(width, parts)


def cheapest_config(width: int, parts: int = 1, most: int = 256) -> Config:
    """Choose the 128-row cut of `parts` results `width` columns wide that takes least time on paper, padding counted.

    A step of 64 takes 4 cycles of tensor cores a column, and its bytes at some 45 a cycle from L2 (7 to 5); `most`
    columns at most.
    """

    def cost(choice: tuple[int, int]) -> int:
        columns, cluster = choice
        step = max(7 * columns, 5 * (128 // cluster + columns))
        return pl.cdiv(width * parts, columns * cluster) * cluster * step

    fitting = [c for c in (256, 192, 128, 64) if c <= most and c % (WIDTH * parts) == 0]
    columns, cluster = min(((c, cluster) for c in fitting for cluster in (2, 1)), key=cost)
    return Config(rows=128, columns=columns, stages=most_stages(128, columns), cluster=cluster)


def most_stages(rows: int, columns: int, slabs: int = 2) -> int:
    """Count the stages that fit beside `slabs` staging slabs for each computing warpgroup; twelve are enough."""
    rows = max(rows, WIDTH)
    staging = slabs * rows * WIDTH * 2
    return min(12, (SMEM_LIMIT - 1024 - staging) // (2 * WIDTH * (rows + columns)))


def decode_config(num_rows: int, num_experts: int, width: int, parts: int) -> Config:
    """Choose a cut for few rows: columns so narrow that 132 SMs read, stages so many that HBM stays busy.

    Rows of a tile: twice an expert's even share, so that most experts' weights are read once.
    """
    share = 2 * pl.cdiv(num_rows, num_experts)
    rows = next((r for r in (8, 16, 32) if r >= share), 64)
    columns, hit = WIDTH * parts, min(num_rows, num_experts)
    while (
        columns < 128 * parts and width % (2 * columns // parts) == 0 and hit * width * parts >= 4 * NUM_SMS * columns
    ):
        columns *= 2
    return Config(rows=rows, columns=columns, stages=most_stages(rows, columns))


def check_operands(x_RD: Array, weights: list[Array], group_sizes_E: Array, contract: int) -> None:
    """Raise Declined for operands that these kernels do not multiply; `contract` is the weights' contracted dim."""
    if any(a.dtype != jnp.bfloat16 for a in (x_RD, *weights)):
        kinds = ", ".join(str(a.dtype) for a in (x_RD, *weights))
        raise Declined(f"dtypes ({kinds}) must be bfloat16: wgmma rounds float32 to tf32; {INSTEAD}")
    for w in weights:
        if w.shape != weights[0].shape or w.ndim != 3 or w.shape[contract] != x_RD.shape[1]:
            shapes = ", ".join(str(w.shape) for w in weights)
            raise Declined(
                f"weights ({shapes}) must be alike and contract x's {x_RD.shape[1]} columns in dim {contract}; "
                f"{INSTEAD}"
            )
        if w.shape[1] % WIDTH or w.shape[2] % WIDTH:
            raise Declined(f"weights ({w.shape}) must have multiples of {WIDTH} in their last two dims; {INSTEAD}")
    check_groups(x_RD, group_sizes_E, weights[0].shape[0])


def check_groups(x_RD: Array, group_sizes_E: Array, num_experts: int) -> None:
    """Raise Declined for no rows, or for group sizes that are not one int32 per expert."""
    if group_sizes_E.shape != (num_experts,) or group_sizes_E.dtype != jnp.int32:
        raise Declined(
            f"group_sizes ({group_sizes_E.dtype}{group_sizes_E.shape}) must be int32, one of {num_experts}; {INSTEAD}"
        )
    if x_RD.shape[0] == 0:
        raise Declined(f"rows (0) must be at least 1; {INSTEAD}")


def place_of(index: Array, num_rows: Array | int, num_columns: int, band: int) -> tuple[Array, Array]:
    """Give the (row tile, column tile) that is computed index-th: bands of row tiles, swept to and fro."""
    index = jnp.asarray(index, jnp.int32)
    nth = lax.div(index, jnp.int32(band * num_columns))
    within = index - nth * (band * num_columns)
    height = jnp.minimum(band, num_rows - nth * band)
    column = lax.div(within, height)
    row = nth * band + within - column * height
    return row, jnp.where(lax.rem(nth, jnp.int32(2)) == 1, num_columns - 1 - column, column)


def cluster_of(config: Config) -> dict[str, Any]:
    """Give the arguments of plgpu.kernel that make blocks neighbours, with an axis `half` between them."""
    return {} if config.cluster == 1 else {"cluster": (config.cluster,), "cluster_names": ("half",)}


def for_my_tiles(
    num_tiles: Array | int,
    config: Config,
    locate: Callable[[Array], Tile],
    body: Callable[[Tile, Array], Array],
    carry: Array,
) -> Array:
    """Run `body(tile, carry)` for every tile that falls to this block (or to its cluster's blocks together).

    A tile is located one ahead: what that reads from memory arrives while the tile before is computed.
    """
    me, step = lax.axis_index("block"), config.num_sms // config.cluster
    mine = lax.div(num_tiles - me + (step - 1), jnp.int32(step))

    def run(i: Array, state: tuple[Tile, Array]) -> tuple[Tile, Array]:
        ahead = locate(jnp.minimum(me + (i + 1) * step, num_tiles - 1))
        return ahead, body(state[0], state[1])

    return lax.fori_loop(0, mine, run, (locate(jnp.minimum(me, num_tiles - 1)), carry))[1]


class Ring:
    """The slots between the copying warpgroup and the computing ones; both count the steps since the kernel began."""

    def __init__(self, stages: int, ready: Any, free: Any) -> None:
        self.stages, self.ready, self.free = stages, ready, free

    def slot(self, step: Array) -> Array:
        """Give the slot of a step."""
        return lax.rem(step, jnp.int32(self.stages))

    def acquire(self, step: Array) -> Array:
        """Wait until the computing warpgroups have left the step's slot; give the slot."""
        slot = self.slot(step)

        @pl.when(step >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        return slot

    def drain(self, steps: Array) -> None:
        """Wait for the last arrivals: a barrier must not be left with any."""

        @pl.loop(jnp.maximum(steps - self.stages, 0), steps)
        def _(step: Array) -> None:
            plgpu.barrier_wait(self.free.at[self.slot(step)])

    def receive(self, step: Array) -> Array:
        """Wait until the step's slot is filled; give the slot."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.ready.at[slot])
        return slot

    def release(self, step: Array) -> None:
        """Tell the copying warpgroup that this warpgroup has left the step's slot."""
        plgpu.barrier_arrive(self.free.at[self.slot(step)])


def ring_barriers(config: Config, copies: int) -> list[Any]:
    """Give the types of a ring's barriers, (ready, free), where `copies` copies fill a slot."""
    ready = plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages)
    if config.cluster == 1:
        return [ready, plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages)]
    shared: Any = plgpu.ClusterBarrier
    free = shared(collective_axes=("half",), num_arrivals=config.warpgroups, num_barriers=config.stages)
    return [ready, free]


class MatrixOfRows:
    """A matrix [stages, rows, WIDTH] in shared memory, copied from any row and multiplied as a tiled one."""

    def __init__(self, ref: Any) -> None:
        self.any_row, self.tiled = (ref, ref) if interpreting() else ref

    @staticmethod
    def memory(stages: int, rows: int, dtype: jax.typing.DTypeLike) -> Any:
        """Give its type, for a kernel's scratch_types."""
        shape = (stages, rows, WIDTH)
        tiled = plgpu.SMEM(shape, dtype, transforms=tiles(dtype, WIDTH))
        if interpreting():  # its unions do not share memory, and it knows neither tiling nor swizzle
            return tiled
        return plgpu.RefUnion(any_row_matrix(shape, dtype), tiled)


def any_row_matrix(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
    """Give the type of a matrix in shared memory, WIDTH columns wide, whose copies may begin at any row."""
    tiling: Any = plgpu.TilingTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiling((1, WIDTH)), tiles(dtype, WIDTH)[1]))


def store_rows(slab: Any, out: Any, first: Array, count: Array, column: Array) -> None:
    """Copy the slab's first `count` rows to out's rows from `first` on, as one group of copies."""
    columns = pl.ds(column, WIDTH)

    @pl.when(count >= WIDTH)
    def _whole() -> None:
        plgpu.copy_smem_to_gmem(slab, out.at[pl.ds(first, WIDTH), columns], commit_group=False)

    @pl.when(count < WIDTH)
    def _ladder() -> None:
        for bit in (32, 16, 8, 4, 2, 1):
            done = count & ~(2 * bit - 1)

            @pl.when((count & bit) != 0)
            def _(bit: int = bit, done: Array = done) -> None:
                plgpu.copy_smem_to_gmem(
                    slab.at[pl.ds(done, bit)], out.at[pl.ds(first + done, bit), columns], commit_group=False
                )
