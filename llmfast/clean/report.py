"""Report what each stage received, passed and removed: for people (Markdown, a table) and for programs (JSON)."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmfast._commands import columns

SAMPLES = 3  # per reason
EXCERPT = 200  # characters


@dataclass(frozen=True)
class Sample:
    """Removed document: its id and the beginning of its text."""

    id: str
    text: str


@dataclass(frozen=True)
class Stage:
    """Counts of one stage. Removed documents are in `reasons`; a stage may also edit documents that it keeps."""

    name: str
    rule: str
    documents_in: int
    documents_out: int
    bytes_in: int  # UTF-8
    bytes_out: int
    reasons: dict[str, int]  # removed documents
    samples: dict[str, list[Sample]]  # at most `SAMPLES` per reason
    lines: dict[str, int] = field(default_factory=dict)  # lines cut out of documents, by reason
    values: dict[str, int] = field(default_factory=dict)  # lost values of columns other than the text, by column


@dataclass(frozen=True)
class Report:
    """Result of a cleaning run. `ignored` counts skipped files by suffix; `tokens` includes end-of-text tokens."""

    settings: dict[str, str]
    ignored: dict[str, int]
    stages: list[Stage]
    tokens: int | None  # None without a tokenizer

    @property
    def documents(self) -> int:
        return self.stages[-1].documents_out

    def table(self) -> str:
        """Format the stages in aligned columns, with what was kept in the last line."""
        rows: list[tuple[str, ...]] = [("stage", "documents", "removed", "bytes", "removed")]
        for s in self.stages:
            cells = s.documents_in, s.documents_in - s.documents_out, s.bytes_in, s.bytes_in - s.bytes_out
            rows.append((s.name, *(f"{n:,}" for n in cells)))
        rows.append(("kept", f"{self.documents:,}", "", f"{self.stages[-1].bytes_out:,}", ""))
        lines = columns(rows)
        if self.tokens is not None:
            lines.append(f"{self.tokens:,} tokens")
        return "\n".join(lines)

    def markdown(self) -> str:
        parts = ["# Cleaning report", _indented(self.table())]
        parts.append("Bytes are UTF-8 bytes; a stage that edits text changes them without removing a document.")
        parts.append("\n".join(f"- {name}: `{value}`" for name, value in self.settings.items()))
        if self.ignored:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in self.ignored.items())
            parts.append(f"Files that were not read, by suffix: {kinds}.")
        for s in self.stages:
            removed = s.documents_in - s.documents_out
            parts += [f"## {s.name}: {removed:,} of {s.documents_in:,} documents removed", s.rule]
            if s.lines:
                counts = ", ".join(f"{reason} {count:,}" for reason, count in s.lines.items())
                parts.append(f"Lines cut, including those of documents removed later: {counts}.")
            if s.values:
                counts = ", ".join(f"{column} {count:,}" for column, count in s.values.items())
                parts.append(f"Values of other columns that JSON cannot hold, such as NaN, replaced by null: {counts}.")
            for reason, count in s.reasons.items():
                parts.append(f"**{reason}**: {count:,}")
                parts.append(_indented("\n".join(f"{x.id}: {x.text}" for x in s.samples[reason])))
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> None:
        """Write `report.md` and `report.json` into the folder."""
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8", errors="replace")  # for file names
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8", errors="replace")


def removed(files: Sequence[Path], default: str) -> tuple[dict[str, int], dict[str, list[Sample]]]:
    """Count the documents that a stage removed by reason, most frequent first, and keep samples of each.

    Args:
        files: JSONL as written by datatrove's exclusion writers.
        default: The reason for documents without one.
    """
    counts: Counter[str] = Counter()
    samples: dict[str, list[Sample]] = {}
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                reason = record.get("metadata", {}).get("filter_reason", default)
                counts[reason] += 1
                if counts[reason] <= SAMPLES:
                    excerpt = _one_line(record.get("text", ""))
                    samples.setdefault(reason, []).append(Sample(_one_line(record["id"]), excerpt))
    return dict(counts.most_common()), samples


def _one_line(text: str) -> str:
    return " ".join(text[: 4 * EXCERPT].split())[:EXCERPT]


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())  # Markdown shows indented text unchanged
