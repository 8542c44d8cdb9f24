"""How fast are matmuls of rows sorted by expert? KERNEL_NUMBERS section 3: products, the gated layer, and decode.

Rows arrive sorted; the sort, the gather and the weighted sum are not in these rows. `lax.ragged_dot` on a GPU is a
dense product over all experts: it is a peer only where that fits.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels.case import Case, Way

DENSE_BYTES = 8 << 30
"""of zero-padded rows, one copy for each expert: more than this and ragged_dot is left out"""

Matmul = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Shape:
    """A layer, and the tokens that reach it."""

    dim: int
    ffn: int
    experts: int
    active: int
    """experts of a token"""
    tokens: int = 0
    skew: float = 0.0
    """exponent of the experts' popularity by rank: 0 is uniform, 1 is Zipf's law"""

    @property
    def rows(self) -> int:
        """Count the rows."""
        return self.tokens * self.active

    @property
    def popularity(self) -> np.ndarray:
        """Give each expert's share of the choices, were one expert chosen."""
        weight = np.arange(1, self.experts + 1) ** -self.skew
        return weight / weight.sum()

    def title(self, kind: str) -> str:
        """Name the row."""
        spread = "zipf" if self.skew else "uniform"
        return f"{kind} d={self.dim} n={self.ffn} E={self.experts} k={self.active} T={self.tokens} {spread}"

    def hit(self) -> int:
        """Count the experts that get rows, in the mean of twenty draws."""
        tokens = min(self.tokens, 512)  # more hit all that matter
        noise = np.random.default_rng(0).gumbel(size=(20, tokens, self.experts))
        chosen = np.argsort(-(noise + np.log(self.popularity)), axis=-1)[..., : self.active].reshape(20, -1)
        return round(np.mean([len(np.unique(each)) for each in chosen]))

    def bytes(self, wide: int, narrow: int, weights: float) -> float:
        """Count arrays of rows, `wide` of dim and `narrow` of ffn columns, and of the weights of experts with rows."""
        rows = self.rows * (wide * self.dim + narrow * self.ffn)
        return 2.0 * (rows + weights * self.hit() * self.dim * self.ffn)


LAYERS = (
    Shape(2048, 1024, 64, 8),  # OLMoE
    Shape(2048, 768, 128, 8),  # Qwen3-30B-A3B
    Shape(1536, 256, 128, 8),
    Shape(4096, 512, 128, 8),
    Shape(4096, 14336, 8, 2),  # Mixtral 8x7B
)


def cases(dry: bool = False) -> list[Case]:
    """Give the grid; `dry`: tiny rows that run every kernel."""
    kinds = (_product, _rows_gradient, _weights_gradient, _forward, _both)
    if dry:
        return [make(Shape(64, 64, 4, 2, 35, skew=1.0)) for make in (_product, _weights_gradient, _both)]
    wide = Shape(6144, 4096, 256, 8, 32768)  # of the published grouped matmuls
    found = [_product(wide, compiled=False), _product(replace(wide, skew=1.0), compiled=False)]
    for layer in LAYERS:
        for tokens in (8192, 32768):
            for skew in (0.0, 1.0):
                shape = replace(layer, tokens=tokens, skew=skew)
                # The code that differs: tiles 256 columns wide, and 192.
                compiled = tokens == 32768 and not skew and layer.ffn in (1024, 768)
                found += [make(shape, compiled=compiled) for make in kinds]
        for tokens in (1, 8, 32, 128):
            for skew in (0.0, 1.0) if tokens > 1 else (0.0,):
                compiled = not skew and layer.ffn in (768, 14336)
                found.append(_forward(replace(layer, tokens=tokens, skew=skew), compiled=compiled))
    return found


def _sizes(shape: Shape, key: jax.Array) -> jax.Array:
    """Let every token choose different experts, and count; the popular ones do not lie side by side."""
    choose, mix = jax.random.split(key)
    scores = jax.random.gumbel(choose, (shape.tokens, shape.experts)) + jnp.log(shape.popularity)
    chosen = jax.lax.top_k(scores, shape.active)[1]
    sizes = jnp.zeros(shape.experts, jnp.int32).at[chosen.reshape(-1)].add(1)
    return jax.random.permutation(mix, sizes)


def _make(shape: Shape, wanted: str, key: jax.Array) -> tuple[jax.Array, ...]:
    """Give the wanted operands, by letter, and last the group sizes."""
    d, n, e, r = shape.dim, shape.ffn, shape.experts, shape.rows
    shapes = {"x": (r, d), "h": (r, n), "i": (e, d, n), "o": (e, n, d)}
    keys = jax.random.split(key, len(wanted) + 1)
    operands = []
    for letter, each in zip(wanted, keys[1:], strict=True):
        scale = shapes[letter][1] ** -0.5 if letter in "io" else 1.0
        operands.append(jax.random.normal(each, shapes[letter], jnp.bfloat16) * jnp.bfloat16(scale))
    return *operands, _sizes(shape, keys[0])


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


