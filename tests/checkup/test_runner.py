"""The parent of a check-up: what crashes, hangs or comes too late costs its own case, and results are always whole."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from llmfast.checkup import runner, worker
from llmfast.checkup.page import page
from llmfast.checkup.record import Case, Finding, Journal
from llmfast.checkup.runner import CheckUp, write_json
from llmfast.checkup.sections import SECTIONS, TUNING, Section, named

# A worker of a section, with a case per letter of MADE, or of MADE_<its name>. It computes nothing, and does without
# torch, whose import would take most of its time; tests/checkup/test_command.py runs the worker as it is.
WORKER = """if True:
    import os, signal, sys, time
    from unittest import mock
    sys.modules["torch"] = mock.MagicMock()
    from llmfast.checkup import sections, worker
    from llmfast.checkup.record import Case, Finding

    def case(letter):
        def run():
            yield Finding("begun", True, {})
            if letter == "x":
                os.kill(os.getpid(), signal.SIGSEGV)
            if letter == "h":
                time.sleep(1000)
            if letter == "e":
                raise ValueError("no such thing")
            if letter == "t":  # the time is over
                worker.time.monotonic = lambda: float("inf")
            if letter == "b":
                worker.device_works = lambda device: False
            if letter == "w":
                yield Finding("wrong", False, {})
            yield Finding("done", True, {})
        return Case(letter, run, 0.01)

    class Made:
        def __init__(self, name):
            self.name = name

        def cases(self, device, size):
            return [case(letter) for letter in os.environ.get(f"MADE_{self.name}", os.environ["MADE"])]

    worker.named = Made
    sys.exit(worker.main(sys.argv[1:]))
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the outcome of a section with the given cases, in `minutes`."""
    monkeypatch.setattr(runner, "PATIENCE", 1.0)

    def run(letters: str, minutes: float = 1.0, processes: int = 1) -> tuple[dict[str, Any], list[Any], list[str]]:
        monkeypatch.setenv("MADE", letters)
        written: list[Any] = []
        said: list[str] = []
        section = Section("made", "Made", 1.0, processes)
        checking = CheckUp(minutes, "cpu", "small", [section], (sys.executable, "-c", WORKER))
        results = checking.run(lambda now: written.append(json.loads(json.dumps(now))), said.append)
        (outcome,) = results["sections"]
        return outcome, written, said

    return run


def found(outcome: dict[str, Any]) -> list[tuple[str, str, bool]]:
    return [(one["case"], one["what"], one["ok"]) for one in outcome["findings"]]


BOTH = [("begun", True), ("done", True)]


@pytest.mark.parametrize(
    ("letter", "what"),
    [
        ("x", f"ended its process with exit code {-signal.SIGSEGV}"),
        ("h", "took too long, and was stopped"),
        ("b", "left the device unusable"),
        ("e", "raised"),
    ],
)
def test_a_fault_costs_its_own_case(check: Any, letter: str, what: str) -> None:
    outcome, _, said = check(f"a{letter}z")
    others = [(case, *one) for case in "az" for one in BOTH]
    lines = found(outcome)
    assert [line for line in lines if line[0] != letter] == others
    assert [line for line in lines if not line[2]] == [(letter, what, False)]
    assert any("WRONG" in line and letter in line for line in said)


@pytest.mark.parametrize(("letter", "position"), [("w", 0), ("x", 1), ("h", 2)])
def test_a_fault_shows_up_in_its_own_section_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, letter: str, position: int
) -> None:
    """Let one section give a wrong result, crash or hang; those before and after it are whole."""
    monkeypatch.setattr(runner, "PATIENCE", 1.0)
    monkeypatch.setenv("MADE", "az")
    sections = [section._replace(share=1.0, processes=1) for section in SECTIONS[1:4]]
    chosen = sections[position]
    monkeypatch.setenv(f"MADE_{chosen.name}", f"a{letter}z")
    checking = CheckUp(3.0, "cpu", "small", sections, (sys.executable, "-c", WORKER))
    results = checking.run(lambda now: None, lambda line: None)
    outcomes = {outcome["name"]: outcome for outcome in results["sections"]}
    assert list(outcomes) == [section.name for section in sections] and results["not_reached"] == []
    whole = [(case, *one) for case in "az" for one in BOTH]
    for name, outcome in outcomes.items():
        lines = found(outcome)
        assert [line for line in lines if line[0] != letter] == whole and outcome["not_reached"] == {}
        assert [line[0] for line in lines if not line[2]] == ([letter] if name == chosen.name else [])
    top, *parts = page(results).split("\n## ")
    assert ", 1 wrong, 0 not reached." in top
    titles = {part.splitlines()[0]: part for part in parts}
    assert [line.split(" | ")[:2] for line in titles["Wrong"].splitlines()[4:5]] == [[f"| {chosen.name}", letter]]
    assert {title for title, part in titles.items() if f"| {letter} |" in part} == {"Wrong", chosen.title}


def test_an_exception_says_what_and_where(check: Any) -> None:
    outcome, _, _ = check("e")
    (wrong,) = [one for one in outcome["findings"] if one["ok"] is False]
    assert wrong["figures"]["error"] == "ValueError: no such thing"


def test_what_comes_too_late_is_named(check: Any) -> None:
    outcome, _, _ = check("atyz")
    assert list(outcome["cases"]) == ["a", "t"]
    assert outcome["not_reached"] == {"y": "no time left", "z": "no time left"}


def test_processes_share_the_cases(check: Any) -> None:
    outcome, _, _ = check("acxyz", processes=2)
    assert sorted(outcome["cases"]) == ["a", "c", "y", "z"]
    assert [one["case"] for one in outcome["findings"] if not one["ok"]] == ["x"]


def test_an_interrupt_ends_the_processes(monkeypatch: pytest.MonkeyPatch, check: Any) -> None:
    started: list[Any] = []
    start = subprocess.Popen

    def interrupting(*args: Any, **options: Any) -> Any:
        started.append(start(*args, **options))
        os.kill(os.getpid(), signal.SIGINT)
        return started[-1]

    monkeypatch.setattr(runner, "PATIENCE", 100.0)
    monkeypatch.setattr(subprocess, "Popen", interrupting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            check("h")
    finally:
        signal.signal(signal.SIGINT, before)
    assert [process.wait(10) for process in started] == [-signal.SIGKILL]


def test_results_are_written_before_and_after_each_section(check: Any) -> None:
    _, written, _ = check("a")
    assert [results["not_reached"] for results in written] == [["made"], []]
    assert written[0]["sections"] == [] and written[-1]["schema"] == "llmfast-checkup" and written[-1]["version"] == 1


def test_a_worker_that_cannot_start_is_a_finding() -> None:
    section = Section("made", "Made", 1.0)
    worker = (sys.executable, "-c", "import sys; sys.exit('no such module')")
    results = CheckUp(0.5, "cpu", "small", [section], worker).run(lambda now: None, lambda line: None)
    (finding,) = results["sections"][0]["findings"]
    assert "exit code 1 before its first case" in finding["what"] and finding["figures"]["output"] == "no such module"


def test_a_worker_that_does_not_start_in_time_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "START", 1.0)
    section = Section("made", "Made", 1.0)
    worker = (sys.executable, "-c", "import time; time.sleep(60)")
    results = CheckUp(0.5, "cpu", "small", [section], worker).run(lambda now: None, lambda line: None)
    (finding,) = results["sections"][0]["findings"]
    assert finding["what"] == "the section's process took more than 1 s to start"


def test_time_that_one_section_leaves_goes_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = []

    def section(self: CheckUp, outcome: runner.Outcome, processes: int, say: Any) -> None:
        budgets.append(outcome.budget)
        now[0] += 6.0  # seconds that it takes

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(CheckUp, "_section", section)
    sections = [Section("a", "A", 1.0), Section("b", "B", 1.0), Section("c", "C", 2.0)]
    CheckUp(1.0, sections=sections).run(lambda results: None, lambda line: None)
    assert budgets == [15.0, 18.0, 48.0]


def test_shares_are_of_one() -> None:
    assert sum(section.share for section in SECTIONS) == pytest.approx(1.0)


def test_what_is_measured_has_the_device_to_itself() -> None:
    """Share cases among processes where compiling takes longest, and nowhere else."""
    processes = {section.name: section.processes for section in (*SECTIONS, TUNING)}
    assert [name for name, count in processes.items() if count > 1] == ["numerics", "behaviour"]
    assert processes.keys() == {"here", "numerics", "behaviour", "memory", "speed", "training", "tuning"}
    for section in (*SECTIONS, TUNING):
        assert named(section.name) is section
    with pytest.raises(ValueError, match=r"section must be one of \['here', .*'training'\]; got 'sped'"):
        named("sped")


def test_a_line_that_is_being_written_is_left(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    assert list(journal.new_entries()) == []
    journal.write("begin", "a", 0, seconds=1.0)
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + whole[:10])
    assert [entry.case for entry in journal.new_entries()] == ["a"]
    journal.path.write_bytes(whole + whole)
    assert [entry.content for entry in journal.new_entries()] == [{"seconds": 1.0}]


def test_results_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})

    def fails(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_case_that_needs_more_memory_than_there_is_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made:
        def cases(self, device: torch.device, size: str) -> list[Case]:
            return [Case("large", lambda: [Finding("done", True)], 1.0, 100), Case("fits", list, 1.0, 10)]

    monkeypatch.setattr(worker, "named", lambda name: Made())
    monkeypatch.setattr(worker, "free_bytes", lambda device: 50)
    journal = Journal(tmp_path / "journal")
    assert worker.main(["made", "--journal", str(journal.path), "--device", "cpu"]) == 0
    entries = list(journal.new_entries())
    assert [(entry.kind, entry.case) for entry in entries] == [("skip", "large"), ("begin", "fits"), ("end", "fits")]
    assert entries[0].content["why"] == "needs 100 bytes, and 50 are free"


@pytest.mark.parametrize(("given", "seconds"), [(["--seconds", "10"], 10.0), ([], 60.0)])
def test_a_case_may_begin_until_the_time_is_up(
    given: list[str], seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]

    class Made:
        def cases(self, device: torch.device, size: str) -> list[Case]:
            later = (lambda by=by: now.__setitem__(0, now[0] + by) or [] for by in (seconds, 0.25, 1.0))
            return [Case(name, run) for name, run in zip("abc", later)]

    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(worker, "named", lambda name: Made())
    journal = Journal(tmp_path / "journal")
    assert worker.main(["made", "--journal", str(journal.path), "--device", "cpu", *given]) == 0
    ended = [(entry.kind, entry.case, entry.content) for entry in journal.new_entries() if entry.kind != "begin"]
    took = [("end", "a", {"seconds": seconds}), ("end", "b", {"seconds": 0.25})]
    assert ended == [*took, ("skip", "c", {"why": "no time left"})]


def test_a_worker_gives_each_process_its_cases_and_stops_at_a_broken_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made:
        def cases(self, device: torch.device, size: str) -> list[Case]:
            assert (device.type, size) == ("cpu", "small")
            return [Case(f"{i}", lambda: [Finding("done", True)], 1.0, 10) for i in range(7)]

    def ran(*options: str) -> tuple[int, list[tuple[str, int]]]:
        journal = Journal(tmp_path / "journal")
        journal.path.unlink(missing_ok=True)
        status = worker.main(["m", "--journal", str(journal.path), "--device", "cpu", "--size", "small", *options])
        return status, [(entry.case, entry.number) for entry in journal.new_entries() if entry.kind == "end"]

    monkeypatch.setattr("gc.collect", lambda: 0)  # which takes a second among so many tests
    monkeypatch.setattr(worker, "named", lambda name: Made())
    monkeypatch.setattr(worker, "free_bytes", lambda device: 10)  # as many as a case needs
    assert ran() == (0, [(f"{i}", i) for i in range(7)])
    assert ran("--first", "2", "--processes", "3", "--process", "1") == (0, [("4", 4)])
    assert ran("--processes", "3", "--process", "0") == (0, [("0", 0), ("3", 3), ("6", 6)])
    monkeypatch.setattr(worker, "device_works", lambda device: False)
    assert ran("--first", "5") == (worker.BROKEN_DEVICE, [("5", 5)])


def test_an_exception_is_told_with_its_last_places(tmp_path: Path) -> None:
    def inner() -> None:
        raise KeyError("k" * 5000)

    def outer() -> list[Finding]:
        inner()
        return []

    journal = Journal(tmp_path / "journal")
    worker.run(Case("c", outer), 3, journal)
    begin, found, end = journal.new_entries()
    assert (begin.kind, begin.content, end.kind) == ("begin", {"seconds": 5.0}, "end") and end.content["seconds"] >= 0
    assert (found.case, found.number, found.content["what"], found.content["ok"]) == ("c", 3, "raised", False)
    figures = found.content["figures"]
    assert figures["error"].startswith("KeyError: 'kkk") and len(figures["error"]) == 2000
    places = [place.split(":")[0] + " " + place.split(" ")[1] for place in figures["where"].split(" < ")]
    assert places == ["test_runner.py inner", "test_runner.py outer", "worker.py run"]


def test_a_device_that_does_not_answer_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def illegal(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", illegal)
    assert worker.device_works(torch.device("cpu")) and not worker.device_works(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert worker.device_works(torch.device("cuda", 0))
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 80))
    assert worker.free_bytes(torch.device("cuda", 0)) == 7 and emptied
    assert worker.free_bytes(torch.device("cpu")) > 1 << 50


def test_results_say_how_and_when_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    CheckUp(2.5, "cpu", "small", []).run(lambda now: written.append(now), lambda line: None)
    (results,) = written
    assert results["command"] == {"minutes": 2.5, "device": "cpu", "size": "small"}
    assert results["llmfast"] == runner.llmfast.__version__
    made = datetime.fromisoformat(results["date"])
    assert made.utcoffset() == timedelta(0) and made.microsecond == 0
    assert abs(datetime.now(timezone.utc) - made) < timedelta(minutes=5)
    usual = CheckUp()
    assert (usual.minutes, usual.device, usual.size, usual.sections) == (runner.MINUTES, "cuda", "full", SECTIONS)
