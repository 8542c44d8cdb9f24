"""How does one kernel text run on the GPU and in Mosaic's interpreter? The interpreter's holes are bridged here.

It knows no `run_state` with an accumulator and no wgmma with its left operand in registers (jax 0.11.2): while it
runs, an accumulator is a Python object that holds a value, and such a wgmma is a product of values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxpr_as_fun

from pallas_kernels.compat import interpreting

Array = jax.Array

LOG2E = 1.4426950408889634
SMEM_LIMIT = 232_448
"""Bytes of shared memory that one block may have (Hopper)."""
NUM_SMS = 132
"""Multiprocessors of an H100 or H200 (SXM): the blocks of a persistent grid."""


def kernel(body: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """Make a Mosaic kernel as `plgpu.kernel` does, one that may be called inside the manual SPMD program.

    There every array carries the mesh axes that it varies on, and a kernel's loops and conditions would have to mix
    such values with constants that vary on none. It is traced on its own, by shapes, and then called; its results
    vary on no axis, until the caller says otherwise.
    """
    launch = plgpu.kernel(body, **options)

    def call(*operands: Array) -> Any:
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
        traced, results = jax.make_jaxpr(launch, return_shape=True)(*shapes)
        return jax.tree.unflatten(jax.tree.structure(results), jaxpr_as_fun(traced)(*operands))

    return call


def tanh(x: Array) -> Array:
    """Give tanh by the exponential: under approx_math the chip's own has 11 bits."""
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2.0 * LOG2E)))


def tiles(dtype: jax.typing.DTypeLike, columns: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Give the transforms of a matrix in shared memory that TMA writes and wgmma reads, `columns` wide."""
    width = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * width * 8)
    tiling: Any = plgpu.TilingTransform  # pyright takes these for abstract classes
    swizzling: Any = plgpu.SwizzleTransform
    return tiling((8, swizzle // width)), swizzling(swizzle)


def matrix(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
    """Give the type of a tiled, swizzled matrix [..., rows, columns] in shared memory."""
    return plgpu.SMEM(shape, dtype, transforms=tiles(dtype, shape[-1]))


class _Accumulator:
    """An accumulator while the interpreter runs: the value itself."""

    def __init__(self, value: Array) -> None:
        self.value, self.shape, self.dtype = value, value.shape, value.dtype

    def __getitem__(self, index: Any) -> Array:
        return self.value[index]

    def __setitem__(self, index: Any, value: Array) -> None:
        self.value = value


def run_state(body: Callable[[Any], None]) -> Callable[[Any], Any]:
    """Run `body` on accumulators that begin as `plgpu.ACC.init(value)`, a tree of them; give their final values."""
    if not interpreting():
        return pl.run_state(body)

    def run(inits: Any) -> Any:
        leaves, structure = jax.tree.flatten(inits, is_leaf=lambda x: isinstance(x, plgpu.ACC))
        accumulators = [_Accumulator(init._init) for init in leaves]
        body(jax.tree.unflatten(structure, accumulators))
        return jax.tree.unflatten(structure, [a.value for a in accumulators])

    return run


def with_accumulators(body: Callable[..., Any], *starts: Array | tuple[int, int]) -> Any:
    """Give what `body` returns, run on a float32 accumulator for each start: a value, or the shape of a zero one.

    Products may be in flight while `body` works on values (`read`); none may be left in flight when it returns.
    """
    shapes: list[Any] = [start if isinstance(start, tuple) else start.shape for start in starts]
    values = [(i, start) for i, start in enumerate(starts) if not isinstance(start, tuple)]

    def run(*accumulators: Any) -> Any:
        for i, value in values:
            accumulators[i][...] = value
        return body(*accumulators)

    if interpreting():
        return run(*(_Accumulator(jnp.zeros(shape, jnp.float32)) for shape in shapes))
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def read(acc: Any, in_flight: int = 0) -> Array:
    """Give an accumulator's value once at most `in_flight` later products are still under way."""
    if isinstance(acc, _Accumulator):
        return acc.value
    return plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)


def wgmma(acc: Any, a: Any, b: Any) -> None:
    """Add a @ b to the accumulator: `a` in registers or shared memory, `b` in shared memory."""
    if not isinstance(acc, _Accumulator):
        plgpu.wgmma(acc, a, b)
        return
    left, right = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
    plgpu.commit_smem()  # this read went past the copy engine's proxy: order it before the next copy
    product = jnp.dot(left.astype(jnp.float32), right.astype(jnp.float32))
    acc.value = acc.value + product.astype(acc.dtype)
