"""How fast is lightning attention? KERNEL_NUMBERS section 5: 64k tokens, 32 heads, against its own chunked XLA form and
against cuDNN's softmax attention, which is another function: it has rows of its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernels.case import Case, Way

TOKENS, HEADS = 65536, 32
Shape = tuple[int, int, int, int]


def cases(dry: bool = False) -> list[Case]:
    """Give the grid; `dry`: one tiny row of each kind."""
    if dry:
        return [make((1, 70, 2, 64)) for make in (_forward, _backward)]
    found = []
    for dim in (64, 128):
        for length in (1024, 4096, 16384, 65536):
            shape = (TOKENS // length, length, HEADS, dim)
            compiled = length in (1024, 65536)  # one pass, and two
            found += [_forward(shape, compiled=compiled), _backward(shape, compiled=compiled), _softmax(shape)]
    packed = (8, 8192, HEADS, 128)
    return [*found, _forward(packed, packed=True), _backward(packed, packed=True)]


def _case(name: str, shape: Shape, arrays: int, flops: float, **kwargs: Any) -> Case:
    batch, length, heads, dim = shape
    size = batch * length * heads * dim
    name = f"{name} {batch}x{length} heads {heads} D={dim}"
    return Case("lightning", name, flops=flops * size, bytes=2.0 * arrays * size, **kwargs)


def make_inputs(shape: Shape, backward: bool, packed: bool, key: jax.Array) -> tuple[Any, ...]:
    """Give q, k, v, the decay and the first state; packed: document ids; for the backward do and dstate."""
    batch, length, heads, dim = shape
    keys = jax.random.split(key, 6)
    q, k, v, do = (jax.random.normal(each, shape, jnp.bfloat16) for each in keys[:4])
    states = [jax.random.normal(each, (batch, heads, dim, dim), jnp.float32) for each in keys[4:]]
    decay_N = -jnp.exp2(-8.0 * jnp.arange(1, heads + 1) / heads)
    inputs = (q, k, v, decay_N, states[0])
    if packed:
        inputs += (jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32) // 1000, (batch, length)),)
    return (*inputs, do, states[1]) if backward else inputs


def _forward(shape: Shape, compiled: bool = True, packed: bool = False) -> Case:
    """Outputs and the last state, compared in the operands' precision; per value 4 D FLOPs and twice a chunk of 64."""
    from moejax.ops.linear_attention import linear_attention

    def attend(way: str) -> Way:
        def run(q: jax.Array, *rest: jax.Array) -> Any:
            return jax.tree.map(lambda x: x.astype(q.dtype), linear_attention(q, *rest, implementation=way))

        return run

    ways = {name: attend(name) for name in ("mosaic", "xla")}
    make = functools.partial(make_inputs, shape, False, packed)
    title = "forward packed" if packed else "forward"
    target = ">= 2.2 TB/s; faster than cuDNN softmax from 2k"
    return _case(title, shape, 4, 4 * shape[-1] + 128, make=make, ways=ways, target=target, compiled=compiled)


def _backward(shape: Shape, compiled: bool = True, packed: bool = False) -> Case:
    """dq, dk, dv and the first state's gradient: q, k, v and do come in, three gradients go out."""

    def gradients(way: str) -> Way:
        def run(q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, state: jax.Array, *rest: jax.Array) -> Any:
            from moejax.ops.linear_attention import linear_attention

            *document, do, dstate = rest

            def attend(q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array) -> Any:
                return linear_attention(q, k, v, decay, state, *document, implementation=way)

            return jax.tree.map(lambda x: x.astype(q.dtype), jax.vjp(attend, q, k, v, state)[1]((do, dstate)))

        return run

    make = functools.partial(make_inputs, shape, True, packed)
    title = "backward packed" if packed else "backward"
    ways = {name: gradients(name) for name in ("mosaic", "xla")}
    target = ">= 1.5 TB/s"
    return _case(title, shape, 7, 3 * (4 * shape[-1] + 128), make=make, ways=ways, target=target, compiled=compiled)


def _softmax(shape: Shape) -> Case:
    """Causal softmax attention of cuDNN at the same shape."""

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        return make_inputs(shape, False, False, key)[:3]

    def softmax(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    return _case("softmax forward", shape, 4, 2 * shape[1], make=make, ways={"cudnn": softmax}, compiled=False)
