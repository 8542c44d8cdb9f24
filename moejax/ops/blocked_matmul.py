"""How does XLA multiply runs of rows without E times the work? Loops over blocks, their length known at run time.

For each expert that has rows, for each block of its rows. On a CPU this beats `lax.ragged_dot`, a masked dense product.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.compat import vary_like

BLOCKS = (256, 64)
"""Rows of one matmul of the blocked path, largest first: as many as fit in a group, the last and smallest masked."""

Carry = Any
BlockBody = Callable[["_Block", Carry], Carry]


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """Give the dtype of sums: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


class _Block:
    """Rows [start, start + size) of which those in [first, end) belong to the expert."""

    def __init__(self, size: int, num_rows: int, first: Array, end: Array):
        self.size = size
        self.start = jnp.minimum(first, num_rows - size)  # a slice must not pass the end
        row_S = self.start + jnp.arange(size, dtype=first.dtype)
        self.own_S1 = ((row_S >= first) & (row_S < end))[:, None]

    def read(self, rows: Array) -> Array:
        return lax.dynamic_slice_in_dim(rows, self.start, self.size)

    def read_own(self, rows: Array) -> Array:
        return jnp.where(self.own_S1, self.read(rows), 0)

    def write(self, rows: Array, block: Array) -> Array:
        block = jnp.where(self.own_S1, block.astype(rows.dtype), self.read(rows))
        return lax.dynamic_update_slice_in_dim(rows, block, self.start, 0)


def _for_blocks(num_rows: int, first: Array, count: Array, body: BlockBody, carry: Carry) -> Carry:
    """Run `body` over the rows [first, first + count), in the largest blocks that fit."""
    if num_rows == 0:
        return carry
    end = first + count
    sizes = sorted({min(size, num_rows) for size in BLOCKS}, reverse=True)
    for size in sizes:
        trips = (end - first + (size - 1 if size == sizes[-1] else 0)) // size

        def step(i: Array, carry: Carry, size: int = size, first: Array = first) -> Carry:
            begin = first + i * size
            return body(_Block(size, num_rows, begin, jnp.minimum(begin + size, end)), carry)

        carry = lax.fori_loop(0, trips, step, carry)
        first = first + trips * size
    return carry


def _for_experts(group_sizes_E: Array, body: Callable[[Array, Array, Array, Carry], Carry], carry: Carry) -> Carry:
    """Run `body(expert, first row, rows, carry)` for every expert that has rows."""
    first_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    busy_E = jnp.argsort(group_sizes_E == 0, stable=True)

    def step(i: Array, carry: Carry) -> Carry:
        expert = busy_E[i]
        return body(expert, first_E[expert], group_sizes_E[expert], carry)

    return lax.fori_loop(0, (group_sizes_E > 0).sum(), step, carry)


def _weights(w_EDF: Array, expert: Array) -> Array:
    return lax.dynamic_index_in_dim(w_EDF, expert, keepdims=False)


def _put_weights(w_EDF: Array, w_DF: Array, expert: Array) -> Array:
    return lax.dynamic_update_index_in_dim(w_EDF, w_DF.astype(w_EDF.dtype), expert, 0)


def _zeros(like: Array, *shape: int, dtype: jnp.dtype | None = None) -> Array:
    """Zeros that vary on the same mesh axes as `like`: a loop's carry must enter with the type it leaves with."""
    return vary_like(jnp.zeros(shape, dtype or like.dtype), like)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=wide(a.dtype))


def blocked_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], group_sizes_E: Int[Array, " E"]
) -> Float[Array, "R F"]:
    """Multiply each expert's run of rows by its weights, block by block."""
    num_rows = x_RD.shape[0]

    def expert_body(expert: Array, first: Array, count: Array, y_RF: Array) -> Array:
        w_DF = _weights(w_EDF, expert)
        return _for_blocks(
            num_rows, first, count, lambda block, y_RF: block.write(y_RF, _dot(block.read(x_RD), w_DF, (1, 0))), y_RF
        )

    return _for_experts(group_sizes_E, expert_body, _zeros(x_RD, num_rows, w_EDF.shape[2]))


