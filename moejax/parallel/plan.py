"""MeshPlan: which devices hold what, and which collectives join them? The only file that names shard_map and Mesh.

The whole step is one manual program: `plan.spmd(f, ins, outs)` runs `f` once per device on that device's part of the
arrays, and the type checker (`check_vma`) refuses a result that was declared equal on all devices but was not reduced.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from moejax.axes import BATCH_AXES, MESH_AXES
from moejax.compat import vary, varying_axes
from moejax.config.mesh import MeshConfig
from moejax.parallel.rules import Rules, make_rules
from moejax.parallel.schedules import Schedule, make_schedule

Tree = Any


@dataclass(frozen=True)
class MeshPlan:
    """The devices, the table of logical axes, and the configuration they come from. Frozen and hashable."""

    mesh: Mesh
    rules: Rules
    config: MeshConfig

    @classmethod
    def from_config(cls, config: MeshConfig, devices: Sequence[Any] | None = None) -> "MeshPlan":
        """Lay `devices` (default: all) out as the configuration says; raise ValueError unless they fit exactly."""
        devices = jax.devices() if devices is None else devices
        config = config.fill(len(devices))
        if len(devices) == 1:
            grid = np.asarray(devices).reshape(config.degrees())
        else:
            grid = mesh_utils.create_device_mesh(config.degrees(), list(devices))
        mesh = Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
        return cls(mesh, make_rules(config), config)

    @classmethod
    def single(cls) -> "MeshPlan":
        """Give the plan of the first device alone."""
        return cls.from_config(MeshConfig(), jax.devices()[:1])

    @classmethod
    def on_paper(cls, config: MeshConfig) -> "MeshPlan":
        """Give the plan of a mesh without devices: enough to count, not to run."""
        mesh: Any = AbstractMesh(config.degrees(), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
        return cls(mesh, make_rules(config), config)

    # --- layout: host side and program borders ---

    def size(self, axis: str) -> int:
        """Give the degree of a mesh axis, 1 when unused."""
        return self.mesh.shape[axis]

    def axes_of(self, *names: str | None) -> tuple[str, ...]:
        """Give the mesh axes of size > 1 on which any of the logical axes lies."""
        used = {axis for name in names if name is not None for axis in self.rules[name]}
        return tuple(axis for axis in MESH_AXES if axis in used)

    def degree(self, *names: str | None) -> int:
        """Give the number of parts that the logical axes are split into."""
        return math.prod(self.size(axis) for axis in self.axes_of(*names))

    def spec(self, *names: str | None) -> PartitionSpec:
        """Give the PartitionSpec of an array from its dims' logical names; two dims on one mesh axis: ValueError."""
        seen: dict[str, str] = {}
        entries: list[tuple[str, ...] | None] = []
        for name in names:
            axes = self.axes_of(name)
            for axis in axes:
                if axis in seen:
                    raise ValueError(f'"{seen[axis]}" and "{name}" would both be split over mesh axis "{axis}"')
                seen[axis] = str(name)
            entries.append(axes or None)
        return PartitionSpec(*entries)

    def sharding(self, *names: str | None) -> NamedSharding:
        """Give the NamedSharding of an array from its dims' logical names."""
        return self.place(self.spec(*names))

    def place(self, spec: PartitionSpec) -> NamedSharding:
        """Put a spec on this mesh."""
        return NamedSharding(self.mesh, spec)

    def spmd(self, f: Callable[..., Any], ins: Tree, outs: Tree) -> Callable[..., Any]:
        """Run `f` on every device's part of its arguments: THE shard_map. `ins` and `outs` are trees of specs."""
        return jax.shard_map(f, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=True)

    def schedule(self, microbatches: int) -> Schedule:
        """Give the pipeline's table; of a single stage, one microbatch after the other."""
        return make_schedule(self.config.schedule, self.config.pipeline, microbatches, self.config.chunks)

    # --- collectives, by logical name: inside the program ---

    def sum_over(self, x: jax.Array, *names: str) -> jax.Array:
        """Sum the devices' parts along logical axes (all-reduce)."""
        axes = self.axes_of(*names)
        return lax.psum(vary(x, axes), axes) if axes else x

    def mean_over(self, x: jax.Array, *names: str) -> jax.Array:
        """Average the devices' values along logical axes (all-reduce)."""
        axes = self.axes_of(*names)
        return lax.pmean(vary(x, axes), axes) if axes else x

    def max_over(self, x: jax.Array, *names: str) -> jax.Array:
        """Take the maximum along logical axes (all-reduce); no gradient."""
        axes = self.axes_of(*names)
        return lax.pmax(vary(lax.stop_gradient(x), axes), axes) if axes else lax.stop_gradient(x)

    def gather(self, x: jax.Array, name: str, dim: int) -> jax.Array:
        """Join the devices' parts of `dim` along a logical axis (all-gather); the same on every device."""
        axes = self.axes_of(name)
        return lax.all_gather(vary(x, axes), axes, axis=dim, tiled=True, to="invarying") if axes else x

    def gather_local(self, x: jax.Array, name: str, dim: int) -> jax.Array:
        """Join the devices' parts as `gather` does, for this device's own use: the transpose is a reduce-scatter."""
        axes = self.axes_of(name)
        return lax.all_gather(vary(x, axes), axes, axis=dim, tiled=True) if axes else x

    def index(self, name: str) -> jax.Array:
        """Give this device's rank along a logical axis, an int32 scalar."""
        axes = self.axes_of(name)
        return lax.axis_index(axes) if axes else jnp.int32(0)

    def agree(self, x: jax.Array, *split: str) -> jax.Array:
        """Turn a value that is equal on a stage's devices, though its type says otherwise, into an unvarying one.

        Along the logical axes `split` it may differ.
        """
        axes = tuple(sorted(varying_axes(x) - {"pipeline", *self.axes_of(*split)}))
        return lax.pmean(x, axes) if axes else x

    def to_experts(self, x: jax.Array, split: int, join: int) -> jax.Array:
        """Exchange over `expert`: part i of dim `split` goes to rank i, what comes is joined along dim `join`."""
        if self.size("expert") == 1:
            return x
        return lax.all_to_all(vary(x, ("expert",)), "expert", split, join, tiled=True)

    def enter_tensor(self, x_BtD: jax.Array) -> jax.Array:
        """Bring the residual stream to every tensor rank, whole: Megatron's f (arXiv 1909.08053, 2205.05198).

        With sequence parallelism an all-gather of residual_seq (transpose: reduce-scatter), otherwise nothing
        (transpose: all-reduce).
        """
        if self.size("tensor") == 1:
            return x_BtD
        if self.config.sequence_parallel:
            return lax.all_gather(x_BtD, "tensor", axis=x_BtD.ndim - 2, tiled=True)
        return vary(x_BtD, ("tensor",))

    def leave_tensor(self, y_BTD: jax.Array) -> jax.Array:
        """Sum the tensor ranks' partial results back into the residual stream: Megatron's g."""
        if self.size("tensor") == 1:
            return y_BTD
        y_BTD = vary(y_BTD, ("tensor",))
        if self.config.sequence_parallel:
            return lax.psum_scatter(y_BTD, "tensor", scatter_dimension=y_BTD.ndim - 2, tiled=True)
        return lax.psum(y_BTD, "tensor")

    def batch_axes(self) -> tuple[str, ...]:
        """Give the mesh axes that split tokens."""
        return tuple(a for a in (*BATCH_AXES, "sequence") if self.size(a) > 1)

    def gradient_axes(self) -> tuple[str, ...]:
        """Give the mesh axes over which a weight's gradient is summed, unless they split the weight itself."""
        return self.axes_of("layers") + self.batch_axes()

    def stream_axes(self) -> tuple[str, ...]:
        """Give the mesh axes over which the residual stream differs."""
        return tuple(dict.fromkeys(self.gradient_axes() + self.axes_of("residual_seq")))

    # --- positions: who has which part of a sequence ---

    def sequence_index(self, local: int, rank: jax.Array | int | None = None) -> jax.Array:
        """Give the indices in the sequence of a rank's `local` tokens, int32 [t] (default: this device's).

        For a ring two parts, one from the front and one from the back, so that causality leaves all ranks equal work.
        """
        ranks = self.size("sequence")
        index_t = jnp.arange(local, dtype=jnp.int32)
        if ranks == 1:
            return index_t
        rank = self.index("seq") if rank is None else rank
        if self.config.context != "ring":
            return rank * local + index_t
        half = local // 2
        return jnp.where(index_t < half, rank * half + index_t, (2 * ranks - 1 - rank) * half + index_t - half)

    def sequence_order(self, length: int) -> np.ndarray:
        """Give the order in which the host lays a sequence's tokens out, so that each rank gets its own."""
        ranks = self.size("sequence")
        if ranks == 1 or self.config.context != "ring":
            return np.arange(length)
        parts = np.arange(length).reshape(2 * ranks, -1)
        return np.concatenate([np.concatenate([parts[r], parts[2 * ranks - 1 - r]]) for r in range(ranks)])

    def residual_part(self, x_BT: jax.Array) -> jax.Array:
        """Take the tokens [B, T] that this tensor rank's part of the residual stream holds."""
        if not self.config.sequence_parallel:
            return x_BT
        size = x_BT.shape[1] // self.size("tensor")
        return lax.dynamic_slice_in_dim(vary(x_BT, ("tensor",)), lax.axis_index("tensor") * size, size, 1)
