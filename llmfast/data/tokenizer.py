"""Text to token ids and back: bytes, which need nothing, or byte-level BPE trained on the text at hand.

Both give every text back exactly, and neither ever produces a special id from text: a document that contains
"<|endoftext|>" is encoded letter by letter.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmfast._checks import expect

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|pad|>")
"""Tokens with an id of their own in every tokenizer that is made here."""
MIN_BPE_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

TokenIds = npt.NDArray[np.int32]


class Tokenizer(Protocol):
    """What the data pipeline needs of a tokenizer. `encode` adds nothing: `pack` puts `eot_id` after each document."""

    @property
    def vocab_size(self) -> int: ...  # every id is below it

    @property
    def eot_id(self) -> int: ...

    @property
    def special_ids(self) -> Mapping[str, int]: ...  # "<|fim_prefix|>" and so on

    def encode(self, text: str) -> TokenIds: ...

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]: ...

    def decode(self, ids: npt.ArrayLike) -> str: ...  # special tokens are dropped, broken UTF-8 becomes U+FFFD

    def save(self, path: str | PathLike[str]) -> None: ...


class ByteTokenizer:
    """UTF-8 bytes are the ids 0..255, then come the special tokens; 264 ids, a multiple of 8, three of them unused."""

    vocab_size = 264
    special_ids: Mapping[str, int] = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    eot_id = special_ids[END_OF_TEXT]

    def encode(self, text: str) -> TokenIds:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: npt.ArrayLike) -> str:
        known = _checked(ids, self.vocab_size)
        return known[known < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def save(self, path: str | PathLike[str]) -> None:
        Path(path).write_text(json.dumps(_BYTES_FILE), encoding="utf-8")


_BYTES_FILE = {"type": "llmfast-bytes", "vocab_size": ByteTokenizer.vocab_size, "special_tokens": SPECIAL_TOKENS}


class BPETokenizer:
    """Byte-level BPE by Hugging Face `tokenizers`; saved as one `tokenizer.json`, which that library reads too.

    Args:
        backend: A `tokenizers.Tokenizer` that knows "<|endoftext|>". The other special tokens are optional.
    """

    def __init__(self, backend: Any) -> None:
        vocabulary: dict[str, int] = backend.get_vocab()
        expect(END_OF_TEXT in vocabulary, f"the tokenizer has no {END_OF_TEXT} token")
        self._backend = backend
        self._backend.encode_special_tokens = True  # means: as the ordinary text they are
        self._backend.no_truncation()  # files saved by others may cut and pad
        self._backend.no_padding()
        self.vocab_size = max(vocabulary.values()) + 1  # ids can have gaps
        self.special_ids: Mapping[str, int] = {t: vocabulary[t] for t in SPECIAL_TOKENS if t in vocabulary}
        self.eot_id = self.special_ids[END_OF_TEXT]

    def __reduce__(self) -> tuple[Any, ...]:
        return BPETokenizer, (self._backend,)  # the pickled backend forgets encode_special_tokens

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 8192) -> "BPETokenizer":
        """The same texts always give the same vocabulary; a short text may give fewer than `vocab_size` ids.

        Raises:
            ValueError: `vocab_size` has no room for 256 bytes and the special tokens, or there is no text.
            ImportError: `tokenizers` is not installed.
        """
        tokenizers = _tokenizers()
        expect(vocab_size >= MIN_BPE_VOCAB_SIZE, f"vocab_size must be at least {MIN_BPE_VOCAB_SIZE}; got {vocab_size}")
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of strings; got one string")
        texts = [text for text in texts if text]
        expect(bool(texts), "texts must hold at least one non-empty text")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        # GPT-2's pattern never joins letters and punctuation, so no merge can rebuild a special token.
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer=trainer, length=len(texts))
        return cls(backend)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "BPETokenizer":
        """Read a `tokenizer.json`; ValueError if it is none."""
        tokenizers = _tokenizers()
        try:
            backend = tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
        except OSError:
            raise
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{path} is not a tokenizer file: {error}") from error
        return cls(backend)

    def encode(self, text: str) -> TokenIds:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: npt.ArrayLike) -> str:
        text: str = self._backend.decode(_checked(ids, self.vocab_size).tolist(), skip_special_tokens=True)
        return text

    def save(self, path: str | PathLike[str]) -> None:
        Path(path).write_text(self._backend.to_str(), encoding="utf-8")


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """The tokenizer that `save` wrote, of either kind, or another `tokenizer.json` that has "<|endoftext|>".

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: the file is no tokenizer.
    """
    expect(not Path(path).is_char_device(), f"{path} is not a tokenizer file but a device")  # which may have no end
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # broken JSON or broken UTF-8, or brackets without end
        raise ValueError(f"{path} is not a tokenizer file: {error}") from error
    if isinstance(content, dict) and content.get("type") == _BYTES_FILE["type"]:
        expect(content == json.loads(json.dumps(_BYTES_FILE)), f"{path} has other byte tokens than this version's")
        return ByteTokenizer()
    return BPETokenizer.load(path)


def _checked(ids: npt.ArrayLike, vocab_size: int) -> npt.NDArray[np.int64]:
    array = np.asarray(ids)
    expect(array.ndim == 1, f"ids must be one-dimensional; got shape {array.shape}")
    array = array.astype(np.int64, casting="same_kind") if array.size else np.empty(0, np.int64)
    outside = array[(array < 0) | (array >= vocab_size)]
    expect(outside.size == 0, f"ids must be in [0, {vocab_size}); got {outside[:1].tolist()}")
    return array


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("the BPE tokenizer needs `tokenizers`: pip install 'llmfast-torch[data]'") from error
    return tokenizers
