"""The README's Python runs as it stands, and its commands exist."""

import re
from pathlib import Path

import pytest

from support.code_blocks import ROOT, commands, expect_command, run_python

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_python(ROOT / "README.md") > 0


def test_commands_exist() -> None:
    found = list(commands(README))
    assert found
    for words in found:
        expect_command(words)


def test_make_verbs_exist() -> None:
    verbs = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"train", "test", "bench"} <= verbs
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert verbs <= targets


def test_named_files_exist() -> None:
    for path in re.findall(r"`((?:llmfast|kernels|tests|examples)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
