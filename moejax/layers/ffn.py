"""The dense feed-forward layer."""

from flax import nnx
from jaxtyping import Array, Float

from moejax.config.model import Precision
from moejax.layers.param import make_param, read
from moejax.ops.swiglu import swiglu
from moejax.parallel.overlap import column_parallel, row_parallel
from moejax.parallel.plan import MeshPlan


class FeedForward(nnx.Module):
    """SwiGLU (arXiv 2002.05202): gate and up split by columns over tensor, down by rows."""

    def __init__(
        self,
        plan: MeshPlan,
        rngs: nnx.Rngs,
        dim: int,
        ffn: int,
        precision: Precision,
        scale: float = 1.0,
        bias: bool = False,
    ) -> None:
        dtype = precision.params
        self.gate = make_param(plan, rngs, (dim, ffn), ("embed", "ffn"), dtype, fan_in=dim, scale=scale)
        self.up = make_param(plan, rngs, (dim, ffn), ("embed", "ffn"), dtype, fan_in=dim, scale=scale)
        self.down = make_param(plan, rngs, (ffn, dim), ("ffn", "embed"), dtype, fan_in=ffn, scale=scale)

        def vector(size: int, axis: str) -> nnx.Param | None:
            return make_param(plan, rngs, (size,), (axis,), dtype, fill=0.0) if bias else None

        self.gate_bias, self.up_bias, self.down_bias = vector(ffn, "ffn"), vector(ffn, "ffn"), vector(dim, "embed")
        self.plan, self.dtype = plan, precision.compute

    def __call__(self, x_BtD: Float[Array, "B t D"]) -> Float[Array, "B t D"]:
        """Enter tensor, run and leave it: both ends are parts of the residual stream."""
        weights = [read(self.gate, self.dtype), read(self.up, self.dtype)]
        gate_BTf, up_BTf = column_parallel(self.plan, x_BtD, weights)
        if self.gate_bias is not None and self.up_bias is not None:
            gate_BTf, up_BTf = gate_BTf + read(self.gate_bias, self.dtype), up_BTf + read(self.up_bias, self.dtype)
        y_BtD = row_parallel(self.plan, swiglu(gate_BTf, up_BTf), read(self.down, self.dtype))
        return y_BtD if self.down_bias is None else y_BtD + read(self.down_bias, self.dtype)

    def part(self, x_BTD: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Give this tensor rank's part of the sum: x has entered tensor, the caller leaves it."""
        assert self.down_bias is None, "a bias is added once, not by every rank"
        gate, up = x_BTD @ read(self.gate, self.dtype), x_BTD @ read(self.up, self.dtype)
        return swiglu(gate, up) @ read(self.down, self.dtype)
