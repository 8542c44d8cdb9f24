"""How does a gated feed-forward (arXiv 2002.05202) of sorted rows save trips to memory? It rides on the products.

Forward: gate and up are the two halves of one tile, so x is read once and silu(gate) * up leaves from registers:
4 R D F FLOPs, 2 (R D + R F) bytes and the weights', where separate kernels move 10 R F bytes more.
Backward: dy @ down^T becomes the gradients of gate and up in the epilogue, which reads them and recomputes hidden:
2 R D F FLOPs and 2 (R D + 5 R F) bytes, 1.6 TB/s at 660 TFLOP/s and D = 2048: the first two slabs of gate and up are
asked for before the product begins, each later one while its predecessor is stored.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import Place, multiply, slabs, staging, store_slab, tuned_config
from pallas_kernels.grouped_tiles import (
    WIDTH,
    Config,
    cheapest_config,
    check_operands,
    default_config,
    most_stages,
    store_rows,
)
from pallas_kernels.target import INSTEAD, Declined
from pallas_kernels.tuning import op_name

Array = jax.Array


def grouped_swiglu(
    x_RD: Array,
    gate_EDF: Array,
    up_EDF: Array,
    group_sizes_E: Array,
    *,
    save: bool = False,
    config: Config | None = None,
) -> Array | tuple[Array, Array, Array]:
    """Give silu(x @ gate) * up's product for each expert's run of rows; zeros after the last run.

    save: give (hidden_RF, gate_RF, up_RF), what grouped_swiglu_bwd wants. Raises Declined.
    """
    check_operands(x_RD, [gate_EDF, up_EDF], group_sizes_E, 1)
    default = default_config(x_RD.shape[0], gate_EDF.shape[0], gate_EDF.shape[2], parts=2)
    config = config or tuned_config(op_name("grouped_swiglu", save=save), default, x_RD, gate_EDF)
    outs = multiply([x_RD], [[gate_EDF, up_EDF]], group_sizes_E, StoreGated(save), config)
    return (outs[0], outs[1], outs[2]) if save else outs[0]


def grouped_swiglu_bwd(
    dy_RD: Array,
    down_EFD: Array,
    gate_RF: Array,
    up_RF: Array,
    group_sizes_E: Array,
    *,
    config: Config | None = None,
) -> tuple[Array, Array, Array]:
    """Give (dgate_RF, dup_RF, hidden_RF) of y = (silu(gate) * up) @ down; zeros after the last run, whatever it holds.

    hidden is what down's gradient wants: grouped_matmul_dw(hidden, dy). Raises Declined.
    """
    check_operands(dy_RD, [down_EFD], group_sizes_E, 2)
    num_rows, width = dy_RD.shape[0], down_EFD.shape[1]
    for name, a in (("gate", gate_RF), ("up", up_RF)):
        if a.shape != (num_rows, width) or a.dtype != dy_RD.dtype:
            raise Declined(f"{name} ({a.dtype}{a.shape}) must be {dy_RD.dtype}({num_rows}, {width}); {INSTEAD}")
    default = gradients_config(num_rows, down_EFD.shape[0], width)
    config = config or tuned_config("grouped_swiglu_bwd", default, dy_RD, down_EFD)
    dgate, dup, hidden = multiply(
        [dy_RD], [[down_EFD]], group_sizes_E, StoreGradients(), config, ins=(gate_RF, up_RF), transpose_w=True
    )
    return dgate, dup, hidden


def gradients_config(num_rows: int, num_experts: int, width: int) -> Config:
    """Choose grouped_swiglu_bwd's cut by shapes: its staging leaves room for fewer stages, its registers for 192."""
    config = default_config(num_rows, num_experts, width)
    if config.columns == 256:
        config = cheapest_config(width, most=192)
    return replace(config, stages=most_stages(config.rows, config.columns, slabs=5))


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + jnp.exp(-x))


