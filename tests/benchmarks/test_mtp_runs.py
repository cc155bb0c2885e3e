"""The runs of `make bench-mtp`, of which each is pretended: what is repeated, what counts, and what is written."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import mtp_runs

KINDS = ["next token only", "parallel heads, n = 2", "parallel heads, n = 4", "sequential depths, D = 1"]
KINDS += ["shared logits, K = 2"]
OF_MODEL = [
    [],
    ["--set=model.mtp=parallel", "--set=model.mtp_heads=2"],
    ["--set=model.mtp=parallel", "--set=model.mtp_heads=4"],
    ["--set=model.mtp=sequential", "--set=model.mtp_heads=1"],
    ["--set=model.mtp=shared", "--set=model.mtp_heads=2"],
]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Write metrics instead of training: the n-th process is n times as fast, and takes n KiB."""
    commands: list[list[str]] = []

    class Process:
        pid = 1

        def __init__(self, command: list[str], stdout: Any) -> None:
            commands.append(command)
            folder = tmp_path / command[command.index("--name") + 1]
            folder.mkdir(exist_ok=True)
            speed = 100.0 * len(commands)
            lines: list[dict[str, Any]] = [
                {"step": 1, "loss": 3.0, "tokens_per_s": speed, "tokens": 64},
                {"step": 1, "validation_mean": 4.0, "tokens": 64},
                {"step": 2, "loss": 2.0, "tokens_per_s": speed / 2, "tokens": 128},
                {"step": 2, "validation_mean": 3.0, "tokens_per_s": 1e9, "tokens": 128},
            ]
            if "shared" in "".join(command):
                lines[-1] |= {"acceptance": [0.5], "tokens_per_pass": 1.5}
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def wait4(pid: int, options: int) -> Any:
        class Used:
            ru_maxrss = len(commands)

        return pid, 0, Used

    monkeypatch.setattr(mtp_runs.subprocess, "Popen", Process)
    monkeypatch.setattr(mtp_runs.os, "wait4", wait4)
    monkeypatch.setattr(sys, "platform", "linux")
    return commands


def test_every_kind_is_trained_once_per_seed_and_in_short_rounds(
    runs: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mtp.json"
    monkeypatch.setattr(mtp_runs, "about", lambda: {"date": "today"})
    given = ["--seeds", "2", "--set", "train.device=cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["mtp_runs", str(tmp_path), *given])
    mtp_runs.main()
    assert len(runs) == 5 * 2 + 3 * 5
    short = ["train.steps=40", "train.log_every=10", "train.eval_rows=1", "train.sample_tokens=0"]
    begin = [sys.executable, "-m", "llmfast", "train", "--overwrite", "--name"]
    usual = [f"--set=runs={tmp_path}", "--set=train.device=cpu"]
    assert runs[:10] == [
        [*begin, f"{kind}-seed-{seed}", *usual, *OF_MODEL[kind], f"--set=train.seed={seed}"]
        for kind in range(5)
        for seed in range(2)
    ]
    assert runs[10:] == [
        [*begin, f"{kind}-short-{number}", *usual, *OF_MODEL[kind], *(f"--set={one}" for one in short)]
        for number in range(3)
        for kind in range(5)
    ]
    found = json.loads(out.read_text())
    assert found["about"] == {"date": "today"} and [row["way"] for row in found["rows"]] == KINDS
    for kind, row in enumerate(found["rows"]):
        last = 10 + 2 * 5 + kind + 1  # the number of its last short run, which is the fastest and the largest
        wanted = {"way": KINDS[kind], "tokens": 128, "validation": [3.0, 3.0]}
        wanted |= {"tokens_per_s": 100.0 * last, "peak_bytes": 1024 * last}
        assert row == wanted | ({"acceptance": [0.5], "tokens_per_pass": 1.5} if kind == 4 else {})
    mtp_runs.main()
    assert len(runs) == 25 and json.loads(out.read_text()) == found, "finished runs are not repeated"


def test_a_run_that_fails_ends_all(runs: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtp_runs.os, "wait4", lambda pid, options: (pid, 3 << 8, None))
    with pytest.raises(SystemExit, match="name: the run failed with status 3"):
        mtp_runs.train(tmp_path, "name", [])
    assert not (tmp_path / "name" / "finished").exists()


def test_a_mac_counts_bytes(runs: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert mtp_runs.train(tmp_path, "name", []) == 1
    assert (tmp_path / "name" / "finished").read_text() == "1"
