"""Tests of the list of planted faults, and of what plants them."""

from pathlib import Path

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
