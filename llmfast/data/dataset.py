"""From names of sources to rows for training and validation, in one deterministic call."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmfast._checks import expect
from llmfast.data.mixture import Mixture
from llmfast.data.packing import Batch, PackedRows, Rows, joined, pack
from llmfast.data.sources import Document, is_held_out, load
from llmfast.data.tokenizer import MIN_BPE_VOCAB_SIZE, BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows of each source, for training and for validation, and the tokenizer they were made with."""

    train: dict[str, Rows]  # by source
    validation: dict[str, Rows]  # by source; empty where nothing was held out
    tokenizer: Tokenizer

    def batch(self, source: npt.NDArray[np.int64], row: npt.NDArray[np.int64], first: int) -> Batch:
        """Training sequences `first` and following: (B,) sources and rows, as `Mixture.sequences` gives them."""
        samples = first + np.arange(len(source))
        parts = [
            rows.batch(row[source == d], samples[source == d])
            for d, rows in enumerate(self.train.values())
            if (source == d).any()
        ]
        batch = joined(parts, np.argsort(np.argsort(source, kind="stable")))
        return replace(batch, sources=torch.from_numpy(source.copy()))


class Mixed:
    """A data set in a mixture's order, as a trainer reads it."""

    def __init__(self, dataset: Dataset, mixture: Mixture) -> None:
        self.dataset, self.mixture = dataset, mixture

    def batch(self, first: int, count: int) -> Batch:
        """Training sequences `first` to `first + count`."""
        return self.dataset.batch(*self.mixture.sequences(first, first + count), first)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self.mixture.state()

    def resume(self, state: Mapping[str, Any], consumed: int) -> None:
        """Keep the first `consumed` sequences as they were; those to come are this mixture's."""
        self.mixture = self.mixture.resumed(state, consumed)


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
        sources: "code", "prose", or paths of folders and files; see `load`. "name=path" gives one another name.
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

    train: dict[str, list[str]] = {}
    validation: dict[str, list[str]] = {}
    for source in sources:
        name, where = source_name(source)
        expect(name not in train, f"sources must have different names; got {name!r} twice")
        kept, held = _split(load(where), held_out)
        expect(bool(kept), f"source {source!r} has no file left to train on at held_out={held_out}")
        train[name] = kept
        if held_out > 0:
            expect(bool(held), f"source {source!r} has no file to validate on at held_out={held_out}; try more, or 0")
            validation[name] = held

    encoder = _tokenizer(tokenizer, [text for texts in train.values() for text in texts], vocab_size)

    def rows(part: str, texts: dict[str, list[str]]) -> dict[str, Rows]:
        return {name: _pack(f"source {name!r}'s {part} part", texts[name], encoder, seq_len) for name in texts}

    return Dataset(rows("training", train), rows("validation", validation), encoder)


def source_name(source: str) -> tuple[str, str]:
    """What a source is called, and where it is: "web=/data/web" is /data/web and called "web"."""
    name, equals, where = source.partition("=")
    return (name, where) if equals and re.fullmatch(r"[\w-]+", name) else (source, source)


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
