"""How fast is attention over whole sequences? KERNEL_NUMBERS section 1, wider keys and packed documents beside it.

A backward row is a forward and its backward: that is what every peer can be asked for. FLOPs are those of the
recomputing algorithm, 2 products forward and 5 backward, though our deterministic backward makes 7.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels.case import Case, Way

TOKENS = 16384
"""in a batch, or one sequence where that is longer"""


@dataclass(frozen=True)
class Shape:
    """A batch of sequences that attend to themselves."""

    length: int
    heads: int = 16
    kv_heads: int = 16
    dim: int = 128
    value_dim: int = 128
    causal: bool = True
    window: int | None = None
    documents: int = 1
    """packed into each sequence, of unequal lengths"""
    tokens: int = TOKENS

    @property
    def batch(self) -> int:
        """Count the sequences."""
        return max(1, self.tokens // self.length)

    def lengths(self) -> np.ndarray:
        """Give the lengths of a sequence's documents: the first is about as long as all others."""
        cuts = self.length - self.length // 2 ** np.arange(1, self.documents)
        return np.diff(np.sort(np.concatenate([[0], cuts, [self.length]])))

    def pairs(self) -> float:
        """Count the pairs of a query and a key that it sees, of a head."""
        if not self.causal:
            return float(self.batch) * self.length**2
        runs = (np.minimum(np.arange(1, n + 1), self.window or n).sum() for n in self.lengths())
        return float(self.batch * sum(runs))

    def title(self, kind: str) -> str:
        """Name the row."""
        seen = "causal" if self.causal else "full"
        seen += f" window={self.window}" if self.window else ""
        seen += f" {self.documents} documents" if self.documents > 1 else ""
        dims = f"{self.dim}" if self.dim == self.value_dim else f"{self.dim}/{self.value_dim}"
        return f"{kind} {seen} S={self.length} D={dims} heads {self.heads}/{self.kv_heads}"


def cases(dry: bool = False) -> list[Case]:
    """Give the grid; `dry`: two tiny rows."""
    if dry:
        tiny = Shape(100, 2, 1, 64, 64, tokens=100)
        return [_case(tiny, backward=False), _case(tiny, backward=True)]
    found = []
    for dim in (128, 64):
        for heads, kv_heads in ((16, 16), (64, 8)):
            for causal in (True, False):
                for length in (1024, 4096, 16384, 32768):
                    shape = Shape(length, heads, kv_heads, dim, dim, causal)
                    new_code = length == 4096 and (heads == 16 or causal) and (dim == 128 or causal)
                    found += [_case(shape, backward, compiled=new_code) for backward in (False, True)]
    beside = (
        Shape(4096, dim=192),
        Shape(4096, 64, 8, documents=6, window=1024),
        Shape(4096, documents=6),
        Shape(4001, causal=False),
    )
    for shape in beside:
        found += [_case(shape, backward) for backward in (False, True)]
    return found


def _case(shape: Shape, backward: bool, **kwargs: Any) -> Case:
    products = 4 * shape.dim + 3 * shape.value_dim if backward else shape.dim + shape.value_dim
    query_dims, key_dims = shape.heads * (shape.dim + shape.value_dim), shape.kv_heads * (shape.dim + shape.value_dim)
    moved = query_dims + key_dims  # q, o, k, v; the backward reads them again and do, and writes dq, dk, dv
    moved = 2 * moved + 2 * shape.heads * shape.value_dim + shape.heads * shape.dim + key_dims if backward else moved
    attend = functools.partial(_way, backward)
    ways = {name: attend(functools.partial(_ours, shape, name)) for name in ("mosaic", "xla")}
    torch_ways: dict[str, Way] = {"flex": functools.partial(_in_torch, backward, functools.partial(_flex, shape))}
    if shape.documents == 1:
        ways |= {
            "cudnn": attend(functools.partial(_cudnn, shape)),
            "tokamax": attend(functools.partial(_tokamax, shape)),
        }
        torch_ways["sdpa cudnn"] = functools.partial(_in_torch, backward, functools.partial(_sdpa, shape))
        if not backward and shape.dim == shape.value_dim:
            ways["pallas attention_mgpu, float16"] = functools.partial(_attention_mgpu, shape)
    return Case(
        "attention",
        shape.title("forward and backward" if backward else "forward"),
        functools.partial(make_inputs, shape, backward),
        ways,
        flops=2.0 * shape.pairs() * shape.heads * products,
        bytes=2.0 * shape.batch * shape.length * moved,
        torch_ways=torch_ways,
        target=_target(shape, backward),
        **kwargs,
    )


