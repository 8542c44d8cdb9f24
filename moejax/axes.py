"""The names: which mesh axes, logical axes and dim letters exist, and what each one means.

"axis" is a mesh axis, "dim" an array dimension, in every name, message and docstring.
"""

from typing import Final

MESH_AXES: Final = ("pipeline", "data", "sequence", "expert", "tensor")
"""Mesh axes, outermost first. `tensor` is innermost because it talks most."""

BATCH_AXES: Final = ("data", "expert")
"""The mesh axes that split the batch: `expert` is a batch axis for everything but expert weights."""

LOGICAL_AXES: Final = (
    "batch",
    "seq",
    "residual_seq",
    "embed",
    "heads",
    "kv_heads",
    "head_dim",
    "latent",
    "ffn",
    "vocab",
    "experts",
    "expert_ffn",
    "layers",
)
"""Names given to the dims of weights and activations; `parallel/rules.py` maps them to mesh axes."""

LETTERS: Final = {
    "A": "experts active per token",
    "B": "batch",
    "C": "slots per expert (capacity)",
    "D": "model dim",
    "E": "experts",
    "F": "feed-forward dim",
    "G": "query heads per key/value head",
    "H": "head dim",
    "I": "pages of a sequence",
    "J": "latent dim",
    "K": "key/value heads",
    "L": "layers",
    "M": "tokens, B*T flat",
    "N": "query heads",
    "P": "pages",
    "R": "routed rows, M*A",
    "S": "key positions",
    "T": "query positions",
    "U": "head dim of values, where it differs",
    "V": "vocabulary",
    "W": "ranks of the expert axis",
    "X": "places in a buffer",
    "Y": "microbatches",
    "Z": "tokens of a page",
}
"""Dim letters used as suffixes of variable names (`q_BTNH`); lower case is the local extent."""
