"""How does a run of rows per expert meet that expert's weights? Without padding, dropping or multiplying by the others.

Rows are sorted by expert: the first group_sizes[0] rows belong to expert 0, and so on; rows after the last group
give zeros, and their gradient is zero. Sizes that add up to more than the rows end with the rows.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.ops.backend import call, choose, to_common_axes
from moejax.ops.blocked_matmul import blocked_matmul, blocked_matmul_bwd, blocked_swiglu, blocked_swiglu_bwd, wide
from moejax.ops.swiglu import swiglu
from pallas_kernels.target import Target


def grouped_matmul_reference(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], group_sizes_E: Int[Array, "E"]
) -> Float[Array, "R F"]:
    """Multiply every row by every expert's weights and keep its own expert's: the oracle, E times the arithmetic."""
    end_E = jnp.cumsum(group_sizes_E)
    row_R1 = jnp.arange(x_RD.shape[0])[:, None]
    own_RE = (row_R1 < end_E) & (row_R1 >= end_E - group_sizes_E)
    y_REF = jnp.einsum("RD,EDF->REF", x_RD, w_EDF, preferred_element_type=wide(x_RD.dtype))
    return jnp.where(own_RE[..., None], y_REF, 0).sum(1).astype(x_RD.dtype)


def grouped_matmul(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, "E"],
    *,
    implementation: str = "auto",
) -> Float[Array, "R F"]:
    """Multiply each expert's run of rows by its weights, summing in float32 or wider.

    implementation: "mosaic" (Hopper) and "triton" (Ampere and later), kernels; "xla", loops over blocks of rows;
    "ragged_dot", XLA's own, E times the work and memory; "reference". "auto": the first of mosaic, triton, xla that the
    chip runs. ValueError for another name, Declined where the named one cannot.
    """
    inputs = to_common_axes(x_RD, w_EDF, group_sizes_E)
    ways: dict[str, Callable] = {way: partial(_matmul, way) for way in KERNELS}
    ways |= {"ragged_dot": _ragged_dot, "reference": grouped_matmul_reference}
    return choose("grouped matmul", implementation, ways, _order, *inputs)


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
    hidden_RF = swiglu(matmul(x_RD, gate_EDF), matmul(x_RD, up_EDF))
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
    """Apply each expert's gated feed-forward (arXiv 2002.05202) to its run of rows; names as in grouped_matmul."""
    inputs = to_common_axes(x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E)
    ways: dict[str, Callable] = {way: partial(_swiglu, way) for way in KERNELS}
    ways |= {way: partial(expert_swiglu_reference, implementation=way) for way in ("ragged_dot", "reference")}
    return choose("expert feed-forward", implementation, ways, _order, *inputs)


KERNELS = ("mosaic", "triton", "xla")


def _order(chip: Target) -> Sequence[str]:
    """Kernels first on GPUs: XLA's loops run one block after the other, its ragged_dot holds E times the rows."""
    return KERNELS if chip.is_hopper else KERNELS[1:] if chip.is_gpu else ("xla",)


def _ragged_dot(x_RD: Array, w_EDF: Array, group_sizes_E: Array) -> Array:
    y_RF = lax.ragged_dot(x_RD, w_EDF, group_sizes_E, preferred_element_type=wide(x_RD.dtype)).astype(x_RD.dtype)
    return jnp.where((jnp.arange(x_RD.shape[0]) < group_sizes_E.sum())[:, None], y_RF, 0)


# --- one product


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(way: str, x_RD: Array, w_EDF: Array, group_sizes_E: Array) -> Array:
    return _matmul_fwd(way, x_RD, w_EDF, group_sizes_E)[0]


def _matmul_fwd(way: str, x_RD: Array, w_EDF: Array, group_sizes_E: Array) -> tuple[Array, tuple]:
    forward = blocked_matmul if way == "xla" else partial(_product, way)
    return forward(x_RD, w_EDF, group_sizes_E), (x_RD, w_EDF, group_sizes_E)


