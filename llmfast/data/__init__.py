"""Turn text into training rows: sources, tokenizers, packing, and `prepare`, which combines them."""

from llmfast.data.best_fit import BestFitRows, pack_best_fit
from llmfast.data.dataset import Dataset, Mixed, prepare
from llmfast.data.fim import FIM, FIMDocumentRows, FIMRows, fim_prompt
from llmfast.data.mixture import Mixture, continued_weights
from llmfast.data.packing import IGNORE_INDEX, Batch, PackedRows, Rows, pack, unigram_entropy
from llmfast.data.sources import Document, is_held_out, load, python_code, python_prose, text_files
from llmfast.data.token_files import TokenFile, open_token_file, read_ds, read_megatron, write_ds
from llmfast.data.tokenizer import SPECIAL_TOKENS, BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "FIM",
    "IGNORE_INDEX",
    "SPECIAL_TOKENS",
    "BPETokenizer",
    "Batch",
    "BestFitRows",
    "ByteTokenizer",
    "Dataset",
    "Document",
    "FIMDocumentRows",
    "FIMRows",
    "Mixed",
    "Mixture",
    "PackedRows",
    "Rows",
    "TokenFile",
    "Tokenizer",
    "continued_weights",
    "fim_prompt",
    "is_held_out",
    "load",
    "load_tokenizer",
    "open_token_file",
    "pack",
    "pack_best_fit",
    "prepare",
    "python_code",
    "python_prose",
    "read_ds",
    "read_megatron",
    "text_files",
    "unigram_entropy",
    "write_ds",
]
