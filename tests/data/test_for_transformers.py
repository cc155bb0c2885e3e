"""Files of a tokenizer for transformers, without it; tests/test_export.py has the rest."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmfast.data import BPETokenizer, ByteTokenizer
from llmfast.data.for_transformers import _byte_level, ids_for_transformers, save_for_transformers

tokenizers = pytest.importorskip("tokenizers")
END = "<|endoftext|>"
BYTE_LEVEL = _byte_level()


def without_padding(tmp_path: Path) -> BPETokenizer:
    """Make a tokenizer of a model that knows the end of a text alone, with the id 1."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    backend.add_special_tokens([END])
    return BPETokenizer(backend)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "without padding"])
def test_files_say_which_token_is_which(kind: str, tmp_path: Path) -> None:
    made = {
        "bytes": ByteTokenizer,
        "bpe": lambda: BPETokenizer.train(["some text, some more text"], 300),
        "without padding": lambda: without_padding(tmp_path),
    }[kind]()
    save_for_transformers(made, tmp_path, max_length=96)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END if kind == "without padding" else "<|pad|>",
        "model_max_length": 96,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    end = theirs.token_to_id(END)
    pad = end if kind == "without padding" else theirs.token_to_id("<|pad|>")
    assert ids_for_transformers(made) == {"bos_token_id": end, "eos_token_id": end, "pad_token_id": pad}
    assert end == made.eot_id and (kind == "without padding") == (pad == end)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    if kind == "bpe":
        assert (tmp_path / "tokenizer.json").read_text() == made.text()  # type: ignore[attr-defined]


@given(text=st.text())
@example(text="".join(map(chr, range(0x180))) + f"中 😀 \u2028{END}")
def test_bytes_have_their_ids_there(text: str) -> None:
    ours, theirs = ByteTokenizer(), BYTE_LEVEL
    assert theirs.encode(text).tolist() == ours.encode(text).tolist()
    assert theirs.decode([*ours.encode(text), *ours.special_ids.values()]) == text
    assert (theirs.special_ids, theirs.eot_id) == (ours.special_ids, ours.eot_id)
