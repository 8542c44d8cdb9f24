"""THE table: which mesh axes does each logical axis lie on, and which sizes does that allow?"""

from dataclasses import dataclass

from moejax.axes import BATCH_AXES, LOGICAL_AXES
from moejax.config.mesh import MeshConfig
from moejax.config.model import ModelConfig


@dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes, outermost first; hashable."""

    table: tuple[tuple[str, tuple[str, ...]], ...]

    def __getitem__(self, name: str) -> tuple[str, ...]:
        """Give the mesh axes of a logical axis; raise ValueError for a name that is not in moejax/axes.py."""
        for logical, axes in self.table:
            if logical == name:
                return axes
        raise ValueError(
            f'"{name}" is no logical axis: add it to moejax/axes.py, or use one of {", ".join(LOGICAL_AXES)}'
        )


def make_rules(mesh: MeshConfig) -> Rules:
    """Build the table for a mesh; axes of size 1 are left out, so that nothing varies over them."""
    tensor = ("tensor",)
    rows: dict[str, tuple[str, ...]] = dict.fromkeys(LOGICAL_AXES, ())
    rows |= {
        "batch": BATCH_AXES,
        "seq": ("sequence",),
        "residual_seq": ("sequence", "tensor") if mesh.sequence_parallel else ("sequence",),
        "heads": tensor,
        "kv_heads": () if mesh.replicate_kv else tensor,
        "ffn": tensor,
        "expert_ffn": tensor,
        "vocab": tensor,
        "experts": ("expert",),
    }
    return Rules(tuple((name, tuple(a for a in axes if getattr(mesh, a) > 1)) for name, axes in rows.items()))


def check_divisible(rules: Rules, mesh: MeshConfig, sizes: dict[str, tuple[str, int]]) -> None:
    """Raise ValueError for the first size that its mesh axes do not divide.

    `sizes` maps what the user wrote ("num_heads") to its logical axis and value.
    """
    for written, (name, size) in sizes.items():
        degree = 1
        for axis in rules[name]:
            degree *= getattr(mesh, axis)
        if size % degree:
            axes = " * ".join(f"{a} ({getattr(mesh, a)})" for a in rules[name])
            hint = " or be replicated: set replicate_kv = true" if name == "kv_heads" else ""
            raise ValueError(f"{written} ({size}) must divide by {axes}{hint}")


def check_model(rules: Rules, mesh: MeshConfig, model: ModelConfig) -> None:
    """Raise ValueError unless every split dim of the model divides by its mesh axes."""
    attention, moe = model.attention, model.moe
    sizes = {
        "vocab": ("vocab", model.vocab),
        "num_heads": ("heads", attention.num_heads),
        "num_kv_heads": ("kv_heads", attention.num_kv_heads),
    }
    if moe is None or moe.every > 1:
        sizes["ffn"] = ("ffn", model.ffn)
    if moe is not None:
        sizes |= {"expert_ffn": ("expert_ffn", moe.expert_ffn), "num_experts": ("experts", moe.num_experts)}
    check_divisible(rules, mesh, sizes)


def check_batch(rules: Rules, mesh: MeshConfig, global_batch: int, microbatches: int, seq_len: int) -> None:
    """Raise ValueError unless a microbatch divides over the batch axes, and a sequence over its own."""
    sizes = {
        "global_batch / microbatches": ("batch", global_batch // microbatches),
        "seq_len": ("residual_seq", seq_len),
    }
    check_divisible(rules, mesh, sizes)
