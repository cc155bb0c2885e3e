"""On a small dirty corpus: documentation of what is installed here, and documents planted for each stage to find."""

import argparse
import ast
import base64
import gzip
import importlib
import inspect
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from llmfast.clean import Report, add_arguments, clean, folder, run
from llmfast.cli import main
from llmfast.data import load, prepare
from llmfast.data.tokenizer import BPETokenizer, ByteTokenizer
from support.datatrove import quickly, with_servers

for needed in folder.NEEDED:
    pytest.importorskip(needed)

HARBOUR = """\
The harbour wakes long before the town does. Boats that left at midnight come home one after another, and the men on
the quay have ice and crates ready for them. A buyer walks along the row and looks into each hold without a word.

Prices are made in a low hall behind the church. Whoever wants to buy raises a hand, and nobody shouts, because the
sellers have known these hands for years. By seven everything is loaded, and the trucks have gone over the hill.

What stays behind is the smell, a few gulls and the cats. The cats have learned to wait at the third gate, where an old
skipper empties his bucket. He says that he does it for the gulls, but he knows each cat by name.
"""
BREAD = """\
Good bread needs little more than flour, water, salt and a great deal of time. Mix the flour with the water in the
evening and leave it alone, so that the grain can drink. In the morning add the leaven and the salt, and fold the dough
over itself every half hour until it holds its shape.

An oven that is too cold is the most common mistake. Let the stone heat for a full hour, and put a pan with boiling
water below it, because steam keeps the crust soft while the loaf rises. After fifteen minutes take the pan out. The
loaf is done when it sounds hollow, and it should rest for an hour before anybody cuts it.
"""
CLOCKS = """\
Before the railway came, every town kept its own time. Noon was when the sun stood highest over the market, and a
traveller who went west set his watch back a little in each place. Nobody minded, since no coach was ever so punctual
that a few minutes could have mattered.

Trains changed that within one generation. Two of them on a single track had to agree about the hour, and a timetable
with forty noons in it was of no use to passengers. So the companies took the time of the capital with them in a locked
case, and the station clock began to contradict the church. For some years towns had two times, and people asked which
one was meant. The church lost in the end.
"""
BEES = """\
A swarm in May looks far more dangerous than it is. The bees have filled themselves with honey, they have no brood to
defend, and all that they want is a dry hollow. Scouts fly out from the cluster and come back to dance for what they
have found, and the better the place, the longer the dance.

It may take three days until the scouts agree. Those who praised a poorer place visit the better one and change their
minds, or simply stop dancing. When enough of them have gathered at one site, they return and warm the others up. Then
the whole cluster takes off within a minute and moves in before the evening.
"""
PAPER = """\
Paper was made from rags for longer than from wood. Collectors went from house to house with a cart, paid for old linen
with needles and ribbons, and sold it to the mill, where women cut off the buttons and sorted the pieces by colour.

At the mill the rags rotted in water for weeks before heavy hammers beat them to a pulp. A man with strong arms dipped a
frame into the vat and lifted it out with an even layer on it. He did that two thousand times a day. A second man
pressed the sheets between felts, and a third hung them up in the attic, where the wind did the rest of the work.
"""
GERMAN = """\
Der Hafen erwacht lange vor der Stadt. Die Boote, die um Mitternacht ausgelaufen sind, kehren eines nach dem anderen
heim, und die Männer auf der Mole haben Eis und Kisten für sie bereit. Ein Händler geht die Reihe entlang und schaut
wortlos in jeden Laderaum. Um sieben Uhr ist alles verladen, und die Lastwagen sind über den Hügel verschwunden. Was
bleibt, ist der Geruch, und mit ihm bleiben ein paar Möwen und die Katzen am dritten Tor.
"""
FRENCH = """\
Le port se réveille bien avant la ville. Les bateaux partis à minuit rentrent l'un après l'autre, et les hommes sur le
quai tiennent prêtes la glace et les caisses. Un acheteur longe la rangée et regarde dans chaque cale sans dire un mot.
À sept heures tout est chargé, et les camions ont disparu derrière la colline. Il ne reste que l'odeur, quelques
mouettes et les chats qui attendent devant la troisième porte.
"""
NOTICES = """\
You must enable JavaScript in the settings of your browser before you can see this page.
We use cookies to make this website better and to show you what could be of interest.
By going on you accept our terms of use and everything else that we may think of later.
Read more about how this site uses cookies in the centre for all of your preferences.
Our privacy policy explains to you what we and our many partners do with the data.
With JavaScript turned off some of the pictures and most of the prices will be missing.
"""
EMAIL, IP = "hilda.quist@harbour-office.example", "193.99.144.85"
ADDRESSES = f"Ask {EMAIL} for the tables, or connect to {IP} at night; from inside, 192.168.0.7 does as well."

