"""Memory-mapped files of token ids: datatrove's `.ds` and Megatron's `.bin` with `.idx`.

    x.ds           tokens: uint16, or uint32 for a vocabulary of more than 65536
    x.ds.index     one uint64 per document: the token at which it ends, counted from the start of x.ds
    x.ds.metadata  three lines of text: "tokenizer|bytes per token", the number of tokens, and the same in millions

    x.bin          tokens of one of `MEGATRON_DTYPES`
    x.idx          "MMIDIDX", two zero bytes, uint64 1, uint8 code of the dtype, uint64 S sequences, uint64 D,
                   then int32 (S,) tokens in each sequence, int64 (S,) the byte of x.bin at which it starts,
                   int64 (D,) the number of sequences before each document, and finally S

All numbers are little-endian. Document boundaries come only from the index; whether a token ends each document is up to
the writer. Opening a file reads the whole index and compares it with the size of the data; of the data it reads 64
blocks.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmfast._checks import expect
from llmfast.data.packing import PackedRows
from llmfast.data.split import LEAST_TOKENS, SPLITS, Split, end

Ends = npt.NDArray[np.int64] | npt.NDArray[np.uint64]

SUFFIXES = (".ds", ".bin", ".idx")  # suffixes that `open_token_file` accepts

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = 34  # bytes before the tables
# Codes 6 and 7 are floats, which cannot be token ids.
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}

SAMPLED_BLOCKS, BLOCK = 64, 4096  # tokens checked on opening: all of them in a file of up to 64 * 4096
CHUNK = 2**20  # tokens `verify` holds at a time


@dataclass(frozen=True, eq=False)
class TokenFile:
    """Consecutive documents in one file: all of them, or a part from `split`.

    A pickle contains the file's name and the index; unpickling maps the file again.
    """

    path: Path
    dtype: np.dtype[Any]
    vocab_size: int
    start: int  # token of the file at which the first document starts
    document_ends: npt.NDArray[np.int64]  # (documents,) ascending, in tokens from the start of the file

    @property
    def num_tokens(self) -> int:
        return int(self.document_ends[-1]) - self.start if len(self.document_ends) else 0

    @property
    def tokens(self) -> npt.NDArray[np.integer]:
        """Map and return (num_tokens,) of `dtype`, read-only; data is read when it is indexed."""
        if not self.num_tokens:  # an empty file cannot be mapped
            return np.empty(0, self.dtype)
        offset = self.start * self.dtype.itemsize
        return np.memmap(self.path, self.dtype, "r", offset=offset, shape=(self.num_tokens,))

    def rows(self, seq_len: int) -> PackedRows:
        """Return rows over the mapped tokens, like `pack`: neighbours share one token, and the last few are dropped.

        Raises:
            ValueError: The documents have fewer than `seq_len + 1` tokens.
        """
        expect(seq_len >= 1, f"seq_len must be at least 1; got {seq_len}")
        rows = (self.num_tokens - 1) // seq_len
        expect(
            rows > 0,
            f"one row of seq_len={seq_len} needs {seq_len + 1} tokens; the documents of {self.path} "
            f"have {self.num_tokens}",
        )
        used = rows * seq_len + 1
        bounds = np.concatenate([[self.start], self.document_ends]) - self.start
        filled = bounds[:-1][np.diff(bounds) > 0]  # an empty document starts where the next one does
        return _FileRows(
            tokens=self.tokens[:used],
            document_starts=filled[filled < used],
            seq_len=seq_len,
            dropped=self.num_tokens - used,
            stride=seq_len,
            file=self,
        )

    def split(self, held_out: float, how: Split = "documents") -> tuple["TokenFile", "TokenFile"]:
        """Split the file into a training part and, after it, a validation part, without copying.

        The last documents are as good as any if they were shuffled before, as datatrove does by default.

        Args:
            held_out: Share to hold out for validation.
            how: "documents" holds out whole documents, that share of their number, rounded. "end" holds out that share
                of the tokens, but at least 1000 or a fifth, whichever is less. It starts at the closest document, or
                else within one.

        Raises:
            ValueError: `held_out` is not between 0 and 1, or leaves one part without a document.
        """
        expect(0 < held_out < 1, f"held_out must be between 0 and 1; got {held_out}")
        expect(how in SPLITS, f"how must be one of {str(SPLITS)[1:-1]}; got {how!r}")
        documents, tokens = len(self.document_ends), self.num_tokens
        if how == "end":
            expect(tokens > 1, f"held_out={held_out} of {tokens} tokens leaves a part without any")
            cut, near = end(tokens, held_out, LEAST_TOKENS)
            cut += self.start
            closest = int(self.document_ends[np.abs(self.document_ends - cut).argmin()])
            cut = closest if abs(closest - cut) <= near else cut
            train = np.append(self.document_ends[self.document_ends < cut], cut)
            validation = self.document_ends[self.document_ends > cut]
        else:
            kept = documents - round(held_out * documents)
            expect(0 < kept < documents, f"held_out={held_out} of {documents} documents leaves a part without any")
            train, validation = self.document_ends[:kept], self.document_ends[kept:]
        return replace(self, document_ends=train), replace(self, document_ends=validation, start=int(train[-1]))

    def verify(self) -> None:
        """Read every token, 2**20 at a time; ValueError names the first one that is not in [0, vocab_size).

        Worth doing once per file. Opening checks only a sample, and a wrong id during training is an IndexError in the
        embedding, or on a GPU a device-side assert.
        """
        tokens = self.tokens
        for at in range(0, len(tokens), CHUNK):
            self._expect_ids(at, tokens[at : at + CHUNK])

    def _expect_sample(self) -> None:
        tokens = self.tokens
        for at in np.unique(np.linspace(0, max(len(tokens) - BLOCK, 0), SAMPLED_BLOCKS, dtype=np.int64)).tolist():
            self._expect_ids(at, tokens[at : at + BLOCK])

    def _expect_ids(self, at: int, ids: npt.NDArray[np.integer]) -> None:
        first = _first((ids < 0) | (ids >= self.vocab_size))
        if first is not None:
            where = self.start + at + first
            raise ValueError(
                f"{self.path}: token {where} (byte {where * self.dtype.itemsize}) is {ids[first]}; "
                f"ids must be in [0, vocab_size={self.vocab_size})"
            )


@dataclass(frozen=True, eq=False)
class _FileRows(PackedRows):
    """Rows that pickle as their file, because NumPy would pickle a memory map with its whole content."""

    file: TokenFile

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile.rows, (self.file, self.seq_len)


def open_token_file(path: str | PathLike[str], *, vocab_size: int) -> TokenFile:
    """Open a token file with `read_ds` for a `.ds`, or `read_megatron` for a `.bin` or `.idx`."""
    suffix = Path(path).suffix
    expect(suffix in SUFFIXES, f"path must end in .ds, .bin or .idx; got {os.fspath(path)!r}")
    return read_ds(path, vocab_size=vocab_size) if suffix == ".ds" else read_megatron(path, vocab_size=vocab_size)


def read_ds(path: str | PathLike[str], *, vocab_size: int) -> TokenFile:
    """Open tokens written by datatrove (`DocumentTokenizer`, `DocumentTokenizerMerger`) or by `write_ds`.

    The metadata give the bytes per token. If they are missing, or of an old version without that entry, it is 2
    for a `vocab_size` of up to 65536, else 4.

    Args:
        path: The `.ds` file; its index and, if present, its metadata are next to it.
        vocab_size: Every id is below it. Only a sample is checked here: see `TokenFile.verify`.

    Raises:
        FileNotFoundError: The data or the index is missing.
        ValueError: The three files contradict each other, a document ends before it starts, an id is out of range, or
            there is a loss mask (`.loss`), which is not supported.
    """
    _expect_vocab_size(vocab_size)
    path, index, metadata, loss = _ds_files(path)
    _expect_files(path, index)
    expect(not loss.exists(), f"{loss}: loss masks are not read; without that file, every token is trained on")

    nbytes = index.stat().st_size
    expect(nbytes % 8 == 0, f"{index} must be a whole number of 8-byte entries; it ends at byte {nbytes}")
    ends = np.fromfile(index, "<u8")
    _expect_ascending(index, "entry", ends, table=0)

    size, count = _ds_metadata(metadata)
    dtype = np.dtype(f"<u{size}") if size else _ds_dtype(vocab_size)
    _expect_data(path, dtype, index, "entry", ends, table=0, entry_size=8)
    tokens = int(ends[-1]) if len(ends) else 0
    expect(count in (None, tokens), f"{metadata}: line 2 says {count} tokens; {path} and its index have {tokens}")
    return _opened(path, dtype, vocab_size, ends)


def write_ds(
    path: str | PathLike[str],
    documents: Iterable[npt.NDArray[np.integer]],
    *,
    vocab_size: int,
    eot_id: int,
    tokenizer_name: str = "Unknown Tokenizer",
) -> TokenFile:
    """Write documents one after another, each followed by `eot_id`, in datatrove's format, and open the result.

    The index is written last, so an incomplete file cannot be opened.

    Args:
        path: Ends in `.ds`. Existing files are replaced only after all documents are written.
        documents: Token ids, (any length,) integers in [0, vocab_size). Empty ones are skipped, as in `pack`.
        vocab_size: Up to 65536 ids take 2 bytes each, more take 4.
        eot_id: The id that ends a document.
        tokenizer_name: For the metadata: the name or path under which datatrove would load the tokenizer.

    Raises:
        ValueError: An argument is out of range, or all documents are empty.
    """
    _expect_vocab_size(vocab_size)
    path, index, metadata, loss = _ds_files(path)
    expect(path.suffix == ".ds", f"path must end in .ds; got {str(path)!r}")
    expect(not loss.exists(), f"{loss} must not exist: it masks the tokens of an earlier file; remove it first")
    expect(0 <= eot_id < vocab_size, f"eot_id must be in [0, vocab_size={vocab_size}); got {eot_id}")
    # datatrove splits the line at every bar.
    expect(not set(tokenizer_name) & set("|\r\n"), f"tokenizer_name must be one line without |; got {tokenizer_name!r}")

    dtype = _ds_dtype(vocab_size)
    eot = np.array([eot_id], dtype)
    ends: list[int] = []
    unfinished = path.with_name(path.name + ".part")
    try:
        with unfinished.open("wb") as file:
            for i, document in enumerate(documents):
                ids = _document(i, document, vocab_size)
                if ids.size:
                    file.write(ids.astype(dtype).tobytes() + eot.tobytes())
                    ends.append((ends[-1] if ends else 0) + ids.size + 1)
        expect(bool(ends), "documents must hold at least one that is not empty")
        index.unlink(missing_ok=True)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    lines = f"{tokenizer_name}|{dtype.itemsize}", f"{ends[-1]}", f"{ends[-1] / 1e6:.3f} MT"
    metadata.write_text("\n".join(lines), encoding="utf-8")
    np.array(ends, "<u8").tofile(index)
    return read_ds(path, vocab_size=vocab_size)


def read_megatron(path: str | PathLike[str], *, vocab_size: int) -> TokenFile:
    """Open tokens of Megatron-LM's `IndexedDataset`, which datatrove's `MegatronDocumentTokenizer` also writes.

    A document consists of all its sequences. Megatron's preprocessing ends a document with a token only on request
    (`--append-eod`).

    Args:
        path: The `.bin` or the `.idx`.
        vocab_size: Every id is below it. Only a sample is checked here: see `TokenFile.verify`.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: The index is invalid, truncated, contradicts itself or the data, or belongs to a multimodal dataset;
            or an id is out of range.
    """
    _expect_vocab_size(vocab_size)
    path = Path(path)
    expect(path.suffix in (".bin", ".idx"), f"path must end in .bin or .idx; got {str(path)!r}")
    path, index = path.with_suffix(".bin"), path.with_suffix(".idx")
    _expect_files(path, index)

    content = index.read_bytes()
    expect(content[:9] == MEGATRON_MAGIC, f"{index} must start with {MEGATRON_MAGIC!r}; got {content[:9]!r}")
    expect(len(content) >= MEGATRON_HEADER, f"{index} ends in its header, at byte {len(content)} of {MEGATRON_HEADER}")
    version, code = int.from_bytes(content[9:17], "little"), content[17]
    expect(version == 1, f"{index}: the version at byte 9 must be 1; got {version}")
    expect(
        code in MEGATRON_DTYPES,
        f"{index}: the dtype's code at byte 17 must be that of integers, one of {sorted(MEGATRON_DTYPES)}; got {code}",
    )
    dtype = np.dtype(MEGATRON_DTYPES[code])
    S, D = int.from_bytes(content[18:26], "little"), int.from_bytes(content[26:34], "little")
    starts_at, documents_at = MEGATRON_HEADER + 4 * S, MEGATRON_HEADER + 12 * S
    expected = documents_at + 8 * D
    modes = ", like that of a multimodal dataset, which is not read" if len(content) == expected + S else ""
    expect(
        len(content) == expected,
        f"{index} says {S} sequences at byte 18 and {D} document bounds at byte 26, so it must end at byte {expected}; "
        f"it ends at {len(content)}{modes}",
    )
    lengths = np.frombuffer(content, "<i4", S, MEGATRON_HEADER)
    starts = np.frombuffer(content, "<i8", S, starts_at)
    documents = np.frombuffer(content, "<i8", D, documents_at)

    if (i := _first(lengths < 0)) is not None:
        raise ValueError(f"{index}: sequence {i} (byte {MEGATRON_HEADER + 4 * i}) has {lengths[i]} tokens")
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if (i := _first(starts != bounds[:-1] * dtype.itemsize)) is not None:
        raise ValueError(
            f"{index}: sequence {i} (byte {starts_at + 8 * i}) starts at byte {starts[i]} of the data; "
            f"the sequences before it end at byte {bounds[i] * dtype.itemsize}"
        )
    _expect_data(path, dtype, index, "sequence", bounds[1:], table=MEGATRON_HEADER, entry_size=4)

    _expect_ascending(index, "document bound", documents, table=documents_at)
    first, last = (int(documents[0]), int(documents[-1])) if D else (0, 0)
    expect(
        (first, last) == (0, S),
        f"{index}: document bounds (from byte {documents_at}) must go from sequence 0 to {S}; got {first} to {last}",
    )
    return _opened(path, dtype, vocab_size, bounds[documents[1:]])


def _opened(path: Path, dtype: np.dtype[Any], vocab_size: int, ends: Ends) -> TokenFile:
    file = TokenFile(path, dtype, vocab_size, start=0, document_ends=ends.astype(np.int64))
    file._expect_sample()
    return file


def _ds_files(path: str | PathLike[str]) -> tuple[Path, Path, Path, Path]:
    name = os.fspath(path)
    return Path(name), Path(name + ".index"), Path(name + ".metadata"), Path(name + ".loss")


def _ds_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _ds_metadata(path: Path) -> tuple[int | None, int | None]:
    """Read bytes per token and number of tokens; None for a value that is not given."""
    if not path.exists():
        return None, None
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    expect(len(lines) >= 2 and lines[1].isdecimal(), f"{path}: line 2 must be a number of tokens; got {lines[1:2]}")
    _, bar, size = lines[0].rpartition("|")
    expect(not bar or size in ("2", "4"), f"{path}: line 1 must end in |2 or |4, bytes per token; got {lines[0]!r}")
    return (int(size) if bar else None), int(lines[1])


def _document(i: int, document: npt.NDArray[np.integer], vocab_size: int) -> npt.NDArray[np.integer]:
    ids = np.asarray(document)
    if not ids.size:
        return ids
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"document {i} must be 1-D integers; got {ids.shape} {ids.dtype}")
    first = _first((ids < 0) | (ids >= vocab_size))
    if first is not None:
        raise ValueError(
            f"document {i} must have ids in [0, vocab_size={vocab_size}); its token {first} is {ids[first]}"
        )
    return ids


def _expect_vocab_size(vocab_size: int) -> None:
    expect(1 <= vocab_size <= 2**31, f"vocab_size must be in [1, 2**31]; got {vocab_size}")


def _expect_files(data: Path, index: Path) -> None:
    for path, role in ((data, "the tokens"), (index, f"the index of {data.name}")):
        if not path.is_file():
            raise FileNotFoundError(f"{path}, {role}, does not exist")


def _expect_ascending(index: Path, noun: str, values: Ends, table: int) -> None:
    """Check that `values` ascend; `table` is the byte of the index at which these 8-byte values start."""
    before = _first(values[1:] < values[:-1])
    if before is not None:
        i = before + 1
        raise ValueError(
            f"{index}: {noun} {i} (byte {table + 8 * i}) is {values[i]}, less than the one before it, {values[before]}"
        )


def _expect_data(
    path: Path, dtype: np.dtype[Any], index: Path, noun: str, ends: Ends, table: int, entry_size: int
) -> None:
    """Check that the data end with the last entry; `table` and `entry_size` locate an entry in the index."""
    size, nbytes = dtype.itemsize, path.stat().st_size
    tokens, last = nbytes // size, int(ends[-1]) if len(ends) else 0
    hint = "".join(f"; it would be right for {s}-byte tokens" for s in (1, 2, 4, 8) if last and last * s == nbytes)
    expect(nbytes % size == 0, f"{path} must be a whole number of {size}-byte tokens; it ends at byte {nbytes}{hint}")
    if (i := _first(ends > tokens)) is not None:
        raise ValueError(
            f"{index}: {noun} {i} (byte {table + entry_size * i}) ends at token {ends[i]} (byte "
            f"{int(ends[i]) * size}); {path} ends at token {tokens} (byte {nbytes}){hint}"
        )
    expect(
        last == tokens,
        f"{index}: the last {noun} ends at token {last} (byte {last * size}); {path} goes on to token {tokens} "
        f"(byte {nbytes}){hint}",
    )


def _first(mask: npt.NDArray[np.bool_]) -> int | None:
    return int(mask.argmax()) if mask.any() else None
