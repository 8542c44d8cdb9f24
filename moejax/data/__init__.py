"""From text to batches, on the host and without jax.

A corpus is read and split by file (`sources`, `corpus`), tokenized without loss (`tokenizer`), packed into rows without
padding (`packing`), prepared once and cached (`dataset`), and served as batches (`batches`): a step's batch is a pure
function of (seed, step). Conversations are texts too, rendered by the model's template (`chat_template`), in which the
answers are marked (`chat`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moejax.data.batches import BatchSource
    from moejax.data.corpus import Documents, load_documents
    from moejax.data.dataset import Data, TextStats, prepare
    from moejax.data.packing import Batch, PackedDataset, PackedIndex, TokenStore
    from moejax.data.tokenizer import Tokenizer, build_tokenizer

__all__ = [
    "Batch",
    "BatchSource",
    "Data",
    "Documents",
    "PackedDataset",
    "PackedIndex",
    "TextStats",
    "TokenStore",
    "Tokenizer",
    "build_tokenizer",
    "load_documents",
    "prepare",
]

_MODULES = {
    "batches": ("BatchSource",),
    "corpus": ("Documents", "load_documents"),
    "dataset": ("Data", "TextStats", "prepare"),
    "packing": ("Batch", "PackedDataset", "PackedIndex", "TokenStore"),
    "tokenizer": ("Tokenizer", "build_tokenizer"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"moejax.data.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
