"""Tests that the notebooks run and that their committed outputs match their code.

Cells run here as plain Python. A kernel (nbclient, ipykernel) would add more than thirty packages and a second process
to run the same lines; the notebooks do not use what only a kernel offers: magics and displayed values.
"""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from support.code_blocks import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
STEPS = re.compile(r"\bsteps=\d+")
NUMBER = re.compile(r"\d[\d,]*(\.\d+)?(e[+-]?\d+)?%?")


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def name_of(notebook: Path) -> str:
    return notebook.stem


def lines_without_numbers(text: str) -> list[str]:
    """Return the printed lines as far as they are equal on every machine and thread count."""
    return [" ".join(NUMBER.sub("#", line).split()) for line in text.splitlines()]


def test_there_are_two() -> None:
    assert list(map(name_of, NOTEBOOKS)) == ["fused_loss_in_ten_minutes", "mtp_on_your_laptop"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_outputs_are_there(notebook: Path) -> None:
    """Expect outputs of a run from top to bottom, without errors."""
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert {output["output_type"] for output in cell["outputs"]} <= {"stream", "display_data"}
        assert all(output["name"] == "stdout" for output in cell["outputs"] if "name" in output), "a warning"
        code = "".join(cell["source"])
        if "plt.show()" in code:
            assert any("image/png" in output.get("data", ()) for output in cell["outputs"])
        elif re.search(r"^ *print\(", code, re.MULTILINE):
            assert cell["outputs"]
    assert len(notebook.read_bytes()) < 100_000


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_cells_run_and_print_what_was_committed(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train for a few steps: no number is compared."""
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": notebook.stem}
    threads = torch.get_num_threads()
    try:
        for number, cell in enumerate(code_cells(notebook), start=1):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                code = STEPS.sub("steps=20", "".join(cell["source"]))
                exec(compile(code, f"{notebook.name}, cell {number}", "exec"), namespace)
            committed = "".join("".join(output["text"]) for output in cell["outputs"] if "text" in output)
            if "decode(" not in "".join(cell["source"]):  # what a trained model writes varies with rounding
                assert lines_without_numbers(printed.getvalue()) == lines_without_numbers(committed), f"cell {number}"
    finally:
        torch.set_num_threads(threads)
        namespace["plt"].close("all")
    assert list(tmp_path.iterdir()) == []
