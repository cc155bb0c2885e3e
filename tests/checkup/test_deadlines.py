"""Waits of a check-up for its workers, and what it writes of one that ends: with a pretended process and clock."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from llmfast.checkup import runner
from llmfast.checkup.record import Journal
from llmfast.checkup.runner import CheckUp, Outcome
from llmfast.checkup.sections import Section

NEVER = 1e9


class Script:
    """Lines that a worker writes into its journal, each at its time, and its end with an exit code."""

    def __init__(self, lines: list[tuple[float, str, str, dict[str, Any]]], ends: float = NEVER, code: int = 0) -> None:
        self.lines, self.ends, self.code = lines, ends, code


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run scripts one after another in place of processes, and return the outcome, the times of kills and commands."""

    def run(*scripts: Script, budget: float = 100.0) -> tuple[Outcome, list[float], list[list[str]]]:
        now, kills, commands, waiting = [0.0], [], [], list(scripts)

        class Process:
            pid = 7

            def __init__(self, command: list[str], stdout: Any, **options: Any) -> None:
                assert options == {"stderr": subprocess.STDOUT, "start_new_session": True}
                commands.append(command)
                self.script, self.began = waiting.pop(0), now[0]
                self.journal = Journal(Path(command[command.index("--journal") + 1]))
                stdout.write(b"  " + b"x" * 3000 + b"told  \n")

            def poll(self) -> int | None:
                while self.script.lines and now[0] - self.began >= self.script.lines[0][0]:
                    _, kind, case, content = self.script.lines.pop(0)
                    self.journal.write(kind, case, int(case), **content)  # type: ignore[arg-type]
                return self.script.code if now[0] - self.began >= self.script.ends else None

            def wait(self) -> int:
                return self.script.code

        monkeypatch.setattr(subprocess, "Popen", Process)
        monkeypatch.setattr(os, "killpg", lambda pid, signal: kills.append(now[0]))
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 1.0))
        outcome = Outcome("made", "Made", budget)
        CheckUp(1.0, "cpu", "small", [], ("worker",))._section(outcome, 1, lambda line: None)
        assert waiting == []
        return outcome, kills, commands

    return run


def whats(outcome: Outcome) -> list[tuple[str, str]]:
    return [(found["case"], found["what"]) for found in outcome.findings]


def test_a_worker_has_a_minute_to_start(world: Any) -> None:
    outcome, kills, _ = world(Script([]))
    assert kills == [60.0] and whats(outcome) == [("start", "the section's process took more than 60 s to start")]
    assert outcome.findings[0]["ok"] is False
    assert outcome.findings[0]["figures"] == {"output": "x" * 1996 + "told"}


@pytest.mark.parametrize(("seconds", "patience"), [(0.1, 20.0), (5.0, 20.0), (6.0, 24.0), (60.0, 240.0)])
def test_a_case_has_four_times_what_it_should_take(world: Any, seconds: float, patience: float) -> None:
    """Wait at least 20 seconds; the next process goes on after the case."""
    begun = Script([(3.0, "begin", "4", {"seconds": seconds})])
    outcome, kills, (_, then) = world(begun, Script([], ends=1.0), budget=1000.0)
    assert kills == [pytest.approx(4.0 + patience, abs=1.0)] and kills[0] >= 3.0 + patience
    assert whats(outcome) == [("4", "took too long, and was stopped")]
    assert then[then.index("--first") + 1] == "5"


def test_between_two_cases_there_is_a_minute(world: Any) -> None:
    lines: list[Any] = [(1.0, "begin", "0", {"seconds": 1.0}), (15.0, "end", "0", {"seconds": 14.5})]
    outcome, kills, _ = world(Script(lines), Script([], ends=1.0), budget=1000.0)
    assert kills[0] == pytest.approx(76.0, abs=1.0) and outcome.cases == {"0": 14.5}


def test_a_process_that_ends_after_a_case_loses_none(world: Any) -> None:
    """Go on with the next case without a finding, as nothing of the last one is lost."""
    lines: list[Any] = [(1.0, "begin", "2", {"seconds": 1.0}), (2.0, "end", "2", {"seconds": 1.0})]
    outcome, kills, (_, then) = world(Script(lines, ends=3.0, code=9), Script([], ends=1.0))
    assert whats(outcome) == [] and kills == [] and then[then.index("--first") + 1] == "3"


@pytest.mark.parametrize(
    ("code", "what"),
    [(9, "ended its process with exit code 9"), (runner.BROKEN_DEVICE, "left the device unusable")],
)
def test_a_case_that_ends_its_process_is_named(world: Any, code: int, what: str) -> None:
    lines: list[Any] = [(1.0, "begin", "0", {"seconds": 1.0})]
    outcome, _, _ = world(Script(lines, ends=3.0, code=code), Script([], ends=1.0))
    assert whats(outcome) == [("0", what)]


def test_no_process_starts_after_the_end(world: Any) -> None:
    """Name what is left; a process gets the seconds that there still are."""
    lines: list[Any] = [(1.0, "begin", "3", {"seconds": 1.0})]
    outcome, _, (command,) = world(Script(lines, ends=30.0, code=9), budget=20.0)
    assert outcome.not_reached == {"cases after number 3": "no time left"} and outcome.seconds == 21.0
    options = dict(zip(command[4::2], command[5::2]))
    assert command[:2] == ["worker", "made"] and options == {
        **{"--first": "0", "--processes": "1", "--process": "0"},
        **{"--seconds": "20.0", "--device": "cpu", "--size": "small"},
    }


def test_a_section_without_time_has_a_budget_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now, budgets = [0.0], []

    def section(self: CheckUp, outcome: Outcome, processes: int, say: Any) -> None:
        budgets.append((outcome.budget, processes))
        now[0] += 200.0

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(CheckUp, "_section", section)
    said: list[str] = []
    sections = [Section("a", "A", 0.5, 3), Section("b", "B", 0.5)]
    CheckUp(2.0, sections=sections).run(lambda results: None, said.append)
    assert budgets == [(60.0, 3), (0.0, 1)] and said == ["A (60 s) ...", "B (0 s) ..."]


def test_what_is_skipped_is_written_with_its_reason(world: Any) -> None:
    lines: list[Any] = [(1.0, "skip", "0", {"why": "no time left"}), (1.0, "begin", "1", {"seconds": 1.0})]
    lines += [
        (2.0, "finding", "1", {"what": "w", "ok": True, "figures": {"x": 1}}),
        (3.0, "end", "1", {"seconds": 2.0}),
    ]
    outcome, _, _ = world(Script(lines, ends=4.0))
    assert outcome.not_reached == {"0": "no time left"} and outcome.cases == {"1": 2.0}
    assert outcome.findings == [{"case": "1", "what": "w", "ok": True, "figures": {"x": 1}}]
    assert outcome.seconds == 4.0


def test_each_of_many_lost_cases_is_followed_by_the_next(world: Any) -> None:
    def ends(case: int) -> Script:
        return Script([(1.0, "begin", f"{case}", {"seconds": 1.0})], ends=2.0, code=9)

    outcome, _, commands = world(*map(ends, range(20)), Script([], ends=1.0), budget=1000.0)
    assert [case for case, _ in whats(outcome)] == [f"{case}" for case in range(20)]
    assert [command[command.index("--first") + 1] for command in commands] == [f"{case}" for case in range(21)]
    left = [float(command[command.index("--seconds") + 1]) for command in commands]
    assert left == [1000.0 - 2.0 * number for number in range(21)]
