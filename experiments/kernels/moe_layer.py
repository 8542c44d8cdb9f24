"""How fast is a whole layer of experts, from tokens and their choices to their sums? KERNEL_NUMBERS section 3.

Sort, gather, gated experts, weighted sum; the router stays outside. Here is also what the family's rows share.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels.case import Case, Way, compiled_torch

EXPANDED_BYTES = 100e9
"""of rows, a copy for each expert: more than this and ragged_dot is left out"""


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

    def weight_bytes(self, matrices: float) -> float:
        """Count `matrices` of [d, n] for each expert with rows."""
        return 2.0 * matrices * self.hit() * self.dim * self.ffn


LAYERS = (
    Shape(2048, 1024, 64, 8),  # OLMoE
    Shape(2048, 768, 128, 8),  # Qwen3-30B-A3B
    Shape(1536, 256, 128, 8),
    Shape(4096, 512, 128, 8),
    Shape(4096, 14336, 8, 2),  # Mixtral 8x7B
)
TINY = Shape(64, 64, 4, 2, 9, skew=1.0)


def cases(dry: bool = False) -> list[Case]:
    """Give the grid; `dry`: a tiny row."""
    if dry:
        return [_gradients(TINY)]
    found = []
    for layer in LAYERS:
        qwen = layer.ffn == 768
        for tokens in (8192, 32768):
            for skew in (0.0, 1.0):
                shape, compiled = replace(layer, tokens=tokens, skew=skew), qwen and tokens == 32768 and not skew
                found += [_forward(shape, compiled=False), _gradients(shape, compiled=compiled)]
        for tokens in (1, 8, 32, 128):
            for skew in (0.0, 1.0) if tokens > 1 else (0.0,):
                shape = replace(layer, tokens=tokens, skew=skew)
                found.append(_forward(shape, compiled=qwen and tokens == 32 and not skew))
    return found


def choices(shape: Shape, key: jax.Array) -> jax.Array:
    """Let every token choose different experts, [M, A]; the popular ones do not lie side by side."""
    choose, mix = jax.random.split(key)
    scores = jax.random.gumbel(choose, (shape.tokens, shape.experts)) + jnp.log(shape.popularity)
    ranks = jax.lax.top_k(scores, shape.active)[1]
    return jax.random.permutation(mix, shape.experts).astype(jnp.int32)[ranks]


def operands(shape: Shape, wanted: str, key: jax.Array) -> list[jax.Array]:
    """Draw operands by letter: rows x [R, d], h [R, n], tokens t [M, d], weights i [E, d, n], o [E, n, d]."""
    d, n, e, r = shape.dim, shape.ffn, shape.experts, shape.rows
    shapes = {"x": (r, d), "h": (r, n), "t": (shape.tokens, d), "i": (e, d, n), "o": (e, n, d)}
    found = []
    for letter, each in zip(wanted, jax.random.split(key, len(wanted)), strict=True):
        scale = shapes[letter][1] ** -0.5 if letter in "io" else 1.0
        found.append(jax.random.normal(each, shapes[letter], jnp.bfloat16) * jnp.bfloat16(scale))
    return found


def choice_weights(shape: Shape, key: jax.Array) -> jax.Array:
    """Draw the weights of every token's choices, [M, A]; they sum to one."""
    return jax.nn.softmax(jax.random.normal(key, (shape.tokens, shape.active), jnp.float32))


# --- who multiplies


def tokamax_dot(x: Any, w: Any, sizes: Any) -> Any:
    """Multiply by tokamax."""
    import tokamax  # pyright: ignore[reportMissingImports]

    return tokamax.ragged_dot(x, w, sizes, implementation="mosaic")


def experts_by(matmul: Callable[[Any, Any, Any], Any], x: Any, gate: Any, up: Any, down: Any, sizes: Any) -> Any:
    """Run gated experts on sorted rows by a peer's matmul."""
    return matmul(jax.nn.silu(matmul(x, gate, sizes)) * matmul(x, up, sizes), down, sizes)


def torch_matmul(x: Any, w: Any, ends: Any) -> Any:
    """Multiply by torch; `ends` are the sizes' running sums, int32."""
    import torch  # pyright: ignore[reportMissingImports]

    return torch._grouped_mm(x, w, offs=ends)


def torch_experts(x: Any, gate: Any, up: Any, down: Any, ends: Any) -> Any:
    """Run gated experts on sorted rows by torch."""
    from torch.nn.functional import silu  # pyright: ignore[reportMissingImports]

    return torch_matmul(silu(torch_matmul(x, gate, ends)) * torch_matmul(x, up, ends), down, ends)


