"""Run the recipe's steps as a sequence of datatrove pipelines, and collect their counts."""

# mypy: disable-error-code="import-not-found,import-untyped,misc"
# pyright: reportMissingImports=false

import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cached_property
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.logging import setup_default_logger

from llmfast.clean.reader import LOST, Count, Reader
from llmfast.clean.recipe import REASONS, STAGES, exact_config, filters, minhash_config
from llmfast.clean.report import Stage, removed
from llmfast.data.tokenizer import END_OF_TEXT

TOKENIZER_FILE = "tokenizer.json"
LINES_CUT = "line-filter-"  # prefix of C4's counter names


class Pipelines:
    """Runner of the recipe from files to a folder, which also keeps the counts.

    Args:
        folder: Receives `text/`, `removed/`, `logs/`, and `tokens/` if it already has a `tokens/tokenizer.json`.
        workers: The number of processes, and of parts into which each pipeline divides its files.
        text_column: The column of tables that holds the text.
        say: Receives a line when each pipeline starts.
    """

    def __init__(self, folder: Path, workers: int, text_column: str, say: Callable[[str], None]) -> None:
        self.folder, self.workers, self.text_column, self.say = folder, workers, text_column, say
        self.scratch = folder / "scratch"
        self.counts: dict[str, tuple[int, int]] = {}  # documents and bytes after each stage
        self.lines: dict[str, dict[str, int]] = {}
        self.lost: dict[str, int] = {}
        self.tokens = 0

    def run(self, root: Path, names: list[str], language: str, language_model: Path | None) -> list[Stage]:
        """Clean the named files under `root`."""
        self._filter(root, names, language, language_model)
        if self.counts["fineweb"][0]:  # datatrove's readers need at least one file
            self._remove_equal()
        if self.counts.get("exact_duplicates", (0, 0))[0]:
            self._remove_nearly_equal(language)
        _tidy(self.folder / "tokens")
        shutil.rmtree(self.scratch, ignore_errors=True)  # does not exist if nothing passed the filters
        return self._stages()

    def _filter(self, root: Path, names: list[str], language: str, language_model: Path | None) -> None:
        steps = [Reader(root, names, self.text_column, self._off("read")), Count("read")]
        for stage, step in filters(language, language_model, self._off):
            steps += [step, Count(stage)]
        self._execute("filters", [*steps, _writer(self.scratch / "filtered")])

    def _remove_equal(self) -> None:
        # Signatures must be computed from what is read back: only from there on do files and processes correspond.
        source, config = self.scratch / "filtered", exact_config()
        signatures, pairs = str(self.scratch / "exact_signatures"), str(self.scratch / "exact_pairs")
        self._execute("exact_signatures", [_reader(source), ExactDedupSignature(signatures, config)])
        self._execute("exact_pairs", [ExactFindDedups(signatures, pairs, config)], tasks=1)
        dedup = ExactDedupFilter(pairs, config, self._off("exact_duplicates"))
        steps = [_reader(source), dedup, Count("exact_duplicates"), _writer(self.scratch / "unequal")]
        self._execute("exact_duplicates", steps)

    def _remove_nearly_equal(self, language: str) -> None:
        source, config = self.scratch / "unequal", minhash_config()
        signatures, pairs, clusters = (str(self.scratch / f"near_{x}") for x in ("signatures", "pairs", "clusters"))
        self._execute("near_signatures", [_reader(source), MinhashDedupSignature(signatures, config, language)])
        self._execute("near_pairs", [MinhashDedupBuckets(signatures, pairs, config=config)], tasks=config.num_buckets)
        self._execute("near_clusters", [MinhashDedupCluster(pairs, clusters, config)], tasks=1)
        dedup = MinhashDedupFilter(clusters, self._off("near_duplicates"))
        steps = [_reader(source), dedup, Count("near_duplicates"), _writer(self.folder / "text")]
        if (self.folder / "tokens").exists():
            steps.append(_tokenizer(self.folder / "tokens"))
        self._execute("near_duplicates", steps)

    def _execute(self, name: str, steps: list[Any], tasks: int | None = None) -> None:
        self.say(f"{name} ...")
        tasks = tasks or self.workers
        logs = str(self.folder / "logs" / name)
        stats = QuietExecutor(steps, tasks=tasks, workers=min(tasks, self.workers), logging_dir=logs).run().stats
        for i, stat in enumerate(stats):
            if stat.name in ("found", *STAGES):
                self.counts[stat.name] = stat["bytes"].n, int(stat["bytes"].total)
                self.lines[stat.name] = _counters(stats[i - 1], LINES_CUT)
            if stat.name == "found":
                self.lost = _counters(stat, LOST)
            self.tokens += int(stat["tokens"].total)

    def _off(self, stage: str) -> Any:
        return _writer(self.folder / "removed" / stage)

    def _stages(self) -> list[Stage]:
        stages = []
        documents_in, bytes_in = self.counts["found"]
        for name, rule in STAGES.items():
            documents_out, bytes_out = self.counts.get(name, (0, 0))
            files = sorted((self.folder / "removed" / name).glob("*.jsonl"))
            reasons, samples = removed(files, REASONS.get(name, "no reason"))
            stages.append(
                Stage(
                    name=name,
                    rule=rule,
                    documents_in=documents_in,
                    documents_out=documents_out,
                    bytes_in=bytes_in,
                    bytes_out=bytes_out,
                    reasons=reasons,
                    samples=samples,
                    lines=self.lines.get(name, {}),
                    values=self.lost if name == "read" else {},
                )
            )
            documents_in, bytes_in = documents_out, bytes_out
        return stages


class QuietExecutor(LocalPipelineExecutor):
    """Executor that suppresses datatrove's stderr output in all its processes; its log files have the same lines."""

    def run(self) -> Any:
        try:
            with redirect_stderr(io.StringIO()):
                setup_default_logger()  # reads the current stderr
                return super().run()
        finally:
            setup_default_logger()

    def _launch_run_for_rank(self, *args: Any, **kwargs: Any) -> Any:
        with redirect_stderr(io.StringIO()):
            return super()._launch_run_for_rank(*args, **kwargs)


class PlainTokenizer(DocumentTokenizer):
    """Tokenizer that encodes a special token in a document as ordinary text, as `llmfast.data` does."""

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = super().tokenizer
        tokenizer.encode_special_tokens = True  # not stored in tokenizer.json
        return tokenizer


def _tokenizer(folder: Path) -> Any:
    return PlainTokenizer(
        str(folder),
        str(folder / TOKENIZER_FILE),
        eos_token=END_OF_TEXT,
        batch_size=1000,
        shuffle_documents=True,
        seed=0,
    )


def _reader(folder: Path) -> Any:
    return JsonlReader(str(folder), add_file_path=False)


def _writer(folder: Path) -> Any:
    return JsonlWriter(str(folder), compression=None)


def _counters(stat: Any, prefix: str) -> dict[str, int]:
    return {k.removeprefix(prefix): int(v.total) for k, v in stat.stats.items() if k.startswith(prefix)}


def _tidy(folder: Path) -> None:
    """Remove files without tokens, which cannot be memory-mapped, and the path of the temporary folder."""
    for tokens in folder.glob("*.ds"):
        index, metadata = (tokens.with_name(tokens.name + suffix) for suffix in (".index", ".metadata"))
        if tokens.stat().st_size:
            _, *rest = metadata.read_text(encoding="utf-8").rpartition(TOKENIZER_FILE)
            metadata.write_text("".join(rest), encoding="utf-8")
        else:
            for file in (tokens, index, metadata):
                file.unlink()