def blocked_matmul_bwd(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, " E"],
    dy_RF: Float[Array, "R F"],
) -> tuple[Float[Array, "R D"], Float[Array, "E D F"]]:
    """Give dx and dw, in one pass over the blocks."""

    def expert_body(expert: Array, first: Array, count: Array, carry: Carry) -> Carry:
        dx_RD, dw_EDF = carry
        w_DF = _weights(w_EDF, expert)

        def body(block: _Block, carry: Carry) -> Carry:
            dx_RD, dw_DF = carry
            dy_SF = block.read_own(dy_RF)
            dx_RD = block.write(dx_RD, _dot(dy_SF, w_DF, (1, 1)))
            return dx_RD, dw_DF + _dot(block.read_own(x_RD), dy_SF, (0, 0))

        start = _zeros(w_DF, *w_DF.shape, dtype=wide(w_DF.dtype))
        dx_RD, dw_DF = _for_blocks(x_RD.shape[0], first, count, body, (dx_RD, start))
        return dx_RD, _put_weights(dw_EDF, dw_DF, expert)

    return _for_experts(group_sizes_E, expert_body, (jnp.zeros_like(x_RD), jnp.zeros_like(w_EDF)))


def blocked_swiglu(
    x_RD: Float[Array, "R D"],
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    down_EFD: Float[Array, "E F D"],
    group_sizes_E: Int[Array, " E"],
) -> tuple[Float[Array, "R D"], Float[Array, "R F"], Float[Array, "R F"]]:
    """Do a block's three products while its rows are in cache; give the output, and gate and up for the backward."""
    num_rows, ffn = x_RD.shape[0], gate_EDF.shape[2]

    def expert_body(expert: Array, first: Array, count: Array, carry: Carry) -> Carry:
        gate_DF, up_DF, down_FD = (_weights(w, expert) for w in (gate_EDF, up_EDF, down_EFD))

        def body(block: _Block, carry: Carry) -> Carry:
            y_RD, gate_RF, up_RF = carry
            x_SD = block.read(x_RD)
            gate_SF, up_SF = (_dot(x_SD, w, (1, 0)).astype(x_SD.dtype) for w in (gate_DF, up_DF))
            y_SD = _dot(jax.nn.silu(gate_SF) * up_SF, down_FD, (1, 0))
            return block.write(y_RD, y_SD), block.write(gate_RF, gate_SF), block.write(up_RF, up_SF)

        return _for_blocks(num_rows, first, count, body, carry)

    zeros_RF = _zeros(x_RD, num_rows, ffn)
    return _for_experts(group_sizes_E, expert_body, (jnp.zeros_like(x_RD), zeros_RF, zeros_RF))


def blocked_swiglu_bwd(
    x_RD: Float[Array, "R D"],
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    down_EFD: Float[Array, "E F D"],
    group_sizes_E: Int[Array, " E"],
    gate_RF: Float[Array, "R F"],
    up_RF: Float[Array, "R F"],
    dy_RD: Float[Array, "R D"],
) -> tuple[Array, Array, Array, Array]:
    """Give the gradients of the rows and of the three weights, in one pass over the blocks."""
    weights = (gate_EDF, up_EDF, down_EFD)

    def expert_body(expert: Array, first: Array, count: Array, carry: Carry) -> Carry:
        dx_RD, dweights = carry
        gate_DF, up_DF, down_FD = (_weights(w, expert) for w in weights)

        def body(block: _Block, carry: Carry) -> Carry:
            dx_RD, dgate_DF, dup_DF, ddown_FD = carry
            x_SD, dy_SD = block.read_own(x_RD), block.read_own(dy_RD)
            hidden_SF, activate_vjp = jax.vjp(lambda g, u: jax.nn.silu(g) * u, block.read(gate_RF), block.read(up_RF))
            dgate_SF, dup_SF = activate_vjp(_dot(dy_SD, down_FD, (1, 1)).astype(hidden_SF.dtype))
            dx_SD = _dot(dgate_SF, gate_DF, (1, 1)) + _dot(dup_SF, up_DF, (1, 1))
            dgate_DF += _dot(x_SD, dgate_SF, (0, 0))
            dup_DF += _dot(x_SD, dup_SF, (0, 0))
            return block.write(dx_RD, dx_SD), dgate_DF, dup_DF, ddown_FD + _dot(hidden_SF, dy_SD, (0, 0))

        zeros = (_zeros(w, *w.shape[1:], dtype=wide(w.dtype)) for w in weights)
        dx_RD, *dw = _for_blocks(x_RD.shape[0], first, count, body, (dx_RD, *zeros))
        return dx_RD, tuple(_put_weights(all_, one, expert) for all_, one in zip(dweights, dw, strict=True))

    start = (jnp.zeros_like(x_RD), tuple(map(jnp.zeros_like, weights)))
    dx_RD, dweights = _for_experts(group_sizes_E, expert_body, start)
    return dx_RD, *dweights
