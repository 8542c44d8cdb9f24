"""Which block sizes are worth measuring? For each kernel a short list, its default first, that tune_kernels.py times.

A list is made of the default and the shapes of the kernel's operands. It holds nothing that the kernel declines, and
nothing whose sums and scores alone fill a thread's registers.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels import flash_attention as flash
from pallas_kernels import flash_attention_bwd as flash_bwd
from pallas_kernels import flash_blocks, mosaic, page_tiles
from pallas_kernels import grouped_matmul_dw as dw
from pallas_kernels import lightning_attention as lightning
from pallas_kernels import linear_cross_entropy as loss
from pallas_kernels import paged_attention as paged
from pallas_kernels import rms_norm as norm
from pallas_kernels.grouped_matmul import StoreProduct, check_cut
from pallas_kernels.grouped_swiglu import StoreGated, StoreGradients
from pallas_kernels.grouped_tiles import WIDTH, most_stages
from pallas_kernels.grouped_tiles import Config as Cut
from pallas_kernels.target import Declined
from pallas_kernels.triton import grouped_matmul as triton

Config = TypeVar("Config")
Shape = jax.ShapeDtypeStruct

OTHER_REGISTERS = 56
"""of a thread: addresses, row statistics, counters"""


def offered(default: Config, others: Iterable[Config], check: Callable[[Config], None]) -> list[Config]:
    """Put the default first, and behind it those others, each once, that `check` does not decline."""
    found = [default]
    for config in others:
        try:
            check(config)
        except Declined:
            continue
        if config not in found:
            found.append(config)
    return found


def check_registers(config: Any, columns: float) -> None:
    """Decline float32 tiles `columns` wide in all: a thread holds half a number of each column's 64 rows."""
    need, limit = round(columns / 2) + OTHER_REGISTERS, flash_blocks.REGISTERS[config.warpgroups][1]
    if need > limit:
        raise Declined(f"{config} needs about {need} registers (limit {limit})")


def flash_attention(default: flash.Config, q: Shape, k: Shape, v: Shape, *_: Shape) -> list[flash.Config]:
    """Vary the queries of a block, the keys of a step and how many steps are under way."""
    dim, value_dim = q.shape[3], v.shape[3]

    def check(config: flash.Config) -> None:
        flash.check_config(config, dim, value_dim)
        check_registers(config, value_dim + 1.5 * config.block_kv)  # probabilities are of 16 bits

    return offered(default, (flash.Config(*each) for each in product((2, 3), (64, 128), (2, 3))), check)


def flash_attention_bwd(default: flash_bwd.Config, q: Shape, k: Shape, v: Shape, *_: Shape) -> list[flash_bwd.Config]:
    """Vary each of the two kernels while the other keeps its default."""
    dim, value_dim = q.shape[3], v.shape[3]
    together = dim + value_dim
    sums = together if together <= flash_bwd.WIDEST else max(dim, value_dim)

    def check(config: flash_bwd.Config) -> None:
        flash_bwd.check_config(config, dim, value_dim)
        if config.dq_block > default.dq_block:
            check_registers(config, dim + 2 * config.dq_block)
        if config.dkv_block > default.dkv_block:
            check_registers(config, sums + 2 * config.dkv_block)

    cuts = list(product((64, 128), (2, 3)))
    others = [replace(default, dq_block=block, dq_stages=stages) for block, stages in cuts]
    others += [replace(default, dkv_block=block, dkv_stages=stages) for block, stages in cuts]
    return offered(default, others, check)


def paged_attention(default: paged.Config, q: Shape, k: Shape, v: Shape, *_: Shape) -> list[paged.Config]:
    """Vary the tiles under way alone: all else is part of the result's rounding."""
    return _stages(default, q.shape[3], k.shape[3] + v.shape[3], 1024)


def latent_attention(default: paged.Config, q: Shape, *_: Shape) -> list[paged.Config]:
    """Vary the tiles under way alone, as for pages of heads; weights are traded through shared memory."""
    return _stages(default, q.shape[3], q.shape[3], 10 * 1024)


