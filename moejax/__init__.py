"""Mixture-of-experts language models in JAX: every router, every mesh, and a slow twin for every fast path.

`moejax.load_pretrained(folder)` gives a model with open weights, `moejax.save_pretrained(model, folder)` writes one.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moejax.interop.pretrained import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: a config or a schedule needs no jax."""
    if name not in __all__:
        raise AttributeError(f"module 'moejax' has no attribute {name!r}")
    from moejax.interop import pretrained

    return getattr(pretrained, name)
