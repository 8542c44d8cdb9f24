"""How many devices stand along each mesh axis, and what ZeRO and sequence parallelism split."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moejax.axes import MESH_AXES
from moejax.config.fields import FORBID_UNKNOWN

Degree = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class MeshConfig:
    """Degrees of the five mesh axes; their product is the number of devices."""

    pipeline: Degree = 1
    """pipeline stages"""
    data: Annotated[int, Field(ge=-1)] = 1
    """replicas of the batch; -1: as many as devices are left"""
    sequence: Degree = 1
    """context parallelism: each device has a part of every sequence"""
    expert: Degree = 1
    """expert parallelism: experts split, tokens sent to them; a batch axis for everything else"""
    tensor: Degree = 1
    """tensor parallelism (arXiv 1909.08053)"""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO (arXiv 1910.02054), over the batch axes: 1 splits optimizer state, 2 gradients too, 3 weights too"""
    sequence_parallel: bool = False
    """Megatron's sequence parallelism: the residual stream is split over `tensor` too (arXiv 2205.05198)"""
    replicate_kv: bool = False
    """key/value heads whole on every tensor rank, for num_kv_heads that do not divide by tensor"""
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    """order of forward and backward in a pipeline (arXiv 1811.06965, 2006.09503, 2104.04473)"""
    chunks: Degree = 1
    """interleaved: groups of layers that each stage holds, v; the bubble shrinks and the traffic grows by v"""
    context: Literal["ring", "all_to_all"] = "ring"
    """how queries meet the other devices' keys: keys go round a ring, zig-zag balanced (arXiv 2310.01889), or heads
    are exchanged for positions (Ulysses, arXiv 2309.14509)"""
    exchange: Literal["auto", "ragged", "padded"] = "auto"
    """how rows reach their experts' devices: the rows alone (GPU), or equal parts padded with zeros (CPU's twin)"""
    exchange_factor: Annotated[float, Field(gt=0.0)] = 1.5
    """room for routed rows per expert rank, as a multiple of the even share; what overflows goes in further rounds"""
    overlap_tensor: bool = False
    """gather and product of tensor parallelism as one ring of steps, so that they overlap; wants sequence_parallel"""

    def __post_init__(self) -> None:
        if (self.chunks > 1) != (self.schedule == "interleaved"):
            raise ValueError(f'schedule = "{self.schedule}" and chunks ({self.chunks}): interleaved wants chunks > 1')
        if self.chunks > 1 and self.pipeline == 1:
            raise ValueError(f"chunks ({self.chunks}) interleave a pipeline: set pipeline > 1")
        if self.pipeline > 1 and self.zero_stage == 2:
            raise ValueError(
                f"zero_stage (2) reduces gradients in every microbatch, which a pipeline (pipeline = {self.pipeline}) "
                "has many of in flight: set zero_stage = 1, or 3"
            )
        if self.overlap_tensor and not self.sequence_parallel:
            raise ValueError("overlap_tensor rotates parts of the residual stream: set sequence_parallel = true")
        if self.data == 0:
            raise ValueError("data (0) must be a degree, or -1 for all devices that are left")
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel splits the residual over tensor: set tensor > 1")

    def degrees(self) -> tuple[int, ...]:
        """Give the degrees in the order of MESH_AXES."""
        return tuple(getattr(self, axis) for axis in MESH_AXES)

    def fill(self, num_devices: int) -> "MeshConfig":
        """Replace data = -1 by what is left of `num_devices`; raise ValueError unless the product fits exactly."""
        others = self.pipeline * self.sequence * self.expert * self.tensor
        data = max(num_devices // others, 1) if self.data == -1 else self.data
        if others * data != num_devices:
            sizes = " * ".join(f"{a} {data if a == 'data' else getattr(self, a)}" for a in MESH_AXES)
            raise ValueError(
                f"the mesh has {others * data} devices ({sizes}) but jax sees {num_devices}: change the mesh, "
                "hide devices (CUDA_VISIBLE_DEVICES), or try it on a CPU with --fake-devices N"
            )
        return MeshConfig(**{**self.__dict__, "data": data})

    def for_decoding(self) -> "MeshConfig":
        """Leave sequence parallelism out: one token cannot be split, and no weight lies differently for it.

        Raise ValueError for a mesh that splits layers or positions.
        """
        for axis in ("pipeline", "sequence"):
            if (degree := getattr(self, axis)) > 1:
                raise ValueError(
                    f"{axis} ({degree}) is for training: generate on another mesh (any checkpoint restores onto any)"
                )
        return MeshConfig(**{**self.__dict__, "sequence_parallel": False, "overlap_tensor": False})