def _target(shape: Shape, backward: bool) -> str:
    floor = ">= 1.03 x the best peer"
    if shape.documents > 1 or backward:
        return floor
    if shape.dim == 64:
        return f"{floor}, >= {475 if shape.causal else 500} TFLOP/s"
    return f"{floor}, >= 690 TFLOP/s" if shape.length >= 16384 else floor


def make_inputs(shape: Shape, backward: bool, key: jax.Array) -> tuple[jax.Array, ...]:
    """Give q, k, v, for the backward do, for packed documents the ids of their tokens."""
    query, keys = (shape.batch, shape.length, shape.heads), (shape.batch, shape.length, shape.kv_heads)
    shapes = [(*query, shape.dim), (*keys, shape.dim), (*keys, shape.value_dim), (*query, shape.value_dim)]
    shapes = shapes if backward else shapes[:3]
    found = [
        jax.random.normal(each, dims, jnp.bfloat16)
        for each, dims in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]
    if shape.documents > 1:
        ids = np.repeat(np.arange(shape.documents, dtype=np.int32), shape.lengths())
        found.append(jnp.broadcast_to(jnp.asarray(ids), (shape.batch, shape.length)))
    return tuple(found)


def _way(backward: bool, attend: Callable[..., jax.Array]) -> Way:
    """Make a way of a function of q, k, v and perhaps ids."""
    if not backward:
        return attend

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, *ids: jax.Array) -> Any:
        _, vjp = jax.vjp(lambda *inputs: attend(*inputs, *ids), q, k, v)
        return vjp(do)

    return gradients


def _ours(shape: Shape, name: str, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None = None) -> jax.Array:
    from moejax.ops.attention import attention
    from moejax.ops.mask import Mask

    mask = Mask(ids, ids, window=shape.window, causal=shape.causal)
    return attention(q, k, v, mask, implementation=name)


def _cudnn(shape: Shape, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=shape.causal, implementation="cudnn")


def _tokamax(shape: Shape, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    import tokamax  # pyright: ignore[reportMissingImports]

    return tokamax.dot_product_attention(q, k, v, is_causal=shape.causal, implementation="mosaic")


def _attention_mgpu(shape: Shape, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Its shared memory is typed float16, and it leaves the scale to the caller."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=shape.causal)
    q, k, v = (x.astype(jnp.float16) for x in (q * shape.dim**-0.5, k, v))
    o: Any = attention_mgpu.attention(q, k, v, config)
    return o.astype(jnp.bfloat16)


def _in_torch(backward: bool, attend: Callable[..., Any], q: Any, k: Any, v: Any, *rest: Any) -> Any:
    """Run a peer on [B, N, T, H] views of its inputs."""
    import torch  # pyright: ignore[reportMissingImports]

    inputs = [x.detach().requires_grad_(backward) for x in (q, k, v)]
    turned = [x.transpose(1, 2) for x in inputs]
    if not backward:
        return attend(*turned, *rest).transpose(1, 2)
    do, *ids = rest
    return torch.autograd.grad(attend(*turned, *ids).transpose(1, 2), inputs, do)


def _sdpa(shape: Shape, q: Any, k: Any, v: Any) -> Any:
    """Force cuDNN: left alone, torch takes FlashAttention-2 on Hopper, at half the speed."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]

    grouped = shape.heads != shape.kv_heads
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, is_causal=shape.causal, enable_gqa=grouped)


@functools.cache
def _compiled_flex() -> Any:
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention.flex_attention import flex_attention  # pyright: ignore[reportMissingImports]

    return torch.compile(flex_attention)


@functools.cache
def _block_mask(shape: Shape) -> Any:
    """Say once which blocks FlexAttention may skip; all rows of a batch hold documents of the same lengths."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention.flex_attention import create_block_mask  # pyright: ignore[reportMissingImports]

    ids = torch.repeat_interleave(torch.arange(shape.documents), torch.as_tensor(shape.lengths())).cuda()

    def seen(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
        found = (query >= key) & (ids[query] == ids[key])
        return found & (query - key < shape.window) if shape.window else found

    return create_block_mask(seen, None, None, shape.length, shape.length) if shape.causal else None


def _flex(shape: Shape, q: Any, k: Any, v: Any, *_: Any) -> Any:
    return _compiled_flex()(q, k, v, block_mask=_block_mask(shape), enable_gqa=shape.heads != shape.kv_heads)
