"""Text to training rows: sources, tokenizers, packing, and `prepare`, which does all of it."""

from llmfast.data.dataset import Dataset, Mixed, prepare
from llmfast.data.mixture import Mixture, continued_weights
from llmfast.data.packing import IGNORE_INDEX, Batch, PackedRows, Rows, pack, unigram_entropy
from llmfast.data.sources import Document, is_held_out, load, python_code, python_prose, text_files
from llmfast.data.tokenizer import SPECIAL_TOKENS, BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "IGNORE_INDEX",
    "SPECIAL_TOKENS",
    "BPETokenizer",
    "Batch",
    "ByteTokenizer",
    "Dataset",
    "Document",
    "Mixed",
    "Mixture",
    "PackedRows",
    "Rows",
    "Tokenizer",
    "continued_weights",
    "is_held_out",
    "load",
    "load_tokenizer",
    "pack",
    "prepare",
    "python_code",
    "python_prose",
    "text_files",
    "unigram_entropy",
]
