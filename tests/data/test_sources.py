import inspect
import json.decoder
import queue
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from llmfast.data import Document, is_held_out, load, python_code, python_prose, sources, text_files

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def code() -> list[Document]:
    return list(python_code())


@pytest.fixture(scope="module")
def prose(code: list[Document]) -> list[Document]:
    some = [d for d in code if d.name.startswith(("json/", "q", "te", "u"))]  # parsing all of it takes seconds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "python_code", lambda: iter(some))
        return list(python_prose())


def test_code_is_the_standard_library(code: list[Document]) -> None:
    names = [d.name for d in code]
    assert names == sorted(names) and len(set(names)) == len(names)
    text = {d.name: d.text for d in code}
    assert text["json/decoder.py"] == Path(json.decoder.__file__).read_text("utf-8")
    assert len(code) > 300 and sum(len(d.text) for d in code) > 5_000_000


def test_code_leaves_out_what_nobody_wrote(code: list[Document]) -> None:
    folders = {folder for d in code for folder in d.name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
    names = {d.name for d in code}
    assert "encodings/cp1252.py" not in names and "encodings/utf_8.py" in names
    assert not any(name.startswith("_sysconfigdata") for name in names)


def test_prose_is_topics_and_docstrings(prose: list[Document]) -> None:
    names = [d.name for d in prose]
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names} == {"topics", "docstrings"}
    text = {d.name: d.text for d in prose}
    assert text["docstrings/textwrap.py"].startswith("Text wrapping and filling.\n\n")
    assert (inspect.getdoc(textwrap.wrap) or "missing") in text["docstrings/textwrap.py"]
    assert "def wrap" not in text["docstrings/textwrap.py"]
    assert min(len(d.text) for d in prose if d.name.startswith("docstrings/")) >= 200


def test_docstrings_keep_the_order_of_the_file(prose: list[Document]) -> None:
    text = next(d.text for d in prose if d.name == "docstrings/queue.py")
    # A method of the first class comes before the next class.
    places = [text.index(inspect.getdoc(x) or "") for x in (queue.Queue, queue.Queue.put, queue.PriorityQueue)]
    assert 0 < places[0] < places[1] < places[2]


def test_topics_do_not_repeat_each_other(prose: list[Document]) -> None:
    paragraphs = [
        " ".join(p.split())
        for d in prose
        if d.name.startswith("topics/")
        for p in d.text.split("\n\n")
        if len(p.split()) >= 8
    ]
    total = sum(map(len, paragraphs))
    assert total > 200_000
    assert total - sum(map(len, set(paragraphs))) < 0.02 * total  # all topics together: a fifth


