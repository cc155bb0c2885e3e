"""Turn names of sources into rows for training and validation, in one deterministic call."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from llmfast._checks import expect
from llmfast.data.best_fit import pack_best_fit
from llmfast.data.cache import cached_ids, cached_texts
from llmfast.data.fim import FIM, FIMDocumentRows, FIMRows
from llmfast.data.mixture import Mixture
from llmfast.data.packing import Batch, PackedRows, Rows, joined, pack
from llmfast.data.reader import TEXT_COLUMN
from llmfast.data.sources import Document, load, warn
from llmfast.data.split import SPLITS, Split, by_document, by_end
from llmfast.data.token_files import SUFFIXES, TokenFile, open_token_file
from llmfast.data.tokenizer import MIN_BPE_VOCAB_SIZE, BPETokenizer, ByteTokenizer, TokenIds, Tokenizer, load_tokenizer


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and validation rows of each source, and their tokenizer."""

    train: dict[str, Rows]  # by name of the source
    validation: dict[str, Rows]  # by name of the source; empty if nothing was held out
    tokenizer: Tokenizer
    split: dict[str, Split] = field(default_factory=dict)  # how the validation part of each source was chosen

    def batch(self, source: npt.NDArray[np.int64], row: npt.NDArray[np.int64], first: int) -> Batch:
        """Return B training sequences from number `first` on.

        `Mixture.sequences` returns their `source`, an index into `train`, and `row`, each (B,).
        """
        samples = first + np.arange(len(source))
        parts = [
            rows.batch(row[source == d], samples[source == d])
            for d, rows in enumerate(self.train.values())
            if (source == d).any()
        ]
        batch = joined(parts, np.argsort(np.argsort(source, kind="stable")))
        return replace(batch, sources=torch.from_numpy(source.copy()))


