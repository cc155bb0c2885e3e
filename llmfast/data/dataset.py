"""From names of sources to rows for training and validation, in one deterministic call."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmfast._checks import expect
from llmfast.data.packing import PackedRows, pack
from llmfast.data.sources import Document, is_held_out, load
from llmfast.data.tokenizer import MIN_BPE_VOCAB_SIZE, BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows of all sources for training, rows of each source for validation, and the tokenizer they were made with."""

    train: PackedRows
    validation: dict[str, PackedRows]  # by source; empty where nothing was held out
    tokenizer: Tokenizer


def prepare(
    sources: Sequence[str],
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 8192,
    seq_len: int = 1024,
    held_out: float = 0.05,
) -> Dataset:
    """Load the sources, split them by file, train the tokenizer on the training part, encode and pack.

    Args:
        sources: "code", "prose", or paths of folders and files; see `load`.
        tokenizer: "bpe" (needs `tokenizers`), "bytes", or the path of a saved tokenizer.
        vocab_size: Ids of a new BPE tokenizer; the others have their own.
        seq_len: Tokens per row.
        held_out: Share of each source's files that is kept for validation; 0 keeps none.

    Raises:
        ValueError: An argument is out of range, or a source has too little text for one row in either part.
    """
    expect(not isinstance(sources, str), f"sources must be a list of names; got the string {sources!r}")
    expect(len(sources) > 0, "sources must name at least one source")
    expect(len(set(sources)) == len(sources), f"sources must differ; got {list(sources)}")
    expect(seq_len >= 2, f"seq_len must be at least 2; got {seq_len}")
    expect(0 <= held_out < 1, f"held_out must be in [0, 1); got {held_out}")
    if tokenizer == "bpe":  # before any file is read
        expect(vocab_size >= MIN_BPE_VOCAB_SIZE, f"vocab_size must be at least {MIN_BPE_VOCAB_SIZE}; got {vocab_size}")

    train: list[str] = []
    validation: dict[str, list[str]] = {}
    for source in sources:
        kept, held = _split(load(source), held_out)
        expect(bool(kept), f"source {source!r} has no file left to train on at held_out={held_out}")
        train += kept
        if held_out > 0:
            expect(bool(held), f"source {source!r} has no file to validate on at held_out={held_out}; try more, or 0")
            validation[source] = held

    encoder = _tokenizer(tokenizer, train, vocab_size)
    return Dataset(
        train=_pack("the training part", train, encoder, seq_len),
        validation={s: _pack(f"source {s!r}'s validation part", t, encoder, seq_len) for s, t in validation.items()},
        tokenizer=encoder,
    )


def _split(documents: list[Document], held_out: float) -> tuple[list[str], list[str]]:
    kept: list[str] = []
    held: list[str] = []
    for document in documents:
        (held if is_held_out(document, held_out) else kept).append(document.text)
    return kept, held


def _tokenizer(name: str, texts: list[str], vocab_size: int) -> Tokenizer:
    if name == "bytes":
        return ByteTokenizer()
    if name == "bpe":
        return BPETokenizer.train(texts, vocab_size)
    try:
        return load_tokenizer(name)
    except FileNotFoundError:
        raise ValueError(f"unknown tokenizer {name!r}: expected 'bpe', 'bytes' or a file that exists") from None


def _pack(part: str, texts: list[str], tokenizer: Tokenizer, seq_len: int) -> PackedRows:
    ids = tokenizer.encode_batch(texts)
    try:
        return pack(ids, seq_len, tokenizer.eot_id)
    except ValueError as error:
        raise ValueError(f"{part} is too small: {error}") from error
