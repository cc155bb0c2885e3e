"""Train every kind of multi-token prediction like `make train`, and compare the loss of the next token.

python -m benchmarks.mtp_runs FOLDER     # finished runs in FOLDER are reused; the table goes to results/mtp.json

Whole runs show what is learned, and are deterministic. Speed and memory of a step need a quiet machine and are measured
separately, in several rounds of short runs of every kind. The highest speed and the highest peak of each kind count.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.store import about
from llmfast.train.metrics import read_metrics

RESULTS = Path(__file__).resolve().parent / "results" / "mtp.json"
WAYS = {
    "next token only": [],
    "parallel heads, n = 2": ["model.mtp=parallel", "model.mtp_heads=2"],
    "parallel heads, n = 4": ["model.mtp=parallel", "model.mtp_heads=4"],
    "sequential depths, D = 1": ["model.mtp=sequential", "model.mtp_heads=1"],
    "shared logits, K = 2": ["model.mtp=shared", "model.mtp_heads=2"],
}
ROUNDS = 3
SHORT = ["train.steps=40", "train.log_every=10", "train.eval_rows=1", "train.sample_tokens=0"]


def train(folder: Path, name: str, settings: list[str]) -> int:
    """Train one run in its own process, unless it has finished before; return its peak memory in bytes."""
    if (folder / name / "finished").exists():
        return int((folder / name / "finished").read_text())
    command = [sys.executable, "-m", "llmfast", "train", "--overwrite", "--name", name]
    command += [f"--set={setting}" for setting in (f"runs={folder}", *settings)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name}: the run failed with status {os.waitstatus_to_exitcode(status)}")
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    (folder / name / "finished").write_text(str(peak))
    return peak


def learned(folder: Path, seeds: int, settings: list[str]) -> list[dict[str, Any]]:
    rows = []
    for number, (way, model) in enumerate(WAYS.items()):
        runs = [f"{number}-seed-{seed}" for seed in range(seeds)]
        for seed, name in enumerate(runs):
            train(folder, name, [*settings, *model, f"train.seed={seed}"])
        logs = [read_metrics(folder / name / "metrics.jsonl") for name in runs]
        validation = [[line["validation_mean"] for line in log if "validation_mean" in line][-1] for log in logs]
        last = logs[-1][-1]
        row = {"way": way, "tokens": last["tokens"], "validation": validation}
        rows.append(row | {key: last[key] for key in ("acceptance", "tokens_per_pass") if key in last})
    return rows


def costs(folder: Path, settings: list[str]) -> dict[str, dict[str, float]]:
    found = {way: {"tokens_per_s": 0.0, "peak_bytes": 0} for way in WAYS}
    for round in range(ROUNDS):
        for number, (way, model) in enumerate(WAYS.items()):
            name = f"{number}-short-{round}"
            peak = train(folder, name, [*settings, *model, *SHORT])
            lines = read_metrics(folder / name / "metrics.jsonl")
            speed = max(line["tokens_per_s"] for line in lines if "loss" in line)
            best = found[way]
            best["tokens_per_s"] = max(best["tokens_per_s"], speed)
            best["peak_bytes"] = max(best["peak_bytes"], peak)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, help="folder of the runs; finished runs are not repeated")
    parser.add_argument("--seeds", type=int, default=1, help="number of whole runs of each kind")
    parser.add_argument("--set", action="append", default=[], help="a setting for all runs, as in llmfast train")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = learned(args.folder, args.seeds, args.set)
    by_way = costs(args.folder, args.set)
    rows = [row | by_way[row["way"]] for row in rows]
    args.out.write_text(json.dumps({"about": about(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
