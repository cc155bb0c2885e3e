"""Plant known faults one at a time and see that a test notices: `make faults`.

`tests/faults.json` lists single careless edits, drawn blindly from all parts of the project, each with the test that
fails with it. All take about a quarter of an hour; `--area` and `--number` choose some.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "faults.json"
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "site", "__pycache__", "build", "dist")
NOTHING_COLLECTED, CANNOT_RUN = 5, (3, 4)  # exit statuses of pytest: internal error, wrong usage


class PlantedFault(NamedTuple):
    """One edit that breaks something, and the test that notices."""

    area: str
    file: str
    line: str  # the text that is replaced; it occurs once in the file
    planted: str  # what it becomes
    effect: str  # what a user sees of it
    test: str  # "tests/....py" or "tests/....py::test_..."


def known(file: Path = LIST) -> list[PlantedFault]:
    return [PlantedFault(**fields) for fields in json.loads(file.read_text(encoding="utf-8"))]


def verdict(fault: PlantedFault, tree: Path) -> str:
    """Plant a fault in a copy of the project, run its test, and undo it.

    Returns:
        "caught", "survived", "skipped" if the test needs what is not installed, or "outdated" if the line or the test
        is no longer there.
    """
    file = tree / fault.file
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    if before.count(fault.line) != 1:
        return "outdated"
    paths = os.pathsep.join(str(tree / folder) for folder in (".", "kernels", "tests"))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", fault.test]
    file.write_text(before.replace(fault.line, fault.planted), encoding="utf-8")
    try:
        done = subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    finally:
        file.write_text(before, encoding="utf-8")
    if done.returncode in (0, NOTHING_COLLECTED):
        return next(
            (v for v, word in (("survived", "passed"), ("skipped", "skipped")) if word in done.stdout), "outdated"
        )
    return "outdated" if done.returncode in CANNOT_RUN else "caught"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per fault; return 1 if one survives."""
    faults = known()
    parser = argparse.ArgumentParser(description="Plant known faults and see that a test notices each.")
    parser.add_argument("--area", choices=sorted({fault.area for fault in faults}), help="only faults of this area")
    parser.add_argument("--number", type=int, nargs="+", metavar="N", help="only these faults, counted from 0")
    options = parser.parse_args(arguments)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(shutil.copytree(ROOT, Path(folder, "tree"), ignore=LEFT_OUT))
        for number, fault in enumerate(faults):
            if options.area not in (None, fault.area) or (options.number and number not in options.number):
                continue
            found = verdict(fault, tree)
            counts[found] += 1
            print(f"{number:3} {found:8} {fault.file}: {fault.effect}\n             {fault.test}", flush=True)
    print(", ".join(f"{count} {found}" for found, count in counts.most_common()))
    return 1 if counts["survived"] else 0


if __name__ == "__main__":
    sys.exit(main())
