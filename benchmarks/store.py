"""The file of results, `results.json`: one line per row."""

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import report

_HERE = Path(__file__).resolve().parent


def default_folder() -> Path:
    """Return `results/`, or the subfolder named after the GPU if there is one."""
    if not torch.cuda.is_available():
        return _HERE / "results"
    return _HERE / "results" / re.sub(r"\W+", "-", torch.cuda.get_device_name(0)).strip("-").lower()


def write(folder: Path, rows: list[report.Row], *, part: bool = False) -> None:
    """Write `results.json` and everything generated from it.

    Rows of a `part` of the suite replace those of the same section, operation and way. The file says what ran again,
    and names the versions of libraries that were not there the first time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, described = folder / "results.json", about()
    if part and file.exists():
        earlier = json.loads(file.read_text())
        again = {"date": described["date"], "commit": described["commit"], "what": report.unique(map(_kind, rows))}
        before = [
            old | {"what": [kind for kind in old["what"] if kind not in again["what"]]}
            for old in earlier["about"].get("again", [])
        ]
        versions = described["versions"] | earlier["about"]["versions"]
        again_and_before = {"again": [*(old for old in before if old["what"]), again], "versions": versions}
        described = earlier["about"] | again_and_before
        replaced = {(_kind(row), row.get("way")) for row in rows}
        rows = [*rows, *(row for row in earlier["rows"] if (_kind(row), row.get("way")) not in replaced)]
    # One line per row keeps diffs between versions readable.
    lines = ",\n".join(json.dumps(row) for row in rows)
    file.write_text(f'{{"about": {json.dumps(described)},\n"rows": [\n{lines}\n]}}\n')
    report.draw(folder)


def _kind(row: report.Row) -> str:
    return f"{row['section']}: {row['operation']}" if "operation" in row else row["section"]


def about() -> dict[str, Any]:
    """Describe the machine, the versions and the date."""
    from llmfast.checkup.implementations import versions

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=_HERE, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results") else ""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "--short", "HEAD") + changed,
        "cpu": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "versions": {"Python": platform.python_version(), **versions()},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
