"""How does a run of rows per expert meet that expert's weights? Without padding, dropping or multiplying by the others.

Rows are sorted by expert: the first group_sizes[0] rows belong to expert 0, and so on; rows after the last group
give zeros, and their gradient is zero.
"""

from collections.abc import Callable
from functools import partial
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


def grouped_matmul_reference(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], group_sizes_E: Int[Array, "E"]
) -> Float[Array, "R F"]:
    """Multiply every row by every expert's weights and keep its own expert's: the oracle, E times the arithmetic."""
    end_E = jnp.cumsum(group_sizes_E)
    row_R1 = jnp.arange(x_RD.shape[0])[:, None]
    own_RE = (row_R1 < end_E) & (row_R1 >= end_E - group_sizes_E)
    y_REF = jnp.einsum("RD,EDF->REF", x_RD, w_EDF, preferred_element_type=_wide(x_RD.dtype))
    return jnp.where(own_RE[..., None], y_REF, 0).sum(1).astype(x_RD.dtype)


def grouped_matmul(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, "E"],
    *,
    implementation: str = "auto",
) -> Float[Array, "R F"]:
    """Multiply each expert's run of rows by its weights, in float32 or wider.

    implementation: "reference"; "ragged_dot" (XLA's; a masked dense product on CPU); "blocked" (a loop over blocks of
    rows with a trip count known at run time); "auto" is blocked on CPU. ValueError for another name.
    """
    x_RD, w_EDF, group_sizes_E = _to_common_axes(x_RD, w_EDF, group_sizes_E)
    return _MATMULS[_resolve(implementation)](x_RD, w_EDF, group_sizes_E)


def expert_swiglu_reference(
    x_RD: Float[Array, "R D"],
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    down_EFD: Float[Array, "E F D"],
    group_sizes_E: Int[Array, "E"],
    *,
    implementation: str = "reference",
) -> Float[Array, "R D"]:
    """Compose expert feed-forwards, down(silu(gate) * up), from three grouped matmuls: the twin of expert_swiglu."""
    matmul = partial(grouped_matmul, group_sizes_E=group_sizes_E, implementation=implementation)
    hidden_RF = jax.nn.silu(matmul(x_RD, gate_EDF)) * matmul(x_RD, up_EDF)
    return matmul(hidden_RF, down_EFD)


def expert_swiglu(
    x_RD: Float[Array, "R D"],
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    down_EFD: Float[Array, "E F D"],
    group_sizes_E: Int[Array, "E"],
    *,
    implementation: str = "auto",
) -> Float[Array, "R D"]:
    """Apply each expert's gated feed-forward (arXiv 2002.05202) to its run of rows.

    "blocked" does a block's three products while its rows are in cache; the others compose grouped matmuls.
    """
    inputs = _to_common_axes(x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E)
    if _resolve(implementation) == "blocked":
        return _blocked_swiglu(*inputs)
    return expert_swiglu_reference(*inputs, implementation=implementation)


def _resolve(implementation: str) -> str:
    if implementation == "auto":
        return "blocked" if jax.default_backend() == "cpu" else "ragged_dot"
    if implementation not in _MATMULS:
        raise ValueError(f"implementation ({implementation!r}) must be one of auto, {', '.join(_MATMULS)}")
    return implementation


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _to_common_axes(*arrays: Array) -> list[Array]:
    """Let all inputs of a custom_vjp vary on the same mesh axes; the transpose sums the gradients back."""
    return [vary_like(x, *arrays) for x in arrays]


def _ragged_dot(x_RD: Array, w_EDF: Array, group_sizes_E: Array) -> Array:
    y_RF = lax.ragged_dot(x_RD, w_EDF, group_sizes_E, preferred_element_type=_wide(x_RD.dtype)).astype(x_RD.dtype)
    return jnp.where((jnp.arange(x_RD.shape[0]) < group_sizes_E.sum())[:, None], y_RF, 0)


