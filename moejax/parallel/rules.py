"""THE table: which mesh axes does each logical axis lie on, and which sizes does that allow?"""

from collections.abc import Sequence
from dataclasses import dataclass

from moejax.axes import BATCH_AXES, LOGICAL_AXES
from moejax.config.attention import AttentionConfig, LightningConfig, Mixer
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
        "layers": ("pipeline",),
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
    moe = model.moe
    sizes = {"vocab": ("vocab", model.vocab)}
    for table, mixer in model.mixer_tables().items():
        sizes[f"{table}.num_heads"] = ("heads", mixer.num_heads)
        if isinstance(mixer, AttentionConfig):
            sizes[f"{table}.num_kv_heads"] = ("kv_heads", mixer.num_kv_heads)
    if model.encoder is not None:
        check_encoder(mesh)
    if model.encoder is not None or moe is None or not all(moe.is_sparse(n) for n in range(model.num_layers)):
        sizes["ffn"] = ("ffn", model.ffn)
    if moe is not None:
        sizes |= {"expert_ffn": ("expert_ffn", moe.expert_ffn), "num_experts": ("experts", moe.num_experts)}
        if moe.shared_ffn:
            sizes["shared_ffn"] = ("ffn", moe.shared_ffn)
        if moe.router.balance_over == "model" and moe.router.load_balance and mesh.pipeline > 1:
            raise ValueError(
                f'balance_over = "model" wants the routers of all layers at once, and pipeline ({mesh.pipeline}) '
                'splits them: set balance_over = "layer", or pipeline = 1'
            )
        if moe.competitive and mesh.pipeline > 1:
            raise ValueError(
                f"moe.competitive splits the last layer from the others, and pipeline ({mesh.pipeline}) wants stages "
                "alike: set pipeline = 1"
            )
    elif mesh.expert > 1:
        raise ValueError(f"expert ({mesh.expert}) splits experts, and the model has none: give those devices to data")
    check_divisible(rules, mesh, sizes)
    if model.mtp is not None:
        check_mtp(mesh, model)
    if mesh.sequence > 1:
        for mixer in model.mixer_tables().values():
            check_context(rules, mesh, mixer)


def check_mtp(mesh: MeshConfig, model: ModelConfig) -> None:
    """Raise ValueError where further tokens cannot be predicted."""
    for name, degree in (("pipeline", mesh.pipeline), ("sequence", mesh.sequence)):
        if degree > 1:
            raise ValueError(
                f"mtp reads the last layer's stream beside the next tokens, and {name} ({degree}) keeps them on other "
                f"devices: set {name} = 1, or leave mtp out"
            )
    if model.encoder is not None or (model.moe is not None and model.moe.competitive):
        raise ValueError(
            f'mtp predicts further tokens from one stream, and a model of name = "{model.name}" has others'
        )


def check_encoder(mesh: MeshConfig) -> None:
    """Raise ValueError for meshes that split what an encoder and a decoder need whole."""
    if mesh.pipeline > 1:
        raise ValueError(
            f"pipeline ({mesh.pipeline}) hands one stream from stage to stage, and every layer of a decoder looks into "
            "its encoder's too: set pipeline = 1"
        )
    if mesh.sequence > 1:
        raise ValueError(
            f"sequence ({mesh.sequence}) splits positions, which T5's learned scores by distance do not know: set "
            "sequence = 1"
        )


def check_context(rules: Rules, mesh: MeshConfig, mixer: Mixer) -> None:
    """Raise ValueError unless this mixer can be split over positions."""
    if isinstance(mixer, LightningConfig):
        return
    attention = mixer if isinstance(mixer, AttentionConfig) else None
    if attention is not None and attention.dropout:
        raise ValueError(
            f"attention.dropout ({attention.dropout}) has no split over positions: set it to 0, or sequence "
            f"({mesh.sequence}) to 1"
        )
    local, name = (mixer.num_heads, "heads") if attention is None else (attention.num_kv_heads, "kv_heads")
    for axis in rules[name]:
        local //= getattr(mesh, axis)
    if mesh.context == "all_to_all" and local % mesh.sequence:
        raise ValueError(
            f'context = "all_to_all" exchanges key/value heads: {local} on a tensor rank must divide by sequence '
            f'({mesh.sequence}), or set context = "ring"'
        )


def check_layers(mesh: MeshConfig, runs: Sequence[tuple[Sequence[object], int]]) -> None:
    """Raise ValueError unless a list of (period, repeats) makes equal stages; stages hold whole periods."""
    if mesh.pipeline == 1:
        return
    if len(runs) != 1:
        shown = " + ".join(f"{repeats} x ({', '.join(map(str, period))})" for period, repeats in runs)
        raise ValueError(f"pipeline ({mesh.pipeline}) wants one period of layers repeated, not {shown}")
    (period, repeats), stages = runs[0], mesh.pipeline * mesh.chunks
    if repeats % stages:
        raise ValueError(
            f"num_layers ({repeats * len(period)}, periods of {len(period)}) must give each of pipeline "
            f"({mesh.pipeline}) * chunks ({mesh.chunks}) stages as many periods: {repeats} does not divide by {stages}"
        )


def check_batch(
    rules: Rules,
    mesh: MeshConfig,
    global_batch: int,
    microbatches: int,
    seq_len: int,
    source_len: int | None = None,
) -> None:
    """Raise ValueError unless a microbatch divides over the batch axes, a sequence and its source over their own."""
    sizes = {
        "global_batch / microbatches": ("batch", global_batch // microbatches),
        "seq_len": ("residual_seq", seq_len),
    }
    if source_len is not None:
        sizes["source_len"] = ("residual_seq", source_len)
    check_divisible(rules, mesh, sizes)
    if mesh.sequence > 1 and mesh.context == "ring" and seq_len % (2 * mesh.sequence):
        raise ValueError(f"seq_len ({seq_len}) must divide by 2 * sequence ({mesh.sequence}): a zig-zag has two parts")
    if mesh.schedule == "interleaved" and microbatches % mesh.pipeline:
        raise ValueError(
            f"microbatches ({microbatches}) must divide by pipeline ({mesh.pipeline}): an interleaved schedule goes "
            "round in groups"
        )