def _tokamax(x: Any, w: Any, sizes: Any) -> Any:
    import tokamax  # pyright: ignore[reportMissingImports]

    return tokamax.ragged_dot(x, w, sizes, implementation="mosaic")


def _pallas(x: Any, w: Any, sizes: Any) -> Any:
    """It has no gradient, and its code grows with the experts."""
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    return ragged_dot(
        x, w, group_sizes=sizes, block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=4
    )


def _torch(x: Any, w: Any, sizes: Any) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    return torch._grouped_mm(x, w, offs=sizes.cumsum(0).to(torch.int32))


def _peers(shape: Shape) -> dict[str, Matmul]:
    """Give the peers that can be differentiated."""
    peers: dict[str, Matmul] = {"tokamax": _tokamax}
    if 2 * shape.experts * shape.rows * max(shape.dim, shape.ffn) <= DENSE_BYTES:
        peers["ragged_dot"] = jax.lax.ragged_dot
    return peers


def _all(shape: Shape) -> dict[str, Matmul]:
    return {way: _op(way) for way in ("mosaic", "triton", "xla")} | _peers(shape)


# --- what is multiplied


def _product(shape: Shape, **kwargs: Any) -> Case:
    """Rows by weights: [R, d] by [E, d, n]."""
    ways = _all(shape) | {"pallas ragged_dot": _pallas}
    size = shape.bytes(1, 1, 1)
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
    size = shape.bytes(1, 1, 1)
    return _case("rows' gradient", shape, "hi", ways, 1, ">= 660 TFLOP/s", bytes=size, torch_ways=torch_ways, **kwargs)


def _weights_gradient(shape: Shape, **kwargs: Any) -> Case:
    """The gradient of the weights: [R, d]^T by [R, n] for each expert."""

    def gradient(matmul: Matmul, x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
        zeros = jnp.zeros((shape.experts, shape.dim, shape.ffn), x.dtype)
        return jax.vjp(lambda w: matmul(x, w, sizes), zeros)[1](dy)[0]

    ways = {name: functools.partial(gradient, matmul) for name, matmul in _all(shape).items()}
    torch_ways = {"_grouped_mm": lambda x, dy, sizes: _torch(x.t(), dy, sizes)}
    size = shape.bytes(1, 1, shape.experts / shape.hit())  # those without rows are written too
    return _case(
        "weights' gradient", shape, "xh", ways, 1, ">= 660 TFLOP/s", bytes=size, torch_ways=torch_ways, **kwargs
    )


def _layer(matmul: Matmul, x: Any, gate: Any, up: Any, down: Any, sizes: Any) -> Any:
    return matmul(jax.nn.silu(matmul(x, gate, sizes)) * matmul(x, up, sizes), down, sizes)


def _torch_layer(*inputs: Any) -> Any:
    from torch.nn.functional import silu  # pyright: ignore[reportMissingImports]

    x, gate, up, down, sizes = inputs
    return _torch(silu(_torch(x, gate, sizes)) * _torch(x, up, sizes), down, sizes)


def _layers(shape: Shape) -> dict[str, Way]:
    def ours(way: str) -> Way:
        def layer(*inputs: jax.Array) -> jax.Array:
            from moejax.ops.grouped_matmul import expert_swiglu

            return expert_swiglu(*inputs, implementation=way)

        return layer

    peers = {name: functools.partial(_layer, matmul) for name, matmul in _peers(shape).items()}
    return {way: ours(way) for way in ("mosaic", "triton", "xla")} | peers


def _forward(shape: Shape, **kwargs: Any) -> Case:
    """The gated layer of sorted rows."""
    decode = shape.tokens <= 128
    read = f">= {60 if shape.tokens < 32 else 85} % of read bandwidth"
    return _case(
        "decode layer" if decode else "layer",
        shape,
        "xiio",
        _layers(shape),
        3,
        read if decode else ">= 520 TFLOP/s",
        bytes=shape.bytes(2, 0, 3),
        torch_ways={"_grouped_mm": _torch_layer},
        **kwargs,
    )


def _both(shape: Shape, **kwargs: Any) -> Case:
    """The gated layer and its gradients, of the rows and of all weights."""

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
    size = shape.bytes(4, 2, 3 + 3 + 3 * shape.experts / shape.hit())
    return _case(
        "layer and gradients",
        shape,
        "xiiox",
        ways,
        9,
        ">= 450 TFLOP/s",
        bytes=size,
        torch_ways={"_grouped_mm": torch_both},
        **kwargs,
    )
