"""How do rows travel to their experts and back on any NVIDIA GPU? Two kernels that read each row once, by index.

No arithmetic to speak of: 2*2*X*D bytes for the gather, 2*(R+M)*D for the combination, in bfloat16.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.target import INSTEAD, Declined
from pallas_kernels.triton.call import Launch, triton_call

Array = jax.Array

BLOCK = 4096
"""elements of a program's block: four loads of 16 bytes in flight in each of 128 threads, for bfloat16"""


def gather_rows(x_MD: Array, index_X: Array) -> Array:
    """Copy row index[i] to place i; an index outside of [0, M) gives zeros: [X, D]. Raises Declined."""
    if x_MD.ndim != 2 or index_X.ndim != 1 or not x_MD.size or not index_X.size:
        raise Declined(f"x {x_MD.shape} must be a matrix and index {index_X.shape} a vector, none empty: {INSTEAD}")
    _check_index(index_X)
    launch = gather_launch(x_MD.shape[0], x_MD.shape[1], index_X.size)
    out = jax.ShapeDtypeStruct((index_X.size, x_MD.shape[1]), x_MD.dtype)
    return triton_call("gather_rows_kernel", x_MD, index_X, out=out, launch=launch)


def gather_launch(num_rows: int, depth: int, num_out: int) -> Launch:
    """Say how the gather is launched."""
    rows, columns = block(depth)
    constants = {"num_rows": num_rows, "num_out": num_out, "depth": depth, "rows": rows, "columns": columns}
    return Launch((-(-num_out // rows), -(-depth // columns)), constants)


def combine_rows(y_RD: Array, place_MA: Array, weights_MA: Array) -> Array:
    """Sum each token's A rows y[place] by weight, in float32: [M, D]; a place outside of [0, R) adds nothing.

    The sum goes in the order of the choices: the same bits each time. Raises Declined.
    """
    if y_RD.ndim != 2 or place_MA.ndim != 2 or weights_MA.shape != place_MA.shape or not y_RD.size or not place_MA.size:
        raise Declined(
            f"y {y_RD.shape} must be a matrix, and places {place_MA.shape} and weights {weights_MA.shape} matrices of "
            f"one shape, none empty: {INSTEAD}"
        )
    _check_index(place_MA)
    if not (jnp.issubdtype(y_RD.dtype, jnp.floating) and y_RD.dtype.itemsize <= 4):
        raise Declined(f"dtype ({y_RD.dtype}) must be a float of at most 32 bits: sums are in float32; {INSTEAD}")
    launch = combine_launch(y_RD.shape, place_MA.shape)
    out = jax.ShapeDtypeStruct((place_MA.shape[0], y_RD.shape[1]), y_RD.dtype)
    return triton_call("combine_rows_kernel", y_RD, place_MA, weights_MA, out=out, launch=launch)


def combine_launch(y_shape: tuple[int, ...], place_shape: tuple[int, ...]) -> Launch:
    """Say how the combination is launched."""
    (num_rows, depth), (num_tokens, num_active) = y_shape, place_shape
    rows, columns = block(depth)
    constants = {"num_rows": num_rows, "num_tokens": num_tokens, "num_active": num_active, "depth": depth}
    return Launch((-(-num_tokens // rows), -(-depth // columns)), {**constants, "rows": rows, "columns": columns})


def block(depth: int) -> tuple[int, int]:
    """Cut the matrix into blocks of rows and columns, powers of two."""
    columns = min(1024, 1 << (depth - 1).bit_length())
    return max(1, BLOCK // columns), columns


def _check_index(index: Array) -> None:
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise Declined(f"index dtype ({index.dtype}) must be an integer's; {INSTEAD}")
