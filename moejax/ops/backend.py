"""Who computes an op? THE place where a kernel is chosen: by name, or "auto" by the chip that the program is for."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.compat import vary_like
from pallas_kernels.target import Declined, Target, target

Way = Callable[..., Any]

_log = logging.getLogger(__name__)


def to_common_axes(*arrays: jax.Array) -> list[jax.Array]:
    """Let all inputs of a custom_vjp vary on the same mesh axes; the transpose sums the gradients back."""
    return [vary_like(x, *arrays) for x in arrays]


def choose(
    op: str,
    implementation: str,
    ways: Mapping[str, Way],
    order: Callable[[Target], Sequence[str]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call the named way, or for "auto" the first of `order(target)` that does not decline.

    A way raises `Declined` for what it cannot take: named, that is the user's error; under "auto" the next one is
    tried and the reason is logged once. Raises ValueError for a name that is not among `ways`.
    """
    if implementation != "auto":
        if implementation not in ways:
            raise ValueError(f'{op}: implementation "{implementation}" must be one of auto, {", ".join(ways)}')
        return ways[implementation](*args, **kwargs)
    chip = target()
    names = [name for name in order(chip) if name in ways]
    for name in names[:-1]:
        try:
            return ways[name](*args, **kwargs)
        except Declined as reason:
            _log_once(op, name, chip.kind, str(reason))
    return ways[names[-1]](*args, **kwargs)


def call(kernel: Way, *args: Any, **kwargs: Any) -> Any:
    """Call a kernel, and mark its outputs as varying over every axis that an input varies on: kernels forget it.

    To be called inside the op's custom_vjp, forward and backward: outside, the mark's transpose would sum gradients
    over devices. A kernel takes long to trace: one is traced once for all calls with the same shapes and options.
    """
    named = {str(i): x for i, x in enumerate(args)} | kwargs
    arrays = {name: jnp.asarray(x) for name, x in named.items() if isinstance(x, (jax.Array, np.ndarray))}
    options = tuple((name, x) for name, x in named.items() if name not in arrays)
    outputs = _traced_once(kernel, options)(arrays)
    return jax.tree.map(lambda y: vary_like(y, *arrays.values()), outputs)


@functools.cache
def _traced_once(kernel: Way, options: tuple[tuple[str, Any], ...]) -> Way:
    def run(arrays: dict[str, jax.Array]) -> Any:
        named = dict(options) | arrays
        places = sorted(int(name) for name in named if name.isdigit())
        keywords = {name: x for name, x in named.items() if not name.isdigit()}
        return kernel(*(named[str(place)] for place in places), **keywords)

    run.__name__ = getattr(kernel, "__name__", "kernel")
    return jax.jit(run)


@functools.cache
def _log_once(op: str, name: str, kind: str, reason: str) -> None:
    _log.warning("%s: not by %s on %s: %s", op, name, kind, reason)