def _stages(default: paged.Config, query_columns: int, tile_columns: int, others: int) -> list[paged.Config]:
    def check(config: paged.Config) -> None:
        need = 2 * page_tiles.ROWS * query_columns + 2 * config.stages * config.tile * tile_columns + others
        if need > mosaic.SMEM_LIMIT:
            raise Declined(f"{config} needs {need} bytes of shared memory (limit {mosaic.SMEM_LIMIT})")

    return offered(default, (replace(default, stages=stages) for stages in range(2, 7)), check)


def _cuts(default: Cut, widths: Iterable[int], slabs: int) -> Iterable[Cut]:
    """Vary columns, clusters, stages and bands; for few rows (decode) columns and the rows of a tile."""
    if default.rows < 2 * WIDTH:
        for rows, columns in product(sorted({default.rows, min(WIDTH, 2 * default.rows)}), widths):
            yield Cut(rows, columns, most_stages(rows, columns, slabs))
        return
    for columns, cluster in product(widths, (1, 2)):
        yield Cut(default.rows, columns, most_stages(default.rows, columns, slabs), cluster)
    yield replace(default, stages=default.stages - 1)
    for band in (4, 16):
        yield replace(default, band=band)


def grouped_matmul(default: Cut, *_: Shape) -> list[Cut]:
    """Vary the cut."""
    return offered(default, _cuts(default, (64, 128, 192, 256), 2), lambda cut: check_cut(cut, 1, StoreProduct()))


def grouped_swiglu(default: Cut, *_: Shape) -> list[Cut]:
    """Vary the cut; gate and up are half of its columns each."""
    return offered(default, _cuts(default, (128, 256), 2), lambda cut: check_cut(cut, 2, StoreGated(save=True)))


def grouped_swiglu_bwd(default: Cut, *_: Shape) -> list[Cut]:
    """Vary the cut; 256 columns would leave the epilogue no registers."""
    return offered(default, _cuts(default, (64, 128, 192), 5), lambda cut: check_cut(cut, 1, StoreGradients()))


def grouped_matmul_dw(default: Cut, *_: Shape) -> list[Cut]:
    """Vary the cut, of dw's rows and columns."""
    return offered(default, _cuts(default, (128, 192, 256), 2), dw.check_cut)


def lightning_attention(default: lightning.Config, q: Shape, *_: Shape) -> list[lightning.Config]:
    """Vary the span of a block, and how many chunks are under way."""
    chunks = -(-q.shape[1] // lightning.CHUNK)
    spans = (default.span, max(1, default.span // 2), min(chunks, 2 * default.span), chunks)
    return offered(default, (lightning.Config(span, n) for span in spans for n in (3, 2)), lambda config: None)


def linear_cross_entropy_statistics(default: loss.Config, x: Shape, w: Shape, *_: Shape) -> list[loss.Config]:
    """Vary the tile's columns, the stages that fit beside them, and the rows that stay in L2."""
    others = [replace(default, stages=3), loss.Config(columns=192, stages=5), loss.Config(columns=128, stages=6)]
    return offered(default, [*others, *(replace(default, band=band) for band in (8, 32))], lambda config: None)


def rms_norm_bwd(default: norm.Config, x: Shape, *_: Shape) -> list[norm.Config]:
    """Vary the blocks of a multiprocessor and their slots."""

    def check(config: norm.Config) -> None:
        blocks = config.num_blocks // mosaic.NUM_SMS
        if norm.smem_bytes(x.shape[1], config.stages) * blocks > mosaic.SMEM_LIMIT:
            raise Declined(f"{blocks} blocks of {config} must fit in shared memory")

    sizes = product((2, 3, 4, 6), (1, 2, 3, 4))
    return offered(default, (norm.Config(stages, blocks * mosaic.NUM_SMS) for stages, blocks in sizes), check)


def triton_grouped_matmul(default: triton.Config, x: Shape, *_: Shape) -> list[triton.Config]:
    """Vary columns, the contracted step and stages; float32 is multiplied without tensor cores, in one way."""
    if jnp.dtype(x.dtype) == jnp.float32:
        return [default]
    sizes = product((64, 128, 256), (32, 64), (3, 4))
    rows = default.rows
    others = (triton.Config(rows, c, step, stages, 8 if rows * c > 8192 else 4) for c, step, stages in sizes)
    return offered(default, others, lambda config: None)
