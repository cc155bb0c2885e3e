"""`llmfast doctor --full`, its page, and a comparison of two machines."""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from llmfast.checkup import command, runner
from llmfast.checkup.page import COMPARED, check, comparison, machine, page, verdict
from llmfast.checkup.record import SCHEMA, VERSION
from llmfast.checkup.sections import SECTIONS, Section
from llmfast.cli import main


def results(name: str, share: float, **more: Any) -> dict[str, Any]:
    """Make results of a machine, with a finding of each kind."""
    findings = [
        {"case": "device", "what": "cuda", "ok": None, "figures": {"name": name, "bytes": 1234567}},
        {"case": "rows", "what": "loss", "ok": True, "figures": {"seconds": 0.5, "share_of_copy": share}},
        {"case": "rows", "what": "a | b", "ok": False, "figures": {"error": "two\nlines", "curve": [1.0]}},
    ]
    section = {
        "name": "speed",
        "title": "Speed",
        "budget": 10.0,
        "seconds": 4.0,
        "findings": findings,
        "cases": {"rows": 1.0},
        "not_reached": {"AdamW": "no time left"},
    }
    return {
        "schema": "llmfast-checkup",
        "version": 1,
        "llmfast": "1.2",
        "date": "2026-01-01T00:00:00+00:00",
        "command": {},
        "sections": [section],
        "not_reached": ["training"],
    } | more


def test_a_page_begins_with_what_is_wrong() -> None:
    lines = page(results("H100", 0.8)).splitlines()
    assert lines[0] == "# Check-up of llmfast 1.2"
    assert lines[2] == "2026-01-01T00:00:00+00:00, H100: 1 right, 1 wrong, 1 not reached."
    assert "Sections not reached: training." in lines
    assert lines.index("## Wrong") < lines.index("## Speed")
    assert "| speed | rows | a \\| b | error two lines |" in lines
    assert "| right | rows | loss | seconds 0.5, share_of_copy 0.8 |" in lines
    assert "Not reached: AdamW (no time left)" in lines


def test_two_machines_side_by_side() -> None:
    first, second = results("H100", 0.8), results("B200", 0.7)
    del second["sections"][0]["findings"][2]
    lines = comparison(first, second).splitlines()
    assert lines == [
        *("# H100, llmfast 1.2 and B200, llmfast 1.2", "", "## Speed", ""),
        *("| case | what | figure | H100, llmfast 1.2 | B200, llmfast 1.2 |", "|---|---|---|---|---|"),
        "| device | cuda |  |  |  |",  # neither right nor wrong
        "| rows | loss | share_of_copy | 0.8 | 0.7 |",
        *("| rows | a \\| b |  | WRONG  | not reached |", ""),
    ]


@pytest.mark.parametrize(
    ("given", "says"),
    [([], "schema"), ({"schema": "other"}, "schema"), ({"schema": "llmfast-checkup", "version": 2}, "got version 2")],
)
def test_other_files_are_refused(given: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check(given)


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path in paths:
        path.write_text(json.dumps(results(path.stem, 0.5)))
    assert main(["doctor", "--compare", *map(str, paths)]) == 0
    assert capsys.readouterr().out.startswith("# a, llmfast 1.2 and b, llmfast 1.2\n")
    paths[1].write_text("{")
    assert main(["doctor", "--compare", *map(str, paths)]) == 2
    assert f"--compare: {paths[1]}: Expecting property name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--minutes", "0"], "--minutes must be above 0; got 0.0"),
        (["--sections", "sped"], "section must be one of"),
        ([], "needs a GPU that torch can use, but there is none"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: Sequence[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--full", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--tune"], ["--minutes", "8"], ["--minutes", "0"], ["--sections", "here"], ["--json", "a"], ["--markdown", "a"]],
)
@pytest.mark.parametrize("others", [[], ["--compare", "a", "b"]])
def test_parts_of_full_need_it(arguments: list[str], others: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments, *others]) == 2
    assert capsys.readouterr().err == f"llmfast: error: {arguments[0]} has no meaning without --full\n"


def test_two_results_are_compared_without_a_third(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--full", "--compare", "a", "b"]) == 2
    assert "--compare and --full cannot be combined" in capsys.readouterr().err


def test_from_the_command_line_to_the_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run a section on the pretended GPU in its own process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        command,
        "CheckUp",
        lambda minutes, sections: runner.CheckUp(
            minutes, size="small", sections=sections, worker=(sys.executable, "-m", "support.pretended_gpu")
        ),
    )
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    files = tmp_path / "results.json", tmp_path / "results.md"
    monkeypatch.setattr(command, "TUNING", Section("training", "A short training run", 0.1))  # tuning takes a minute
    arguments = ["--sections", "here", "--tune", "--json", str(files[0]), "--markdown", str(files[1])]
    assert main(["doctor", "--full", *arguments]) == 0
    written = json.loads(files[0].read_text())
    assert [section["name"] for section in written["sections"]] == ["here", "training"]
    assert set(written["sections"][0]["cases"]) >= {"versions", "device", "copy bandwidth"}
    assert "pretended H100: 2 right, 0 wrong, 0 not reached." in files[1].read_text()
    assert f"written to {files[0]}" in capsys.readouterr().out