def _torch_layer(x: Any, weights: Any, gate: Any, up: Any, down: Any, experts: Any) -> Any:
    """Sort, gather, multiply and sum as transformers' grouped_mm experts do, the rows gathered once, not twice."""
    import torch  # pyright: ignore[reportMissingImports]

    chosen, active = experts.reshape(-1), experts.shape[1]
    order = torch.argsort(chosen, stable=True)
    back = torch.argsort(order)
    sizes = torch.histc(chosen.float(), gate.shape[0], 0, gate.shape[0] - 1)  # bincount would wait for the GPU
    y = torch_experts(x[order // active], gate, up, down, sizes.cumsum(0).to(torch.int32))
    return torch_combine(y, weights, back)


def torch_combine(y: Any, weights: Any, back: Any) -> Any:
    """Sum each token's rows by weight; `back` are its choices' places."""
    return (y[back].reshape(*weights.shape, -1) * weights.to(y.dtype)[..., None]).sum(1)


# --- whole layers


def _layers(shape: Shape, backward: bool) -> dict[str, Way]:
    """Give the ways: functions of tokens, weights of the choices, three of the experts, and the choices."""

    def layer(experts: Way, movers: str, *inputs: jax.Array) -> jax.Array:
        from moejax.ops.permute import combine_rows, gather_rows, sort_by_expert

        x, weights, gate, up, down, chosen = inputs
        order = sort_by_expert(chosen, shape.experts)
        rows = gather_rows(x, order, shape.active, implementation=movers)
        y = experts(rows, gate, up, down, order.group_sizes_E)
        return combine_rows(y, weights, order, implementation=movers)

    def ours(way: str) -> Way:
        def experts(*inputs: jax.Array) -> jax.Array:
            from moejax.ops.grouped_matmul import expert_swiglu

            return expert_swiglu(*inputs, implementation=way)

        return functools.partial(layer, experts, way)

    ways = {way: ours(way) for way in ("mosaic", "triton", "xla", "ragged_dot")}
    if _expanded_bytes(shape, backward) > EXPANDED_BYTES:
        ways.pop("ragged_dot")
    return ways | {"tokamax": functools.partial(layer, functools.partial(experts_by, tokamax_dot), "xla")}


def _expanded_bytes(shape: Shape, backward: bool) -> float:
    """Count what ragged_dot holds: rows for every expert, one array forward, about ten backward.

    As compiled for an H200 with jax 0.11.2: 17.5 and 129 GB for OLMoE's layer and 8192 tokens.
    """
    dims = 5 * (shape.dim + shape.ffn) if backward else max(shape.dim, shape.ffn)
    return 2.0 * shape.experts * shape.rows * dims


def _make(shape: Shape, backward: bool, key: jax.Array) -> tuple[jax.Array, ...]:
    keys = jax.random.split(key, 3)
    x, *rest = operands(shape, "tiiot" if backward else "tiio", keys[0])
    return x, choice_weights(shape, keys[1]), *rest, choices(shape, keys[2])


def _forward(shape: Shape, **kwargs: Any) -> Case:
    decode = shape.tokens <= 128
    read = f">= {60 if shape.tokens < 32 else 85} % of read bandwidth"
    return Case(
        "moe",
        shape.title("whole decode layer" if decode else "whole layer"),
        functools.partial(_make, shape, False),
        _layers(shape, backward=False),
        flops=6.0 * shape.rows * shape.dim * shape.ffn,
        bytes=shape.weight_bytes(3) + 4.0 * shape.tokens * shape.dim,
        torch_ways=_torch_ways(_torch_layer),
        target=read if decode else _target(shape, False),
        **kwargs,
    )


def _gradients(shape: Shape, **kwargs: Any) -> Case:
    """The layer and its gradients: of tokens, their weights and the experts'; compared in the tokens' precision."""

    def both(layer: Way, *inputs: jax.Array) -> Any:
        *leaves, dy, chosen = inputs
        y, vjp = jax.vjp(lambda *leaves: layer(*leaves, chosen), *leaves)
        return jax.tree.map(lambda x: x.astype(dy.dtype), (y, *vjp(dy)))

    def torch_both(*inputs: Any) -> Any:
        import torch  # pyright: ignore[reportMissingImports]

        *leaves, dy, chosen = inputs
        leaves = [x.detach().requires_grad_() for x in leaves]
        y = _torch_layer(*leaves, chosen)
        return y, *torch.autograd.grad(y, leaves, dy)

    return Case(
        "moe",
        shape.title("whole layer and gradients"),
        functools.partial(_make, shape, True),
        {name: functools.partial(both, layer) for name, layer in _layers(shape, backward=True).items()},
        flops=18.0 * shape.rows * shape.dim * shape.ffn,
        bytes=shape.weight_bytes(6 + 3 * shape.experts / shape.hit()) + 8.0 * shape.tokens * shape.dim,
        torch_ways=_torch_ways(torch_both),
        target=_target(shape, True),
        **kwargs,
    )


def _torch_ways(way: Way) -> Mapping[str, Way]:
    return {"_grouped_mm": way, "_grouped_mm compiled": compiled_torch(way)}


def _target(shape: Shape, backward: bool) -> str:
    """Give the published figures of SonicMoE on an H100, and ours for Qwen3's shape; gradients beside the forward."""
    forward, alone = {256: (361, 402), 512: (502, 511), 768: (520, 450)}.get(shape.ffn, (520, 450))
    if not backward:
        return f">= {forward} TFLOP/s"
    both = alone if shape.ffn >= 768 else round(3 / (1 / forward + 2 / alone))
    return f">= {both} TFLOP/s, >= 1.5 x the best peer"