PLANTED = {
    # what stays
    "bread.txt": BREAD,
    "clocks.md": CLOCKS + "\n" + ADDRESSES + "\n",
    "bees.rst": BEES.replace("dry hollow", "caf\u00c3\u00a9 with a dry hollow") + "\n" + NOTICES.splitlines()[0] + "\n",
    "paper.txt": PAPER + "The end of a text is marked <|endoftext|> in the files of some people.\n",
    # what goes
    "blank.txt": " \n\n",
    "empty.txt": "",
    "german.txt": GERMAN,
    "french.txt": FRENCH,
    "repeated.txt": HARBOUR.splitlines()[0] + "\n" + "The same line comes again and again.\n" * 30,
    "short.txt": "".join(BREAD.splitlines(keepends=True)[:2]),
    "latin.txt": BREAD.replace("bread", "brod") + "Lorem ipsum dolor sit amet.\n",
    "curly.txt": CLOCKS.replace("every town", "every {town}"),
    "notices.txt": NOTICES,
    "breathless.txt": BEES.replace(".", ""),
}
WENT = {
    "blank.txt": ("read", "blank"),
    "empty.txt": ("read", "blank"),
    "bytes.txt": ("read", "not UTF-8"),
    "damaged.jsonl.gz/1": ("read", "broken gzip from here on"),
    "more.jsonl/1": ("read", "not JSON"),
    "more.jsonl/2": ("read", "no text"),
    "more.jsonl/3": ("read", "blank"),
    "german.txt": ("language", "de"),
    "french.txt": ("language", "fr"),
    "repeated.txt": ("repetition", "dup_line_frac"),
    "short.txt": ("gopher", "gopher_short_doc"),
    "latin.txt": ("c4", "lorem_ipsum"),
    "curly.txt": ("c4", "curly_bracket"),
    "notices.txt": ("c4", "too_few_sentences"),
    "breathless.txt": ("fineweb", "line_punct_ratio"),
}
COPIES = {"harbour.txt", "copies/harbour.md", "copy-7"}  # the last one in JSONL, under an id of its own
MODULES = ("email.generator", "email.feedparser", "email.policy", "logging.handlers", "concurrent.futures.thread")
DISTRIBUTIONS = ("hypothesis", "numpy", "packaging", "pytest")


def docstrings(module: str) -> str:
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return "\n\n".join(filter(None, (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, documented))))


def write_corpus(root: Path) -> None:
    (root / "copies").mkdir(parents=True)
    documents = {f"stdlib/{name}.txt": docstrings(name) for name in MODULES}
    documents |= {f"installed/{name}.md": str(metadata.metadata(name).get_payload()) for name in DISTRIBUTIONS}
    documents |= PLANTED | {"harbour.txt": HARBOUR, "copies/harbour.md": HARBOUR.replace("\n", "\r\n")}
    documents["nearly.txt"] = HARBOUR.replace("each hold", "every hold").replace("an old", "the old")
    for name, text in documents.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(text.encode())
    (root / "bytes.txt").write_bytes("Käse und Brot".encode("latin-1"))
    (root / "table.csv").write_text("not read")
    (root / ".hidden.txt").write_text("not read")
    records = [
        {"text": HARBOUR, "id": "copy-7", "rank": "../up", "filter_reason": "old"},
        None,
        {"body": "x"},
        {"text": " "},
    ]
    lines = [json.dumps(record) if record else "{broken" for record in records]
    (root / "more.jsonl").write_text("\n".join(lines) + "\n\n")
    packed = gzip.compress(json.dumps({"text": FRENCH}).encode() + b"\n")
    (root / "damaged.jsonl.gz").write_bytes(packed[:-4])


