"""A small model to train and to test with."""

from llmfast.models.decoder import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig"]
