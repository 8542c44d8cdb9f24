"""How fast are matmuls of rows sorted by expert? KERNEL_NUMBERS section 3: products and gated experts.

Whole layers, from tokens on, are in `moe_layer`, moves of rows in `moe_permute`; `cases` gives all of the family.
`lax.ragged_dot` on a GPU is a dense product over all experts: it is a peer only where that fits.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernels import moe_layer, moe_permute
from experiments.kernels.case import Case, Way
from experiments.kernels.moe_layer import (
    LAYERS,
    Shape,
    choices,
    experts_by,
    operands,
    tokamax_dot,
    torch_experts,
    torch_matmul,
)

DENSE_BYTES = 8 << 30
"""of zero-padded rows, one copy for each expert: more than this and ragged_dot is left out"""

Matmul = Callable[[Any, Any, Any], Any]


def cases(dry: bool = False) -> list[Case]:
    """Give the grid; `dry`: tiny rows that run every kernel."""
    kinds = (_product, _rows_gradient, _weights_gradient, _forward, _both)
    if dry:
        found = [make(Shape(64, 64, 4, 2, 35, skew=1.0)) for make in (_product, _weights_gradient, _both)]
        return found + moe_layer.cases(dry) + moe_permute.cases(dry)
    wide = Shape(6144, 4096, 256, 8, 32768)  # of the published grouped matmuls
    found = [_product(wide, compiled=False), _product(replace(wide, skew=1.0), compiled=False)]
    for layer in LAYERS:
        for tokens in (8192, 32768):
            for skew in (0.0, 1.0):
                shape = replace(layer, tokens=tokens, skew=skew)
                # The code that differs: tiles 256 columns wide, and 192; all gradients' kernels are in the last kind.
                once = tokens == 32768 and not skew
                new_code = {768: (_product, _rows_gradient, _forward), 1024: (_forward, _both)}.get(layer.ffn, ())
                found += [make(shape, compiled=once and make in new_code) for make in kinds]
        for tokens in (1, 8, 32, 128):
            for skew in (0.0, 1.0) if tokens > 1 else (0.0,):
                compiled = not skew and (layer.ffn, tokens) in ((768, 1), (768, 128), (14336, 1), (14336, 32))
                found.append(_forward(replace(layer, tokens=tokens, skew=skew), compiled=compiled))
    return found + moe_layer.cases(dry) + moe_permute.cases(dry)


def _make(shape: Shape, wanted: str, key: jax.Array) -> tuple[jax.Array, ...]:
    """Give the wanted operands, by letter, and last the group sizes."""
    choose, draw = jax.random.split(key)
    sizes = jnp.zeros(shape.experts, jnp.int32).at[choices(shape, choose).reshape(-1)].add(1)
    return *operands(shape, wanted, draw), sizes


def _bytes(shape: Shape, wide: int, narrow: int, weights: float) -> float:
    """Count arrays of rows, `wide` of dim and `narrow` of ffn columns, and matrices of the experts with rows."""
    return 2.0 * shape.rows * (wide * shape.dim + narrow * shape.ffn) + shape.weight_bytes(weights)


def _case(
    kind: str, shape: Shape, wanted: str, ways: Mapping[str, Way], products: int, target: str, **kwargs: Any
) -> Case:
    """Count 2 d n FLOPs for each row and product."""
    flops = 2.0 * products * shape.rows * shape.dim * shape.ffn
    make = functools.partial(_make, shape, wanted)
    return Case("moe", shape.title(kind), make, ways, flops=flops, target=target, **kwargs)


# --- who multiplies


def _op(way: str) -> Matmul:
    def matmul(x: Any, w: Any, sizes: Any) -> Any:
        from moejax.ops.grouped_matmul import grouped_matmul

        return grouped_matmul(x, w, sizes, implementation=way)

    return matmul


def _pallas(x: Any, w: Any, sizes: Any) -> Any:
    """It has no gradient, and its code grows with the experts."""
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    return ragged_dot(
        x, w, group_sizes=sizes, block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=4
    )


def _torch(x: Any, w: Any, sizes: Any) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    return torch_matmul(x, w, sizes.cumsum(0).to(torch.int32))


def _peers(shape: Shape) -> dict[str, Matmul]:
    """Give the peers that can be differentiated."""
    peers: dict[str, Matmul] = {"tokamax": tokamax_dot}
    if 2 * shape.experts * shape.rows * max(shape.dim, shape.ffn) <= DENSE_BYTES:
        peers["ragged_dot"] = jax.lax.ragged_dot
    return peers


def _all(shape: Shape) -> dict[str, Matmul]:
    return {way: _op(way) for way in ("mosaic", "triton", "xla")} | _peers(shape)


# --- what is multiplied


def _product(shape: Shape, **kwargs: Any) -> Case:
    """Rows by weights: [R, d] by [E, d, n]."""
    ways = _all(shape) | {"pallas ragged_dot": _pallas}
    size = _bytes(shape, 1, 1, 1)
    return _case(
        "product", shape, "xi", ways, 1, ">= 660 TFLOP/s", bytes=size, torch_ways={"_grouped_mm": _torch}, **kwargs
    )


def _rows_gradient(shape: Shape, **kwargs: Any) -> Case:
    """The gradient of the rows: [R, n] by [E, d, n], transposed where it lies."""

    def gradient(matmul: Matmul, dy: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        zeros = jnp.zeros((shape.rows, shape.dim), dy.dtype)
        return jax.vjp(lambda x: matmul(x, w, sizes), zeros)[1](dy)[0]

    ways = {name: functools.partial(gradient, matmul) for name, matmul in _all(shape).items()}
    torch_ways = {"_grouped_mm": lambda dy, w, sizes: _torch(dy, w.transpose(-2, -1), sizes)}
    size = _bytes(shape, 1, 1, 1)
    return _case("rows' gradient", shape, "hi", ways, 1, ">= 660 TFLOP/s", bytes=size, torch_ways=torch_ways, **kwargs)


def _weights_gradient(shape: Shape, **kwargs: Any) -> Case:
    """The gradient of the weights: [R, d]^T by [R, n] for each expert."""

    def gradient(matmul: Matmul, x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
        zeros = jnp.zeros((shape.experts, shape.dim, shape.ffn), x.dtype)
        return jax.vjp(lambda w: matmul(x, w, sizes), zeros)[1](dy)[0]

    ways = {name: functools.partial(gradient, matmul) for name, matmul in _all(shape).items()}
    torch_ways = {"_grouped_mm": lambda x, dy, sizes: _torch(x.t(), dy, sizes)}
    size = _bytes(shape, 1, 1, shape.experts / shape.hit())  # those without rows are written too
    return _case(
        "weights' gradient", shape, "xh", ways, 1, ">= 660 TFLOP/s", bytes=size, torch_ways=torch_ways, **kwargs
    )


def _torch_layer(*inputs: Any) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    x, gate, up, down, sizes = inputs
    return torch_experts(x, gate, up, down, sizes.cumsum(0).to(torch.int32))


def _layers(shape: Shape) -> dict[str, Way]:
    def ours(way: str) -> Way:
        def layer(*inputs: jax.Array) -> jax.Array:
            from moejax.ops.grouped_matmul import expert_swiglu

            return expert_swiglu(*inputs, implementation=way)

        return layer

    peers = {name: functools.partial(experts_by, matmul) for name, matmul in _peers(shape).items()}
    return {way: ours(way) for way in ("mosaic", "triton", "xla")} | peers


def _forward(shape: Shape, **kwargs: Any) -> Case:
    """The gated experts on sorted rows."""
    decode = shape.tokens <= 128
    read = f">= {60 if shape.tokens < 32 else 85} % of read bandwidth"
    return _case(
        "decode experts" if decode else "experts",
        shape,
        "xiio",
        _layers(shape),
        3,
        read if decode else ">= 520 TFLOP/s",
        bytes=_bytes(shape, 2, 0, 3),
        torch_ways={"_grouped_mm": _torch_layer},
        **kwargs,
    )


def _both(shape: Shape, **kwargs: Any) -> Case:
    """The gated experts and their gradients, of the rows and of all weights."""

    def both(layer: Way, *inputs: jax.Array) -> Any:
        *operands, dy, sizes = inputs
        y, vjp = jax.vjp(lambda *operands: layer(*operands, sizes), *operands)
        return y, *vjp(dy)

    def torch_both(*inputs: Any) -> Any:
        import torch  # pyright: ignore[reportMissingImports]

        *operands, dy, sizes = inputs
        leaves = [x.detach().requires_grad_() for x in operands]
        y = _torch_layer(*leaves, sizes)
        return y, *torch.autograd.grad(y, leaves, dy)

    ways = {name: functools.partial(both, layer) for name, layer in _layers(shape).items()}
    size = _bytes(shape, 4, 2, 3 + 3 + 3 * shape.experts / shape.hit())
    return _case(
        "experts and gradients",
        shape,
        "xiiox",
        ways,
        9,
        ">= 450 TFLOP/s",
        bytes=size,
        torch_ways={"_grouped_mm": torch_both},
        **kwargs,
    )