@pytest.fixture(autouse=True, scope="module")
def _quickly() -> Iterator[None]:
    with quickly():
        yield


@pytest.fixture
def servers() -> Iterator[None]:
    with with_servers():
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus") / "in"
    write_corpus(root)
    return root


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained = BPETokenizer.train(list(PLANTED.values()), 400)
    trained._backend.enable_truncation(10)  # a file that would cut every document
    trained.save(path)
    return path


@pytest.fixture(scope="module")
def cleaned(corpus: Path, tokenizer: Path) -> tuple[Path, Report]:
    output = corpus.parent / "out"
    return output, clean(corpus, output, tokenizer=tokenizer)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def kept(output: Path) -> dict[str, str]:
    return {record["id"]: record["text"] for record in records(output / "text")}


def went(output: Path) -> dict[str, tuple[str, str | None]]:
    """Return stage and reason of each document that was removed."""
    return {
        record["id"]: (stage.name, record.get("metadata", {}).get("filter_reason"))
        for stage in (output / "removed").iterdir()
        for record in records(stage)
    }


def test_each_planted_document_goes_where_it_should(cleaned: tuple[Path, Report]) -> None:
    output, _ = cleaned
    assert {name: went(output).get(name) for name in WENT} == WENT
    assert (PLANTED.keys() - WENT.keys()) == {"bread.txt", "clocks.md", "bees.rst", "paper.txt"} <= kept(output).keys()


def test_of_copies_one_stays(cleaned: tuple[Path, Report]) -> None:
    output, _ = cleaned
    group = [*COPIES, "nearly.txt"]
    assert len(kept(output).keys() & group) == 1
    stages = Counter(went(output)[name][0] for name in group if name not in kept(output))
    assert stages == {"exact_duplicates": 2, "near_duplicates": 1}
    parts = [output / "text", *(output / "removed").iterdir()]
    (copy,) = (record for part in parts for record in records(part) if record["id"] == "copy-7")
    assert copy["metadata"]["input"] == {"rank": "../up", "filter_reason": "old"}  # names that mean much to datatrove
    assert {path.name for path in output.rglob("*.jsonl")} == {"00000.jsonl"}


def test_what_stays_is_whole(cleaned: tuple[Path, Report]) -> None:
    texts = kept(cleaned[0])
    assert texts["bread.txt"] == BREAD.strip()  # with its blank line, and short lines at the ends of paragraphs
    assert texts["bees.rst"] == BEES.replace("dry hollow", "café with a dry hollow").strip()  # without JavaScript
    documentation = [name for name in texts if name.startswith(("stdlib/", "installed/"))]
    assert documentation  # which of them stay is up to the versions that are installed
    assert len(documentation) < (len(MODULES) + len(DISTRIBUTIONS)) / 2


def test_no_address_is_left_anywhere(cleaned: tuple[Path, Report]) -> None:
    output, _ = cleaned
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        assert EMAIL.encode() not in content and IP.encode() not in content, path
    expected = ADDRESSES.replace(EMAIL, "email@example.com").replace(IP, "22.214.171.124")
    assert expected in kept(output)["clocks.md"]  # and the address of a private network is as it was


def test_every_document_is_kept_or_removed_once(corpus: Path, cleaned: tuple[Path, Report]) -> None:
    output, report = cleaned
    ids = [r["id"] for part in [output / "text", *(output / "removed").iterdir()] for r in records(part)]
    files = {p.relative_to(corpus).as_posix() for p in corpus.rglob("*") if p.suffix in (".txt", ".md", ".rst")}
    expected = files - {".hidden.txt"} | {"copy-7", *(f"more.jsonl/{i}" for i in (1, 2, 3))}
    # The French text in the damaged file could still be read, and is French.
    assert sorted(ids) == sorted(expected | {"damaged.jsonl.gz/0", "damaged.jsonl.gz/1"})
    assert report.ignored == {".csv": 1}


