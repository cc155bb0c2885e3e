"""The end of a source as its validation part: nothing twice, nothing lost, at a boundary, and as much as is said."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmfast.data import Document, split

some_texts = st.lists(st.text(st.sampled_from("ab \n"), min_size=1, max_size=60), min_size=1, max_size=12)


def documents(texts: list[str]) -> list[Document]:
    return [Document(f"{i}.txt", text) for i, text in enumerate(texts)]


@given(texts=some_texts, held_out=st.floats(0.001, 0.999))
def test_the_parts_are_the_text_in_two(texts: list[str], held_out: float) -> None:
    total = sum(map(len, texts))
    train, held = split.by_end(documents(texts), held_out)
    assert "".join(train + held) == "".join(texts)
    assert all(train + held)
    if total > 1:
        assert train and held
        wanted = min(max(held_out * total, min(split.LEAST_CHARACTERS, split.LEAST_SHARE * total)), total - 1)
        assert wanted / 2 - 1 <= sum(map(len, held)) <= wanted * 3 / 2 + 1
    assert (train, held) == split.by_end(documents(texts), held_out)


@pytest.mark.parametrize(
    ("separator", "begins"),
    [("\n\n", r"P"), ("\n", r"P"), (" ", r"P"), ("", r".")],
)
def test_one_file_is_cut_where_a_paragraph_or_line_or_word_begins(separator: str, begins: str) -> None:
    text = separator.join(f"P{i:04d}" + (" and so\non" if separator == "\n\n" else "") for i in range(20_000))
    (kept,), (held,) = split.by_end(documents([text]), 0.1)
    assert kept + held == text and abs(len(held) / len(text) - 0.1) < 1e-3
    assert begins == "." or held.startswith(begins)
    assert kept.endswith(separator)


@pytest.mark.parametrize(("files", "whole"), [(10, 2), (30, 6), (100, 20)])
def test_of_small_files_the_last_are_held_out_whole(files: int, whole: int) -> None:
    texts = [f"{i} " + "word " * 30 for i in range(files)]
    assert split.by_end(documents(texts), 0.05) == (texts[:-whole], texts[-whole:])


def test_much_text_is_split_as_asked() -> None:
    (kept,), (held,) = split.by_end(documents(["x" * 1_000_000]), 0.05)
    assert (len(kept), len(held)) == (950_000, 50_000)
    (kept,), (held,) = split.by_end(documents(["x" * 50_000]), 0.05)
    assert (len(kept), len(held)) == (46_000, 4000)
    (kept,), (held,) = split.by_end(documents(["x" * 1000]), 0.05)
    assert (len(kept), len(held)) == (800, 200)


def closest_boundary(text: str, cut: int, near: int) -> int:
    """Try every place near the cut: before a paragraph if one lies there whole, else before a line, else a word."""
    first, last = max(cut - near, 1), min(cut + near, len(text) - 1)
    for separator in ("\n\n", "\n", " "):
        ends = range(first - 1 + len(separator), last + 1)
        found = [i for i in ends if text[i - len(separator) : i] == separator]
        if found:
            return min(found, key=lambda i: abs(i - cut))
    return cut


words = st.tuples(st.sampled_from(["a", "aaa", "aaaaaaaa"]), st.sampled_from([" ", " ", "\n", "\n\n"])).map("".join)


@given(text=st.lists(words, min_size=1, max_size=12).map("".join), held_out=st.floats(0.2, 0.9))
@example(text="aaaa\naaaaa", held_out=0.5)
@example(text="aaa aaa aa", held_out=0.3)
@example(text="\n" + "a" * 9, held_out=0.8)
@example(text="aaaa a\naaa", held_out=0.5)
def test_the_end_begins_at_the_closest_boundary(text: str, held_out: float) -> None:
    at = closest_boundary(text, *split.end(len(text), held_out, split.LEAST_CHARACTERS))
    assert split.by_end(documents([text]), held_out) == ([text[:at]], [text[at:]])


@pytest.mark.parametrize(
    ("total", "held_out", "least", "cut", "near"),
    [
        (1, 0.5, 4, 0, 0),
        (2, 0.99, 4, 1, 0),
        (3, 0.01, 4, 2, 0),
        (10, 0.1, 4, 8, 1),
        (10, 0.99, 4, 1, 0),
        (100, 0.05, 4, 95, 2),
        (100, 0.02, 4, 96, 2),
        (100, 0.7, 4, 30, 15),
    ],
)
def test_where_an_end_begins(total: int, held_out: float, least: int, cut: int, near: int) -> None:
    assert split.end(total, held_out, least) == (cut, near)
