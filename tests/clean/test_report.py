"""Counts and samples of a report, in the table and on the page."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmfast.clean import Report, Sample, Stage
from llmfast.clean.report import removed


def test_samples_are_three_of_each_reason_and_short(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": f"id\n{i}", "text": f"{i} \n " + "x" * 300, "metadata": {"filter_reason": "long"}} for i in range(5)
    ]
    rows += [{"id": "plain", "text": " a\n\tb "}, {"id": "bare", "metadata": {}}]
    (tmp_path / "0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "1.jsonl").write_text(json.dumps(rows[0]) + "\n")
    reasons, samples = removed([tmp_path / "0.jsonl", tmp_path / "1.jsonl"], "usual")
    assert list(reasons.items()) == [("long", 6), ("usual", 2)]
    assert samples["long"] == [Sample(f"id {i}", f"{i} " + "x" * 198) for i in range(3)]
    assert samples["usual"] == [Sample("plain", "a b"), Sample("bare", "")]
    assert removed([], "usual") == ({}, {})


def test_the_table_and_the_page_have_every_count() -> None:
    def stage(name: str, documents: tuple[int, int], size: tuple[int, int], **more: Any) -> Stage:
        usual: dict[str, Any] = {"reasons": {}, "samples": {}}
        return Stage(name, f"Rule of {name}.", *documents, *size, **usual | more)

    cut, sample = {"policy": 1234, "javascript": 2}, {"blank": [Sample("a.txt", "one"), Sample("b.txt", "two")]}
    first = stage("read", (12000, 11998), (5_000_000, 4_999_990), reasons={"blank": 2}, samples=sample, lines=cut)
    stages = [first, stage("c4", (11998, 7), (4_999_990, 70), values={"score": 1000, "b": 1})]
    report = Report({"language": "en", "workers": "2"}, {".csv": 3, ".pdf": 1}, stages, 1234567)
    assert report.documents == 7
    assert [line.split() for line in report.table().splitlines()] == [
        ["stage", "documents", "removed", "bytes", "removed"],
        ["read", "12,000", "2", "5,000,000", "10"],
        ["c4", "11,998", "11,991", "4,999,990", "4,999,920"],
        ["kept", "7", "70"],
        ["1,234,567", "tokens"],
    ]
    assert not replace(report, tokens=None).table().endswith("tokens")
    assert report.markdown().split("\n\n")[2:] == [
        "Bytes are UTF-8 bytes; a stage that edits text changes them without removing a document.",
        "- language: `en`\n- workers: `2`",
        "Files that were not read, by suffix: 3 .csv, 1 .pdf.",
        "## read: 2 of 12,000 documents removed",
        "Rule of read.",
        "Lines cut, including those of documents removed later: policy 1,234, javascript 2.",
        "**blank**: 2",
        "    a.txt: one\n    b.txt: two",
        "## c4: 11,991 of 11,998 documents removed",
        "Rule of c4.",
        "Values of other columns that JSON cannot hold, such as NaN, replaced by null: score 1,000, b 1.\n",
    ]
