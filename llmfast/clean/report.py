"""What each stage took in, let through and removed: for people (Markdown, a table), and for programs (JSON)."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmfast._commands import columns

SAMPLES = 3  # of each reason
EXCERPT = 200  # characters


@dataclass(frozen=True)
class Sample:
    """A removed document: its id, and how its text begins."""

    id: str
    text: str


@dataclass(frozen=True)
class Stage:
    """One stage. Documents go whole, and are in `reasons`; a stage may also edit those that it lets through."""

    name: str
    rule: str
    documents_in: int
    documents_out: int
    bytes_in: int  # UTF-8
    bytes_out: int
    reasons: dict[str, int]  # documents that went
    samples: dict[str, list[Sample]]  # at most `SAMPLES` by reason
    lines: dict[str, int] = field(default_factory=dict)  # lines cut out of documents, by reason
    values: dict[str, int] = field(default_factory=dict)  # lost in other columns than the text, by column


@dataclass(frozen=True)
class Report:
    """`settings` are the call's; `ignored` counts files that were not read, by suffix; `tokens` include the ends."""

    settings: dict[str, str]
    ignored: dict[str, int]
    stages: list[Stage]
    tokens: int | None  # None without a tokenizer

    @property
    def documents(self) -> int:
        return self.stages[-1].documents_out

    def table(self) -> str:
        """Stages in aligned columns, and what was kept in the last line."""
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
        parts = ["# What was cleaned", _indented(self.table())]
        parts.append("Bytes are those of UTF-8; a stage that edits text changes them without removing a document.")
        parts.append("\n".join(f"- {name}: `{value}`" for name, value in self.settings.items()))
        if self.ignored:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in self.ignored.items())
            parts.append(f"Files that were not read, by suffix: {kinds}.")
        for s in self.stages:
            removed = s.documents_in - s.documents_out
            parts += [f"## {s.name}: {removed:,} of {s.documents_in:,} documents removed", s.rule]
            if s.lines:
                counts = ", ".join(f"{reason} {count:,}" for reason, count in s.lines.items())
                parts.append(f"Lines cut, in documents that went later too: {counts}.")
            if s.values:
                counts = ", ".join(f"{column} {count:,}" for column, count in s.values.items())
                parts.append(f"Values of other columns that JSON has nothing for, such as NaN; null now: {counts}.")
            for reason, count in s.reasons.items():
                parts.append(f"**{reason}**: {count:,}")
                parts.append(_indented("\n".join(f"{x.id}: {x.text}" for x in s.samples[reason])))
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> None:
        """`report.md` and `report.json` into the folder."""
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8", errors="replace")  # names of files
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8", errors="replace")


def removed(files: Sequence[Path], default: str) -> tuple[dict[str, int], dict[str, list[Sample]]]:
    """Count the documents that a stage wrote off by reason, most first, and take the first few of each.

    Args:
        files: JSONL as datatrove's exclusion writers leave it.
        default: The reason of documents that came without one.
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
    return "\n".join(f"    {line}" for line in text.splitlines())  # Markdown shows it as it is
