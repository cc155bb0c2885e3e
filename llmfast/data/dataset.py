"""From names of sources to rows for training and validation, in one deterministic call."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from llmfast._checks import expect
from llmfast.data.best_fit import pack_best_fit
from llmfast.data.fim import FIM, FIMDocumentRows, FIMRows
from llmfast.data.mixture import Mixture
from llmfast.data.packing import Batch, PackedRows, Rows, joined, pack
from llmfast.data.sources import is_held_out, load
from llmfast.data.token_files import SUFFIXES, open_token_file
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
    packing: Literal["concat", "best_fit"] = "concat",
    fim: Callable[[Tokenizer], FIM] | None = None,
    fim_unit: Literal["context", "document"] = "context",
) -> Dataset:
    """Load the sources, split them by file, train the tokenizer on the training part, encode and pack.

    Args:
        sources: "code", "prose", or paths of folders and files; see `load`. "name=path" gives one another name. Files
            of tokens (.ds, .bin, .idx) are mapped into memory; of these the last documents validate.
        tokenizer: "bpe" (needs `tokenizers`), "bytes", or the path of a saved tokenizer: that of the files of tokens.
        vocab_size: Ids of a new BPE tokenizer; the others have their own.
        seq_len: Tokens per row.
        held_out: Share of each source's files that is kept for validation; 0 keeps none.
        packing: "concat" (`pack`) or "best_fit" (`pack_best_fit`), of texts.
        fim: With the tokenizer, how documents of the training part are rearranged; see `FIM`.
        fim_unit: Rearranged is what a row has of a document ("context"), or documents before they are packed.

    Raises:
        ValueError: An argument is out of range, or a source has too little text for one row in either part.
    """
    expect(not isinstance(sources, str), f"sources must be a list of names; got the string {sources!r}")
    expect(len(sources) > 0, "sources must name at least one source")
    expect(len(set(sources)) == len(sources), f"sources must differ; got {list(sources)}")
    expect(seq_len >= 2, f"seq_len must be at least 2; got {seq_len}")
    expect(0 <= held_out < 1, f"held_out must be in [0, 1); got {held_out}")
    expect(packing in ("concat", "best_fit"), f"packing must be 'concat' or 'best_fit'; got {packing!r}")
    expect(fim_unit in ("context", "document"), f"fim_unit must be 'context' or 'document'; got {fim_unit!r}")
    whole = fim is not None and fim_unit == "document"
    expect(not (whole and packing == "best_fit"), "fim_unit='document' needs packing='concat'")
    if tokenizer == "bpe":  # before any file is read
        expect(vocab_size >= MIN_BPE_VOCAB_SIZE, f"vocab_size must be at least {MIN_BPE_VOCAB_SIZE}; got {vocab_size}")
    named = [source_name(source) for source in sources]
    places = dict(named)
    for name in places:
        expect([n for n, _ in named].count(name) == 1, f"sources must have different names; got {name!r} twice")
    files = [name for name, where in places.items() if _is_tokens(where)]
    if files:
        saved = tokenizer not in ("bpe", "bytes")
        expect(saved, f"files of tokens need the tokenizer.json they were made with; got tokenizer={tokenizer!r}")
        expect(not whole, "fim_unit='document' needs texts; files of tokens can have fim_unit='context'")
    texts = {name: _split(name, where, held_out) for name, where in places.items() if name not in files}
    encoder = _tokenizer(tokenizer, [text for train, _ in texts.values() for text in train], vocab_size)
    rearranged = None if fim is None else fim(encoder)

    train: dict[str, Rows] = {}
    validation: dict[str, Rows] = {}
    for name, where in places.items():
        if name in texts:
            part, held = texts[name]
            if rearranged is not None and whole:
                train[name] = FIMDocumentRows.pack(encoder.encode_batch(part), seq_len, rearranged)
            else:
                train[name] = _pack(f"source {name!r}'s training part", part, encoder, seq_len, packing)
            if held_out > 0:
                validation[name] = _pack(f"source {name!r}'s validation part", held, encoder, seq_len, packing)
        else:
            file = open_token_file(where, vocab_size=encoder.vocab_size)
            if held_out > 0:
                file, rest = file.split(held_out)
                validation[name] = rest.rows(seq_len)
            train[name] = file.rows(seq_len)
        rows = train[name]
        if rearranged is not None and isinstance(rows, PackedRows):
            train[name] = FIMRows(rows, rearranged)
    return Dataset(train, validation, encoder)


def _is_tokens(where: str) -> bool:
    return Path(where).suffix in SUFFIXES and Path(where).is_file()


def source_name(source: str) -> tuple[str, str]:
    """What a source is called, and where it is: "web=/data/web" is /data/web and called "web"."""
    name, equals, where = source.partition("=")
    return (name, where) if equals and re.fullmatch(r"[\w-]+", name) else (source, source)


def _split(name: str, where: str, held_out: float) -> tuple[list[str], list[str]]:
    """Texts to train on, and those to validate on."""
    parts: tuple[list[str], list[str]] = [], []
    for document in load(where):
        parts[is_held_out(document, held_out)].append(document.text)
    kept, held = parts
    expect(bool(kept), f"source {name!r} has no file left to train on at held_out={held_out}")
    expect(
        bool(held) or held_out == 0,
        f"source {name!r} has no file to validate on at held_out={held_out}; try more, or 0",
    )
    return parts


def _tokenizer(name: str, texts: list[str], vocab_size: int) -> Tokenizer:
    if name == "bytes":
        return ByteTokenizer()
    if name == "bpe":
        return BPETokenizer.train(texts, vocab_size)
    try:
        return load_tokenizer(name)
    except FileNotFoundError:
        raise ValueError(f"unknown tokenizer {name!r}: expected 'bpe', 'bytes' or a file that exists") from None


def _pack(part: str, texts: list[str], tokenizer: Tokenizer, seq_len: int, packing: str) -> PackedRows:
    ids = tokenizer.encode_batch(texts)
    try:
        return (pack if packing == "concat" else pack_best_fit)(ids, seq_len, tokenizer.eot_id)
    except ValueError as error:
        raise ValueError(f"{part} is too small: {error}") from error