class Mixed:
    """Training data in the order of a mixture: what a trainer reads."""

    def __init__(self, dataset: Dataset, mixture: Mixture) -> None:
        self.dataset, self.mixture = dataset, mixture

    def batch(self, first: int, count: int) -> Batch:
        """Return `count` training sequences from number `first` on."""
        return self.dataset.batch(*self.mixture.sequences(first, first + count), first)

    def state(self) -> dict[str, Any]:
        """Return the mixture's state for a checkpoint."""
        return self.mixture.state()

    def resume(self, state: Mapping[str, Any], consumed: int) -> None:
        """Take the first `consumed` sequences from the checkpoint's `state`, and later ones from this mixture."""
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
    text_column: str = TEXT_COLUMN,
    split: Mapping[str, Split] | None = None,
    say: Callable[[str], None] | None = None,
) -> Dataset:
    """Load and split the sources, train a BPE tokenizer on the training parts or load another, encode and pack.

    Args:
        sources: "code", "prose", or paths of folders and files; see `load`. "name=path" sets another name. Token files
            (.ds, .bin, .idx) are memory-mapped.
        tokenizer: "bpe" (needs `tokenizers`), "bytes", or the path of a saved tokenizer. Token files need the tokenizer
            they were written with.
        vocab_size: Number of ids of a new BPE tokenizer; other tokenizers have their own.
        seq_len: Inputs per row, at least 2.
        held_out: Share of each source held out for validation; 0 holds out none.
        packing: The way texts are packed: "concat" (`pack`) or "best_fit" (`pack_best_fit`).
        fim: A function that takes the tokenizer and returns the rule for rearranging training documents; see `FIM`.
        fim_unit: "context" rearranges the part of a document that is in a row; "document" rearranges whole documents
            before they are packed, and needs texts and packing="concat".
        text_column: The column of tables that holds the text; see `text_files`.
        split: The way validation data are chosen, by name of the source. "documents" holds out whole documents by a
            hash of their names (in a token file, the last ones); "end" holds out the last part of the text or tokens.
            The default is "documents", or "end" if that would leave the training or validation part without a row.
            Pass `Dataset.split` to reproduce a split with any tokenizer and seq_len.
        say: Called with messages about skipped inputs and held-out ends; by default the messages are warnings.

    Raises:
        ValueError: An argument is out of range, or the training or validation part of a source does not fill a row.
        ImportError: A file or the tokenizer needs a package that is not installed.
    """
    expect(seq_len >= 2, f"seq_len must be at least 2; got {seq_len}")
    expect(0 <= held_out < 1, f"held_out must be in [0, 1); got {held_out}")
    expect(packing in ("concat", "best_fit"), f"packing must be 'concat' or 'best_fit'; got {packing!r}")
    expect(fim_unit in ("context", "document"), f"fim_unit must be 'context' or 'document'; got {fim_unit!r}")
    whole = fim is not None and fim_unit == "document"
    expect(not (whole and packing == "best_fit"), "fim_unit='document' needs packing='concat'; got packing='best_fit'")
    if tokenizer == "bpe":  # before any file is read
        expect(vocab_size >= MIN_BPE_VOCAB_SIZE, f"vocab_size must be at least {MIN_BPE_VOCAB_SIZE}; got {vocab_size}")
    given: dict[str, Split] = dict(split or {})
    places = _places(sources, given)
    token_sources = [name for name, where in places.items() if _is_tokens(where)]
    if token_sources:
        saved = tokenizer not in ("bpe", "bytes")
        expect(saved, f"token files need the tokenizer.json they were written with; got tokenizer={tokenizer!r}")
        expect(not whole, "fim_unit='document' needs texts; token files support fim_unit='context'")
    texts_at = {name: where for name, where in places.items() if name not in token_sources}
    documents = {name: load(where, text_column=text_column, say=say) for name, where in texts_at.items()}
    chosen: dict[str, Split] = {n: given.get(n) or _default_split(documents.get(n), held_out) for n in places}
    while True:
        texts = {name: _parts(name, documents[name], held_out, chosen[name]) for name in documents}
        encoder = _tokenizer(tokenizer, [text for train, _ in texts.values() for text in train], vocab_size)
        rearranged = None if fim is None else fim(encoder)
        tokens = {name: open_token_file(places[name], vocab_size=encoder.vocab_size) for name in token_sources}
        rows: dict[str, tuple[Rows, Rows | None]] = {}
        short: dict[str, ValueError] = {}
        for name in places:
            try:
                if name in token_sources:
                    rows[name] = _rows_of_tokens(tokens[name], held_out, chosen[name], seq_len)
                else:
                    rows[name] = _rows_of_texts(texts[name], encoder, seq_len, packing, rearranged if whole else None)
            except ValueError as error:
                short[name] = error
        for name, reason in short.items():
            if held_out == 0 or chosen[name] == "end" or name in given:
                raise ValueError(f"source {name!r}: {reason}") from reason
            chosen[name] = "end"
        if not short:
            break
    for name in places if held_out > 0 else ():
        if chosen[name] == "end":
            if name in token_sources:
                what, (kept, held) = "tokens", (part.num_tokens for part in tokens[name].split(held_out, "end"))
            else:
                what, (kept, held) = "text", (sum(map(len, part)) for part in texts[name])
            why = "" if name in given else "; it has too few documents to hold out whole ones"
            (say or warn)(f"{name}: validating on the last {held / (kept + held):.1%} of its {what}{why}")
    train = {name: part for name, (part, _) in rows.items()}
    if rearranged is not None:
        train = {n: FIMRows(part, rearranged) if isinstance(part, PackedRows) else part for n, part in train.items()}
    return Dataset(train, {name: held for name, (_, held) in rows.items() if held is not None}, encoder, chosen)


def _places(sources: Sequence[str], split: Mapping[str, Split]) -> dict[str, str]:
    """Check names and splits, and return the place of each source by its name."""
    expect(not isinstance(sources, str), f"sources must be a list of names; got the string {sources!r}")
    expect(len(sources) > 0, "sources must name at least one source; got none")
    expect(len(set(sources)) == len(sources), f"sources must not repeat; got {list(sources)}")
    named = [source_name(source) for source in sources]
    places = dict(named)
    for name in places:
        expect([n for n, _ in named].count(name) == 1, f"sources must have different names; got {name!r} twice")
    for name, how in split.items():
        expect(name in places, f"split must use names of sources ({', '.join(places)}); got {name!r}")
        expect(how in SPLITS, f"split of {name!r} must be one of {str(SPLITS)[1:-1]}; got {how!r}")
    return places


