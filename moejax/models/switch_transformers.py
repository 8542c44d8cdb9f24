"""Switch Transformers as released (arXiv 2101.03961): T5's encoder and decoder, top-1 experts in every other layer."""

from typing import Literal

from moejax.config.attention import T5AttentionConfig
from moejax.config.model import ModelConfig
from moejax.models.layer import Layer
from moejax.models.switch import check_router


def layers(config: ModelConfig) -> list[Layer]:
    """List the encoder's layers, then the decoder's: of every so many the second is sparse."""
    encoder, mixer, moe = config.encoder, config.t5, config.moe
    assert encoder is not None and mixer is not None and moe is not None
    check_router(moe.router)
    return [_layer(mixer, number, encoder.every, "encoder") for number in range(encoder.num_layers)] + [
        _layer(mixer, number, moe.every, "decoder") for number in range(config.num_layers)
    ]


def _layer(mixer: T5AttentionConfig, number: int, every: int, part: Literal["encoder", "decoder"]) -> Layer:
    sparse = every == 1 or number % every == 1
    return Layer(mixer, "sparse" if sparse else "dense", part=part)