def _matmul_bwd(way: str, saved: tuple, dy_RF: Array) -> tuple:
    x_RD, w_EDF, group_sizes_E = saved
    if way == "xla":
        return *blocked_matmul_bwd(x_RD, w_EDF, group_sizes_E, dy_RF), None
    dx_RD = _product(way, dy_RF, w_EDF, group_sizes_E, transpose_w=True)
    return dx_RD, _dw(way, x_RD, dy_RF, group_sizes_E), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


# --- the gated feed-forward


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(way: str, x_RD: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, group_sizes_E: Array) -> Array:
    if way != "mosaic":
        return _swiglu_fwd(way, x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E)[0]
    from pallas_kernels.grouped_swiglu import grouped_swiglu

    hidden_RF = call(grouped_swiglu, x_RD, gate_EDF, up_EDF, group_sizes_E)
    return _product(way, hidden_RF, down_EFD, group_sizes_E)


def _swiglu_fwd(
    way: str, x_RD: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, group_sizes_E: Array
) -> tuple[Array, tuple]:
    inputs = (x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E)
    if way == "xla":
        y_RD, gate_RF, up_RF = blocked_swiglu(*inputs)
        return y_RD, (*inputs, gate_RF, up_RF)
    if way == "mosaic":
        from pallas_kernels.grouped_swiglu import grouped_swiglu

        hidden_RF, gate_RF, up_RF = call(grouped_swiglu, x_RD, gate_EDF, up_EDF, group_sizes_E, save=True)
    else:
        gate_RF, up_RF = (_product(way, x_RD, w_EDF, group_sizes_E) for w_EDF in (gate_EDF, up_EDF))
        hidden_RF = swiglu(gate_RF, up_RF)
    return _product(way, hidden_RF, down_EFD, group_sizes_E), (*inputs, gate_RF, up_RF)


def _swiglu_bwd(way: str, saved: tuple, dy_RD: Array) -> tuple:
    x_RD, gate_EDF, up_EDF, down_EFD, sizes_E, gate_RF, up_RF = saved
    if way == "xla":
        return *blocked_swiglu_bwd(x_RD, gate_EDF, up_EDF, down_EFD, sizes_E, gate_RF, up_RF, dy_RD), None
    if way == "mosaic":
        from pallas_kernels.grouped_matmul import grouped_matmul_pair
        from pallas_kernels.grouped_swiglu import grouped_swiglu_bwd

        dgate_RF, dup_RF, hidden_RF = call(grouped_swiglu_bwd, dy_RD, down_EFD, gate_RF, up_RF, sizes_E)
        dx_RD = call(grouped_matmul_pair, dgate_RF, dup_RF, gate_EDF, up_EDF, sizes_E)
    else:
        hidden_RF, swiglu_vjp = jax.vjp(swiglu, gate_RF, up_RF)
        dgate_RF, dup_RF = swiglu_vjp(_product(way, dy_RD, down_EFD, sizes_E, transpose_w=True))
        both = ((dgate_RF, gate_EDF), (dup_RF, up_EDF))
        back = [_product(way, d_RF, w_EDF, sizes_E, transpose_w=True).astype(jnp.float32) for d_RF, w_EDF in both]
        dx_RD = (back[0] + back[1]).astype(x_RD.dtype)
    pairs = ((x_RD, dgate_RF), (x_RD, dup_RF), (hidden_RF, dy_RD))
    return dx_RD, *(_dw(way, a, b, sizes_E) for a, b in pairs), None


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


# --- the kernels: imported where they are used, for Mosaic takes long and Triton need not be there


def _product(way: str, x_RD: Array, w_EDF: Array, group_sizes_E: Array, transpose_w: bool = False) -> Array:
    if way == "mosaic":
        from pallas_kernels.grouped_matmul import grouped_matmul as kernel
    else:
        from pallas_kernels.triton.grouped_matmul import grouped_matmul as kernel
    return call(kernel, x_RD, w_EDF, group_sizes_E, transpose_w=transpose_w)


def _dw(way: str, x_RD: Array, dy_RF: Array, group_sizes_E: Array) -> Array:
    if way == "mosaic":
        from pallas_kernels.grouped_matmul_dw import grouped_matmul_dw as kernel
    else:
        from pallas_kernels.triton.grouped_matmul import grouped_matmul_dw as kernel
    return call(kernel, x_RD, dy_RF, group_sizes_E)