class Pretended:
    """A check-up that has these results, or is interrupted."""

    made: ClassVar[list[tuple[float, list[str]]]] = []
    results: Any = None

    def __init__(self, minutes: float, sections: Sequence[Section]) -> None:
        self.made.append((minutes, [section.name for section in sections]))

    def run(self, write: Any) -> Any:
        write(self.results)
        if self.results["date"] == "interrupted":
            raise KeyboardInterrupt
        return self.results


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> type[Pretended]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "CheckUp", Pretended)
    monkeypatch.setattr(Pretended, "made", [])
    return Pretended


def test_the_exit_code_says_whether_something_is_wrong(
    pretended: type[Pretended], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    every, twice = [section.name for section in SECTIONS], ["--sections", "speed", "here", "speed"]
    for found, status, more, given in (
        (results("H100", 0.8), 1, [], (8.0, every)),
        (results("H100", 0.8), 0, ["--minutes=4.5", "--tune"], (4.5, [*every, "tuning"])),
        (results("H100", 0.8, date="interrupted"), 130, twice, (8.0, ["speed", "here"])),
    ):
        if status == 0:
            del found["sections"][0]["findings"][2]
        pretended.results = found
        assert main(["doctor", "--full", *files, *more]) == status
        assert pretended.made.pop() == given and pretended.made == []
        assert json.loads((tmp_path / "a.json").read_text()) == found
        assert (tmp_path / "a.md").read_text() == page(found)
        out, err = capsys.readouterr()
        if status == 130:
            finished = "".join(f"; finished sections are in {path}" for path in files[1::2])
            assert out == "" and err == f"llmfast: interrupted{finished}\n"
        else:
            said = [f"1 right, {status} wrong, 1 not reached", *(f"written to {path}" for path in files[1::2])]
            assert out.splitlines() == said


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_a_folder_that_is_missing_is_said_before_any_work(
    option: str, pretended: type[Pretended], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nowhere" / "a"
    assert main(["doctor", "--full", option, str(path)]) == 2 and pretended.made == []
    assert capsys.readouterr().err == f"llmfast: error: {option}: {path} must be a file in a folder that exists\n"


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_a_folder_is_no_file_for_results(
    option: str, pretended: type[Pretended], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--full", option, str(tmp_path)]) == 2 and pretended.made == []
    assert f"{option}: {tmp_path} must be a file in a folder that exists" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["-1", "0", "nan"])
def test_a_check_up_needs_time(minutes: str, pretended: type[Pretended], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--full", f"--minutes={minutes}"]) == 2 and pretended.made == []
    assert f"--minutes must be above 0; got {float(minutes)}" in capsys.readouterr().err


def test_older_results_are_read_and_newer_ones_refused() -> None:
    for version in ({}, {"version": 0}, {"version": VERSION}):
        given = {"schema": SCHEMA, **version}
        assert check(given) is given
    with pytest.raises(ValueError, match=f"must be of version {VERSION} or older; got version {VERSION + 1}"):
        check({"schema": SCHEMA, "version": VERSION + 1})


def test_every_finding_of_a_page_is_counted_once() -> None:
    found = results("H100", 0.8)
    found["sections"].append(
        found["sections"][0] | {"title": "Twice", "not_reached": {"a": "no time left", "b": "needs 9 bytes"}}
    )
    assert verdict(found) == (2, 2, 3)
    assert "Not reached: a (no time left); b (needs 9 bytes)" in page(found).splitlines()
    assert machine({"sections": []}) == "an unknown device"


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "True"), (1234567, "1,234,567"), (0.123456, "0.1235"), (123456.0, "1.235e+05"), ("a", "a")],
)
def test_a_figure_is_written_for_people(value: Any, text: str) -> None:
    found = results("H100", 0.8)
    found["sections"][0]["findings"] = [
        {"case": "c", "what": "w", "ok": None, "figures": {"x": value, "none": None, "curve": [1.0, 2.0]}}
    ]
    assert f"|  | c | w | x {text} |" in page(found).splitlines()


def test_a_page_has_all_findings_and_the_time_they_took() -> None:
    text = page(results("H100", 0.8))
    speed = text.partition("## Speed\n")[2]
    assert "\n4 of 10 seconds.\n" in speed
    assert "|  | device | cuda | name H100, bytes 1,234,567 |" in speed
    assert "| WRONG | rows | a \\| b | error two lines |" in speed
    assert "curve" not in text and text.count("| device | cuda |") == 1  # what is not wrong comes once


def test_a_figure_stands_for_a_finding() -> None:
    """Shares come before times, which say less about a machine."""
    for order in itertools.permutations(COMPARED, 2):
        first = next(name for name in COMPARED if name in order)
        one, two = results("H100", 0.8), results("B200", 0.7)
        for each in (one, two):
            each["sections"][0]["findings"][1]["figures"] = {name: 2.0 + COMPARED.index(name) for name in order}
        value = 2 + COMPARED.index(first)
        assert f"| rows | loss | {first} | {value} | {value} |" in comparison(one, two)
