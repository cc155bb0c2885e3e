"""The parent of a check-up: starts a process per section, watches it, and writes the results after each.

If a case crashes its process, breaks the device or hangs, only that case is lost: another process starts with the next
one. The parent never touches the GPU.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import llmfast
from llmfast.checkup.record import SCHEMA, VERSION, Journal, Size
from llmfast.checkup.sections import SECTIONS, Section
from llmfast.checkup.worker import BROKEN_DEVICE

WORKER = (sys.executable, "-m", "llmfast.checkup.worker")
START = 60.0  # seconds that a process may take to import torch and find the device
PATIENCE = 20.0  # the shortest time limit of a case in seconds, however little time it should take
POLL = 0.05  # seconds between two looks at a journal


@dataclass
class Outcome:
    """The result of a section."""

    name: str
    title: str
    budget: float  # seconds
    seconds: float = 0.0
    findings: list[dict[str, Any]] = field(default_factory=list)
    cases: dict[str, float] = field(default_factory=dict)  # seconds of each that ended
    not_reached: dict[str, str] = field(default_factory=dict)  # why


MINUTES = 8.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class CheckUp:
    """A check-up of one device.

    Args:
        minutes: what all sections together may take; each gets its share of what is left.
        sections: those to run, in order.
        worker: the command that starts a section's process, to which options are appended.
    """

    minutes: float = MINUTES
    device: str = "cuda"
    size: Size = "full"
    sections: Sequence[Section] = SECTIONS
    worker: Sequence[str] = WORKER

    def run(self, write: Callable[[dict[str, Any]], None], say: Say = print) -> dict[str, Any]:
        """Run all sections, and pass the results so far to `write` after each of them.

        Returns:
            The results, in the schema of `docs/gpu.md`.
        """
        end = time.monotonic() + 60 * self.minutes
        results: dict[str, Any] = {
            "schema": SCHEMA,
            "version": VERSION,
            "llmfast": llmfast.__version__,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": {"minutes": self.minutes, "device": self.device, "size": self.size},
            "sections": [],
            "not_reached": [section.name for section in self.sections],
        }
        write(results)
        for position, section in enumerate(self.sections):
            rest = sum(later.share for later in self.sections[position:])
            budget = max(0.0, end - time.monotonic()) * section.share / rest
            outcome = Outcome(section.name, section.title, budget)
            say(f"{section.title} ({budget:.0f} s) ...")
            self._section(outcome, section.processes, say)
            results["sections"].append(asdict(outcome))
            results["not_reached"].remove(section.name)
            write(results)
        return results

    def _section(self, outcome: Outcome, processes: int, say: Say) -> None:
        """Run a section, with its cases divided among this many concurrent processes."""
        start, stop = time.monotonic(), Event()
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
            watch = _Watch(outcome, Path(folder), say, stop)
            share = partial(self._share, watch, processes, start + outcome.budget)
            try:
                list(pool.map(share, range(processes)))
            except KeyboardInterrupt:
                stop.set()
                raise
        outcome.seconds = time.monotonic() - start

    def _share(self, watch: "_Watch", processes: int, end: float, process: int) -> None:
        """Run a process for its share of the cases, and after each lost case another one, while there is time."""
        first = 0
        for attempt in range(1000):
            if attempt > 0 and time.monotonic() > end:
                watch.outcome.not_reached[f"cases after number {first - 1}"] = "no time left"
                break
            options: dict[str, Any] = {"--first": first, "--processes": processes, "--process": process}
            options |= {"--seconds": end - time.monotonic(), "--device": self.device, "--size": self.size}
            lost = _Process(self.worker, options, watch, f"{process}-{attempt}").run()
            if lost is None or watch.stop.is_set():
                break
            first = lost + 1


class _Watch(NamedTuple):
    """State shared by the processes of a section."""

    outcome: Outcome
    folder: Path
    say: Say
    stop: Event  # set when they are to end at once


class _Process:
    """One worker process and its progress."""

    def __init__(self, worker: Sequence[str], options: dict[str, Any], watch: _Watch, name: str) -> None:
        self._watch, self._outcome = watch, watch.outcome
        journal, self._output = watch.folder / f"{name}.jsonl", watch.folder / f"{name}.txt"
        self._journal = Journal(journal)
        self._began = 0
        self._last = -1, ""  # number and name of the last case that began
        self._running = False
        self._deadline = time.monotonic() + START
        command = [*worker, watch.outcome.name, "--journal", str(journal)]
        command += [word for name, value in options.items() for word in (name, str(value))]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def run(self) -> int | None:
        """Wait for the process; return the number of the case that ended it, or None if it completed."""
        while (code := self._process.poll()) is None and time.monotonic() < self._deadline:
            if self._watch.stop.is_set():
                break
            self._take_entries()
            time.sleep(POLL)
        if code is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._take_entries()
        if code == 0 or self._watch.stop.is_set():
            return None
        told = self._output.read_text(errors="replace").strip()[-2000:]
        index, case = self._last
        if self._began == 0:
            late = f"took more than {START:.0f} s to start"
            how = late if code is None else f"ended with exit code {code} before its first case"
            self._note("start", f"the section's process {how}", told)
            return None
        if code is None:
            self._note(case, "took too long, and was stopped", told)
        elif code == BROKEN_DEVICE:
            self._note(case, "left the device unusable", told)
        elif self._running:
            self._note(case, f"ended its process with exit code {code}", told)
        return index

    def _note(self, case: str, what: str, told: str) -> None:
        self._outcome.findings.append({"case": case, "what": what, "ok": False, "figures": {"output": told}})
        self._watch.say(f"  WRONG {case}: {what}")

    def _take_entries(self) -> None:
        for kind, case, index, content in self._journal.new_entries():
            if kind == "begin":
                self._began += 1
                self._last, self._running = (index, case), True
                self._deadline = time.monotonic() + max(PATIENCE, 4 * content["seconds"])
            elif kind == "finding":
                self._outcome.findings.append({"case": case, **content})
                if content["ok"] is False:
                    self._watch.say(f"  WRONG {case}: {content['what']}")
            elif kind == "end":
                self._running = False
                self._outcome.cases[case] = content["seconds"]
                self._deadline = time.monotonic() + START
            else:
                self._outcome.not_reached[case] = content["why"]


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write the results so that a reader never finds half of them, even if the writer is killed."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
