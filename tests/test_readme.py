"""Tests that the README's Python runs, its commands exist, and its figures and the measured ones match the results."""

import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from benchmarks.report import headline
from llmfast._gpus import H100, H200
from llmfast.checkup import command
from llmfast.losses import LinearCrossEntropyPlan
from llmfast.models import DecoderConfig
from llmfast.models.cost import count_parameters
from llmfast.train import Config
from support.code_blocks import ROOT, commands, expect_command, run_python
from support.results import kernel, results, row_kernel

README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_python(ROOT / "README.md") > 0


def test_commands_exist() -> None:
    found = list(commands(README))
    assert found
    for words in found:
        expect_command(words)


def test_figures_in_the_text_are_the_codes() -> None:
    words = " ".join(README.split())
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (python,) = re.findall(r'^requires-python = ">=([\d.]+)"', project, re.MULTILINE)
    assert f"They need a fresh clone, Linux and Python {python} or newer." in words
    assert f"explains how to check one in {({8: 'eight'})[command.MINUTES]} minutes." in words
    demo = Config()
    shape = {name: getattr(demo.model, name) for name in ("width", "layers", "heads")}
    million = count_parameters(DecoderConfig(demo.data.vocab_size, **shape)).total / 1e6
    for page in (words, " ".join((ROOT / "docs" / "index.md").read_text(encoding="utf-8").split())):
        assert re.findall(r"trains? a (\d+) M parameter model", page) == [f"{million:.0f}"]


def test_files_of_a_run_are_named_as_it_writes_them() -> None:
    (listed,) = re.findall(r"The run is in `runs/demo/`: (.*?)\. For", " ".join(README.split()))
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "llmfast" / "train").rglob("*.py"))
    files = re.findall(r"`([\w.]+)`", listed)
    assert files and all(f'"{name}"' in source for name in files)


def test_make_verbs_exist() -> None:
    verbs = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"train", "test", "docs"} <= verbs
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert verbs <= targets


def test_a_stranger_reads_the_readme_in_a_minute() -> None:
    assert len(README.split()) < 900  # with its table


