"""Pages: a test shows what each states, lines to migrate give equal results, and links are called like their targets.

`statements.json` has the statements of each page, in its order, with the test that shows each. Who changes a sentence
looks there whether it still holds, and changes it there too.
"""

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from support.code_blocks import ROOT, blocks

STATEMENTS: dict[str, dict[str, str]] = json.loads((ROOT / "tests" / "statements.json").read_text(encoding="utf-8"))
OTHERS = ("liger_kernel", "cut_cross_entropy", "apex", "bitsandbytes", "quack")  # libraries that need not be here


@cache
def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", STATEMENTS)
def test_what_a_page_states_is_shown_by_a_test(page: str) -> None:
    words = " ".join(text_of(page).split())
    for sentence, test in STATEMENTS[page].items():
        assert sentence in words, f"{page} does not say: {sentence}"
        file, _, name = test.partition("::")
        assert f"\ndef {name}(" in text_of(f"tests/{file}"), test


def links(page: str) -> Iterator[tuple[str, str]]:
    """Yield text and target of the links from cells of a page's tables to other pages."""
    for line in text_of(page).splitlines():
        if line.startswith("|"):
            yield from re.findall(r"\[([^\]]+)\]\(([\w/.-]+\.md(?:#[\w-]+)?)\)", line)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_links_of_a_table_are_called_like_what_they_lead_to(page: str) -> None:
    found = list(links(page))
    assert len(found) > 10
    for name, target in found:
        path, _, anchor = target.partition("#")
        headings = re.findall(r"^#+ (.*)$", text_of(str((ROOT / page).parent.relative_to(ROOT) / path)), re.MULTILINE)
        place = anchor or f"{headings[0]} {path}".lower()
        assert name.lower().removesuffix(".md") in place.lower(), f"{name} leads to {target}"


def test_the_same_wish_leads_to_the_same_page() -> None:
    """Compare the tables of the README and of the documentation's first page."""
    wishes: list[dict[str, str]] = []
    for page, folder in (("README.md", "docs/"), ("docs/index.md", "")):
        rows = re.findall(rf"^\| (.+?) \| \[[^\]]+\]\({folder}([\w/.-]+)", text_of(page), re.MULTILINE)
        wishes.append(dict(rows))
    shared = wishes[0].keys() & wishes[1].keys()
    assert len(shared) >= 6
    assert {wish: wishes[0][wish] for wish in shared} == {wish: wishes[1][wish] for wish in shared}


# Old lines of docs/migration.md and the new ones below them.


def pairs() -> Iterator[tuple[str, str]]:
    """Yield each old statement, from its comment, and the new ones that replace it."""
    for block in blocks(text_of("docs/migration.md"), "python"):
        for part in re.split(r"(?m)^(?=# was)", block.code)[1:]:
            lines = part.splitlines()
            old = [line for line in lines if line.startswith("#")]
            first = re.sub(r"^# was[^:]*:\s?", "", old[0])
            rest = [re.sub(r"^# {6}", "", line) for line in old[1:]]
            yield "\n".join([first, *rest]).strip(), "\n".join(line for line in lines if not line.startswith("#"))


def keywords(code: str) -> dict[str, Any]:
    """Return the keywords of all calls that are numbers, text or truth values."""
    found = (k for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) for k in node.keywords)
    return {k.arg: k.value.value for k in found if k.arg and isinstance(k.value, ast.Constant)}


def namespace() -> dict[str, Any]:
    """Return what the page's first block makes."""
    torch.manual_seed(0)
    made: dict[str, Any] = {}
    exec(blocks(text_of("docs/migration.md"), "python")[0].code, made)
    return made


PAIRS = list(pairs())


def test_lines_to_migrate_are_found() -> None:
    assert len(PAIRS) >= 15 and {name for name in OTHERS if any(name in old for old, _ in PAIRS)} == {*OTHERS}


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_an_old_line_and_the_new_one_have_the_same_numbers(old: str, new: str) -> None:
    before, after = keywords(old), keywords(new)
    shared = before.keys() & after.keys()
    assert {name: before[name] for name in shared} == {name: after[name] for name in shared}


OF_TORCH = [
    (old, new)
    for old, new in PAIRS
    if re.search(r"\bF\.|\btorch\.", old) and ("Options" not in old or hasattr(torch.nn, "LinearCrossEntropyOptions"))
]


@pytest.mark.parametrize(("old", "new"), OF_TORCH)
def test_an_old_line_of_torch_and_the_new_one_do_the_same(old: str, new: str) -> None:
    """Compare the loss, or what an optimizer does in two steps."""
    results: list[Any] = []
    for code in (old, new):
        made = namespace()
        exec(code, made)
        if "optimizer" in code:
            for _ in range(2):
                made["model"](torch.ones(3, 32)).square().sum().backward()
                made["optimizer"].step()
            results.append(torch.cat([p.detach().flatten() for p in made["model"].parameters()]))
        elif "criterion" in code:
            results.append(made["criterion"](made["logits"], made["targets"]).detach())
        else:
            results.append(made["loss"].detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
