"""How many FLOPs has a program, as traced? Matmuls of one device's part, from the differentiated jaxpr."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def matmul_flops(jaxpr: core.Jaxpr, ticks: int = 0, work: int = 0, rows: int = 0) -> float:
    """Count the FLOPs of all matmuls that a device runs: loops by their length, of a condition the longer branch.

    The outermost loop of `ticks` turns counts as `work`, a grouped matmul (`ragged_dot`) has at most `rows` rows that
    are not padding, and a loop whose length is known only at run time counts as not taken.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot_flops(equation)
        elif name in ("ragged_dot_general", "ragged_dot"):
            total += _ragged_flops(equation, rows)
        elif name == "scan":
            length, inside = params["length"], (ticks, work)
            if ticks and length == ticks:
                length, inside = work, (0, 0)
            total += length * matmul_flops(_open(params["jaxpr"]), *inside, rows)
        elif name == "cond":
            total += max(matmul_flops(_open(branch), ticks, work, rows) for branch in params["branches"])
        elif name != "while":
            total += sum(matmul_flops(inner, ticks, work, rows) for inner in _inner(params))
    return total


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        if isinstance(value, (core.ClosedJaxpr, core.Jaxpr)):
            yield _open(value)


def _open(jaxpr: Any) -> core.Jaxpr:
    """Give the jaxpr inside a closed one; newer versions of jax have one type for both."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _dot_flops(equation: core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = _shape(equation.invars[0])
    return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(left[d] for d in contracted)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _ragged_flops(equation: core.JaxprEqn, rows: int) -> float:
    """Every row meets one group's matrix: rows * D * F, whichever of the three products of a layer it is."""
    left, right = (_shape(variable) for variable in equation.invars[:2])
    result = _shape(equation.outvars[0])
    own = min(left[0], rows) if rows else left[0]
    if len(result) == 3:  # the weights' gradient: [R, D] x [R, F] -> [E, D, F]
        return 2.0 * own * left[1] * right[1]
    return 2.0 * own * left[1] * result[1]
