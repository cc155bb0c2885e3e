"""`files/` holds what datatrove 0.10.1 wrote: see `datatrove_writes`, which is also run again where it is installed."""

import itertools
import pickle
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfast.data import BPETokenizer, pack, token_files
from llmfast.data.split import Split
from llmfast.data.token_files import MEGATRON_DTYPES, TokenFile, open_token_file, read_ds, read_megatron, write_ds

FILES = Path(__file__).parent / "files"
TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "",
    "A short text.",
    "Grüße, 世界! " * 6,
    "for i in range(10):\n    print(i)\n",
]
# Ids above 65535, so that the four bytes matter; the last document has no end-of-text.
WIDE = [[70000, 1, 2], [], [131071], [5, 99999, 3, 0], [8, 9]]
VOCAB, EOT = 1000, 999


def documents_of(file: TokenFile) -> list[list[int]]:
    bounds = [file.start, *file.document_ends.tolist()]
    tokens = file.tokens.tolist()
    return [tokens[a - file.start : b - file.start] for a, b in itertools.pairwise(bounds)]


def same_batches(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    a, b = ours.batch(range(len(ours))), theirs.batch(range(len(theirs)))
    for name in ("tokens", "labels", "document_ids", "positions"):
        assert getattr(a, name).tolist() == getattr(b, name).tolist(), name
    assert a.num_valid == b.num_valid


# ---- what datatrove wrote


def datatrove_writes() -> None:
    """Write files into the working directory, with the `tokenizer.json` of `BPETokenizer.train(TEXTS, 300)` there."""
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer, MegatronDocumentTokenizer
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    texts = [Document(text=text, id=str(i)) for i, text in enumerate(TEXTS)]
    end = "<|endoftext|>"
    DocumentTokenizer(".", "tokenizer.json", eos_token=end, shuffle_documents=False).run(texts)
    DocumentTokenizer(".", "tokenizer.json", eos_token=end, save_filename="shuffled", seed=0).run(texts)
    MegatronDocumentTokenizer(".", tokenizer_name_or_path="tokenizer.json", eos_token=end).run(texts)
    wide = TokenizedFile(".", "wide.ds", tokenizer_name_or_path="wide", save_final_metadata=True, token_size=4)
    megatron = MegatronTokenizedFile(".", "wide", token_size=4)
    for document in WIDE:
        wide.write(document, None)
        megatron.write(document)
    wide.close()
    megatron.close()


@pytest.mark.parametrize("name", ["00000_unshuffled.ds", "00000_tokens.bin", "shuffled_00000_00000_doc_shuffled.ds"])
def test_texts_tokenized_by_datatrove(name: str) -> None:
    pytest.importorskip("tokenizers")
    tokenizer = BPETokenizer.load(FILES / "tokenizer.json")
    file = open_token_file(FILES / name, vocab_size=tokenizer.vocab_size)
    file.verify()
    expected = [[*ids.tolist(), tokenizer.eot_id] for ids in tokenizer.encode_batch(TEXTS)]
    if "shuffled_0" in name:
        assert documents_of(file) != expected
        assert sorted(documents_of(file)) == sorted(expected)
    else:
        assert documents_of(file) == expected
        assert [tokenizer.decode(np.array(d)) for d in documents_of(file)] == TEXTS
    assert file.dtype == np.uint16 and file.num_tokens == sum(map(len, expected))


@pytest.mark.parametrize(("name", "dtype"), [("wide.ds", np.uint32), ("wide.bin", np.int32), ("wide.idx", np.int32)])
def test_four_bytes_by_datatrove(name: str, dtype: type) -> None:
    file = open_token_file(FILES / name, vocab_size=2**17)
    assert documents_of(file) == WIDE
    assert file.dtype == dtype
    # The empty document is no document of the rows, and the last token of one is followed by nothing.
    batch = file.rows(4).batch([0, 1])
    assert batch.tokens.tolist() == [[70000, 1, 2, 131071], [5, 99999, 3, 0]]
    assert batch.labels.tolist() == [[1, 2, -100, -100], [99999, 3, 0, -100]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]


def test_datatrove_still_writes_these_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datatrove")
    (tmp_path / "tokenizer.json").write_bytes((FILES / "tokenizer.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    datatrove_writes()
    written = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert written == {p.name: p.read_bytes() for p in FILES.iterdir()}


@pytest.mark.parametrize("vocab_size", [VOCAB, 2**17])
def test_datatrove_reads_what_we_write(tmp_path: Path, vocab_size: int) -> None:
    datasets = pytest.importorskip("datatrove.utils.dataset")
    merger = pytest.importorskip("datatrove.pipeline.tokens.merger")
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, n) for n in rng.integers(1, 40, 30)]
    file = write_ds(tmp_path / "ours.ds", documents, vocab_size=vocab_size, eot_id=EOT)
    with open(tmp_path / "ours.ds.index", "rb") as index:
        assert merger.load_doc_ends(index).tolist() == file.document_ends.tolist()
    # datatrove's rows share no token: stride seq_len + 1, positions of the inputs and the last label.
    seq_len = 15
    theirs = datasets.DatatroveFileDataset(
        str(tmp_path / "ours.ds"), seq_len, token_size=file.dtype.itemsize, return_positions=True
    )
    assert len(theirs) == file.num_tokens // (seq_len + 1) > 20
    document = np.searchsorted(file.document_ends, np.arange(file.num_tokens), side="right")
    for i in range(len(theirs)):
        at = slice(i * (seq_len + 1), (i + 1) * (seq_len + 1))
        assert theirs[i]["input_ids"].tolist() == file.tokens[at].tolist()
        within = document[at]
        expected = np.arange(seq_len + 1) - np.searchsorted(within, within)
        assert theirs[i]["positions"].tolist() == expected.tolist()
    # The merger reads metadata, index and data, and rewrites all three.
    merger.DocumentTokenizerMerger(str(tmp_path), str(tmp_path / "merged"), "all", shuffle=False, progress=False).run()
    merged = read_ds(tmp_path / "merged" / "000_all.ds", vocab_size=vocab_size)
    assert documents_of(merged) == documents_of(file)


# ---- what we write


corpora = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=12), max_size=12)