def _is_tokens(where: str) -> bool:
    return Path(where).suffix in SUFFIXES and Path(where).is_file()


def source_name(source: str) -> tuple[str, str]:
    """Split a source into name and place: "web=/data/web" is the place /data/web with the name "web"."""
    name, equals, where = source.partition("=")
    return (name, where) if equals and re.fullmatch(r"[\w-]+", name) else (source, source)


def _default_split(documents: Sequence[Document] | None, held_out: float) -> Split:
    few = documents is not None and held_out > 0 and not all(by_document(documents, held_out))
    return "end" if few else "documents"


def _parts(name: str, documents: Sequence[Document], held_out: float, how: Split) -> tuple[list[str], list[str]]:
    """Split documents into texts for training and texts for validation."""
    kept, held = (by_document if how == "documents" or held_out == 0 else by_end)(documents, held_out)
    part = "training" if not kept else "validation"
    expect(
        bool(kept) and (bool(held) or held_out == 0),
        f"source {name!r} has no {'document' if how == 'documents' else 'text'} for {part} at held_out={held_out}"
        + ("; split='end' holds out a part of its text" if how == "documents" else ""),
    )
    return kept, held


def _tokenizer(name: str, texts: list[str], vocab_size: int) -> Tokenizer:
    if name == "bytes":
        return ByteTokenizer()
    if name == "bpe":
        how = f"{BPETokenizer.recipe()} {vocab_size}"
        (saved,) = cached_texts(texts, how, lambda: [BPETokenizer.train(texts, vocab_size).text()])
        return BPETokenizer.of(saved)
    try:
        return load_tokenizer(name)
    except FileNotFoundError:
        raise ValueError(f"unknown tokenizer {name!r}: expected 'bpe', 'bytes' or a file that exists") from None


def _rows_of_tokens(file: TokenFile, held_out: float, how: Split, seq_len: int) -> tuple[Rows, Rows | None]:
    if held_out == 0:
        return file.rows(seq_len), None
    kept, held = file.split(held_out, how)
    return kept.rows(seq_len), held.rows(seq_len)


def _rows_of_texts(
    texts: tuple[list[str], list[str]], tokenizer: Tokenizer, seq_len: int, packing: str, rearranged: FIM | None
) -> tuple[Rows, Rows | None]:
    """Pack the texts for training, and those for validation if there are any."""
    kept, held = (_encoded(part, tokenizer) for part in texts)
    if packing == "concat":
        _expect_rows({"training": kept, **({"validation": held} if texts[1] else {})}, seq_len)
    pack_texts = pack if packing == "concat" else pack_best_fit
    train = (
        pack_texts(kept, seq_len, tokenizer.eot_id)
        if rearranged is None
        else FIMDocumentRows.pack(kept, seq_len, rearranged)
    )
    return train, pack_texts(held, seq_len, tokenizer.eot_id) if texts[1] else None


def _encoded(texts: list[str], tokenizer: Tokenizer) -> list[TokenIds]:
    """Encode texts, each with the ids that it begins with."""
    start = np.array(tokenizer.start_ids, dtype=np.int32)
    encoded = (
        cached_ids(texts, f"{tokenizer.recipe()} {tokenizer.text()}", lambda: tokenizer.encode_batch(texts))
        if isinstance(tokenizer, BPETokenizer)
        else tokenizer.encode_batch(texts)
    )
    return [np.concatenate([start, ids]) if len(ids) else ids for ids in encoded] if len(start) else encoded


def _expect_rows(parts: Mapping[str, Sequence[TokenIds]], seq_len: int) -> None:
    """Raise ValueError if a part does not fill a row. The message suggests more text or a smaller seq_len."""
    tokens = {part: sum(len(ids) + 1 for ids in documents if len(ids)) for part, documents in parts.items()}
    most = min(tokens.values()) - 1
    for part, n in tokens.items():
        expect(
            n > seq_len,
            f"its {part} part is too small: one row of seq_len={seq_len} needs {seq_len + 1} tokens, and it has {n}; "
            f"give it more text{f', or use a seq_len of at most {most}' if most >= 2 else ''}",
        )
