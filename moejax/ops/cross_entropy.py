"""How surprised is the model by each target?"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.compat import vary_like
from moejax.ops.backend import call, choose, to_common_axes
from pallas_kernels.target import Target

Reduce = Callable[[Array], Array]

BLOCK_BYTES = 2**28
"""Logits that the linear cross-entropy holds at a time, unless told how many columns."""


def cross_entropy(
    logits_MV: Float[Array, "M V"],
    targets_M: Int[Array, " M"],
    first: Int[Array, ""] | int = 0,
    sum_over: Reduce = lambda x: x,
    max_over: Reduce = lax.stop_gradient,
) -> Float[Array, " M"]:
    """Give -log softmax(logits)[target] in nats, in float32 or wider.

    Where the vocabulary is split, `logits` are the columns from `first` on, and the two reductions join the devices'
    parts: nobody holds a whole row.
    """
    wide = jnp.promote_types(logits_MV.dtype, jnp.float32)
    logits_MV = logits_MV.astype(wide)
    max_M = max_over(logits_MV.max(-1))
    total_M = sum_over(jnp.exp(logits_MV - max_M[:, None]).sum(-1))
    # A comparison, whose transpose is a select: that of a gather would scatter into a zeroed copy of the logits.
    is_target_MV = jnp.arange(logits_MV.shape[-1]) == (targets_M - first)[:, None]
    target_M = sum_over(jnp.where(is_target_MV, logits_MV, 0.0).sum(-1))
    return jnp.log(total_M) + max_M - target_M


def mixture_cross_entropy(log_gate_EM: Float[Array, "E M"], loss_EM: Float[Array, "E M"]) -> Float[Array, " M"]:
    """Give -log sum_e gate_e exp(-loss_e): Jacobs' competitive loss (1991), whose gradient trains each expert in
    proportion to its posterior; with loss = ||d - o_e||^2 / 2 it is the paper's own, with cross-entropies a mixture of
    softmaxes."""
    return -jax.nn.logsumexp(log_gate_EM - loss_EM, axis=0)


class _How(NamedTuple):
    """What of a linear cross-entropy is no array."""

    way: str
    sum_over: Reduce
    max_over: Reduce
    block: int
    """tokens of the vocabulary taken at a time"""
    vocab_dim: int
    softcap: float | None


def linear_cross_entropy(
    x_MD: Float[Array, "M D"],
    w: Float[Array, "D V"] | Float[Array, "V D"],
    targets_M: Int[Array, " M"],
    first: Int[Array, ""] | int = 0,
    sum_over: Reduce = lambda x: x,
    max_over: Reduce = lax.stop_gradient,
    *,
    vocab_dim: int = 1,
    block: int | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
) -> Float[Array, " M"]:
    """Give the cross-entropy of the logits x @ w without holding them: `block` of the vocabulary at a time, twice.

    The same as `cross_entropy(x @ w, ...)`, its backward pass computing the logits again. Blocks are of the vocabulary,
    not of tokens, so that w is read once and its gradient written once, never summed up. `vocab_dim` is w's dim of the
    vocabulary: 0 for a table of embeddings (transposed, it would be copied). `softcap` bends the logits to
    cap * tanh(logits / cap) (arXiv 2408.00118). "mosaic", on Hopper, writes no logit in the forward pass; the backward
    pass is XLA's; "reference" holds all logits, and so does "auto" where one block would: computing them again costs
    more than reading them. Raises ValueError for another implementation.
    """
    vocab = w.shape[vocab_dim]
    block = block or logits_block(x_MD.shape[0], vocab, jnp.promote_types(x_MD.dtype, jnp.float32).itemsize)

    def blockwise(way: str) -> Callable[..., Array]:
        how = _How(way, sum_over, max_over, min(block, vocab), vocab_dim, softcap)
        return functools.partial(_linear_cross_entropy, how)

    def reference(x_MD: Array, w: Array, targets_M: Array, first: Array) -> Array:
        logits_MV, _ = _logits(_How("reference", sum_over, max_over, vocab, vocab_dim, softcap), x_MD, w, 0, vocab)
        return cross_entropy(logits_MV, targets_M, first, sum_over, max_over)

    def order(chip: Target) -> tuple[str, ...]:
        if block >= vocab:
            return ("reference",)
        return ("mosaic", "xla") if chip.is_hopper else ("xla",)

    ways = {"mosaic": blockwise("mosaic"), "xla": blockwise("xla"), "reference": reference}
    arrays = to_common_axes(x_MD, w, targets_M, jnp.asarray(first, targets_M.dtype))
    return choose("linear cross-entropy", implementation, ways, order, *arrays)


def logits_block(num_tokens: int, vocab: int, width: int) -> int:
    """Give how much of the vocabulary is taken at a time: all of it where its logits, `width` bytes each, are few."""
    fitting = BLOCK_BYTES // max(num_tokens * width, 1)
    return vocab if fitting >= vocab else max(fitting // 128 * 128, 1024)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_cross_entropy(how: _How, x_MD: Array, w: Array, targets_M: Array, first: Array) -> Array:
    return _linear_cross_entropy_fwd(how, x_MD, w, targets_M, first)[0]


def _linear_cross_entropy_fwd(how: _How, x_MD: Array, w: Array, targets_M: Array, first: Array) -> tuple:
    statistics = _mosaic if how.way == "mosaic" else _statistics
    max_M, total_M, target_M = statistics(how, x_MD, w, targets_M - first)
    highest_M = how.max_over(max_M)
    lse_M = jnp.log(how.sum_over(total_M * jnp.exp(max_M - highest_M))) + highest_M
    return lse_M - how.sum_over(target_M), (x_MD, w, targets_M, first, lse_M)


def _mosaic(how: _How, x_MD: Array, w: Array, columns_M: Array) -> tuple[Array, Array, Array]:
    from pallas_kernels.linear_cross_entropy import linear_cross_entropy_statistics  # Mosaic takes long to import

    options = {"vocab_dim": how.vocab_dim, "softcap": how.softcap}
    return call(linear_cross_entropy_statistics, x_MD, w, columns_M, **options)


def _statistics(how: _How, x_MD: Array, w: Array, columns_M: Array) -> tuple[Array, Array, Array]:
    """Give each row's largest logit, the sum of exp(logit - largest) and the logit of its column, 0 if it has none."""
    wide = jnp.promote_types(x_MD.dtype, jnp.float32)

    def add(start: Array | int, size: int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        logits_MV, _ = _logits(how, x_MD, w, start, size)
        *sums, target_M = carry
        here_M = (columns_M >= start) & (columns_M < start + size)
        column_M1 = jnp.where(here_M, columns_M - start, 0)[:, None]
        logit_M = jnp.take_along_axis(logits_MV, column_M1, axis=1, mode="promise_in_bounds")[:, 0]
        max_M, total_M = _joined(sums, _max_and_sum(logits_MV))
        return max_M, total_M, jnp.where(here_M, logit_M, target_M)

    lowest_M = jnp.full(columns_M.shape, jnp.finfo(wide).min, wide)
    zeros_M = jnp.zeros(columns_M.shape, wide)
    return _over_blocks(how, w, add, tuple(vary_like(c, x_MD) for c in (lowest_M, zeros_M, zeros_M)))


def _max_and_sum(logits_MV: Array) -> tuple[Array, Array]:
    """Give each row's largest logit and its sum of exp(logit - largest), in one pass over memory."""
    ones_MV = vary_like(jnp.ones_like(logits_MV), logits_MV)
    start = (jnp.finfo(logits_MV.dtype).min, 0.0)
    first = tuple(vary_like(jnp.asarray(x, logits_MV.dtype), logits_MV) for x in start)
    return lax.reduce((logits_MV, ones_MV), first, _joined, dimensions=(1,))


def _joined(a: Sequence[Array], b: Sequence[Array]) -> tuple[Array, Array]:
    """Join the largest logit and the sum of two parts of a row."""
    highest = jnp.maximum(a[0], b[0])
    return highest, a[1] * jnp.exp(a[0] - highest) + b[1] * jnp.exp(b[0] - highest)


def _linear_cross_entropy_bwd(how: _How, saved: tuple, dloss_M: Array) -> tuple:
    x_MD, w, targets_M, first, lse_M = saved
    dloss_M, lse_M = (vary_like(y, x_MD) for y in (dloss_M, lse_M))

    def add(start: Array | int, size: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dx_MD, dw = carry
        logits_MV, slope_MV = _logits(how, x_MD, w, start, size)
        is_target_MV = start + jnp.arange(size) == (targets_M - first)[:, None]
        dlogits_MV = (jnp.exp(logits_MV - lse_M[:, None]) - is_target_MV) * dloss_M[:, None] * slope_MV
        dlogits_MV = dlogits_MV.astype(x_MD.dtype)
        wide = dx_MD.dtype
        dims = ((1,), (how.vocab_dim,)), ((), ())
        dx_MD += lax.dot_general(dlogits_MV, _part(how, w, start, size), dims, preferred_element_type=wide)
        pair = (x_MD, dlogits_MV) if how.vocab_dim else (dlogits_MV, x_MD)
        part = lax.dot_general(*pair, (((0,), (0,)), ((), ())), preferred_element_type=wide)
        return dx_MD, lax.dynamic_update_slice_in_dim(dw, part.astype(w.dtype), start, axis=how.vocab_dim)

    zeros = (jnp.zeros(x_MD.shape, jnp.promote_types(x_MD.dtype, jnp.float32)), jnp.zeros_like(w))
    dx_MD, dw = _over_blocks(how, w, add, tuple(vary_like(c, x_MD) for c in zeros))
    return dx_MD.astype(x_MD.dtype), dw, None, None


_linear_cross_entropy.defvjp(_linear_cross_entropy_fwd, _linear_cross_entropy_bwd)


def _over_blocks(how: _How, w: Array, add: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """Fold `add(first column, number of columns, carry)` over the blocks; what is left over goes last."""
    full, rest = divmod(w.shape[how.vocab_dim], how.block)
    carry = lax.fori_loop(0, full, lambda i, carry: add(i * how.block, how.block, carry), carry)
    return add(full * how.block, rest, carry) if rest else carry


def _part(how: _How, w: Array, start: Array | int, size: int) -> Array:
    return lax.dynamic_slice_in_dim(w, start, size, axis=how.vocab_dim)


def _logits(how: _How, x_MD: Array, w: Array, start: Array | int, size: int) -> tuple[Array, Array | float]:
    """Give some columns of the logits in float32 or wider, and their slope in what x @ w is."""
    wide = jnp.promote_types(x_MD.dtype, jnp.float32)
    dims = ((1,), (1 - how.vocab_dim,)), ((), ())
    logits_MV = lax.dot_general(x_MD, _part(how, w, start, size), dims, preferred_element_type=wide)
    if how.softcap is None:
        return logits_MV, 1.0
    bent_MV = jnp.tanh(logits_MV / how.softcap)
    return how.softcap * bent_MV, 1 - bent_MV**2
