"""How do rows travel to their experts and back? By gathers alone: the transpose of a permutation is its inverse.

A slot is one of a token's A choices, numbered m*A + a. A place is an index in the sorted order.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from moejax.ops.backend import call, choose, to_common_axes
from pallas_kernels.target import Target

MOVERS = {"xla": "xla", "triton": "triton", "mosaic": "xla", "ragged_dot": "xla", "reference": "xla"}
"""Who moves rows where experts are named so: XLA, whose gathers are fusions that a kernel would not beat, but for
Triton's own, where XLA is to be left out."""


class Order(NamedTuple):
    """Where each of the R = M*A slots stands once every expert's slots are one run."""

    rows_R: Int[Array, "R"]
    """the slot at each place; slots that are not chosen come last"""
    inverse_R: Int[Array, "R"]
    """the place of each slot"""
    group_sizes_E: Int[Array, "E"]
    """how many chosen slots each expert has"""


def combine_reference(y_RD: Float[Array, "R D"], weights_MA: Float[Array, "M A"], order: Order) -> Float[Array, "M D"]:
    """Sum each token's rows by weight with a scatter-add over the chosen places: the oracle."""
    num_tokens, num_active = weights_MA.shape
    wide = jnp.promote_types(y_RD.dtype, jnp.float32)
    chosen_R = jnp.arange(y_RD.shape[0]) < order.group_sizes_E.sum()
    weight_R = jnp.where(chosen_R, weights_MA.reshape(-1)[order.rows_R], 0).astype(wide)
    terms_RD = jnp.where(chosen_R[:, None], y_RD, 0).astype(wide) * weight_R[:, None]
    zeros_MD = jnp.zeros((num_tokens, y_RD.shape[1]), wide)
    return zeros_MD.at[order.rows_R // num_active].add(terms_RD).astype(y_RD.dtype)


def sort_by_expert(
    experts_MA: Int[Array, "M A"], num_experts: int, chosen_MA: Bool[Array, "M A"] | None = None
) -> Order:
    """Sort the slots by expert, and within an expert by slot; slots not chosen come last and are not counted."""
    key_R = experts_MA.astype(jnp.int32).reshape(-1)
    if chosen_MA is not None:
        key_R = jnp.where(chosen_MA.reshape(-1), key_R, num_experts)
    rows_R = jnp.argsort(key_R, stable=True).astype(jnp.int32)
    places_R = jnp.arange(key_R.size, dtype=jnp.int32)
    inverse_R = jnp.zeros_like(rows_R).at[rows_R].set(places_R, unique_indices=True, mode="promise_in_bounds")
    group_sizes_E = (key_R[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
    return Order(rows_R, inverse_R, group_sizes_E)


def gather_rows(
    x_MD: Float[Array, "M D"], order: Order, num_active: int, *, implementation: str = "auto"
) -> Float[Array, "R D"]:
    """Copy each token's row to the places of its slots; a place whose slot is not chosen holds zeros.

    The gradient sums a token's rows in float32 or wider and reads nothing from the places not chosen.
    implementation: as the experts', see MOVERS; "auto" is xla, one fusion each way; "triton", a kernel for NVIDIA GPUs.
    """
    x_MD, *fields = to_common_axes(x_MD, *order)
    ways: dict[str, Callable] = {name: partial(_gather_rows, way, num_active) for name, way in MOVERS.items()}
    return choose("gather of rows", implementation, ways, _order, x_MD, Order(*fields))


def combine_rows(
    y_RD: Float[Array, "R D"], weights_MA: Float[Array, "M A"], order: Order, *, implementation: str = "auto"
) -> Float[Array, "M D"]:
    """Sum each token's rows by weight, in float32 or wider; slots that are not chosen add nothing, whatever y holds.

    Names as in gather_rows.
    """
    y_RD, weights_MA, *fields = to_common_axes(y_RD, weights_MA, *order)
    ways: dict[str, Callable] = {name: partial(_combine_rows, way) for name, way in MOVERS.items()}
    return choose("combination of rows", implementation, ways, _order, y_RD, weights_MA, Order(*fields))


def _order(chip: Target) -> Sequence[str]:
    return ["xla"]


def _rows_of_choice(y_RD: Array, order: Order, choice: int, num_active: int) -> Float[Array, "M D"]:
    """Bring every token the row of its a-th choice, zeros where that slot is not chosen; float32 or wider."""
    place_M = order.inverse_R.reshape(-1, num_active)[:, choice]
    y_MD = y_RD.at[place_M].get(mode="promise_in_bounds")
    y_MD = jnp.where((place_M < order.group_sizes_E.sum())[:, None], y_MD, 0)
    return y_MD.astype(jnp.promote_types(y_RD.dtype, jnp.float32))


def _rows_of_tokens(x_MD: Array, order: Order, num_active: int) -> Float[Array, "R D"]:
    chosen_R = jnp.arange(order.rows_R.size) < order.group_sizes_E.sum()
    return jnp.where(chosen_R[:, None], x_MD.at[order.rows_R // num_active].get(mode="promise_in_bounds"), 0)


def move_rows(
    x_RD: Shaped[Array, "R D"],
    take_X: Int[Array, "X"],
    taken_X: Bool[Array, "X"],
    back_R: Int[Array, "R"],
    kept_R: Bool[Array, "R"],
) -> Shaped[Array, "X D"]:
    """Copy row take[i] to place i, zeros where it is not taken; (back, kept) is the same map seen from the rows.

    The gradient is the way back: a gather, where a plain gather's is a scatter. The caller vouches for the inverse.
    """
    return _move_rows(*to_common_axes(x_RD, take_X, taken_X, back_R, kept_R))


def _take_rows(x_RD: Array, take_X: Array, taken_X: Array) -> Array:
    return jnp.where(taken_X[:, None], x_RD.at[take_X].get(mode="clip"), 0)


@jax.custom_vjp
def _move_rows(x_RD: Array, take_X: Array, taken_X: Array, back_R: Array, kept_R: Array) -> Array:
    return _take_rows(x_RD, take_X, taken_X)


def _move_rows_fwd(x_RD: Array, take_X: Array, taken_X: Array, back_R: Array, kept_R: Array) -> tuple:
    return _take_rows(x_RD, take_X, taken_X), (back_R, kept_R)


def _move_rows_bwd(saved: tuple, dy_XD: Array) -> tuple:
    return _take_rows(dy_XD, *saved), None, None, None, None


_move_rows.defvjp(_move_rows_fwd, _move_rows_bwd)


def _places_of_choices(order: Order, num_active: int) -> Int[Array, "M A"]:
    """Give the place of each choice, -1 where it is not chosen."""
    place_R = jnp.where(order.inverse_R < order.group_sizes_E.sum(), order.inverse_R, -1)
    return place_R.reshape(-1, num_active)


def _spread(way: str, x_MD: Array, order: Order, num_active: int) -> Array:
    """Copy each token's row to the places of its slots."""
    if way == "xla":
        return _rows_of_tokens(x_MD, order, num_active)
    from pallas_kernels.triton import permute

    chosen_R = jnp.arange(order.rows_R.size) < order.group_sizes_E.sum()
    return call(permute.gather_rows, x_MD, jnp.where(chosen_R, order.rows_R // num_active, -1))


def _collect(way: str, y_RD: Array, weights_MA: Array | None, order: Order, num_active: int) -> Array:
    """Sum each token's rows, by weight if there are weights."""
    if way == "triton":
        from pallas_kernels.triton import permute

        place_MA = _places_of_choices(order, num_active)
        ones_MA = jnp.ones(place_MA.shape, jnp.float32)
        return call(permute.combine_rows, y_RD, place_MA, ones_MA if weights_MA is None else weights_MA)
    total = jnp.zeros((), jnp.promote_types(y_RD.dtype, jnp.float32))
    for a in range(num_active):
        rows_MD = _rows_of_choice(y_RD, order, a, num_active)
        total = total + (rows_MD if weights_MA is None else rows_MD * weights_MA[:, a, None])
    return total.astype(y_RD.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine_rows(way: str, y_RD: Array, weights_MA: Array, order: Order) -> Array:
    return _collect(way, y_RD, weights_MA, order, weights_MA.shape[1])


def _combine_rows_fwd(way: str, y_RD: Array, weights_MA: Array, order: Order) -> tuple[Array, tuple]:
    return _combine_rows(way, y_RD, weights_MA, order), (y_RD, weights_MA, order)


def _combine_rows_bwd(way: str, saved: tuple, dout_MD: Array) -> tuple:
    y_RD, weights_MA, order = saved
    num_active = weights_MA.shape[1]
    weight_R = weights_MA.reshape(-1)[order.rows_R]
    wide = jnp.promote_types(y_RD.dtype, jnp.float32)
    dy_RD = _spread(way, dout_MD, order, num_active).astype(wide) * weight_R[:, None]
    dweights = [(_rows_of_choice(y_RD, order, a, num_active) * dout_MD).sum(-1) for a in range(num_active)]
    return dy_RD.astype(y_RD.dtype), jnp.stack(dweights, axis=1).astype(weights_MA.dtype), None


_combine_rows.defvjp(_combine_rows_fwd, _combine_rows_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather_rows(way: str, num_active: int, x_MD: Array, order: Order) -> Array:
    return _spread(way, x_MD, order, num_active)


def _gather_rows_fwd(way: str, num_active: int, x_MD: Array, order: Order) -> tuple[Array, Order]:
    return _spread(way, x_MD, order, num_active), order


def _gather_rows_bwd(way: str, num_active: int, order: Order, dx_RD: Array) -> tuple:
    return _collect(way, dx_RD, None, order, num_active), None


_gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)