def test_the_counts_add_up(cleaned: tuple[Path, Report]) -> None:
    output, report = cleaned
    for stage, following in zip(report.stages, report.stages[1:]):
        assert (stage.documents_out, stage.bytes_out) == (following.documents_in, following.bytes_in)
    for stage in report.stages:
        assert sum(stage.reasons.values()) == stage.documents_in - stage.documents_out
        assert len(records(output / "removed" / stage.name)) == stage.documents_in - stage.documents_out
        assert {reason: min(count, 3) for reason, count in stage.reasons.items()} == {
            reason: len(samples) for reason, samples in stage.samples.items()
        }
    texts = kept(output).values()
    assert report.documents == len(texts)
    assert report.stages[-1].bytes_out == sum(len(text.encode()) for text in texts)
    lines = {stage.name: stage.lines for stage in report.stages if stage.lines}
    assert lines == {"c4": {"javascript": 3, "policy": 4}}
    assert report.settings["language_model"] == "py3langid"


def test_the_report_is_written(cleaned: tuple[Path, Report]) -> None:
    output, report = cleaned
    assert json.loads((output / "report.json").read_text()) == asdict(report)
    text = (output / "report.md").read_text()
    for line in report.table().splitlines():
        assert f"    {line}\n" in text
    assert "**de**: 1\n\n    german.txt: Der Hafen erwacht lange vor der Stadt. Die Boote," in text
    assert "Files that were not read, by suffix: 1 .csv." in text


def documents(ds: Path, tokenizer: BPETokenizer) -> list[str]:
    """Return the texts of a token file; each ends with the end of text and contains no other."""
    tokens, ends = np.fromfile(ds, "<u2"), np.fromfile(f"{ds}.index", "<u8").astype(int)
    assert ends[-1] == len(tokens)
    parts = np.split(tokens, ends[:-1])
    for part in parts:
        assert np.flatnonzero(part == tokenizer.eot_id).tolist() == [len(part) - 1]
    return [tokenizer.decode(part[:-1].astype(np.int64)) for part in parts]


def test_tokens_are_the_text(cleaned: tuple[Path, Report], tokenizer: Path) -> None:
    output, report = cleaned
    (ds,) = (output / "tokens").glob("*.ds")
    texts = documents(ds, BPETokenizer.load(tokenizer))
    assert sorted(texts) == sorted(kept(output).values()) and any("<|endoftext|>" in text for text in texts)
    assert report.tokens == len(np.fromfile(ds, "<u2"))
    assert (output / "tokens" / f"{ds.name}.metadata").read_text().splitlines()[:2] == [
        "tokenizer.json|2",
        str(report.tokens),
    ]


def test_documents_are_shuffled_within_a_file_of_tokens_and_name_no_other_file(
    cleaned: tuple[Path, Report], tokenizer: Path
) -> None:
    output, _ = cleaned
    (ds,) = (output / "tokens").glob("*.ds")
    found, texts = documents(ds, BPETokenizer.load(tokenizer)), [record["text"] for record in records(output / "text")]
    assert found != texts and sorted(found) == sorted(texts) and len(texts) > 4
    assert not any("file_path" in record["metadata"] for record in records(output / "text"))  # of a temporary folder


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the workers' parts in turns in this process."""
    from llmfast.clean import pipelines

    class OneByOne(pipelines.QuietExecutor):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"workers": 1})

    monkeypatch.setattr(pipelines, "QuietExecutor", OneByOne)


