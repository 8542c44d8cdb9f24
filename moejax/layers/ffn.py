"""The dense feed-forward layer."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from moejax.config.model import Precision
from moejax.layers.param import make_param, read
from moejax.ops.swiglu import swiglu
from moejax.parallel.overlap import column_parallel, row_parallel
from moejax.parallel.plan import MeshPlan


class FeedForward(nnx.Module):
    """SwiGLU (arXiv 2002.05202), or relu without a gate: gate and up split by columns over tensor, down by rows."""

    def __init__(
        self,
        plan: MeshPlan,
        rngs: nnx.Rngs,
        dim: int,
        ffn: int,
        precision: Precision,
        scale: float = 1.0,
        bias: bool = False,
        gated: bool = True,
    ) -> None:
        dtype = precision.params
        made = {"shape": (dim, ffn), "axes": ("embed", "ffn"), "dtype": dtype, "fan_in": dim, "scale": scale}
        self.gate = make_param(plan, rngs, **made) if gated else None
        self.up = make_param(plan, rngs, **made)
        self.down = make_param(plan, rngs, (ffn, dim), ("ffn", "embed"), dtype, fan_in=ffn, scale=scale)

        def vector(size: int, axis: str) -> nnx.Param | None:
            return make_param(plan, rngs, (size,), (axis,), dtype, fill=0.0) if bias else None

        self.gate_bias = vector(ffn, "ffn") if gated else None
        self.up_bias, self.down_bias = vector(ffn, "ffn"), vector(dim, "embed")
        self.plan, self.dtype = plan, precision.compute

    def __call__(self, x_BtD: Float[Array, "B t D"]) -> Float[Array, "B t D"]:
        """Enter tensor, run and leave it: both ends are parts of the residual stream."""
        wide = [(self.gate, self.gate_bias), (self.up, self.up_bias)]
        wide = [(w, b) for w, b in wide if w is not None]
        units = column_parallel(self.plan, x_BtD, [read(w, self.dtype) for w, _ in wide])
        units = [h if b is None else h + read(b, self.dtype) for h, (_, b) in zip(units, wide, strict=True)]
        hidden_BTf = swiglu(*units) if self.gate is not None else jax.nn.relu(units[0])
        y_BtD = row_parallel(self.plan, hidden_BTf, read(self.down, self.dtype))
        return y_BtD if self.down_bias is None else y_BtD + read(self.down_bias, self.dtype)

    def part(self, x_BTD: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Give this tensor rank's part of the sum: x has entered tensor, the caller leaves it."""
        assert self.down_bias is None, "a bias is added once, not by every rank"
        assert self.gate is not None, "shared experts are gated"
        gate, up = x_BTD @ read(self.gate, self.dtype), x_BTD @ read(self.up, self.dtype)
        return swiglu(gate, up) @ read(self.down, self.dtype)
