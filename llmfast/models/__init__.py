"""A decoder-only transformer, and functions that save and load it in Llama's format."""

from llmfast.models.cache import KeyValues
from llmfast.models.decoder import Decoder, DecoderConfig, Trunk
from llmfast.models.llama import load_llama, save_llama
from llmfast.models.sampling import Sampler

__all__ = ["Decoder", "DecoderConfig", "KeyValues", "Sampler", "Trunk", "load_llama", "save_llama"]
