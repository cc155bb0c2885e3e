"""A tokenizer's files as transformers reads them: tokenizer.json and tokenizer_config.json."""

import json
from pathlib import Path
from typing import Any

from llmfast.data.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, BPETokenizer, ByteTokenizer, Tokenizer

_PAD = SPECIAL_TOKENS[-1]


def save_for_transformers(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> None:
    """Write the files to `folder`, which must exist; `AutoTokenizer.from_pretrained` gives the same ids for a text.

    One thing differs: transformers encodes special tokens in a text as such, unless `split_special_tokens=True`.
    """
    (_byte_level() if isinstance(tokenizer, ByteTokenizer) else tokenizer).save(folder / "tokenizer.json")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": _PAD if _PAD in tokenizer.special_ids else END_OF_TEXT,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],  # not token_type_ids, which no Llama takes
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def ids_for_transformers(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of these tokens, by their names in config.json and generation_config.json."""
    end = tokenizer.eot_id
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": tokenizer.special_ids.get(_PAD, end)}


def _byte_level() -> BPETokenizer:
    """Make the byte tokenizer as a BPE without merges."""
    import tokenizers

    # The byte-level alphabet is GPT-2's: printable bytes stand for themselves, the others for characters from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocabulary = {characters[byte]: byte for byte in range(256)} | dict(ByteTokenizer.special_ids)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return BPETokenizer(backend)
