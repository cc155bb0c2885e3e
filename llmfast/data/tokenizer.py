"""Encode text as token ids and back: bytes, which need no training, or byte-level BPE trained on the given text.

Both reproduce every text exactly, and neither ever produces a special id from text: a document that contains
"<|endoftext|>" is encoded as ordinary characters.
"""

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from llmfast._checks import expect

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|pad|>")
"""Tokens with their own id in every tokenizer created here."""
MIN_BPE_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
LONGEST_WORD = 256
"""Maximum characters of a word, number, or run of punctuation or spaces; longer ones are split in training."""

# GPT-2's pattern with a limit on length: training rewrites a word for each merge in it, so a long word would take
# time quadratic in its length. It never joins letters and punctuation, so no merge can rebuild a special token.
_WORDS = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}{1,N}| ?\p{N}{1,N}| ?[^\s\p{L}\p{N}]{1,N}|\s{1,N}(?!\S)|\s{1,N}").replace(
    "1,N", f"1,{LONGEST_WORD}"
)
_LARGE = 1 << 20  # from this many characters on, a call may delay Ctrl-C too long

TokenIds = npt.NDArray[np.int32]
T = TypeVar("T")


class Tokenizer(Protocol):
    """Interface that the data pipeline needs. `encode` adds nothing: `pack` puts `eot_id` after each document."""

    @property
    def vocab_size(self) -> int: ...  # every id is below it

    @property
    def eot_id(self) -> int: ...

    @property
    def special_ids(self) -> Mapping[str, int]: ...  # "<|fim_prefix|>" and so on

    @property
    def start_ids(self) -> Sequence[int]: ...  # with which every uncut text begins

    def encode(self, text: str) -> TokenIds: ...

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]: ...

    def decode(self, ids: npt.ArrayLike) -> str: ...  # special tokens are dropped, broken UTF-8 becomes U+FFFD

    def save(self, path: str | PathLike[str]) -> None: ...