def test_parts_of_several_workers(
    corpus: Path, cleaned: tuple[Path, Report], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some parts have no document left, others none but copies of another part's."""
    in_this_process(monkeypatch)
    output, alone = tmp_path / "out", cleaned[1]
    report = clean(corpus, output, tokenizer=tokenizer, workers=9)
    assert [(s.documents_in, s.documents_out, s.reasons) for s in report.stages] == [
        (s.documents_in, s.documents_out, s.reasons) for s in alone.stages
    ]
    assert sorted([*kept(output), *went(output)]) == sorted([*kept(cleaned[0]), *went(cleaned[0])])
    files = sorted((output / "tokens").glob("*.ds"))
    texts = [text for ds in files for text in documents(ds, BPETokenizer.load(tokenizer))]
    assert 1 < len(files) < 9 and sorted(texts) == sorted(kept(output).values())


@pytest.mark.usefixtures("servers")
def test_two_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "in"
    corpus.mkdir()
    (corpus / "a.txt").write_text(GERMAN)
    (corpus / "b.txt").write_text(FRENCH)
    report = clean(corpus, tmp_path / "out", workers=2)
    assert {stage.name: stage.reasons for stage in report.stages if stage.reasons} == {"language": {"de": 1, "fr": 1}}
    assert capfd.readouterr() == ("", "")


def arguments(*values: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(value) for value in values])


@pytest.mark.usefixtures("servers")
def test_one_document_by_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bread.txt").write_text(BREAD)
    assert run(arguments(tmp_path / "bread.txt", tmp_path / "new" / "out")) == 0
    assert kept(tmp_path / "new" / "out") == {"bread.txt": BREAD.strip()}
    out, err = capfd.readouterr()
    assert out.splitlines()[1].split() == ["read", "1", "0", str(len(BREAD)), "0"]
    assert out.splitlines()[11].split() == ["kept", "1", str(len(BREAD) - 1)]
    assert err and all(line.startswith("llmfast: ") for line in err.splitlines())  # nothing of datatrove's own


def test_every_flag_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    called = mock.Mock(return_value=mock.Mock(documents=1))
    monkeypatch.setattr("llmfast.clean.command.clean", called)
    flags = {"tokenizer": Path("t"), "language": "de", "language_model": Path("m"), "workers": 3, "text_column": "body"}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    assert run(arguments("in", "out", *given, "--overwrite")) == 0
    assert called.call_args.args == (Path("in"), Path("out"))
    passed = dict(called.call_args.kwargs)
    assert callable(passed.pop("say")) and passed == flags | {"overwrite": True}
    assert run(arguments("in", "out")) == 0
    parameters = inspect.signature(clean).parameters
    assert all(parameters[name].default == value for name, value in called.call_args.kwargs.items() if name != "say")


