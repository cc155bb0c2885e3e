"""Names, commands and figures of CONTRIBUTING.md, SECURITY.md and the folders' READMEs are those of the code."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.code_blocks import ROOT, commands, expect_command

GUIDES = ["CONTRIBUTING.md", "SECURITY.md", "kernels/README.md"]
OWN = {"kernels/README.md": ["kernels", "kernels/llmfast_kernels"]}
# What items speak of besides what is in their files: fixtures, an argument, methods of other objects.
ELSEWHERE = {"path", "kernels", "process_group", "llmfast_kernels"}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def items(page: str) -> Iterator[tuple[str, list[str]]]:
    """Yield list items, rows and paragraphs, each with the folders that are named since the heading before it."""
    folders = [""]
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    for item in re.split(r"\n(?=\d\. |- |   - |\| |#|\n)", prose):
        if item.lstrip().startswith("#"):
            folders = ["", *OWN.get(page, [])]
        folders = [*folders, *re.findall(r"`((?:\w+/)+)(?:\w+\.\w+)?`", item)]
        yield item, folders


def files(item: str, folders: list[str]) -> Iterator[tuple[str, list[Path]]]:
    """Yield the files that an item names, with the places where each may be."""
    for name in re.findall(r"(?<!without )(?<!without an )`([\w/]+\.py)`", item):
        yield name, [path for folder in folders if (path := ROOT / folder / name).is_file()]


@pytest.mark.parametrize("page", GUIDES)
def test_files_are_in_the_folder_that_is_named_before_them(page: str) -> None:
    missing = [name for item, folders in items(page) for name, places in files(item, folders) if not places]
    assert missing == []


@pytest.mark.parametrize("page", GUIDES)
def test_names_are_in_the_files_that_are_named_with_them(page: str) -> None:
    """Look up `NAME` in the file that is named last before it, or next after it."""
    found = []
    for item, folders in items(page):
        sources: dict[int, str] = {}
        for name, places in files(item, folders):
            at = item.index(f"`{name}`")
            sources[at] = "\n".join(path.read_text(encoding="utf-8") for path in places)
        for m in re.finditer(r"`(?:Compiled\.|llmfast\.\w+\.)?([A-Za-z_]\w+)`", item):
            before = [text for at, text in sources.items() if at < m.start()][-1:]
            after = [text for at, text in sources.items() if at > m.start()][:1]
            if sources and m[1] not in ELSEWHERE and not any(re.search(rf"\b{m[1]}\b", t) for t in before + after):
                found.append((m[1], item[:60]))
    assert found == []


@pytest.mark.parametrize("page", GUIDES)
def test_commands_exist(page: str) -> None:
    for words in commands(text_of(page)):
        if words[:2] != ["python", "-m"]:  # pip, build and twine
            expect_command(words)
    verbs = set(re.findall(r"`make ([a-z-]+)", text_of(page)))
    assert verbs <= set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["test", "ARGS=-k cross_entropy -x"], "bin/python -m pytest --machine-code -rs -n 2 -k cross_entropy -x"),
        (["test-gpu"], "bin/python -m pytest --device cuda tests/losses tests/optim "),
        (["train", "ARGS=--set train.steps=200"], "bin/llmfast train --set train.steps=200"),
        (
            ["train", "PYTHON=python3.12", "VENV=elsewhere"],
            "python3.12 tools/setup_env.py --venv elsewhere --extras train",
        ),
        (["train", "CONSTRAINTS="], "--extras train\n"),
    ],
)
def test_what_make_runs(arguments: list[str], wanted: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    command = ["make", "-n", "-B", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and wanted in re.sub(" +\n", "\n", done.stdout), done.stdout + done.stderr


def test_the_files_of_the_kernels_are_all_listed() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+/?)` \| (.*) \|$", text_of("kernels/README.md"), re.MULTILINE))
    package = ROOT / "kernels" / "llmfast_kernels"
    there = {path.name + "/" * path.is_dir() for path in package.iterdir() if not path.name.startswith("__")}
    assert rows.keys() == there - {"py.typed"}
    for name, text in rows.items():
        if "no Triton" in text:
            assert not re.search(r"^(?:import|from) triton", (package / name).read_text(encoding="utf-8"), re.MULTILINE)


def test_no_kernel_is_of_a_layer() -> None:
    """Norms, rotary embeddings, attention and activations are left to others: `norm_kernel` measures gradients."""
    sources = (ROOT / "kernels" / "llmfast_kernels").rglob("*.py")
    found = [
        name for path in sources for name in re.findall(r"^def (\w+)_kernel\(", path.read_text("utf-8"), re.MULTILINE)
    ]
    of_losses = ["cross_entropy", "distillation", "count_above", "filtered_matmul", "scale"]
    backward = ["cross_entropy_backward", "distillation_backward"]
    assert sorted(found) == sorted([*of_losses, *backward, "prepare", "update", "norm", "sum"])


RECIPES = re.findall(
    r"^\| \[`([\w.]+)`\]\(\S+\) \| .*? \| (.*?) \| (.*?) \|$", text_of("examples/README.md"), re.MULTILINE
)


@pytest.mark.parametrize(("file", "how", "lines"), RECIPES, ids=[file for file, *_ in RECIPES])
def test_a_recipe_is_run_as_its_row_says_and_has_its_lines(file: str, how: str, lines: str) -> None:
    source = text_of(f"examples/{file}")
    assert f"examples/{file}" in how or how == "imported by them"
    assert ("torchrun" in how) == ("torchrun" in source)
    for word in (word for code in re.findall(r"`([^`]+)`", lines) for word in re.findall(r"[\w.]*\w", code)):
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", source), f"{file} has no {word}"
