"""Tests of the list of planted faults, and of what plants them."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tools import faults
from tools.faults import ROOT, PlantedFault, known, verdict


@pytest.mark.parametrize("fault", known(), ids=lambda fault: f"{fault.file}:{hash_of(fault)}")
def test_each_has_a_test_that_exists(fault: PlantedFault) -> None:
    assert fault.line != fault.planted
    file, _, name = fault.test.partition("::")
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8") if name else (ROOT / file).exists()


def hash_of(fault: PlantedFault) -> int:
    return sum(fault.planted.encode())


def test_few_are_outdated() -> None:
    """Allow a line to change without an edit of the list; draw new faults where many have changed."""
    outdated = [fault for fault in known() if (ROOT / fault.file).read_text(encoding="utf-8").count(fault.line) != 1]
    assert len(outdated) < len(known()) / 10, outdated


FOUND = "def test_found() -> None:\n    from broken import answer\n\n    assert answer() == 42\n"


@pytest.mark.parametrize(
    ("line", "test", "expected"),
    [
        ("return 42", "tests/test_it.py::test_found", "caught"),
        ("return 42", "tests/test_it.py", "caught"),
        ("# a comment", "tests/test_it.py::test_found", "survived"),
        ("return 43", "tests/test_it.py::test_found", "outdated"),
        ("return 42", "tests/test_it.py::test_lost", "outdated"),
        ("return 42", "tests/test_nothing.py", "outdated"),
        ("return 42", "tests/test_skipped.py", "skipped"),
    ],
)
def test_verdicts(tmp_path: Path, line: str, test: str, expected: str) -> None:
    (tmp_path / "tests").mkdir()
    broken = tmp_path / "broken.py"
    broken.write_text("def answer() -> int:\n    # a comment\n    return 42\n")
    (tmp_path / "tests" / "test_it.py").write_text(FOUND)
    (tmp_path / "tests" / "test_nothing.py").write_text("")
    (tmp_path / "tests" / "test_skipped.py").write_text("import pytest\n\npytest.importorskip('nowhere')\n")
    before = broken.read_text()
    planted = line.replace("42", "41").replace("comment", "remark")
    assert verdict(PlantedFault("a", "broken.py", line, planted, "wrong", test), tmp_path) == expected
    assert broken.read_text() == before


def test_the_status_says_whether_one_survived(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fates = iter(["caught", "survived", "caught", "caught"])
    monkeypatch.setattr(faults, "verdict", lambda fault, tree: next(fates))
    assert faults.main(["--number", "0", "1", "2"]) == 1
    assert "2 caught, 1 survived" in capsys.readouterr().out
    assert faults.main(["--number", "0"]) == 0


@pytest.mark.parametrize(
    ("arguments", "planted"),
    [
        ([], [0, 1, 2, 3]),
        (["--area", "kernels"], [0, 2]),
        (["--number", "0", "3"], [0, 3]),
        (["--area", "kernels", "--number", "2", "3"], [2]),
        (["--area", "data", "--number", "0"], []),
    ],
)
def test_an_area_and_numbers_choose_faults(
    arguments: list[str], planted: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    areas = ("kernels", "data", "kernels", "data")
    every = [PlantedFault(area, f"{i}.py", "a", "b", f"effect {i}", f"test {i}") for i, area in enumerate(areas)]
    seen: list[PlantedFault] = []

    def noting(fault: PlantedFault, tree: Path) -> str:
        assert (tree / "tools" / "faults.py").is_file() and not tree.is_relative_to(ROOT)
        assert not (tree / ".git").exists()
        seen.append(fault)
        return "caught"

    monkeypatch.setattr(faults, "known", lambda: every)
    monkeypatch.setattr(faults, "verdict", noting)
    assert faults.main(arguments) == 0 and seen == [every[i] for i in planted]
    *lines, last = capsys.readouterr().out.splitlines()
    told = [(f"{i:3} caught   {i}.py: effect {i}", f"             test {i}") for i in planted]
    assert lines == [line for pair in told for line in pair]
    assert last == (f"{len(planted)} caught" if planted else "")


@pytest.mark.parametrize(
    ("status", "said", "found"),
    [
        (0, "1 passed, 1 skipped", "survived"),
        (0, "1 skipped", "skipped"),
        (5, "no tests ran", "outdated"),
        (5, "2 skipped", "skipped"),
        (1, "1 failed, 3 passed", "caught"),
        (2, "interrupted", "caught"),
        (3, "internal error", "outdated"),
        (4, "usage: 1 passed", "outdated"),
    ],
)
def test_a_verdict_is_that_of_pytests_status(
    status: int, said: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the fault's own test, in the copy, up to its first failure."""
    file = tmp_path / "it.py"
    file.write_text("a = 1\n")
    ran: list[list[str]] = []

    def run(command: list[str], *, cwd: Path, env: dict[str, str], **options: object) -> Any:
        assert file.read_text() == "a = 2\n" and cwd == tmp_path and options == {"capture_output": True, "text": True}
        assert env["PYTHONPATH"].split(os.pathsep) == [str(tmp_path / name) for name in (".", "kernels", "tests")]
        ran.append(command)
        return SimpleNamespace(returncode=status, stdout=said)

    monkeypatch.setattr(faults.subprocess, "run", run)
    fault = PlantedFault("area", "it.py", "a = 1", "a = 2", "effect", "tests/test_it.py::test_it")
    assert verdict(fault, tmp_path) == found and file.read_text() == "a = 1\n"
    assert ran == [[sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", fault.test]]
    file.write_text("a = 1\na = 1\n")  # which of them?
    assert verdict(fault, tmp_path) == "outdated" and len(ran) == 1
