"""Tests of `make check`: which tests belong to a file, and that time ends."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import check

ROOT = Path(__file__).parents[1]
OF_PAGES = ("docs", "figures", "readme", "statements", "claims", "counts", "pages", "contributing")


@pytest.mark.parametrize(
    ("changed", "first"),
    [
        ("llmfast/losses/plan.py", ["tests/losses/test_plan.py", "tests/losses/test_budget.py"]),
        ("llmfast/train/config.py", ["tests/train/test_config.py", "tests/train/test_batch.py"]),
        ("llmfast/clean/recipe.py", ["tests/clean/test_recipe.py", "tests/test_clean.py"]),
        ("llmfast/export.py", ["tests/test_export.py"]),
        ("kernels/llmfast_kernels/row.py", ["tests/losses/test_budget.py", "tests/losses/test_calls.py"]),
        ("kernels/llmfast_kernels/optimizer/rules.py", ["tests/optim/test_by_torch.py"]),
        ("evidence/roofline.py", ["tests/evidence/test_roofline.py", "tests/evidence/test_compiler.py"]),
        ("tests/optim/test_lion.py", ["tests/optim/test_lion.py"]),
        ("docs/losses.md", ["tests/test_docs.py", "tests/test_figures.py", "tests/test_readme.py"]),
        ("README.md", [f"tests/test_{name}.py" for name in OF_PAGES]),
        ("docs/hooks.py", ["tests/test_docs.py"]),
        ("tools/check.py", ["tests/test_check.py"]),
    ],
)
def test_the_tests_of_a_changed_file_come_first(changed: str, first: list[str]) -> None:
    assert (ROOT / changed).is_file()
    found = check.tests_of([Path(changed)])
    always = len(check.ALWAYS)
    assert found[:always] == [f"tests/{name}" for name in check.ALWAYS]
    assert found[always : always + len(first)] == first
    assert len(found) == len(set(found)) and all((ROOT / path).is_file() for path in found)


def test_the_time_is_that_of_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave room within what the pages say for starting the tests, and for those that have begun."""
    given: list[list[str]] = []
    monkeypatch.setattr(check, "changed", lambda base: [])
    monkeypatch.setattr(check, "left", lambda branch: "HEAD")

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        given.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert check.main([]) == 0
    mypy, tests = given
    seconds = float(tests[tests.index("--seconds") + 1])
    assert mypy[-1] == "mypy" and seconds == 70
    for page in ("CONTRIBUTING.md", "Makefile", "tools/check.py"):
        times = re.findall(r"(\d+) seconds", (ROOT / page).read_text(encoding="utf-8"))
        assert times and {*times} == {"90"}, page


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, Any]]]:
    """Note commands instead of running them; those with the word `fails` fail. Each takes two seconds."""
    found: list[tuple[list[str], dict[str, Any]]] = []
    now = [0.0]

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[:2] == [sys.executable, "-m"]
        found.append((command[2:], options))
        now[0] += 2.0
        return subprocess.CompletedProcess(command, 7 * any("fails" in word for word in command))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(check.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(check, "left", lambda branch: f"left {branch}")
    return found


@pytest.mark.parametrize("suffix", ["py", "ipynb", "md"])
def test_code_that_changed_is_read_before_all_types_and_tests(
    suffix: str, ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    file = Path(f"docs/page.{suffix}")
    monkeypatch.setattr(check, "changed", lambda base: compared.append(base) or [file, Path("notes.txt")])
    assert check.main(["--base", "abc", "--seconds", "31"]) == 0 == check.main([])
    assert compared == ["abc", "left main"]
    of_code = [["ruff", "check", str(file)], ["ruff", "format", "--check", str(file)]] * (suffix != "md")
    for i, seconds in enumerate((31, 70)):
        *before, (tests, options) = ran[i * len(ran) // 2 : (i + 1) * len(ran) // 2]
        assert [command for command, _ in before] == [*of_code, ["mypy"]]
        assert all(given == {"cwd": ROOT} for _, given in before)
        left = seconds - 2 * len(before)
        given = ["-n", "2", "-q", "-rs", "--maxfail", "5", "-p", "support.hurry", "--seconds", f"{left}"]
        assert tests == ["pytest", *given, *check.tests_of([file])] and options["cwd"] == ROOT
        paths = options["env"]["PYTHONPATH"].split(os.pathsep)
        assert [Path(path) for path in paths] == [ROOT, ROOT / "kernels", ROOT / "tests"]
        assert options["env"].items() >= {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}.items()


@pytest.mark.parametrize(("name", "last"), [("fails.py", "ruff"), ("a.py", "pytest")])
def test_the_first_check_that_fails_is_the_last(
    name: str, last: str, ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "changed", lambda base: [Path(name)])
    monkeypatch.setattr(check, "tests_of", lambda files: ["tests/test_fails.py"])
    assert check.main([]) == 7 and ran[-1][0][0] == last and len(ran) == (1 if last == "ruff" else 4)


def test_the_sample_exists_and_comes_last() -> None:
    assert check.tests_of([]) == [f"tests/{name}" for name in (*check.ALWAYS, *check.SAMPLE)]
    assert check.tests_of([Path("llmfast/losses/plan.py")])[-1] == f"tests/{check.SAMPLE[-1]}"


def test_a_change_is_found_in_a_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*command: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(check, "ROOT", tmp_path)
    git("init", "-b", "main")
    for name in ("kept.py", "edited.py", "removed.py"):
        (tmp_path / name).write_text("a = 1\n")
    git("add", ".")
    git("commit", "-m", "Begin")
    git("checkout", "-b", "work")
    (tmp_path / "committed.py").write_text("b = 1\n")
    git("add", ".")
    git("commit", "-m", "Go on")
    (tmp_path / "edited.py").write_text("a = 2\n")
    (tmp_path / "removed.py").unlink()
    (tmp_path / "new file.py").write_text("c = 1\n")
    assert {str(path) for path in check.changed(check.left("main"))} == {"committed.py", "edited.py", "new file.py"}
    assert {str(path) for path in check.changed("HEAD")} == {"edited.py", "new file.py"}
    assert check.left("no-such-branch") == "HEAD"


def test_tests_that_have_not_begun_are_left_out(tmp_path: Path) -> None:
    """Let an hour pass in the first test."""
    (tmp_path / "test_slow.py").write_text(
        "from support import hurry\ndef test_first(): hurry._began -= 3600\ndef test_second(): assert False\n"
    )
    command = [
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-p",
        "support.hurry",
        "--seconds",
        "1800",
    ]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path), "--rootdir", str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "1 passed, 1 skipped" in done.stdout
    assert "the time is up; make test runs all" in done.stdout