# --- the blocked path: for each expert that has rows, for each block of its rows


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
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=_wide(a.dtype))


@jax.custom_vjp
def _blocked_matmul(x_RD: Array, w_EDF: Array, group_sizes_E: Array) -> Array:
    num_rows = x_RD.shape[0]

    def expert_body(expert: Array, first: Array, count: Array, y_RF: Array) -> Array:
        w_DF = _weights(w_EDF, expert)
        return _for_blocks(
            num_rows, first, count, lambda block, y_RF: block.write(y_RF, _dot(block.read(x_RD), w_DF, (1, 0))), y_RF
        )

    return _for_experts(group_sizes_E, expert_body, _zeros(x_RD, num_rows, w_EDF.shape[2]))


def _blocked_matmul_fwd(x_RD: Array, w_EDF: Array, group_sizes_E: Array) -> tuple[Array, tuple]:
    return _blocked_matmul(x_RD, w_EDF, group_sizes_E), (x_RD, w_EDF, group_sizes_E)


def _blocked_matmul_bwd(saved: tuple, dy_RF: Array) -> tuple:
    x_RD, w_EDF, group_sizes_E = saved

    def expert_body(expert: Array, first: Array, count: Array, carry: Carry) -> Carry:
        dx_RD, dw_EDF = carry
        w_DF = _weights(w_EDF, expert)

        def body(block: _Block, carry: Carry) -> Carry:
            dx_RD, dw_DF = carry
            dy_SF = block.read_own(dy_RF)
            dx_RD = block.write(dx_RD, _dot(dy_SF, w_DF, (1, 1)))
            return dx_RD, dw_DF + _dot(block.read_own(x_RD), dy_SF, (0, 0))

        start = _zeros(w_DF, *w_DF.shape, dtype=_wide(w_DF.dtype))
        dx_RD, dw_DF = _for_blocks(x_RD.shape[0], first, count, body, (dx_RD, start))
        return dx_RD, _put_weights(dw_EDF, dw_DF, expert)

    dx_RD, dw_EDF = _for_experts(group_sizes_E, expert_body, (jnp.zeros_like(x_RD), jnp.zeros_like(w_EDF)))
    return dx_RD, dw_EDF, None


_blocked_matmul.defvjp(_blocked_matmul_fwd, _blocked_matmul_bwd)

_MATMULS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "reference": grouped_matmul_reference,
    "ragged_dot": _ragged_dot,
    "blocked": _blocked_matmul,
}
"""The implementations of grouped_matmul, by name."""


# --- the fused gated feed-forward


@jax.custom_vjp
def _blocked_swiglu(x_RD: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, group_sizes_E: Array) -> Array:
    return _blocked_swiglu_fwd(x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E)[0]


def _blocked_swiglu_fwd(
    x_RD: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, group_sizes_E: Array
) -> tuple[Array, tuple]:
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
    y_RD, gate_RF, up_RF = _for_experts(group_sizes_E, expert_body, (jnp.zeros_like(x_RD), zeros_RF, zeros_RF))
    return y_RD, (x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E, gate_RF, up_RF)


def _blocked_swiglu_bwd(saved: tuple, dy_RD: Array) -> tuple:
    x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E, gate_RF, up_RF = saved
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

        zeros = (_zeros(w, *w.shape[1:], dtype=_wide(w.dtype)) for w in weights)
        dx_RD, *dw = _for_blocks(x_RD.shape[0], first, count, body, (dx_RD, *zeros))
        update = lax.dynamic_update_index_in_dim
        return dx_RD, tuple(
            update(all_, one.astype(all_.dtype), expert, 0) for all_, one in zip(dweights, dw, strict=True)
        )

    start = (jnp.zeros_like(x_RD), tuple(map(jnp.zeros_like, weights)))
    dx_RD, dweights = _for_experts(group_sizes_E, expert_body, start)
    return dx_RD, *dweights, None


_blocked_swiglu.defvjp(_blocked_swiglu_fwd, _blocked_swiglu_bwd)
