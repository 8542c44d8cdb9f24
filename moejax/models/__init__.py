"""Models: each file lists the layers of one family, `decoder.py` runs such a list, `build` makes a model by name, and
`ModelParts` takes one apart into structure, weights and their places on the mesh."""

from moejax.models.build import FAMILIES, build
from moejax.models.decoder import Decoder
from moejax.models.encoder_decoder import EncoderDecoder
from moejax.models.parts import ModelParts

__all__ = ["FAMILIES", "Decoder", "EncoderDecoder", "ModelParts", "build"]