def test_text_files_in_a_folder(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": b"b\r\nb",
        "a/deep/x.MD": "é\n".encode(),
        "a/bom.rst": b"\xef\xbb\xbfbom",
        "latin.py": b"# -*- coding: latin-1 -*-\nx = '\xe9'\n",
        "blank.txt": b" \n\t",
        "empty.txt": b"",
        "image.png": b"\xff\x00",
        ".hidden/c.txt": b"c",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    expected = [
        Document("a/bom.rst", "bom"),
        Document("a/deep/x.MD", "é\n"),
        Document("b.txt", "b\nb"),
        Document("latin.py", "# -*- coding: latin-1 -*-\nx = 'é'\n"),
    ]
    assert list(text_files(tmp_path)) == expected == load(str(tmp_path))


def test_text_files_takes_one_file_of_any_suffix(tmp_path: Path) -> None:
    """Say that one is read as plain text whose suffix may promise something else."""
    said: list[str] = []
    for name, told in (("notes.log", 1), ("rows.csv", 2), ("notes.TXT", 2)):
        (tmp_path / name).write_text("hello")
        assert load(str(tmp_path / name), say=said.append) == [Document(name, "hello")]
        assert len(said) == told
    assert said[1].startswith(f"{tmp_path}/rows.csv is read as plain text: its suffix is none of .md, ")


def test_text_files_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(text_files(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no text in .*\.md, \.py, \.rst, \.txt"):
        list(text_files(tmp_path))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"looked for \.md, \.py"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match=r"no text in .*empty\.txt$"):
        load(str(tmp_path / "empty.txt"))
    (tmp_path / "broken.txt").write_bytes(b"ok so far \xff")
    with pytest.raises(ValueError, match=r"broken\.txt is not UTF-8 text: broken\.txt, byte 10; "):
        load(str(tmp_path))
    (tmp_path / "broken.txt").write_bytes("wide".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"broken\.txt is not UTF-8 text: broken\.txt, byte 1; "):
        load(str(tmp_path))


def test_load_by_name(code: list[Document]) -> None:
    assert load("code") == code
    with pytest.raises(ValueError, match=r"unknown source 'proze': expected 'code', 'prose', .* mean 'prose'\?"):
        load("proze")
    with pytest.raises(
        ValueError, match=r"unknown source 'code, prose': .*; several sources are a list, \['code', 'prose'\]"
    ):
        load("code, prose")
    with pytest.raises(ValueError, match="unknown source '': expected 'code'"):
        load("")


def test_of_pythons_folder_only_what_is_hand_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, latin = b"decoding_table = (\n", b"# -*- coding: latin-1 -*-\nx = '\xe9'\n"
    files = {"table.py": table, "encodings/cp1.py": table, "encodings/cp2.py": b"x = 1\n" + table, "B.PY": latin}
    files |= {"encodings/map.py": b"decoding_map  = {}", "encodings/used.py": b"x = decoding_table = 1"}
    files |= {
        "_sysconfigdata_x.py": b"x",
        "blank.py": b" \n",
        "broken.py": b"x = '\xe9'",
        "nonsense.py": b"# coding: no",
    }
    files |= {"test/x.py": b"x", "lib/site-packages/x.py": b"x", "pydoc_data/x.py": b"x", "notes.txt": b"x"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert [d.name for d in python_code()] == ["B.PY", "encodings/used.py", "table.py"]
    assert next(python_code()).text.endswith("x = 'é'\n")


def test_a_topic_that_mostly_repeats_a_longer_one_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    several = "one\n\ntwo\n\nthree\n\nfour and more"
    topics = {"several": several, "half": "one\n\n two\n\nnew\n\nmore", "most": "one\n\ntwo\n\nnew too", "blank": " \n"}
    monkeypatch.setattr("pydoc_data.topics.topics", topics)
    assert [(d.name, d.text) for d in sources._topics()] == [
        ("topics/half", topics["half"]),
        ("topics/several", several),
    ]


def test_load_of_an_empty_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="source 'code' is empty"):
        load("code")


def test_a_file_and_its_docstrings_are_held_out_together(code: list[Document], prose: list[Document]) -> None:
    side = {d.name: is_held_out(d, 0.3) for d in code}
    paired = [d for d in prose if d.name.startswith("docstrings/")]
    assert len(paired) > 20
    assert all(is_held_out(d, 0.3) == side[d.name.removeprefix("docstrings/")] for d in paired)
    assert 0.2 < sum(side.values()) / len(side) < 0.4


def test_held_out_grows_with_the_fraction_and_is_fixed() -> None:
    documents = [Document(f"{i}.txt", "") for i in range(2000)]
    held = {f: {d.name for d in documents if is_held_out(d, f)} for f in (0, 0.05, 0.5, 0.99)}
    assert not held[0] and held[0.05] < held[0.5] < held[0.99]
    assert all(abs(len(names) / 2000 - f) < 0.03 for f, names in held.items())
    # Fixed for good: moving a file between the parts would spoil comparisons with earlier runs.
    assert [i for i in range(60) if is_held_out(Document(f"{i}.txt", ""), 0.1)] == [14, 48]
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            is_held_out(documents[0], fraction)


def test_import_leaves_optional_packages_alone() -> None:
    code = "import sys, llmfast.data; print(sorted({'tokenizers', 'pydoc_data.topics'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_docstrings_are_those_of_every_definition_in_turn() -> None:
    source = """'''Of the module.'''
class A:
    '''Of a class.'''
    async def f(self):
        '''Of a coroutine,

            indented.
        '''
def g():
    '''Of a function.'''
    def h():
        'Of one within it.'
x = 'no docstring'
"""
    assert sources._docstrings(source).split("\n\n") == [
        *("Of the module.", "Of a class.", "Of a coroutine,", "indented.", "Of a function.", "Of one within it.")
    ]


@pytest.mark.parametrize("count", [199, 200])
def test_files_with_few_docstrings_are_no_prose(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    text = "x" * count
    monkeypatch.setattr(sources, "python_code", lambda: iter([Document("a.py", f"'{text}'"), Document("b.py", "1")]))
    monkeypatch.setattr(sources, "_topics", lambda: iter([]))
    monkeypatch.setattr(sources, "cached_texts", lambda texts, how, make: asked.append(how) or make())
    assert list(python_prose()) == ([Document("docstrings/a.py", text)] if count >= 200 else [])
    assert sys.version in asked[0]  # which decides how a docstring is read


def test_a_folder_may_be_called_like_a_source(
    code: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.txt").write_text("mine")
    assert load("./code") == [Document("a.txt", "mine")] and load("code") == code


def test_names_that_are_not_unicode_are_on_one_side() -> None:
    named = [Document(f"{i}\udcff.txt", "") for i in range(200)]
    assert 0 < sum(is_held_out(document, 0.5) for document in named) < 200


def test_a_file_without_one_good_line_says_what_is_wrong(tmp_path: Path) -> None:
    (file := tmp_path / "a.jsonl").write_text("{broken\n")
    with pytest.raises(
        ValueError, match=r"^no text in .*a\.jsonl; 1 document is left out: not JSON \(1, a\.jsonl, line 1\)$"
    ):
        load(str(file))
    with pytest.raises(ValueError, match=r"^no text in \S+; looked for .*; 1 document is left out: not JSON"):
        load(str(tmp_path))
    file.write_text('{"body": "x"}')
    with pytest.raises(
        ValueError, match=r"^no text in a column 'text' \(text_column names another\) in \S+; 1 document"
    ):
        load(str(file))


def test_a_suffix_that_is_unknown_is_a_warning_unless_somebody_listens(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.warns(UserWarning, match=r"a\.csv is read as plain text: its suffix is none of \.md, "):
        load(str(tmp_path / "a.csv"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(str(tmp_path / "a.csv"), say=[].append)


def test_a_table_without_a_text_column_is_text_as_it_stands(tmp_path: Path) -> None:
    (file := tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    said: list[str] = []
    assert load(str(file), text_column="", say=said.append) == [Document("a.jsonl", '{"text": "x"}\n')]
    assert said == [f"{file} is read as plain text: its suffix is none of .md, .py, .rst, .txt"]
    with pytest.raises(
        ValueError, match=r"no text in \S+; looked for \.md, \.py, \.rst, \.txt; 1 file of another kind"
    ):
        load(str(tmp_path), text_column="")
    assert load(str(file), say=said.append) == [Document("a.jsonl/0", "x")] and len(said) == 1
