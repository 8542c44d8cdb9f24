"""What differs between the jax and flax versions that we support: one function each, and no other place."""

from collections.abc import Iterable

import jax
from jax import lax


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Give the mesh axes over which a value differs between devices, inside the manual program."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(manual.varying) if manual is not None else frozenset(getattr(kind, "vma", ()))


def vary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """Mark a value as varying over `axes`; its transpose sums the gradient over those it did not vary on."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_like(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Mark a value as varying over every axis that any of `others` varies on."""
    return vary(x, sorted(frozenset().union(*map(varying_axes, others))))