def test_named_files_exist() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:llmfast|kernels|tests|examples)/[\w./]*)`", README + MEASURED + contributing):
        assert (ROOT / path).exists(), path


def measured() -> dict[str, list[str]]:
    """Read the table of measurements: each row's first cell maps to the other three."""
    _, _, text = MEASURED.partition("| what | llmfast | others")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {what: cells for what, *cells in rows}


def test_measured_figures_are_those_of_the_results() -> None:
    """Check every number that `make bench` produces; tests/optim/test_traffic.py checks those of `make test`."""
    rows = results("results.json")

    def one(section: str, **wanted: Any) -> dict[str, Any]:
        return next(row for row in rows if row["section"] == section and wanted.items() <= row.items())

    assert headline(rows) in README
    eight = {"N": 8192, "D": 4096, "V": 128256}
    linear = {"operation": "linear_cross_entropy", "size": eight}
    liger = [one("real sizes", way=way, **linear) for way in ("Liger", "Liger, C = 8", "Liger, C = 16")]
    modelled = [row["seconds"][H200.name] * 1e3 for row in liger]
    off = [round(100 * (ms / measured - 1)) for ms, measured in zip(modelled, (53.0, 37.7, 35.1), strict=True)]
    text = (
        "The model says {:.1f}, {:.1f} and {:.1f}: {} % too low at C = 1, and {} % and {} % too high at C = 8 and 16."
    )
    assert text.format(*modelled, -off[0], *off[1:]) in MEASURED.replace("\n", " ")
    torch.manual_seed(0)
    exact = torch.randn(1 << 20, dtype=torch.float64)
    # The rounding error of normally distributed numbers; for the gradient itself it is slightly smaller.
    rounding = "1.6e-3"
    assert float((exact.bfloat16() - exact).norm() / exact.norm()) == pytest.approx(float(rounding), abs=1e-4)
    assert f"milliseconds on an {H100.name.split()[0]}, *modelled*" in README
    assert f"rounding to bfloat16 alone costs {rounding}" in " ".join(README.split())

    def took(way: str, dtype: str = "float32") -> str:
        size = {"N": 1024, "D": 512, "V": 50257}
        row = one("clock", operation="linear_cross_entropy", way=way, size=size, dtype=f"torch.{dtype}")
        return f"{row['seconds']:.2f} s and {row['peak_bytes'] / 2**20:.0f} MiB"

    code = [row for row in rows if row["section"] == "machine code" and "llmfast" in row["ways"]]
    of_rows = row_kernel(rows)
    update = kernel(code, "update_kernel", "rules:adam'", "PARAM_TYPE={'triton_type': 'fp32'}", "LOW_TYPE=None")
    (hot, *_) = update["loops"]
    elements = 1024 // (32 * update["warps"])  # of a thread: "BLOCK=1024"
    assert "BLOCK=1024," in update["launch"]
    mtp = {row["way"]: row for row in results("mtp.json")}
    sequential = mtp["sequential depths, D = 1"]
    wanted = {
        "linear loss on two CPU cores, float32, N=1024, D=512, V=50257": [
            f"{took('llmfast')} beyond the inputs",
            f"torch unfused {took('torch')}; `F.linear_cross_entropy` with options "
            f"{took('torch linear_cross_entropy')}",
        ],
        "the same in bfloat16": [took("llmfast", "bfloat16"), f"torch unfused {took('torch', 'bfloat16')}"],
        "row kernel for sm_90 (loss, lse and gradient, bfloat16)": [
            f"{of_rows['registers']} registers, no spills, 16 bytes per access in its loops",
            "",
        ],
        "AdamW kernel for sm_90, float32": [
            f"{update['registers']} registers, no spills, 16 bytes per access in its loops (4 for misaligned "
            f"gradients), {hot['instructions'] / elements:.0f} instructions per parameter",
            "",
        ],
        "sequential depth at the demo's size, one seed: validation loss of the next token": [
            f"{mean(sequential['validation']):.3f}, with {100 * sequential['acceptance'][0]:.0f} % of the drafts "
            "accepted",
            f"without further heads {mean(mtp['next token only']['validation']):.3f}",
        ],
    }
    assert of_rows["spill_bytes"] == update["spill_bytes"] == 0
    assert {loop["access_bits"] == [128] for loop in of_rows["loops"]} == {True} and hot["access_bits"] == [32, 128]
    found = {what: cells[:2] for what, cells in measured().items()}
    by_tests = {what for what in found if what.startswith(("AdamW, float32, 1 M", "the same in bfloat16 with"))}
    assert len(by_tests) == 2 and found.keys() - by_tests == wanted.keys()
    assert {what: found[what] for what in wanted} == wanted


def test_each_measurement_is_made_by_the_command_next_to_it() -> None:
    """Look in which results, or which tests, the table's figures are found; see the tests of its figures."""
    made = {what: cells[2] for what, cells in measured().items()}
    for what, reproduce in made.items():
        counted_by_tests = what.startswith("AdamW, float32, 1 M") or "stochastic rounding" in what
        trained = what.startswith("sequential depth")
        wanted = "make test" if counted_by_tests else "make bench-mtp" if trained else "make bench"
        assert reproduce == f"`{wanted}`", what
    assert len(made) == 7


def test_no_other_library_is_faster_with_the_bytes_that_it_holds() -> None:
    """Compare modelled times within few more bytes; cut-cross-entropy holds next to nothing, at a larger error.

    The extra 16 KiB are for the numbers of 1,024 rows; torch keeps all logits instead.
    """
    compared = ahead = 0
    for row in results("results.json"):
        if row["section"] != "real sizes" or row["operation"] != "linear_cross_entropy":
            continue
        if row["way"].startswith(("llmfast", "cut-cross-entropy")):
            continue
        N, D, V = (row["size"][axis] for axis in "NDV")
        held = row["peak_bytes"] - 2 * (N * D + V * D)
        low = row["way"].startswith(("Liger", "torch linear")) and "float32 sums" not in row["way"]
        for more, longer in ((16 << 10, 1.0), (0, 1.032)):
            plan = LinearCrossEntropyPlan.make(
                N, D, V, memory_budget=int(held) + more, accumulate_dtype=torch.bfloat16 if low else None
            )
            assert plan.seconds <= longer * row["seconds"][H100.name], (row["way"], row["size"])
        ahead += plan.seconds > row["seconds"][H100.name]
        compared += 1
    assert compared > 50
    assert ahead <= 3
