"""What is one layer of a model? The entries of the list that every family's file makes."""

from dataclasses import dataclass, replace
from typing import Literal

from moejax.config.attention import Mixer
from moejax.config.model import ModelConfig

Kind = Literal["dense", "sparse"]
"""What a layer's feed-forward is."""


@dataclass(frozen=True)
class Layer:
    """A mixer's own config says which mixer it is; each sublayer joins the stream as alpha * x + beta * sublayer."""

    mixer: Mixer
    ffn: Kind
    join_mixer: tuple[float, float] = (1.0, 1.0)
    join_ffn: tuple[float, float] = (1.0, 1.0)
    carries_norm: bool = False
    """x is what the norm gave, for both sublayers (post-norm)"""
    part: Literal["decoder_only", "encoder", "decoder"] = "decoder_only"
    """an encoder's layer sees all its tokens, a decoder's looks into the encoder's as well"""

    @property
    def sublayers(self) -> int:
        """How many times it joins the stream."""
        return 3 if self.part == "decoder" else 2

    def length(self, seq_len: int, source_len: int) -> int:
        """Give the tokens of a sequence that it sees: the source's, or those beside it."""
        return source_len if self.part == "encoder" else seq_len

    def __str__(self) -> str:
        return f"{type(self.mixer).__name__.removesuffix('Config').lower()} {self.ffn}"


def layer(config: ModelConfig, number: int) -> Layer:
    """Give layer `number` as the config's own fields describe it; layers that are alike are equal."""
    sort, residual = config.mixers[number % len(config.mixers)], config.residual
    ffn: Kind = "sparse" if config.moe is not None and config.moe.is_sparse(number) else "dense"
    joins = residual.ffn, residual.of_norm
    if sort == "lightning":
        assert config.lightning is not None
        return Layer(config.lightning, ffn, residual.lightning, *joins)
    if config.latent is not None:
        return Layer(config.latent, ffn, residual.attention, *joins)
    attention = replace(config.attention, window=None) if sort == "global" else config.attention
    return Layer(attention, ffn, residual.attention, *joins)


def layers(config: ModelConfig) -> list[Layer]:
    """List all layers as the config's own fields describe them."""
    return [layer(config, number) for number in range(config.num_layers)]