@given(documents=corpora.filter(any), vocab_size=st.sampled_from([VOCAB, 2**16, 2**16 + 1]), data=st.data())
def test_written_and_read_is_packed(
    documents: list[list[int]], vocab_size: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("ds") / "x.ds"
    arrays = [np.array(d, dtype=np.int32) for d in documents]
    file = write_ds(path, iter(arrays), vocab_size=vocab_size, eot_id=EOT)
    assert file.dtype == (np.uint32 if vocab_size > 2**16 else np.uint16)  # the largest id is one less
    assert documents_of(file) == [[*d, EOT] for d in documents if d]
    assert sorted(p.name for p in path.parent.iterdir()) == ["x.ds", "x.ds.index", "x.ds.metadata"]
    (path.parent / "x.ds.metadata").unlink()  # then the vocabulary says how many bytes
    assert documents_of(open_token_file(str(path), vocab_size=vocab_size)) == documents_of(file)

    seq_len = data.draw(st.integers(1, file.num_tokens - 1))
    rows, packed = file.rows(seq_len), pack(arrays, seq_len, EOT)
    assert rows.document_starts.tolist() == packed.document_starts.tolist()
    assert (rows.dropped, rows.stride) == (packed.dropped, packed.stride)
    same_batches(rows, packed)


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([[1], [2, 1000]], {}, r"document 1 must have ids in \[0, vocab_size=1000\); its token 1 is 1000"),
        ([[1], [-1]], {}, "document 1 must have ids .* its token 0 is -1"),
        ([[[1]]], {}, r"document 0 must be 1-D integers; got \(1, 1\) int64"),
        ([[0.5]], {}, r"document 0 must be 1-D integers; got \(1,\) float64"),
        ([[], []], {}, "documents must hold at least one"),
        ([[1]], {"eot_id": 1000}, r"eot_id must be in \[0, vocab_size=1000\); got 1000"),
        ([[1]], {"vocab_size": 0}, "vocab_size must be in"),
        ([[1]], {"tokenizer_name": "a|b"}, r"tokenizer_name must be one line without"),
    ],
)
def test_wrong_input_to_write_leaves_what_was_there(
    tmp_path: Path, documents: list[Any], options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "x.ds"
    write_ds(path, [np.array([7, 7, 7])], vocab_size=VOCAB, eot_id=EOT)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        write_ds(path, map(np.array, documents), **{"vocab_size": VOCAB, "eot_id": EOT, **options})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    write_ds(path, [np.array([8])], vocab_size=VOCAB, eot_id=EOT)
    assert documents_of(read_ds(path, vocab_size=VOCAB)) == [[8, EOT]]


def test_an_index_never_belongs_to_other_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing that breaks off leaves new tokens without an index, not with the old one, whose length may fit."""
    path = tmp_path / "x.ds"
    write_ds(path, [np.array([1, 2, 3]), np.array([4])], vocab_size=VOCAB, eot_id=EOT)

    def full(*args: Any, **kwargs: Any) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        write_ds(path, [np.array([5]), np.array([6, 7, 8])], vocab_size=VOCAB, eot_id=EOT)
    with pytest.raises(FileNotFoundError, match=r"x\.ds\.index, the index of x\.ds, does not exist"):
        read_ds(path, vocab_size=VOCAB)


# ---- faults, planted one at a time


def change(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes() if path.exists() else b""))


def put(at: int, layout: str, *values: int) -> Callable[[bytes], bytes]:
    """Return a function that overwrites bytes from `at` on with `values`."""
    new = struct.pack(layout, *values)
    return lambda b: b[:at] + new + b[at + len(new) :]


def cut(nbytes: int) -> Callable[[bytes], bytes]:
    return lambda b: b[:-nbytes]


def add(nbytes: int) -> Callable[[bytes], bytes]:
    return lambda b: b + bytes(nbytes)


def text(content: str) -> Callable[[bytes], bytes]:
    return lambda b: content.encode()


@pytest.fixture
def ds(tmp_path: Path) -> Path:
    """Write documents that end at tokens 4, 6 and 11."""
    documents = [np.array([1, 2, 3]), np.array([4]), np.array([5, 6, 7, 8])]
    write_ds(tmp_path / "x.ds", documents, vocab_size=VOCAB, eot_id=EOT)
    return tmp_path / "x.ds"


@pytest.mark.parametrize(
    ("suffix", "how", "message"),
    [
        (".index", cut(1), "x.ds.index must be a whole number of 8-byte entries; it ends at byte 23"),
        (".index", put(8, "<Q", 3), "x.ds.index: entry 1 (byte 8) is 3, less than the one before it, 4"),
        (
            *(".index", put(16, "<Q", 12)),
            "entry 2 (byte 16) ends at token 12 (byte 24); {folder}/x.ds ends at token 11 (byte 22)",
        ),
        (".index", put(8, "<QQ", 2**63, 2**64 - 1), "entry 1 (byte 8) ends at token 9223372036854775808 (byte"),
        (".index", cut(8), "the last entry ends at token 6 (byte 12); {folder}/x.ds goes on to token 11 (byte 22)"),
        (".index", cut(24), "the last entry ends at token 0 (byte 0); {folder}/x.ds goes on to token 11"),
        ("", cut(1), "x.ds must be a whole number of 2-byte tokens; it ends at byte 21"),
        ("", cut(2), "entry 2 (byte 16) ends at token 11 (byte 22); {folder}/x.ds ends at token 10 (byte 20)"),
        ("", cut(12), "entry 1 (byte 8) ends at token 6 (byte 12); {folder}/x.ds ends at token 5 (byte 10)"),
        ("", add(2), "the last entry ends at token 11 (byte 22); {folder}/x.ds goes on to token 12 (byte 24)"),
        ("", add(22), "goes on to token 22 (byte 44); it would be right for 4-byte tokens"),
        ("", put(10, "<H", 1000), "x.ds: token 5 (byte 10) is 1000; ids must be in [0, vocab_size=1000)"),
        (".metadata", text("x|4\n11"), "2-byte tokens"),
        (".metadata", text("x|3\n11"), "x.ds.metadata: line 1 must end in |2 or |4, bytes per token; got 'x|3'"),
        (".metadata", text("x|2\n12"), "line 2 says 12 tokens; {folder}/x.ds and its index have 11"),
        (".metadata", text("x|2"), "line 2 must be a number of tokens; got []"),
        (".metadata", text("x|2\n-1"), "line 2 must be a number of tokens; got ['-1']"),
        (".loss", add(11), "x.ds.loss: loss masks are not read"),
    ],
)
def test_faults_in_ds(ds: Path, suffix: str, how: Callable[[bytes], bytes], message: str) -> None:
    change(Path(f"{ds}{suffix}"), how)
    with pytest.raises(ValueError, match=re.escape(message.format(folder=ds.parent))):
        open_token_file(ds, vocab_size=VOCAB)


def test_missing_files_of_ds(ds: Path) -> None:
    Path(f"{ds}.metadata").unlink()
    with pytest.raises(ValueError, match=r"4-byte tokens; it ends at byte 22; it would be right for 2-byte tokens"):
        read_ds(ds, vocab_size=2**16 + 1)  # without metadata, the vocabulary says how many bytes
    Path(f"{ds}.metadata").write_text("old version\n11\n11 T")
    assert read_ds(ds, vocab_size=VOCAB).dtype == np.uint16
    Path(f"{ds}.index").unlink()
    with pytest.raises(FileNotFoundError, match=r"x.ds.index, the index of x.ds, does not exist"):
        read_ds(ds, vocab_size=VOCAB)
    ds.unlink()
    with pytest.raises(FileNotFoundError, match=r"x.ds, the tokens, does not exist"):
        read_ds(ds, vocab_size=VOCAB)


def megatron(path: Path, code: int, lengths: list[int], bounds: list[int], tokens: list[int]) -> Path:
    """Write a `.bin` and its `.idx` according to the format's description."""
    dtype = np.dtype(MEGATRON_DTYPES[code])
    np.array(tokens, dtype).tofile(path)
    starts = [sum(lengths[:i]) * dtype.itemsize for i in range(len(lengths))]
    S, D = len(lengths), len(bounds)
    index = b"MMIDIDX\0\0" + struct.pack(f"<QBQQ{S}i{S}q{D}q", 1, code, S, D, *lengths, *starts, *bounds)
    path.with_suffix(".idx").write_bytes(index)
    return path


@pytest.fixture
def mmididx(tmp_path: Path) -> Path:
    """Write documents of two, zero and two sequences; tables at bytes 34, 50 and 82, the end at byte 114."""
    return megatron(tmp_path / "x.v1.bin", 8, [3, 0, 2, 4], [0, 2, 2, 4], list(range(9)))


@pytest.mark.parametrize(("code", "name"), [(1, "u1"), (2, "i1"), (3, "i2"), (4, "i4"), (5, "i8"), (8, "u2")])
def test_integers_of_megatron(tmp_path: Path, code: int, name: str) -> None:
    path = megatron(tmp_path / "x.bin", code, [3, 0, 2, 4], [0, 2, 2, 4], [*range(8), 127])
    for other in (path, path.with_suffix(".idx")):
        file = open_token_file(other, vocab_size=128)
        assert file.dtype == np.dtype(name)
        assert documents_of(file) == [[0, 1, 2], [], [3, 4, 5, 6, 7, 127]]
        batch = file.rows(8).batch([0])
        assert batch.labels.tolist() == [[1, 2, -100, 4, 5, 6, 7, 127]]
        assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    with pytest.raises(
        ValueError, match=rf"token 8 \(byte {8 * file.dtype.itemsize}\) is 127; ids must be in \[0, vocab"
    ):
        read_megatron(path, vocab_size=127)


@pytest.mark.parametrize(
    ("suffix", "how", "message"),
    [
        (".idx", put(0, "<B", 0), "x.v1.idx must start with b'MMIDIDX"),
        (".idx", cut(114), "x.v1.idx must start with b'MMIDIDX"),
        (".idx", cut(90), "x.v1.idx ends in its header, at byte 24 of 34"),
        (".idx", put(9, "<Q", 2), "the version at byte 9 must be 1; got 2"),
        (".idx", put(17, "<B", 7), "the dtype's code at byte 17 must be that of integers"),
        (".idx", cut(8), "4 document bounds at byte 26, so it must end at byte 114; it ends at 106"),
        (".idx", put(18, "<Q", 2**60), "it ends at 114"),
        (".idx", add(4), "it ends at 118, like that of a multimodal dataset, which is not read"),
        (".idx", put(42, "<i", -2), "sequence 2 (byte 42) has -2 tokens"),
        (
            *(".idx", put(66, "<q", 8)),
            "sequence 2 (byte 66) starts at byte 8 of the data; the sequences before it end at byte 6",
        ),
        (
            *(".idx", put(17, "<B", 4)),
            "sequence 1 (byte 58) starts at byte 6 of the data; the sequences before it end at byte 12",
        ),
        (
            *(".idx", put(46, "<i", 5)),
            "sequence 3 (byte 46) ends at token 10 (byte 20); {folder}/x.v1.bin ends at token 9 (byte 18)",
        ),
        (".idx", put(46, "<i", 3), "the last sequence ends at token 8 (byte 16); {folder}/x.v1.bin goes on to token 9"),
        (".idx", put(90, "<q", 3), "document bound 2 (byte 98) is 2, less than the one before it, 3"),
        (".idx", put(82, "<q", 1), "document bounds (from byte 82) must go from sequence 0 to 4; got 1 to 4"),
        (".idx", put(106, "<q", 5), "document bounds (from byte 82) must go from sequence 0 to 4; got 0 to 5"),
        (".bin", cut(1), "x.v1.bin must be a whole number of 2-byte tokens; it ends at byte 17"),
        (".bin", cut(2), "sequence 3 (byte 46) ends at token 9 (byte 18); {folder}/x.v1.bin ends at token 8 (byte 16)"),
        (".bin", add(18), "goes on to token 18 (byte 36); it would be right for 4-byte tokens"),
        (".bin", put(4, "<H", 1000), "x.v1.bin: token 2 (byte 4) is 1000; ids must be in [0, vocab_size=1000)"),
    ],
)
def test_faults_in_megatron(mmididx: Path, suffix: str, how: Callable[[bytes], bytes], message: str) -> None:
    change(mmididx.with_suffix(suffix), how)
    with pytest.raises(ValueError, match=re.escape(message.format(folder=mmididx.parent))):
        open_token_file(mmididx, vocab_size=VOCAB)


def test_a_negative_id_is_no_padding(tmp_path: Path) -> None:
    path = megatron(tmp_path / "x.bin", 4, [3], [0, 1], [1, -1, 2])
    with pytest.raises(ValueError, match=r"token 1 \(byte 4\) is -1"):
        read_megatron(path, vocab_size=VOCAB)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_missing_files_of_megatron(mmididx: Path, missing: str) -> None:
    mmididx.with_suffix(missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"x.v1{missing}, .* does not exist"):
        read_megatron(mmididx, vocab_size=VOCAB)


def test_wrong_arguments(ds: Path, mmididx: Path) -> None:
    for path in ("x.npy", "x", Path("x.ds.index")):
        with pytest.raises(ValueError, match=r"path must end in .ds, .bin or .idx; got 'x"):
            open_token_file(path, vocab_size=VOCAB)
    for path in (ds, mmididx):
        for vocab_size in (0, 2**31 + 1):
            with pytest.raises(ValueError, match=rf"vocab_size must be in \[1, 2\*\*31\]; got {vocab_size}"):
                open_token_file(path, vocab_size=vocab_size)
    file = read_ds(ds, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"seq_len=11 needs 12 tokens; the documents of .*x.ds have 11"):
        file.rows(11)
    with pytest.raises(ValueError, match="seq_len must be at least 1"):
        file.rows(0)


# ---- nothing, much, and parts


def test_no_documents(tmp_path: Path) -> None:
    (tmp_path / "x.ds").touch()
    (tmp_path / "x.ds.index").touch()
    for path in (tmp_path / "x.ds", megatron(tmp_path / "x.bin", 8, [], [0], [])):
        file = open_token_file(path, vocab_size=VOCAB)
        assert (file.num_tokens, len(file.tokens), len(file.document_ends)) == (0, 0, 0)
        file.verify()
        with pytest.raises(ValueError, match=r"needs 5 tokens; the documents of .* have 0"):
            file.rows(4)


def resident(path: Path) -> int:
    """Return the bytes of a mapped file that this process has in memory."""
    maps = iter(Path("/proc/self/smaps").read_text().splitlines())
    sizes = (next(line for line in maps if line.startswith("Rss:")) for of in maps if of.endswith(f" {path}"))
    return sum(1024 * int(size.split()[1]) for size in sizes)


@pytest.mark.parametrize("suffix", [".ds", ".bin"])
def test_a_large_file_is_not_read(tmp_path: Path, suffix: str) -> None:
    documents, length = 1000, 150_000
    path = tmp_path / f"x{suffix}"
    if suffix == ".ds":
        np.arange(length, (documents + 1) * length, length, dtype=np.uint64).tofile(f"{path}.index")
    else:
        megatron(path, 8, [length] * documents, list(range(documents + 1)), [])
    with path.open("wb") as file:  # 300 MB, of which the disk holds one token
        file.truncate(documents * length * 2)
        file.seek(101_000_000)
        file.write(struct.pack("<H", VOCAB))

    tracemalloc.start()
    large = open_token_file(path, vocab_size=VOCAB)
    rows = large.rows(1024)
    last = rows.batch([0, len(rows) - 1])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6
    assert resident(path) < 0.02 * path.stat().st_size  # pages around those of the sample are mapped along
    assert len(rows) == (documents * length - 1) // 1024
    assert last.tokens.shape == (2, 1024)

    assert len(pickle.dumps(rows)) < 20_000  # the documents' ends
    again = pickle.loads(pickle.dumps(rows))
    assert again.batch([7, 146]).positions.tolist() == rows.batch([7, 146]).positions.tolist()
    assert isinstance(again.tokens, np.memmap)
    # The sample missed that one token. In parts, it is still named by where it is in the file.
    train, validation = large.split(0.7)
    train.verify()
    for part in (large, validation):
        with pytest.raises(ValueError, match=r"token 50500000 \(byte 101000000\) is 1000"):
            part.verify()


def test_the_sample_of_a_small_file_is_all_of_it(tmp_path: Path) -> None:
    tokens = 64 * 4096
    for wrong in (0, 1, 4095, 4096, tokens // 2, tokens - 1):
        ids = np.zeros(tokens, np.uint16)
        ids[wrong] = VOCAB
        ids.tofile(tmp_path / "x.ds")
        np.array([tokens], np.uint64).tofile(tmp_path / "x.ds.index")
        with pytest.raises(ValueError, match=rf"token {wrong} \(byte"):
            read_ds(tmp_path / "x.ds", vocab_size=VOCAB)


@given(
    documents=st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=5), min_size=2, max_size=20),
    held_out=st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_split(documents: list[list[int]], held_out: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("split") / "x.bin"
    tokens = [token for d in documents for token in d]
    file = read_megatron(
        megatron(path, 4, [len(d) for d in documents], list(range(len(documents) + 1)), tokens), vocab_size=VOCAB
    )
    kept = len(documents) - round(held_out * len(documents))
    if not 0 < kept < len(documents):
        with pytest.raises(ValueError, match="leaves a part without any"):
            file.split(held_out)
        return
    train, validation = file.split(held_out)
    assert documents_of(train) == documents[:kept]
    assert documents_of(validation) == documents[kept:]
    for part, expected in ((train, documents[:kept]), (validation, documents[kept:])):
        part.verify()
        if part.num_tokens > 1:
            rows = part.rows(1)
            starts = np.cumsum([0, *map(len, expected)])
            assert rows.document_starts.tolist() == sorted(set(starts.tolist()) - {part.num_tokens})
            first_of_all = next(token for d in expected for token in d)
            assert rows.batch([0]).tokens.tolist() == [[first_of_all]]
            same_batches(pickle.loads(pickle.dumps(rows)), rows)
    if kept > 1:  # a part has parts
        first, second = train.split(0.5) if round(0.5 * kept) not in (0, kept) else (train, train)
        assert documents_of(first) == documents[: len(first.document_ends)]
        assert documents_of(second)[-1:] == documents[kept - 1 : kept]


@pytest.mark.parametrize("length", [300, 5000])
def test_split_at_the_end_loses_no_document_and_adds_none(length: int, tmp_path: Path) -> None:
    """A cut at a document boundary leaves whole documents; any other splits one document."""
    documents = [[i] * length for i in range(20)]
    write_ds(tmp_path / "x.ds", map(np.array, documents), vocab_size=VOCAB, eot_id=EOT)
    written = [[*document, EOT] for document in documents]
    train, validation = (documents_of(part) for part in read_ds(tmp_path / "x.ds", vocab_size=VOCAB).split(0.01, "end"))
    if length == 300:
        assert train == written[:17] and validation == written[17:]
    else:
        assert [*train[:-1], train[-1] + validation[0], *validation[1:]] == written
        assert len(train) == 20 and len(validation[0]) == 1000


@pytest.mark.parametrize("held_out", [0.1, 0.3, 0.5])
def test_parts_have_ends_like_files_of_their_own(held_out: float, tmp_path: Path) -> None:
    """The second part, which begins within a file, is cut where a file of only its tokens is."""
    write_ds(tmp_path / "x.ds", [np.full(700, i) for i in range(20)], vocab_size=VOCAB, eot_id=EOT)
    for part in read_ds(tmp_path / "x.ds", vocab_size=VOCAB).split(0.6, "end"):
        path = tmp_path / "alone.ds"
        part.tokens.tofile(path)
        np.asarray(part.document_ends - part.start, np.uint64).tofile(path.with_name("alone.ds.index"))
        alone = read_ds(path, vocab_size=VOCAB)
        for how in get_args(Split):
            found, expected = ([*map(documents_of, file.split(held_out, how))] for file in (part, alone))
            assert found == expected


def test_the_smallest_file_that_has_an_end(tmp_path: Path) -> None:
    for n in (1, 2):
        np.zeros(n, np.uint16).tofile(tmp_path / f"{n}.ds")
        np.array([n], np.uint64).tofile(tmp_path / f"{n}.ds.index")
    with pytest.raises(ValueError, match=r"held_out=0\.5 of 1 tokens leaves a part without any"):
        read_ds(tmp_path / "1.ds", vocab_size=VOCAB).split(0.5, "end")
    parts = read_ds(tmp_path / "2.ds", vocab_size=VOCAB).split(0.5, "end")
    assert [part.num_tokens for part in parts] == [1, 1]


@pytest.mark.parametrize("held_out", [0, 1, -0.5, 1.5])
def test_split_shares(ds: Path, held_out: float) -> None:
    with pytest.raises(ValueError, match="held_out must be between 0 and 1"):
        read_ds(ds, vocab_size=VOCAB).split(held_out)


@pytest.mark.parametrize(("name", "first"), [({}, "Unknown Tokenizer|2"), ({"tokenizer_name": "my/own"}, "my/own|2")])
def test_metadata_say_who_wrote_how_many_tokens(name: dict[str, str], first: str, tmp_path: Path) -> None:
    write_ds(tmp_path / "x.ds", [np.zeros(1500, int), np.zeros(3, int)], vocab_size=VOCAB, eot_id=EOT, **name)
    assert (tmp_path / "x.ds.metadata").read_text() == f"{first}\n1505\n0.002 MT"
    write_ds(tmp_path / "y.ds", [np.zeros(3, int)], vocab_size=2**31, eot_id=2**31 - 1)
    assert (tmp_path / "y.ds.metadata").read_text() == "Unknown Tokenizer|4\n4\n0.000 MT"
    assert read_ds(tmp_path / "y.ds", vocab_size=2**31).tokens.tolist() == [0, 0, 0, 2**31 - 1]


def test_what_cannot_be_written_is_refused_before_any_file(tmp_path: Path) -> None:
    document = [np.array([1])]
    for path, options, message in (
        ("x.bin", {}, r"path must end in \.ds; got '.*x\.bin'"),
        ("x.ds", {"eot_id": -1}, r"eot_id must be in \[0, vocab_size=1000\); got -1"),
        ("x.ds", {"tokenizer_name": "a\nb"}, "tokenizer_name must be one line without"),
        ("x.ds", {"tokenizer_name": "a\rb"}, "tokenizer_name must be one line without"),
    ):
        with pytest.raises(ValueError, match=message):
            write_ds(tmp_path / path, document, **{"vocab_size": VOCAB, "eot_id": EOT, **options})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.ds.loss").touch()
    with pytest.raises(ValueError, match=r"x\.ds\.loss must not exist: it masks the tokens of an earlier file"):
        write_ds(tmp_path / "x.ds", document, vocab_size=VOCAB, eot_id=EOT)
    assert [path.name for path in tmp_path.iterdir()] == ["x.ds.loss"]


@pytest.mark.parametrize(("boundary", "cut"), [(7000, 7000), (6999, 8000), (9000, 9000), (9001, 8000)])
def test_an_end_begins_with_a_document_if_one_is_near(boundary: int, cut: int, tmp_path: Path) -> None:
    """The last 2,000 of 10,000 tokens are wanted: a document may begin up to half as many before or after that."""
    np.zeros(10_000, np.uint16).tofile(tmp_path / "x.ds")
    np.array([boundary, 10_000], np.uint64).tofile(tmp_path / "x.ds.index")
    train, validation = read_ds(tmp_path / "x.ds", vocab_size=VOCAB).split(0.2, "end")
    assert (train.num_tokens, validation.num_tokens) == (cut, 10_000 - cut)


@pytest.mark.parametrize("chunk", [1, 4, 5, 9, 20])
def test_every_token_is_verified_wherever_it_is(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, the last, and those around the bounds of what is read at once; opening reads none of them here."""
    monkeypatch.setattr(token_files, "CHUNK", chunk)
    monkeypatch.setattr(TokenFile, "_expect_sample", lambda file: None)
    np.array([2, 9], np.uint64).tofile(tmp_path / "x.ds.index")
    for wrong in range(9):
        ids = np.zeros(9, np.uint16)
        ids[wrong] = VOCAB
        ids.tofile(tmp_path / "x.ds")
        with pytest.raises(ValueError, match=rf"token {wrong} \(byte {2 * wrong}\) is 1000; "):
            read_ds(tmp_path / "x.ds", vocab_size=VOCAB).verify()
    read_ds(tmp_path / "x.ds", vocab_size=VOCAB + 1).verify()


def test_the_least_that_a_file_can_have(tmp_path: Path) -> None:
    """One id, two tokens, rows of one, and metadata of either width and of no width."""
    for size, dtype in ((2, np.uint16), (4, np.uint32), (None, np.uint16)):
        np.zeros(2, dtype).tofile(tmp_path / "x.ds")
        np.array([2], np.uint64).tofile(tmp_path / "x.ds.index")
        (tmp_path / "x.ds.metadata").write_text(f"name{'' if size is None else f'|{size}'}\n2")
        file = read_ds(tmp_path / "x.ds", vocab_size=1)
        assert file.dtype == dtype and file.rows(1).batch([0]).labels.tolist() == [[0]] and file.rows(1).dropped == 0
    for line in ("name|3\n2", "name|\n2", "name|2", "name|2\nmany"):
        (tmp_path / "x.ds.metadata").write_text(line)
        with pytest.raises(ValueError, match=r"x\.ds\.metadata: line [12] must "):
            read_ds(tmp_path / "x.ds", vocab_size=1)
    for count in (0, 1, 3):
        (tmp_path / "x.ds.metadata").write_text(f"name|2\n{count}")
        with pytest.raises(ValueError, match=rf"line 2 says {count} tokens; \S+ and its index have 2$"):
            read_ds(tmp_path / "x.ds", vocab_size=1)
    (tmp_path / "x.ds.metadata").write_bytes(b"\xef\xbb\xbfn\xe9m|2\r\n2\r\n")  # a name in Latin-1, on Windows
    assert read_ds(tmp_path / "x.ds", vocab_size=1).num_tokens == 2
    right = "; it would be right for {}-byte tokens"
    for nbytes, hint in ((6, ""), (0, ""), (8, right.format(4)), (2, right.format(1))):
        (tmp_path / "x.ds.metadata").unlink(missing_ok=True)
        (tmp_path / "x.ds").write_bytes(bytes(nbytes))
        with pytest.raises(ValueError, match=rf"\(byte {nbytes}\){hint}$"):
            read_ds(tmp_path / "x.ds", vocab_size=1)
    np.array([0], np.uint64).tofile(tmp_path / "x.ds.index")
    with pytest.raises(
        ValueError, match=r"the last entry ends at token 0 \(byte 0\); \S+ goes on to token 1 \(byte 2\)$"
    ):
        read_ds(tmp_path / "x.ds", vocab_size=1)


@pytest.mark.parametrize("size", [1, 4, 8])
def test_the_size_that_tokens_may_have_is_told(size: int, ds: Path) -> None:
    ds.write_bytes(bytes(11 * size))
    with pytest.raises(ValueError, match=rf"\d\)?; it would be right for {size}-byte tokens$"):
        read_ds(ds, vocab_size=VOCAB)
    ds.write_bytes(bytes(11 * 3))
    with pytest.raises(ValueError, match=r"whole number of 2-byte tokens; it ends at byte 33$"):
        read_ds(ds, vocab_size=VOCAB)
