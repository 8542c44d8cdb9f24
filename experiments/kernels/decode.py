"""How fast is attention to paged keys? KERNEL_NUMBERS section 2, verified drafts, prompt chunks and latents beside it.

Rows whose pages lie in order ("contiguous") have the peers that know no pages; the kernel's own code does not differ.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels.case import Case, Way

LATENT, VALUES = 576, 512
"""DeepSeek-V3's cached numbers a token, and how many of them are the value."""
SIZES = ((1, 1024), (1, 32768), (1, 262144), (8, 4096), (32, 4096), (64, 8192))


@dataclass(frozen=True)
class Shape:
    """A batch of sequences in the cache."""

    lengths: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    page: int = 64
    queries: int = 1
    shuffled: bool = True
    """whether the pages lie anywhere in the pool"""

    @property
    def entries(self) -> int:
        """Give the pages of the longest sequence."""
        return -(-max(self.lengths) // self.page)

    def title(self, kind: str) -> str:
        """Name the row."""
        equal = min(self.lengths) == max(self.lengths)
        sizes = f"{self.lengths[0]}" if equal else f"{min(self.lengths)}-{max(self.lengths)}"
        pages = f"pages of {self.page}" if self.shuffled else "contiguous"
        heads = f"heads {self.heads}/{self.kv_heads} D={self.dim}"
        return f"{kind} B={len(self.lengths)} T={self.queries} S={sizes} {heads} {pages}"


def cases(dry: bool = False) -> list[Case]:
    """Give the grid; `dry`: one tiny row of each kind."""
    if dry:
        tiny = Shape((70, 1), 4, 1, 64, page=16)
        return [_paged(tiny), _latent(Shape((70,), 4, 1, 192, page=16), 128)]
    found = []
    for kv_heads in (8, 4):
        for batch, length in SIZES:
            lengths = (length,) * batch
            found.append(_paged(Shape(lengths, kv_heads=kv_heads, shuffled=False), compiled=False))
            for page in (16, 64, 128):
                new_code = (batch, length) == (8, 4096) and (kv_heads == 8 or page == 64)
                found.append(_paged(Shape(lengths, kv_heads=kv_heads, page=page), compiled=new_code))
        found.append(_paged(Shape(_ragged(64, 8192), kv_heads=kv_heads), compiled=False))
    found.append(_paged(Shape((4096,) * 32, 64, 8, dim=64), window=128, sinks=True))  # gpt-oss' local layers
    found += [_paged(Shape((4096,) * batch, queries=4), compiled=batch == 32) for batch in (1, 32)]
    found.append(_paged(Shape((8192,) * 4, queries=512)))
    for heads in (128, 16):
        for batch, queries in ((1, 1), (32, 1), (128, 1), (32, 4)):
            shape = Shape((4096,) * batch, heads, 1, LATENT, queries=queries)
            found.append(_latent(shape, VALUES, compiled=batch == 32))
    return found


def _ragged(batch: int, longest: int) -> tuple[int, ...]:
    """Spread lengths evenly over the logarithm, from 64 on."""
    return tuple(int(x) for x in np.geomspace(64, longest, batch))


def _tables(shape: Shape) -> np.ndarray:
    """Give every sequence pages of its own; entries past its length are -1."""
    batch = len(shape.lengths)
    pages = np.arange(batch * shape.entries, dtype=np.int32)
    if shape.shuffled:
        pages = np.random.default_rng(0).permutation(pages)
    used = np.arange(shape.entries) < -(-np.array(shape.lengths)[:, None] // shape.page)
    return np.where(used, pages.reshape(batch, -1), -1).astype(np.int32)


def make_inputs(shape: Shape, values: bool, key: jax.Array) -> tuple[jax.Array, ...]:
    """Give queries, pages of keys (and of values), tables, lengths and query lengths."""
    batch = len(shape.lengths)
    keys = jax.random.split(key, 3)
    pages = (batch * shape.entries, shape.page, shape.kv_heads, shape.dim)
    pages = pages if values else (*pages[:2], shape.dim)
    q = jax.random.normal(keys[0], (batch, shape.queries, shape.heads, shape.dim), jnp.bfloat16)
    kv = [jax.random.normal(each, pages, jnp.bfloat16) for each in keys[1 : 3 if values else 2]]
    lengths = jnp.asarray(shape.lengths, jnp.int32)
    return q, *kv, jnp.asarray(_tables(shape)), lengths, jnp.full((batch,), shape.queries, jnp.int32)


def _paged(shape: Shape, window: int | None = None, sinks: bool = False, **kwargs: Any) -> Case:
    """Count the bytes of the keys and values that are seen, and the products with them."""
    from moejax.ops.paged_attention import paged_attention

    def attend(way: str) -> Way:
        def run(*inputs: jax.Array) -> jax.Array:
            sinks_N = jnp.linspace(-1.0, 1.0, shape.heads) if sinks else None
            return paged_attention(*inputs, window=window, sinks_N=sinks_N, implementation=way)

        return run

    ways: dict[str, Way] = {name: attend(name) for name in ("mosaic", "xla")}
    torch_ways: dict[str, Way] = {}
    if not shape.shuffled:
        ways |= {"cudnn": functools.partial(_cudnn, shape), "pallas decode": functools.partial(_pallas_decode, shape)}
        torch_ways = {"sdpa": functools.partial(_sdpa, shape), "flex": functools.partial(_flex, shape)}
    elif shape.queries == 1 and window is None:
        ways["pallas paged, pool turned"] = _pallas_paged
    seen = [min(length, (window or length) + shape.queries - 1) for length in shape.lengths]
    name = shape.title("paged" if window is None else f"paged window={window}")
    return Case(
        "decode",
        name,
        functools.partial(make_inputs, shape, True),
        ways,
        flops=4.0 * _pairs(shape, window) * shape.heads * shape.dim,
        bytes=4.0 * sum(seen) * shape.kv_heads * shape.dim + _query_bytes(shape, 2 * shape.dim),
        torch_ways=torch_ways,
        target=_target(shape),
        **kwargs,
    )


def _latent(shape: Shape, value_dim: int, **kwargs: Any) -> Case:
    """Keys and values are the same bytes, read once."""
    from moejax.ops.paged_attention import latent_attention

    def attend(way: str) -> Way:
        return functools.partial(latent_attention, value_dim=value_dim, scale=192**-0.5, implementation=way)

    return Case(
        "decode",
        shape.title("latent"),
        functools.partial(make_inputs, shape, False),
        {name: attend(name) for name in ("mosaic", "xla")},
        flops=2.0 * _pairs(shape, None) * shape.heads * (shape.dim + value_dim),
        bytes=2.0 * sum(shape.lengths) * shape.dim + _query_bytes(shape, shape.dim + value_dim),
        target=">= 90 % of read bandwidth or 600 TFLOP/s",
        **kwargs,
    )


def _pairs(shape: Shape, window: int | None) -> int:
    """Count the pairs of a query and a key that it sees."""
    ends = [length - t for length in shape.lengths for t in range(shape.queries)]
    return sum(min(end, window or end) for end in ends)


def _query_bytes(shape: Shape, dims: int) -> float:
    return 2.0 * len(shape.lengths) * shape.queries * shape.heads * dims


def _target(shape: Shape) -> str:
    if shape.queries > 8:
        return ">= 55 % of 790 TFLOP/s"
    if shape.lengths == (1024,):
        return "<= 8 us"
    large = sum(shape.lengths) * shape.kv_heads * shape.dim * 4 >= 2**28
    return ">= 90 % of read bandwidth, <= 1.05 x contiguous" if large else "<= 1.05 x contiguous"


def _in_order(shape: Shape, *pages: Any) -> Sequence[Any]:
    """View the pages of a contiguous row as whole sequences [B, S, K, H]; lengths fill their pages."""
    return [x.reshape(len(shape.lengths), -1, shape.kv_heads, shape.dim) for x in pages]


def _cudnn(shape: Shape, q: jax.Array, k: jax.Array, v: jax.Array, *_: jax.Array) -> jax.Array:
    k, v = _in_order(shape, k, v)
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _pallas_decode(shape: Shape, q: jax.Array, k: jax.Array, v: jax.Array, *_: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.gpu.decode_attention import gqa

    k, v = _in_order(shape, k, v)
    return gqa(q[:, 0], k, v)[:, None]


def _pallas_paged(q: jax.Array, k: jax.Array, v: jax.Array, tables: jax.Array, lengths: jax.Array, *_: Any) -> Any:
    """Its pages lie head first: turning the pool over is part of its time here."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    k_KPZH, v_KPZH = (jnp.moveaxis(x, 2, 0) for x in (k, v))
    scaled = q[:, 0] * q.shape[-1] ** -0.5
    return paged_attention(scaled, k_KPZH, v_KPZH, jnp.maximum(tables, 0), lengths)[:, None]


def _sdpa(shape: Shape, q: Any, k: Any, v: Any, *_: Any) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    k, v = (x.transpose(1, 2) for x in _in_order(shape, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q.transpose(1, 2), k, v, enable_gqa=True).transpose(1, 2)


@functools.cache
def _compiled_flex() -> Any:
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention.flex_attention import flex_attention  # pyright: ignore[reportMissingImports]

    return torch.compile(flex_attention)


def _flex(shape: Shape, q: Any, k: Any, v: Any, *_: Any) -> Any:
    k, v = (x.transpose(1, 2) for x in _in_order(shape, k, v))
    return _compiled_flex()(q.transpose(1, 2), k, v, enable_gqa=True).transpose(1, 2)
