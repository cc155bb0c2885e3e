"""Checks of docstrings, comments and pages that ruff's pydocstyle rules do not cover."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.code_blocks import ROOT
from support.sources import tree_of

FOLDERS = ("llmfast", "kernels", "evidence", "benchmarks", "tools", "examples", "docs", "tests")


def files(suffix: str) -> list[Path]:
    found = [*ROOT.glob(f"*{suffix}"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob(f"*{suffix}"))]
    names = sorted(str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts)
    return [ROOT / name for name in names]


SOURCES, PAGES = files(".py"), files(".md")

# Openings of fragments, such as "Of N rows.", "Whether it fits." or "What is kept."
FRAGMENTS = set(
    re.split(
        r"\W+",
        "and as at beside but by else for from how if in nor of or so those though to what whatever when where whether "
        "which who whose with within without",
    )
)
# A function's docstring opens with an imperative verb, which is neither of these nor a plural such as "Bytes". A test's
# may be a sentence.
NOT_VERBS = FRAGMENTS | set(
    re.split(
        r"\W+",
        "a after all an any each every inside into like no one only other same that the these this those three two",
    )
)

UNITS = "bytes?|nats?|tokens?|seconds?|instructions?|FLOPs?|registers?|launches|loads?|rows?|steps?|values?|losses"
THINGS = (
    "token|parameter|logit|step|element|second|weight|row|tensor|thread|access|layer|rank|group|launch|pass|seed|head"
)
# Each pattern, and what to write instead.
DISCOURAGED = {
    rf"(?i)(?<![a-z])(?:{UNITS})[ _]an?[ _](?:{THINGS})(?![a-z])": "per",
    r"\banew\b": "again",
    r"\bsomebody\b": "someone, or name who",
    r"\bwhoever\b": "name who",
    r"\bwhich is none\b": "is not a ...",
    r"\bwhat there is\b": "name it",
    r"\bbeside (?!=)\w": "next to, in addition to, compared with",
    r"\b(?:and|or) (?:its|their) (?:kin|like)\b": "and similar ...",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def docstrings(source: Path) -> Iterator[tuple[ast.AST, int, str]]:
    """Yield each docstring with its node and line."""
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node, node.body[0].lineno, text
        if isinstance(node, ast.Module | ast.ClassDef):  # attributes, which a string follows
            for attribute, after in itertools.pairwise(node.body):
                match attribute, after:
                    case ast.Assign() | ast.AnnAssign(), ast.Expr(ast.Constant(str(text))):
                        yield attribute, after.lineno, text


def is_property(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(d).rpartition(".")[2] in ("property", "cached_property") for d in decorators)


def faults_of(node: ast.AST, text: str) -> Iterator[str]:
    """Yield what is wrong with the opening of a docstring."""
    first = text.split()[0]
    word = first.strip("`*\"'(,.:;").lower()
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if function and not is_property(node) and not node.name.startswith("test_"):
        plural = word.endswith("s") and not word.endswith("ss")
        if word in NOT_VERBS or plural or not first[0].isalpha():
            yield f"a function's docstring starts with a verb in the imperative, not {first!r}"
    elif word in FRAGMENTS:
        yield f"a docstring starts with a sentence or a noun phrase, not {first!r}"


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_docstrings_open_with_a_verb_or_a_noun_phrase(source: Path) -> None:
    found = [f"{line}: {fault}" for node, line, text in docstrings(source) for fault in faults_of(node, text)]
    assert found == []


@pytest.mark.parametrize("path", [p for p in [*SOURCES, *PAGES] if p != Path(__file__)], ids=name_of)
def test_words(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [
        f"{number}: {match[0]!r}: write {instead!r}"
        for number, line in enumerate(lines, 1)
        for pattern, instead in DISCOURAGED.items()
        if (match := re.search(pattern, line))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ('def f():\n    """Return it."""', ""),
        ('def f():\n    """Of N rows."""', "verb"),
        ('def f():\n    """Bytes of it."""', "verb"),
        ('def f():\n    """(N,) of it."""', "verb"),
        ('def f():\n    """Pass it on."""', ""),
        ('class C:\n    """Bytes of it."""', ""),
        ('class C:\n    """What is kept."""', "noun phrase"),
        ('class C:\n    @property\n    def p(self):\n        """Bytes of it."""', ""),
        ('"""Whether it fits."""', "noun phrase"),
        ('x = 1\n"""As in the paper."""', "noun phrase"),
        ('class C:\n    x: int = 1\n    """Number of rows."""', ""),
    ],
)
def test_the_check_itself(source: str, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(source)
    found = [f for node, _, text in docstrings(file) for f in faults_of(node, text)]
    assert len(found) == bool(fault) and all(fault in f for f in found)