def test_a_name_that_is_not_unicode(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    corpus, output = tmp_path / "in", tmp_path / "out"
    corpus.mkdir()
    (corpus / "bread.txt").write_text(BREAD)
    (corpus / os.fsdecode(b"kept\xff.txt")).write_text(CLOCKS)
    (corpus / os.fsdecode(b"gone\xff.txt")).write_text(GERMAN)
    (corpus / os.fsdecode(b"x.\xff")).write_text("not read")
    assert run(arguments(corpus, output)) == 0
    assert set(kept(output)) == {"bread.txt", "kept\ufffd.txt"} and set(went(output)) == {"gone\ufffd.txt"}
    assert "1 .?" in (output / "report.md").read_text()
    assert json.loads((output / "report.json").read_text())["stages"][0]["documents_in"] == 3


@pytest.mark.parametrize("text", ["", GERMAN])
def test_nothing_is_left(text: str, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Regression test for datatrove #301: an empty input is an error in its MinHash."""
    corpus, output = tmp_path / "in", tmp_path / "out"
    corpus.mkdir()
    (corpus / "a.txt").write_text(text)
    assert run(arguments(corpus, output, "--tokenizer", tokenizer)) == 1
    assert "nothing was kept" in capsys.readouterr().err
    report = json.loads((output / "report.json").read_text())
    assert report["tokens"] == 0 and report["stages"][-1]["documents_out"] == 0
    assert list((output / "text").iterdir()) == [] and [*went(output)] == ["a.txt"]
    assert [path.name for path in (output / "tokens").iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet"])
def test_a_table_is_cleaned_by_its_column_and_what_json_cannot_hold_is_counted(suffix: str, tmp_path: Path) -> None:
    """NaN, half a surrogate pair and a large number once cost the document, as not JSON."""
    path = tmp_path / f"a{suffix}"
    when = datetime(2024, 5, 6, 7, 8)
    if suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        table = {"body": [BREAD, GERMAN], "score": [float("nan"), 1.0], "raw": [b"x", None], "when": [when, None]}
        pytest.importorskip("pyarrow.parquet").write_table(pa.table(table), path)
        kept_columns = {"score": None, "raw": None, "when": when.isoformat()}
        lost = {"score": 1, "raw": 1}
    else:
        row = '{"score": NaN, "half": "\\ud800", "big": [1, 1%s], "id": null, "body": %s}\n'
        content = b"\xef\xbb\xbf" + (row % ("0" * 30, json.dumps(BREAD)) + json.dumps({"body": GERMAN})).encode()
        path.write_bytes(pytest.importorskip("zstandard").compress(content) if suffix.endswith("zst") else content)
        kept_columns = {"score": None, "half": None, "big": [1, None]}
        lost = {"score": 1, "half": 1, "big": 1}
    report = clean(path, tmp_path / "out", text_column="body")
    (record,) = records(tmp_path / "out" / "text")
    assert (record["text"], record["id"]) == (BREAD.strip(), f"a{suffix}/0")
    assert record["metadata"]["input"] == kept_columns
    assert went(tmp_path / "out") == {f"a{suffix}/1": ("language", "de")}
    assert report.stages[0].values == lost
    counts = ", ".join(f"{column} {count}" for column, count in lost.items())
    assert f"such as NaN, replaced by null: {counts}." in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(ValueError, match=r"no text in a column 'text' \(text_column names .*columns are .*'body'"):
        clean(path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_is_not_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "in"
    corpus.mkdir()
    (corpus / "a.pdf").touch()
    assert run(arguments(corpus, tmp_path / "out")) == 2
    assert "; 1 file of another kind is left out: .pdf (1)" in capsys.readouterr().err
    (corpus / "a.txt").write_text(BREAD)
    assert run(arguments(corpus, tmp_path / "out")) == 0
    assert "llmfast: 1 file of another kind is left out: .pdf (1)" in capsys.readouterr().err.splitlines()


def test_what_was_kept_can_be_trained_on_and_cleaned_again(cleaned: tuple[Path, Report], tmp_path: Path) -> None:
    output, _ = cleaned
    said: list[str] = []
    texts = {document.text for document in load(str(output), say=said.append)}
    assert texts == set(kept(output).values())
    assert said == [f"{output}: it was written by llmfast clean; of that only text/ is read"]
    data = prepare([str(output)], tokenizer="bytes", seq_len=64, say=said.append)
    assert len(data.train[str(output)]) > 0 and len(data.validation[str(output)]) > 0
    again = clean(output, tmp_path / "again")
    assert again.stages[0].documents_in == len(kept(output)) and again.ignored == {}
    assert again.documents == len(kept(output))


def test_a_long_word_takes_no_time_by_its_square_and_addresses_are_found_as_before() -> None:
    from datatrove.pipeline.formatters import PIIFormatter

    from llmfast.clean.recipe import Addresses

    ours, theirs = Addresses(email_replacement="E", ip_replacement="I"), PIIFormatter(True, True, True, "E", "I")
    for text in (ADDRESSES, f"<{EMAIL}>,{EMAIL};\n{EMAIL}\tx@y @ !a@b.cc a@[1.2.3.ab:] {IP}", *PLANTED.values()):
        assert ours.format(text) == theirs.format(text)
    text = base64.b64encode(np.random.default_rng(0).bytes(1_000_000)).decode()
    start = time.perf_counter()
    assert ours.format(text) == text
    assert time.perf_counter() - start < 20


def test_another_language(tmp_path: Path) -> None:
    corpus = tmp_path / "in"
    corpus.mkdir()
    (corpus / "a.txt").write_text(GERMAN)
    (corpus / "b.txt").write_text(BREAD)
    clean(corpus, tmp_path / "out", language="de")
    assert kept(tmp_path / "out") == {"a.txt": GERMAN.strip()}
    assert went(tmp_path / "out") == {"b.txt": ("language", "en")}


def test_an_output_stays_unless_it_is_ours_and_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, output = tmp_path / "in", tmp_path / "out"
    corpus.mkdir()
    (corpus / "a.txt").write_text(GERMAN)
    output.mkdir()  # empty, which is fine
    clean(corpus, output)
    first = (output / "report.md").read_text()
    with pytest.raises(FileExistsError, match="use overwrite to replace it"):
        clean(corpus, output)

    (corpus / "b.txt").write_text(FRENCH)
    with monkeypatch.context() as patched:
        patched.setattr(Report, "write", lambda self, folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            clean(corpus, output, overwrite=True)
    assert (output / "report.md").read_text() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]  # no trace of the run that failed
    assert clean(corpus, output, overwrite=True).stages[0].documents_in == 2
    assert (output / "report.md").read_text() != first

    others = tmp_path / "others"
    others.mkdir()
    (others / "report.json").write_text("{}")
    with pytest.raises(FileExistsError, match="llmfast clean did not write it"):
        clean(corpus, others, overwrite=True)
    assert (others / "report.json").read_text() == "{}"


def test_bad_arguments(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        clean(tmp_path / "nothing", output)
    for wrong in (corpus, corpus / "out", corpus.parent):
        with pytest.raises(ValueError, match="output and inputs must not contain each other"):
            clean(corpus, wrong)
    with pytest.raises(ValueError, match="workers must be at least 1; got 0"):
        clean(corpus, output, workers=0)
    with pytest.raises(ValueError, match="output must be a folder that is not a mount point"):
        clean(corpus, "/proc")
    with pytest.raises(ValueError, match=r"inputs must be one of \.md, "):
        clean(corpus / "table.csv", output)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.md, \.py"):
        clean(tmp_path / "empty", output)
    for language in ("xx", "frr"):  # North Frisian has a tokenizer, but py3langid does not know it
        with pytest.raises(ValueError, match=f"language must be one .*; got '{language}'"):
            clean(corpus, output, language=language)
    with pytest.raises(FileNotFoundError, match=r"language_model .*lid\.bin"):
        clean(corpus, output, language_model=tmp_path / "lid.bin")
    with pytest.raises(FileNotFoundError):
        clean(corpus, output, tokenizer=tmp_path / "tokenizer.json")
    bare = tmp_path / "bare.json"
    bare.write_text('{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
    with pytest.raises(ValueError, match=r"no <\|endoftext\|> token"):
        clean(corpus, output, tokenizer=bare)
    ByteTokenizer().save(tmp_path / "bytes.json")
    with pytest.raises(ValueError, match=r"that `tokenizers` reads; .*bytes.json is llmfast's byte tokenizer"):
        clean(corpus, output, tokenizer=tmp_path / "bytes.json")
    (tmp_path / "model").mkdir()
    other = bare.read_text().replace('"a": 0', '"</s>": 0')
    (tmp_path / "model" / "tokenizer.json").write_text(other)
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(ValueError, match=r"must have <\|endoftext\|>, which ends documents in token files"):
        clean(corpus, output, tokenizer=tmp_path / "model" / "tokenizer.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.json", "bytes.json", "empty", "model"]


def test_without_the_extra(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folder, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'llmfast-torch\[clean\]'"):
        clean(corpus, tmp_path / "out")
    assert run(arguments(corpus, tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert message.startswith("llmfast: error: cleaning needs datatrove, ") and message.count("\n") == 1


def test_links_in_a_circle_are_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert main(["clean", str(tmp_path / "loop"), str(tmp_path / "cleaned")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "loop"), "--out", str(tmp_path / "report.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop"]
