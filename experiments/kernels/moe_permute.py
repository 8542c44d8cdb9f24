"""How fast do rows travel to their experts and back, with no product between? KERNEL_NUMBERS section 3.

Bytes count each input once: a token's row that goes to k experts is read k times, mostly from the cache.
"""

from dataclasses import replace
from typing import Any

import jax

from experiments.kernels.case import Case, Way, compiled_torch
from experiments.kernels.moe_layer import LAYERS, TINY, Shape, choice_weights, choices, operands, torch_combine


def cases(dry: bool = False) -> list[Case]:
    """Give the grid; `dry`: tiny rows."""
    kinds = (_gather, _combine, _combine_gradients)
    if dry:
        return [make(TINY) for make in kinds]
    shapes = [replace(layer, tokens=tokens) for layer in LAYERS[1:] for tokens in (8192, 32768)]  # 0 moves what 1 does
    return [make(s, compiled=s == replace(LAYERS[1], tokens=32768)) for s in shapes for make in kinds]


def _move(kind: str, shape: Shape, wanted: str, run: Way, torch_run: Way, size: float, **kwargs: Any) -> Case:
    """Make a row of a move: `run(way, order, weights, ...)`, `torch_run(order's rows, its inverse, weights, ...)`."""

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        from moejax.ops.permute import sort_by_expert

        keys = jax.random.split(key, 3)
        order = sort_by_expert(choices(shape, keys[0]), shape.experts)
        return *order, choice_weights(shape, keys[1]), *operands(shape, wanted, keys[2])

    def ours(way: str) -> Way:
        def move(rows: jax.Array, inverse: jax.Array, sizes: jax.Array, *rest: jax.Array) -> Any:
            from moejax.ops.permute import Order

            return run(way, Order(rows, inverse, sizes), *rest)

        return move

    return Case(
        "moe",
        shape.title(kind),
        make,
        {way: ours(way) for way in ("triton", "xla")},
        flops=0.0,
        bytes=size,
        torch_ways={"compile": compiled_torch(lambda rows, back, _, *rest: torch_run(rows, back, *rest))},
        target=">= 3.5 TB/s",
        matmul=False,
        **kwargs,
    )


def _gather(shape: Shape, **kwargs: Any) -> Case:
    """Copy every token's row to its choices' places."""
    from moejax.ops.permute import gather_rows

    def run(way: str, order: Any, _: jax.Array, x: jax.Array) -> jax.Array:
        return gather_rows(x, order, shape.active, implementation=way)

    size = 2.0 * (shape.tokens + shape.rows) * shape.dim
    return _move("gather", shape, "t", run, lambda rows, back, _, x: x[rows // shape.active], size, **kwargs)


def _combine(shape: Shape, **kwargs: Any) -> Case:
    """Sum each token's rows by weight."""
    from moejax.ops.permute import combine_rows

    def run(way: str, order: Any, weights: jax.Array, y: jax.Array) -> jax.Array:
        return combine_rows(y, weights, order, implementation=way)

    def torch_run(rows: Any, back: Any, weights: Any, y: Any) -> Any:
        return torch_combine(y, weights, back)

    return _move("combine", shape, "x", run, torch_run, 2.0 * (shape.tokens + shape.rows) * shape.dim, **kwargs)


def _combine_gradients(shape: Shape, **kwargs: Any) -> Case:
    """The gradients of that sum: of the rows, and of the weights, for which the rows are read again; in bfloat16."""
    from moejax.ops.permute import combine_rows

    def run(way: str, order: Any, weights: jax.Array, y: jax.Array, dout: jax.Array) -> Any:
        dy, dweights = jax.vjp(lambda y, w: combine_rows(y, w, order, implementation=way), y, weights)[1](dout)
        return dy, dweights.astype(y.dtype)

    def torch_run(rows: Any, back: Any, weights: Any, y: Any, dout: Any) -> Any:
        token = rows // shape.active
        dy = dout[token] * weights.reshape(-1)[rows][:, None].to(y.dtype)
        return dy, (dout[token] * y).float().sum(1)[back].reshape(weights.shape)

    size = 2.0 * (shape.tokens + 2 * shape.rows) * shape.dim
    return _move("combine's gradients", shape, "xt", run, torch_run, size, **kwargs)
