"""A small model for training and tests."""

from llmfast.models.decoder import Decoder, DecoderConfig
from llmfast.models.llama import load_llama, save_llama

__all__ = ["Decoder", "DecoderConfig", "load_llama", "save_llama"]
