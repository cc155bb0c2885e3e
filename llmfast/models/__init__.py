"""Small model for training and tests."""

from llmfast.models.decoder import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig"]
