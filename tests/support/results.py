"""Published results of benchmarks, as tests compare figures with them."""

import json
from typing import Any

from support.code_blocks import ROOT

Row = dict[str, Any]


def results(name: str) -> list[Row]:
    """Return the rows of a file of results."""
    rows: list[Row] = json.loads((ROOT / "benchmarks" / "results" / name).read_text())["rows"]
    return rows


def one(rows: list[Row], **wanted: Any) -> Row:
    """Return the single row with these values."""
    (found,) = (row for row in rows if wanted.items() <= row.items())
    return found


def kernel(rows: list[Row], name: str, *arguments: str) -> Row:
    """Return the facts about the single sm_90 machine code of a kernel with these arguments."""
    found = [
        row
        for row in rows
        if row["kernel"] == name and row["target"] == "sm_90" and all(part in row["launch"] for part in arguments)
    ]
    figures = {(row["registers"], row["spill_bytes"], json.dumps(row["loops"])) for row in found}
    assert len(figures) == 1, f"{len(figures)} kinds of {name}"
    return found[0]


def row_kernel(rows: list[Row]) -> Row:
    """Return the facts about the row kernel in bfloat16 with one target, for an H100."""
    code = [row for row in rows if row["section"] == "machine code" and "llmfast" in row["ways"]]
    return kernel(code, "cross_entropy_kernel", "d_logits=*bfloat16:16", "logits_ptr=*bfloat16:16", "THREADS=1024")