class ByteTokenizer:
    """Tokenizer with UTF-8 bytes as ids 0..255, followed by special tokens; 264 ids, a multiple of 8, three unused."""

    vocab_size = 264
    special_ids: Mapping[str, int] = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    eot_id = special_ids[END_OF_TEXT]
    start_ids: Sequence[int] = ()

    def encode(self, text: str) -> TokenIds:
        _expect_texts([text])
        _expect_unicode([text])
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
    """Byte-level BPE by Hugging Face `tokenizers`, saved as one `tokenizer.json`, which that library can read too.

    Args:
        backend: A `tokenizers.Tokenizer`.
        end_of_text: The token that ends a text, which `backend` must know. The other special tokens are optional.
        start_ids: Ids that every text begins with.
    """

    def __init__(self, backend: Any, end_of_text: str = END_OF_TEXT, start_ids: Sequence[int] = ()) -> None:
        vocabulary: dict[str, int] = backend.get_vocab()
        expect(end_of_text in vocabulary, f"the tokenizer has no {end_of_text} token")
        self._backend = backend
        self._backend.encode_special_tokens = True  # encode special tokens in a text as ordinary text
        self._backend.no_truncation()  # files saved elsewhere may truncate and pad
        self._backend.no_padding()
        for choice in ("dropout", "alpha", "nbest_size"):  # with which a text has other ids at each call
            if getattr(backend.model, choice, None) is not None:
                setattr(backend.model, choice, None)
        self.vocab_size = max(vocabulary.values()) + 1  # ids can have gaps
        self.special_ids: Mapping[str, int] = {t: vocabulary[t] for t in SPECIAL_TOKENS if t in vocabulary}
        self.eot_id, self._end_of_text = vocabulary[end_of_text], end_of_text
        self.start_ids: Sequence[int] = tuple(start_ids)

    def __reduce__(self) -> tuple[Any, ...]:  # the pickled backend loses encode_special_tokens
        return BPETokenizer, (self._backend, self._end_of_text, self.start_ids)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 8192) -> "BPETokenizer":
        """Train a vocabulary. The same texts always give the same one; a short text gives fewer than `vocab_size` ids.

        No token has more than `LONGEST_WORD` characters.

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
        pre = tokenizers.pre_tokenizers
        words = pre.Split(tokenizers.Regex(_WORDS), "isolated")
        backend.pre_tokenizer = pre.Sequence([words, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        rest = iter(texts)

        def train() -> None:
            backend.train_from_iterator(rest, trainer=trainer, length=len(texts))

        try:
            _interruptible(train, sum(map(len, texts)))
        finally:
            for _ in rest:  # after an interruption: stops the library's thread, which still reads the texts
                pass
        return cls(backend)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "BPETokenizer":
        """Read a `tokenizer.json`; ValueError if it is invalid.

        A `tokenizer_config.json` next to it, as transformers writes it, says which token ends a text. Then a text also
        begins with what the tokenizer itself puts before it.
        """
        tokenizers = _tokenizers()
        try:
            backend = tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8-sig"))
        except OSError:
            raise
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{path} is not a tokenizer file: {error}") from error
        end_of_text = _end_of_text(Path(path).with_name("tokenizer_config.json"))
        if end_of_text is None:
            return cls(backend)
        found = cls(backend, end_of_text)
        whole, bare = (backend.encode("a", add_special_tokens=special).ids for special in (True, False))
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        found.start_ids = tuple(whole[: next(starts, 0)])  # what comes after the text is the end that `pack` puts there
        return found

    def encode(self, text: str) -> TokenIds:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        _expect_texts(texts)
        try:
            encodings = _interruptible(
                lambda: self._backend.encode_batch_fast(texts, add_special_tokens=False), sum(map(len, texts))
            )
        except TypeError:
            _expect_unicode(texts)  # which the library does not name
            raise
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: npt.ArrayLike) -> str:
        text: str = self._backend.decode(_checked(ids, self.vocab_size).tolist(), skip_special_tokens=True)
        return text

    def save(self, path: str | PathLike[str]) -> None:
        Path(path).write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """Return the content of the file that `save` writes."""
        text: str = self._backend.to_str()
        return text

    @classmethod
    def of(cls, text: str) -> "BPETokenizer":
        """Make the tokenizer that has this `text()`."""
        return cls(_tokenizers().Tokenizer.from_str(text))

    @classmethod
    def recipe(cls) -> str:
        """Describe what `train` and `encode_batch` depend on besides their arguments and the vocabulary."""
        return f"bpe tokenizers={_tokenizers().__version__} {_WORDS} {SPECIAL_TOKENS}"


def _expect_texts(texts: Sequence[str]) -> None:
    for text in texts:
        if not isinstance(text, str):  # `tokenizers` would join a pair of texts
            raise TypeError(f"a text must be a string; got {type(text).__name__}")


def _expect_unicode(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            message = f"a text must be valid Unicode; got {text[e.start]!a} at character {e.start}"
            raise ValueError(message) from None


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """Load a tokenizer written by `save`, of either kind, or a model's `tokenizer.json`; see `BPETokenizer.load`.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: The file is not a tokenizer.
    """
    expect(not Path(path).is_char_device(), f"{path} is not a tokenizer file but a device")  # which may be endless
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8, or endless brackets
        raise ValueError(f"{path} is not a tokenizer file: {error}") from error
    if isinstance(content, dict) and content.get("type") == _BYTES_FILE["type"]:
        expect(content == json.loads(json.dumps(_BYTES_FILE)), f"{path} has other byte tokens than this version's")
        return ByteTokenizer()
    return BPETokenizer.load(path)


def _end_of_text(settings: Path) -> str | None:
    """Read the token that ends a text from a `tokenizer_config.json`; None if there is none."""
    try:
        token = json.loads(settings.read_text(encoding="utf-8-sig"))["eos_token"]
    except (FileNotFoundError, KeyError):
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{settings} is not a tokenizer's settings: {error}") from error
    found: Any = token.get("content") if isinstance(token, dict) else token
    expect(found is None or isinstance(found, str), f"{settings} must name its eos_token; got {found!r:.80}")
    return cast("str | None", found)


def _interruptible(call: Callable[[], T], characters: int) -> T:
    """Call the library, in another thread if the call is long, so that Ctrl-C takes effect before it ends."""
    if characters < _LARGE or threading.current_thread() is not threading.main_thread():
        return call()
    ended: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            ended.append((call(), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    ((result, error),) = ended
    if error is not None:
        raise error
    return cast(T, result)


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
