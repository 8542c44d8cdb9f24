"""How near to the memory's speed are norms, RoPE and SwiGLU, and to the tensor cores' the linear cross-entropy?

KERNEL_NUMBERS section 4. SwiGLU, RoPE and RMSNorm forward are XLA's own fusions (tests/ops/test_fused_on_h200.py).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernels.case import Case, Way, compiled_torch

BF16 = jnp.bfloat16
EPS = 1e-6


def cases(dry: bool = False) -> list[Case]:
    """Give the grid; `dry`: one tiny row of each kind."""
    norms = [(8, 1024)] if dry else [(16384, 4096), (8192, 8192), (131072, 128)]
    elementwise = (64, 256) if dry else (16384, 14336)
    heads = (1, 16, 2, 64) if dry else (4, 4096, 32, 128)
    losses = [(64, 128, 512)]
    if not dry:
        losses = [(rows, dim, vocab) for rows in (2048, 8192) for dim in (2048, 4096) for vocab in (131072, 152064)]
    return [
        *(make(shape) for shape in norms for make in (_norm, _norm_backward)),
        _swiglu(elementwise),
        _swiglu_backward(elementwise),
        _rope(heads),
        *(make(*shape) for shape in losses for make in (_loss, _loss_backward)),
    ]


def _draw(*shapes: tuple[int, ...]) -> Way:
    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, len(shapes))
        return tuple(jax.random.normal(k, s, BF16) for k, s in zip(keys, shapes, strict=True))

    return make


def _memory_case(name: str, shape: tuple[int, ...], arrays: float, target: str, **kwargs: Any) -> Case:
    size = 1.0
    for extent in shape:
        size *= extent
    title = f"{name} {'x'.join(map(str, shape))}"
    moved = 2 * arrays * size
    kwargs["compiled"] = "mosaic" in kwargs["ways"] and shape[-1] >= 1024  # of narrower rows it takes none
    return Case("fused", title, flops=0.0, bytes=moved, target=target, matmul=False, **kwargs)


def _norm(shape: tuple[int, int]) -> Case:
    from moejax.ops.norm import rms_norm

    def torch_norm(x: Any, scale: Any) -> Any:
        import torch  # pyright: ignore[reportMissingImports]

        return torch.nn.functional.rms_norm(x, (x.shape[-1],), scale, EPS)

    return _memory_case(
        "RMSNorm forward",
        shape,
        2,
        ">= 0.93 of the copy's speed",
        make=_draw(shape, shape[1:]),
        ways={"xla": functools.partial(rms_norm, eps=EPS, implementation="xla")},
        torch_ways={"compile": compiled_torch(torch_norm)},
    )


def _norm_backward(shape: tuple[int, int]) -> Case:
    """x, scale, dy -> dx, dscale."""
    from moejax.ops.norm import rms_norm

    def xla(x: jax.Array, scale: jax.Array, dy: jax.Array) -> Any:
        return jax.vjp(lambda x, scale: rms_norm(x, scale, EPS, implementation="xla"), x, scale)[1](dy)

    def mosaic(x: jax.Array, scale: jax.Array, dy: jax.Array) -> Any:
        from pallas_kernels.rms_norm import rms_norm_bwd

        return rms_norm_bwd(x, scale, dy, EPS)

    def torch_gradients(x: Any, scale: Any, dy: Any) -> Any:
        wide, dnormed = x.float(), dy.float() * scale.float()
        inverse = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
        normed = wide * inverse
        dx = inverse * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
        return dx.to(x.dtype), (dy.float() * normed).sum(0).to(scale.dtype)

    return _memory_case(
        "RMSNorm backward",
        shape,
        3,
        ">= 0.88 of the copy's speed",
        make=_draw(shape, shape[1:], shape),
        ways={"mosaic": mosaic, "xla": xla},
        torch_ways={"compile": compiled_torch(torch_gradients)},
    )


def _swiglu(shape: tuple[int, int]) -> Case:
    from moejax.ops.swiglu import swiglu

    def torch_swiglu(gate: Any, up: Any) -> Any:
        import torch  # pyright: ignore[reportMissingImports]

        return torch.nn.functional.silu(gate) * up

    return _memory_case(
        "SwiGLU forward",
        shape,
        3,
        ">= 0.93 of the copy's speed",
        make=_draw(shape, shape),
        ways={"xla": swiglu},
        torch_ways={"compile": compiled_torch(torch_swiglu)},
    )


def _swiglu_backward(shape: tuple[int, int]) -> Case:
    """gate, up, dy -> dgate, dup."""
    from moejax.ops.swiglu import swiglu

    def xla(gate: jax.Array, up: jax.Array, dy: jax.Array) -> Any:
        return jax.vjp(swiglu, gate, up)[1](dy)

    def torch_gradients(gate: Any, up: Any, dy: Any) -> Any:
        gate, up, dy = gate.float(), up.float(), dy.float()
        slope = gate.sigmoid()
        return (dy * up * slope * (1 + gate * (1 - slope))).bfloat16(), (dy * gate * slope).bfloat16()

    return _memory_case(
        "SwiGLU backward",
        shape,
        5,
        ">= 0.88 of the copy's speed",
        make=_draw(shape, shape, shape),
        ways={"xla": xla},
        torch_ways={"compile": compiled_torch(torch_gradients)},
    )


def _rope(shape: tuple[int, int, int, int]) -> Case:
    """Forward; the gradient is the same rotation the other way."""
    from moejax.ops.rope import apply_rope, frequencies, rope_tables

    batch, length, _, dim = shape

    def make(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions_BT = jnp.broadcast_to(jnp.arange(length), (batch, length))
        return jax.random.normal(key, shape, BF16), rope_tables(positions_BT, frequencies(dim, 1e4))

    def torch_rope(x: Any, tables: Any) -> Any:
        import torch  # pyright: ignore[reportMissingImports]

        cos, sin = (t[:, :, None].to(x.dtype) for t in tables)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    return _memory_case(
        "RoPE",
        shape,
        2 + 2 / shape[2],
        ">= 0.93 of the copy's speed",
        make=make,
        ways={"xla": apply_rope},
        torch_ways={"compile": compiled_torch(torch_rope)},
    )


def _draw_loss(rows: int, dim: int, vocab: int, key: jax.Array) -> tuple[jax.Array, ...]:
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (rows, dim), BF16)
    w = jax.random.normal(keys[1], (dim, vocab), BF16) * jnp.asarray(dim**-0.5, BF16)
    return x, w, jax.random.randint(keys[2], (rows,), 0, vocab, jnp.int32)


def _torch_loss(x: Any, w: Any, targets: Any) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    return torch.nn.functional.cross_entropy((x @ w).float(), targets.long(), reduction="none")


def _whole(x: jax.Array, w: jax.Array, targets: jax.Array) -> jax.Array:
    """Hold all logits: the twin, and a peer."""
    from moejax.ops.cross_entropy import cross_entropy

    return cross_entropy(jnp.matmul(x, w, preferred_element_type=jnp.float32), targets)


def _losses() -> dict[str, Way]:
    from moejax.ops.cross_entropy import linear_cross_entropy

    blocked = {name: functools.partial(linear_cross_entropy, implementation=name) for name in ("mosaic", "xla")}
    return blocked | {"all logits": _whole}


def _loss(rows: int, dim: int, vocab: int) -> Case:
    return Case(
        "fused",
        f"linear cross-entropy forward {rows}x{dim}x{vocab}",
        functools.partial(_draw_loss, rows, dim, vocab),
        _losses(),
        flops=2.0 * rows * dim * vocab,
        bytes=2.0 * (rows * dim + dim * vocab) + 4.0 * rows,
        torch_ways={"compile": compiled_torch(_torch_loss)},
        target=">= 650 TFLOP/s",
        compiled=vocab == 131072,
    )


def _loss_backward(rows: int, dim: int, vocab: int) -> Case:
    """Forward and backward: the logits twice, dx and dw."""

    def gradients(loss: Way) -> Way:
        def run(x: jax.Array, w: jax.Array, targets: jax.Array) -> Any:
            return jax.grad(lambda x, w: loss(x, w, targets).mean(), (0, 1))(x, w)

        return run

    def torch_gradients(x: Any, w: Any, targets: Any) -> Any:
        import torch  # pyright: ignore[reportMissingImports]

        leaves = [t.detach().requires_grad_() for t in (x, w)]
        return torch.autograd.grad(torch_loss(*leaves, targets).mean(), leaves)

    torch_loss = compiled_torch(_torch_loss)
    return Case(
        "fused",
        f"linear cross-entropy forward and backward {rows}x{dim}x{vocab}",
        functools.partial(_draw_loss, rows, dim, vocab),
        {name: gradients(loss) for name, loss in _losses().items()},
        flops=8.0 * rows * dim * vocab,
        bytes=4.0 * (rows * dim + dim * vocab) + 4.0 * rows,
        torch_ways={"compile": torch_gradients},
        target=">= 740 TFLOP/s backward, <= 1.2 GB above the outputs",
        compiled=False,
    )