class StoreGated:
    """Store silu(gate) * up, and with `save` gate and up."""

    def __init__(self, save: bool) -> None:
        self.save = save
        self.num_outs = 3 if save else 1

    def outs(self, num_rows: int, width: int) -> Sequence[Any]:
        """Give hidden_RF and with `save` gate_RF and up_RF."""
        return [jax.ShapeDtypeStruct((num_rows, width), jnp.bfloat16)] * self.num_outs

    def memory(self, config: Config) -> Sequence[Any]:
        """Give two slabs: one is stored while the other is written."""
        return [staging(config, 2)]

    def begin(self, place: Place, width: int, ins: Sequence[Any], scratch: Sequence[Any]) -> None:
        """Start nothing."""

    def finish(
        self, place: Place, values: Sequence[Array], ins: Sequence[Any], outs: Sequence[Any], scratch: Sequence[Any]
    ) -> None:
        """Gate, round and store."""
        pairs = slabs(values)
        for i, (gate, up) in enumerate(pairs):
            results = (gate * _sigmoid(gate) * up, gate, up)[: self.num_outs]
            for j, (result, out) in enumerate(zip(results, outs, strict=True)):
                nth, count = i * self.num_outs + j, len(pairs) * self.num_outs
                store_slab(nth, count, result, scratch[0], out, place, i * WIDTH)


class StoreGradients:
    """From hidden's gradient and the saved gate and up, store dgate, dup and hidden."""

    def outs(self, num_rows: int, width: int) -> Sequence[Any]:
        """Give dgate_RF, dup_RF and hidden_RF."""
        return [jax.ShapeDtypeStruct((num_rows, width), jnp.bfloat16)] * 3

    def memory(self, config: Config) -> Sequence[Any]:
        """Give two slabs each for gate and up, in which their gradients take their place, and one for hidden."""
        return [staging(config, 5), plgpu.Barrier(num_arrivals=2, num_barriers=2 * config.warpgroups)]

    def begin(self, place: Place, width: int, ins: Sequence[Any], scratch: Sequence[Any]) -> None:
        """Ask for gate and up of the first two slabs."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i in range(min(2, width // WIDTH)):
            self._fetch(i, place, ins, scratch)

    def finish(
        self, place: Place, values: Sequence[Array], ins: Sequence[Any], outs: Sequence[Any], scratch: Sequence[Any]
    ) -> None:
        """Compute slab by slab, fetch the next but one."""
        memory, arrived = scratch
        parts = slabs(values)
        for i, (dhidden,) in enumerate(parts):
            gates, ups, hiddens = (memory.at[place.warpgroup, s] for s in (i % 2, 2 + i % 2, 4))
            plgpu.barrier_wait(arrived.at[2 * place.warpgroup + i % 2])
            # Zeros after the last run, whatever the saved rows hold there.
            gate, up = (jnp.where(place.of_expert, s[...].astype(jnp.float32), 0.0) for s in (gates, ups))
            open_ = _sigmoid(gate)
            silu = gate * open_
            exact = (dhidden * up * (open_ + silu * (1.0 - open_)), dhidden * silu, silu * up)
            results = [x.astype(jnp.bfloat16) for x in exact]  # now: half the registers while it waits
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the slab before has left
            if 0 < i < len(parts) - 1:
                self._fetch(i + 1, place, ins, scratch)
            for slab, result in zip((gates, ups, hiddens), results, strict=True):
                slab[...] = result
            plgpu.commit_smem()
            for slab, out in zip((gates, ups, hiddens), outs, strict=True):
                store_rows(slab, out, place.first, place.num_rows, place.column + i * WIDTH)
            plgpu.commit_smem_to_gmem_group()

    def _fetch(self, i: int, place: Place, ins: Sequence[Any], scratch: Sequence[Any]) -> None:
        memory, arrived = scratch
        there = (pl.ds(place.first, WIDTH), pl.ds(place.column + i * WIDTH, WIDTH))
        for ref, slot in zip(ins, (i % 2, 2 + i % 2), strict=True):
            plgpu.copy_gmem_to_smem(
                ref.at[there], memory.at[place.warpgroup, slot], arrived.at[2 * place.warpgroup + i % 2]
            )
