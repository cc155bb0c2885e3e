"""Whole runs: what they leave behind, how they go on, and what they refuse."""

import hashlib
import io
import json
import math
import os
import re
import signal
import socket
import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from llmfast._units import short
from llmfast.cli import main
from llmfast.data import Mixed, Mixture, pack
from llmfast.models import Decoder, DecoderConfig
from llmfast.optim.scaling import optimal_lr
from llmfast.train import finish as finishing
from llmfast.train import parts
from llmfast.train.config import load_config
from llmfast.train.metrics import MetricsFile, read_metrics
from llmfast.train.objective import NextToken
from llmfast.train.parallel import World
from llmfast.train.parts import doubts, make_mixture, prepare_data
from llmfast.train.run import Profile, _memory_in_words, _print_plan, train
from llmfast.train.settings import ConfigError
from llmfast.train.trainer import Hooks, Trainer
from support.checkpoints import signed
from support.disk import Disk


def run(settings: list[str], *more: str, **options: bool) -> Path:
    return train(load_config(None, [*settings, *more]), console=Console(quiet=True), **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "model.safetensors"))


def cli(settings: list[str], *arguments: str) -> int:
    return main(["train", *(f"--set={s}" for s in settings), *arguments])


def test_a_run_leaves_everything_behind(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(settings, "--set=train.steps=40", "--set=optimizer.lr=0.01", "--name=first") == 0
    folder = Path(settings[0].removeprefix("runs=")) / "first"
    names = {p.name for p in folder.iterdir()}
    assert names == {
        *("config.toml", "tokenizer.json", "metrics.jsonl", "loss.png", "sample.txt", "model.safetensors"),
        *("checkpoint-00000036", "checkpoint-00000040"),
    }
    assert load_config(folder / "config.toml").train.steps == 40
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")

    lines = read_metrics(folder / "metrics.jsonl")
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == list(range(2, 41, 2))
    assert all(line.keys() >= {"tokens", "lr", "grad_norm", "tokens_per_s"} for line in losses)
    validation = [line["validation_mean"] for line in lines if "validation_mean" in line]
    assert validation[-1] < 0.8 * validation[0]

    output = capsys.readouterr().out
    for expected in (
        "validation loss, first",
        "unigram entropy of held-out text",
        "tokens per second",
        "peak memory",
        "a sample",
    ):
        assert expected in output


def test_the_same_settings_give_the_same_bits(settings: list[str]) -> None:
    one, two = weights(run(settings, "name=one")), weights(run(settings, "name=two"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_resuming_changes_nothing(settings: list[str]) -> None:
    whole = run(settings, "name=whole")
    stopped = run(settings, "name=stopped", "optimizer.schedule=cosine", "train.steps=8")
    # Take it back to step 4, where a crash would have left it: an old checkpoint and newer metrics.
    before = len(read_metrics(stopped / "metrics.jsonl"))
    folder = _rewind(settings, "rewound", at=4)
    resumed = train(load_config(folder / "config.toml"), resume=True, console=Console(quiet=True))
    a, b = weights(whole), weights(resumed)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert _lasting(resumed) == _lasting(whole) and len(_lasting(resumed)) == before


def test_the_closing_table_is_of_this_start_and_of_the_log(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _rewind(settings, "again", at=4)
    (before,) = [line["tokens"] for line in read_metrics(folder / "metrics.jsonl") if line["step"] == 4][:1]
    table: dict[str, str] = {}
    trainers: list[Trainer] = []

    def finish(config: Any, trainer: Trainer, *rest: Any) -> None:
        trainer.seconds = 2.0
        trainers.append(trainer)
        finishing.finish(config, trainer, *rest)

    monkeypatch.setattr("llmfast.train.run.finish", finish)
    monkeypatch.setattr(finishing, "print_table", lambda console, rows: table.update(rows))
    train(load_config(folder / "config.toml"), resume=True, console=Console(quiet=True))
    (trainer,) = trainers
    lines = read_metrics(folder / "metrics.jsonl")
    first, *_, last = (line["validation_mean"] for line in lines if "validation_mean" in line)
    assert table["validation loss, first"] == f"{first:.3f} nats per token"
    assert table["validation loss, last"] == f"{last:.3f}" and first != last
    assert trainer.tokens == lines[-1]["tokens"] and abs(before - trainer.tokens / 2) <= 1
    assert table["tokens per second"] == f"{(trainer.tokens - before) / 2:,.0f}"
    assert table["steps skipped"] == "0"
    written = {name for name in table["in the run folder"].split(", ")}
    assert written == {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("most", "batch_size", "sizes"), [(5, 2, [2, 2, 1]), (4, 2, [2, 2]), (99, 4, [4, 4, 3])])
def test_an_evaluation_reads_the_first_rows_and_no_more(most: int, batch_size: int, sizes: list[int]) -> None:
    rows = pack([np.arange(1, 90)], 8, eot_id=0)
    assert len(rows) == 11
    batches = list(parts.evaluation_batches(rows, most, batch_size))
    assert [len(batch.tokens) for batch in batches] == sizes
    read = torch.cat([batch.tokens for batch in batches])
    assert torch.equal(read, rows.batch(list(range(sum(sizes)))).tokens)


def _lasting(folder: Path) -> list[dict[str, Any]]:
    """Return the log without machine-dependent values and without the hook that `_rewind` replaces."""
    passing = ("tokens_per_s", "memory_bytes", "shares")
    return [{k: v for k, v in line.items() if k not in passing} for line in read_metrics(folder / "metrics.jsonl")]


def _rewind(settings: list[str], name: str, at: int) -> Path:
    """Rewind a run as if it had been killed right after it saved at step `at`."""

    class Killed(Exception): ...

    class Die(Hooks):
        def before_step(self, trainer: Trainer) -> None:
            if trainer.step == at:
                assert trainer.checkpoints is not None
                trainer.checkpoints.wait()
                raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmfast.train.run.Utilisation", lambda *_: Die())
        with pytest.raises(Killed):
            run(settings, f"name={name}")
    return Path(settings[0].removeprefix("runs=")) / name


def test_gradient_accumulation_is_the_same_batch_in_parts(settings: list[str]) -> None:
    whole = weights(run(settings, "name=a", "train.batch_size=4", "train.steps=3"))
    parts = weights(run(settings, "name=b", "train.batch_size=4", "train.micro_batch_size=1", "train.steps=3"))
    for k in whole:
        torch.testing.assert_close(parts[k], whole[k], rtol=2e-4, atol=2e-4)


def test_a_signal_saves_and_stops(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    timer = threading.Timer(0.0, lambda: None)
    original = Trainer._train_step

    def step(self: Trainer) -> Any:
        if self.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(self)

    Trainer._train_step = step  # type: ignore[method-assign]
    try:
        assert cli(settings, "--set=train.steps=50", "--name=stopped") == 130
    finally:
        Trainer._train_step = original  # type: ignore[method-assign]
        timer.cancel()
    folder = Path(settings[0].removeprefix("runs=")) / "stopped"
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-00000004"]
    output = capsys.readouterr().out
    assert (
        f"stopped after step 4 of 50; go on with: llmfast train --resume --name stopped --set {settings[0]}" in output
    )
    assert cli(settings[:1], "--resume", "--name=stopped", "--set=train.steps=6") == 0
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-00000004", "checkpoint-00000006"]


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_before_the_first_step_leaves_nothing(
    number: int, settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupt the first evaluation, as the signals do by their own handler; then start the same run."""
    original = Trainer.evaluate

    def interrupted(self: Trainer) -> Any:
        assert (folder / "config.toml").exists()
        assert signal.getsignal(number) is signal.default_int_handler
        signal.raise_signal(number)

    folder = Path(settings[0].removeprefix("runs=")) / "first"
    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    assert cli(settings, "--name=first") == 130
    assert capsys.readouterr().err == f"llmfast: interrupted; no step was taken, and {folder} was removed\n"
    assert list(folder.parent.iterdir()) == []
    monkeypatch.setattr(Trainer, "evaluate", original)
    assert cli(settings, "--name=first") == 0


@pytest.mark.parametrize(
    ("at", "advice"),
    [
        (1, "{folder} has no checkpoint yet: start it again with --overwrite"),
        (5, "go on from the last checkpoint with: llmfast train --resume --name x --set runs={runs}"),
    ],
)
def test_an_interrupt_within_a_step_says_how_to_go_on(
    at: int, advice: str, settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Trainer._train_step

    def step(self: Trainer) -> Any:
        if self.step == at:
            assert self.checkpoints is not None
            self.checkpoints.wait()
            raise KeyboardInterrupt  # as a second signal does
        return original(self)

    monkeypatch.setattr(Trainer, "_train_step", step)
    runs = Path(settings[0].removeprefix("runs="))
    assert cli(settings, "--name=x") == 130
    assert capsys.readouterr().err == f"llmfast: interrupted; {advice.format(folder=runs / 'x', runs=runs)}\n"
    monkeypatch.setattr(Trainer, "_train_step", original)
    assert cli(settings[:1] if at == 5 else settings, "--name=x", "--resume" if at == 5 else "--overwrite") == 0


def test_a_step_that_is_not_finite_is_skipped_and_reported(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, bad = NextToken.__call__, {2}

    def loss(self: NextToken, model: Any, batch: Any, num_valid: Any, step: int, detail: bool) -> Any:
        value, sums = original(self, model, batch, num_valid, step, detail)
        return value * torch.nan if model.training and step in bad else value, sums

    monkeypatch.setattr(NextToken, "__call__", loss)
    assert cli(settings, "--name=nan") == 0
    folder = Path(settings[0].removeprefix("runs=")) / "nan"
    assert all(t.isfinite().all() for t in weights(folder).values())
    assert read_metrics(folder / "metrics.jsonl")[-2]["skipped"] == 1
    output = capsys.readouterr().out
    assert "1 steps so far had a gradient that is not finite" in output

    bad.update(range(10))
    assert cli(settings, "--name=more", "--set=train.max_skipped=1") == 2
    error = capsys.readouterr().err
    assert "more than train.max_skipped=1" in error and error.count("\n") == 1


def test_weights_that_nothing_can_be_sampled_from_are_told_of(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Use weights as a damaged checkpoint may leave them, which the few validation rows do not reveal."""
    fit = Trainer.fit

    def spoiled(self: Trainer) -> bool:
        finished = fit(self)
        next(self.model.parameters()).data.fill_(torch.nan)
        return finished

    monkeypatch.setattr(Trainer, "fit", spoiled)
    assert cli(settings, "--name=nan") == 0
    assert "no sample: the model's logits are not finite" in capsys.readouterr().out
    folder = Path(settings[0].removeprefix("runs=")) / "nan"
    assert (folder / "loss.png").exists() and not (folder / "sample.txt").exists()


def test_names_are_found_for_runs_without_one(settings: list[str]) -> None:
    assert [run(settings, "train.steps=1").name for _ in range(2)] == ["demo", "demo-2"]


def test_an_existing_run_is_safe(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(settings, "name=kept")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert cli(settings, "--name=kept") == 2
    assert (
        "kept exists: go on with --resume, replace it with --overwrite, or choose a --name" in capsys.readouterr().err
    )
    # Replacing it must not begin before everything else has worked.
    assert cli(settings, "--name=kept", "--overwrite", "--set=data.sources=['/nowhere']") == 2
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert cli(settings, "--name=kept", "--overwrite", "--set=train.steps=2") == 0
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-00000002"]


def test_what_cannot_be_removed_does_not_stop_the_new_run(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(settings, "name=kept")
    original = os.unlink

    def unlink(path: Any, *args: Any, **options: Any) -> None:
        if str(path).endswith("distcp"):
            raise PermissionError(13, "Permission denied", str(path))
        original(path, *args, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    assert cli(settings, "--name=kept", "--overwrite", "--set=train.steps=2") == 0
    gone = folder.with_name(".kept.gone")
    assert f"the rest is in {gone}" in capsys.readouterr().out
    assert gone.exists() and (folder / "checkpoint-00000002").exists()


def test_a_folder_that_a_kill_left_empty_can_be_used(settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "begun").mkdir(parents=True)
    assert cli(settings, "--name=begun", "--set=train.steps=1") == 0


def test_overwrite_only_removes_runs(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs" / "thesis").mkdir(parents=True)
    (tmp_path / "runs" / "thesis" / "chapter1").touch()
    assert cli(settings, "--name=thesis", "--overwrite") == 2
    assert "is not a run of llmfast" in capsys.readouterr().err
    assert (tmp_path / "runs" / "thesis" / "chapter1").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set=train.stpes=3"], "unknown key train.stpes; did you mean train.steps?"),
        (["--set=train.device=tpu7"], "train.device = 'tpu7' is not usable"),
        (["--set=train.device=meta"], "train.device = 'meta' is not usable"),
        (["--set=train.seed=-1"], "train.seed must be at least 0; got -1"),
        (["--set=optimizer.lr=inf"], "optimizer.lr must be finite and at least 0; got inf"),
        (["--set=model.width=4294967296"], "model.width must be in [1, 1048576]; got 4294967296"),
        (["--set=model.layers=1000000000000000000000"], "model.layers must be in [1, 4096]"),
        (["--set=data.vocab_size=9223372036854775807"], "data.vocab_size must be in [1, 16777216]"),
        (
            ["--set=train.steps=9223372036854775807"],
            "train.steps * train.batch_size must be below 2^63; got 18446744073709551614",
        ),
        (['--set=runs="a\\u0000"'], "runs must not hold a null character"),
        (["--config=line\nbreak.toml"], "cannot read line break.toml"),
        (["--set=model.width=[" + "[" * 5000], "model.width must be int"),
        (["--set=data.sources=['src[/red]']"], "src[/red]"),
        (["--set=model.heads=5"], "model: width must be a multiple of 2"),
        (["--set=data.sources=['/nowhere']"], "data: "),
        (["--set=data.seq_len=100000"], "data: "),
        (["--set=data.tokenizer=nothing.json"], "data: unknown tokenizer 'nothing.json'"),
        (["--config=nothing.toml"], "cannot read nothing.toml"),
        (["--set=train.tensorboard=true"], "train.tensorboard needs tensorboard: pip install tensorboard"),
        (["--set=train.micro_batch_size=3"], "train.batch_size=2 does not divide into micro-batches of 3 rows"),
        (["--set=data.fim_rate=2.0"], "data.fim_rate must be in [0, 1]; got 2.0"),
        (["--set=data.weights.x=1"], "data.weights: there is no source 'x' to give a weight"),
        (["--resume"], "--resume needs --name"),
        (["--resume", "--name=nothing"], "nothing"),
        (["--resume", "--name=x", "--config=c.toml"], "--resume takes its settings from the run"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli(settings, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("llmfast: error: ") and message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_shape_that_is_none_is_found_before_the_text_is_read(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llmfast.train.run.prepare_data", None)
    for setting in ("model.heads=5", "model.mtp=parallel", "model.mtp_heads=2"):
        assert cli(settings, f"--set={setting}") == 2
        assert capsys.readouterr().err.startswith("llmfast: error: model: ")


def test_a_port_in_use_is_one_line(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ranks = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken.getsockname()[1]}
        for name, value in ranks.items():
            monkeypatch.setenv(name, str(value))
        assert cli(settings, "--name=alone") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the ranks do not find each other" in line and "address already in use" in line
    assert not Path(settings[0].removeprefix("runs="), "alone").exists()


def test_an_empty_source_is_an_error(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert cli(settings, f"--set=data.sources=['{tmp_path / 'empty'}']") == 2
    assert "empty" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_one_file_is_a_source_and_keeps_its_split(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The split stays on resume, and where the run is continued with rows of another length."""
    (tmp_path / "input.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(2000)))
    one = [*settings, f"data.sources=['one={tmp_path / 'input.txt'}']", "data.held_out=0.1"]
    assert cli(one, "--name=one") == 0
    first = capsys.readouterr().out
    folder = tmp_path / "runs" / "one"
    assert "one: validating on the last 11.3% of its text; it has too few documents" in " ".join(first.split())
    assert load_config(folder / "config.toml").data.split == {"one": "end"}
    before = read_metrics(folder / "metrics.jsonl")[-1]["validation"]
    assert cli([settings[0]], "--name=one", "--resume", "--set=train.steps=10") == 0

    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": f"{i} and {i}\n" * 9}) + "\n" for i in range(50)))
    arguments = [str(folder), "--target", f"more={tmp_path / 'more.jsonl'}", "--name=more", "--set=train.steps=2"]
    assert main(["continue", *arguments, "--set=data.seq_len=16"]) == 0
    data = load_config(folder.parent / "more" / "config.toml").data
    assert data.split == {"more": "documents", "one": "end"} and list(before) == ["one"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_run_of_an_earlier_version_continues_with_the_files_it_read(
    suffix: str, settings: list[str], corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its settings name neither a split nor a column: files with other columns were not read."""
    folder = run(settings, "name=old")
    path = folder / "config.toml"
    written = path.read_text()
    assert 'text_column = "text"' in written and "[data.split]" in written
    path.write_text(
        "\n".join(x for x in written.splitlines() if "text_column" not in x and not x.endswith('= "documents"'))
    )
    for checkpoint in folder.glob("checkpoint-*"):
        signed(checkpoint, about=None)
    (corpus / f"more{suffix}").write_text(json.dumps({"text": "more " * 500}))
    status = cli([settings[0]], "--name=old", "--resume", "--set=train.steps=10")
    if suffix == ".txt":
        assert status == 2 and "the sources' rows have changed" in capsys.readouterr().err
    else:
        out = " ".join(capsys.readouterr().out.split())
        assert status == 0 and "1 file of another kind is left out: .jsonl (1)" in out
        assert load_config(path).data.text_column == ""


def test_what_is_left_out_is_said_once(settings: list[str], corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "x.pdf").write_text("x")
    (corpus / "x.jsonl").write_text('{"text": "of a line"}\n{broken\n')
    assert cli(settings, "--name=first") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("1 file of another kind is left out: .pdf (1)") == 1
    assert out.count("1 document is left out: not JSON (1, x.jsonl, line 2)") == 1


def test_a_missing_package_for_a_file_is_one_line_with_its_own_advice(
    settings: list[str], corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "x.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert cli(settings, "--name=first") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("reading .parquet files needs pyarrow: pip install 'llmfast-torch[formats]'")


def test_a_dry_run_only_says_what_it_would_do(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(settings, "--dry-run") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "8 steps of 64 tokens" in output and "source rows share rows read epochs" in output
    assert re.search(r"a GPU would hold about [\d.]+ [KM]iB, .*; nothing was trained", output)
    assert not (tmp_path / "runs").exists()


def test_a_run_as_long_as_passes_over_its_text(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Note the steps in config.toml, so that the run resumes with as many, or with as many as other epochs take."""
    folder = run(settings, "name=x", "train.epochs=0.1", "train.batch_size=5")
    done = load_config(folder / "config.toml").train
    assert cli(settings, "--train.epochs=1", "--train.batch_size=1", "--dry-run") == 0
    found = re.search(r"; (\d+) steps of 32 tokens", " ".join(capsys.readouterr().out.split()))
    assert found is not None
    rows = int(found[1])
    assert (done.steps, done.epochs) == (math.ceil(rows / 50), 0.0) and done.steps > 1
    assert cli(settings[:1], "--resume", "--name=x", "--train.epochs=0.2") == 0
    assert load_config(folder / "config.toml").train.steps == math.ceil(rows / 25)
    with pytest.raises(ConfigError, match=r"train.epochs must be 0 here, .*; got 2.0"):
        Trainer(
            torch.nn.Linear(1, 1),
            lambda model, batch: torch.zeros(()),
            lambda model: torch.optim.SGD(model.parameters()),
            [],
            load_config(None, ["train.epochs=2.0"]),
        )


@pytest.mark.parametrize(
    ("changed", "warnings"),
    [
        ("train.epochs=4.0", []),
        ("train.epochs=4.2", ["the run reads corpus 4.2 times. After 4 passes, repeated text teaches less and less"]),
        ("optimizer.warmup_steps=7", []),
        ("optimizer.lr=1.0", []),  # which may be meant for a model that begins from nothing
        (
            "optimizer.warmup_steps=8",
            ["the learning rate never falls: optimizer.warmup_steps=8 is not below train.steps=8"],
        ),
    ],
)
def test_doubtful_lengths_are_told_of(
    changed: str, warnings: list[str], settings: list[str], corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = f"data.sources=['corpus={corpus}']"
    assert cli(settings, f"--set={named}", f"--set={changed}", "--set=train.batch_size=1", "--dry-run") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("warning: ") == len(warnings) and all(warning in output for warning in warnings)


def test_a_dry_run_on_several_gpus_says_what_it_knows() -> None:
    """Settings that are right to train with are not refused because what they take is unknown."""
    model = Decoder(DecoderConfig(300, width=32, layers=1, heads=2))
    config = load_config(None, ["train.vocab_parallel=true", "model.tie_embeddings=false", "train.batch_size=4"])
    assert _memory_in_words(config, model, 2) == "what train.vocab_parallel takes on several GPUs is not modelled; "
    config.train.vocab_parallel = False
    assert re.fullmatch(
        r"each GPU would hold about [\d.]+ MiB, by `llmfast plan memory`; ", _memory_in_words(config, model, 2)
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_plan_counts_the_tokens_of_all_ranks_once(ranks: int, settings: list[str]) -> None:
    config = load_config(None, [*settings, "train.batch_size=4"])
    data = prepare_data(config, "bytes", lambda line: None)
    written = io.StringIO()
    console = Console(file=written, width=200)
    world, order = World(torch.device("cpu"), size=ranks), Mixed(data, make_mixture(config, data))
    _print_plan(config, data, order, torch.nn.Linear(10, 5), "cpu", world, console)
    told = written.getvalue()
    assert (
        "8 steps of 128 tokens" in told
        and "\na row is 32 tokens, and one more as the last target; epochs are how often" in told
        and told.startswith("55 parameters on cpu")
    )
    assert (f"on cpu, {ranks} ranks, ddp;" in told) == (ranks > 1)
    rows = sum(map(len, data.train.values()))
    assert f"; {short(rows * 32)} training tokens, vocabulary of {data.tokenizer.vocab_size};" in told


def test_a_rate_for_models_trained_from_scratch_is_told_of() -> None:
    """Warn if the model is pretrained: each optimizer's default is such a rate."""

    def told(*changed: str) -> list[str]:
        config = load_config(None, ["optimizer.warmup_steps=0", *changed])
        return list(doubts(config, Mixture({"a": 10_000}, {}, total=4000, seed=0), parameters=10**9))

    (warning,) = told("model.pretrained=models/qwen")
    assert (
        "optimizer.lr=0.0015 is for small models that are trained from scratch, and can undo what models/qwen"
        in warning
    )
    assert warning.endswith("usually takes 1e-5 to 1e-4 with adamw: try optimizer.lr=2e-05")
    assert told("model.pretrained=x", "optimizer.lr=2e-5") == []
    (warning,) = told("model.pretrained=x", "optimizer.name=lion")
    assert warning.endswith("with adamw, and lion as large a share of its default: try optimizer.lr=6.7e-06")


def test_a_rate_that_is_too_high_for_a_large_model_is_told_of() -> None:
    """Warn at a default that is half as high again as the law's rate: what `llmfast plan` chooses is not."""
    tokens = {"train.steps": 10_000, "train.batch_size": 1000, "data.seq_len": 2000}

    def told(parameters: float, *changed: str) -> list[str]:
        config = load_config(None, [*(f"{name}={value}" for name, value in tokens.items()), *changed])
        return list(doubts(config, Mixture({"a": 10**8}, {}, total=4000, seed=0), parameters=int(parameters)))

    assert told(2e8) == [] == told(1e6, "optimizer.lr=1.0")
    (warning,) = told(7e9)
    best = optimal_lr(6 * 7e9 * 20e9)
    assert "optimizer.lr=0.0015 is for small models: with 7.00 B parameters and 20.0 B tokens" in warning
    assert warning.endswith(f"by DeepSeek LLM's law: try optimizer.lr={best:.2g}")
    assert told(7e9, f"optimizer.lr={best:.2g}") == []
    (warning,) = told(7e9, "optimizer.name=lion")
    assert warning.endswith(f", and lion as large a share of its default: try optimizer.lr={best / 3:.2g}")


def test_a_profile_is_a_trace_of_some_steps(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(settings, "--profile", "--name=traced") == 0
    trace = Path(settings[0].removeprefix("runs=")) / "traced" / "trace.json"
    assert f"profile of steps 3 to 6: {trace}" in capsys.readouterr().out
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::scaled_dot_product_attention" in names


@pytest.mark.parametrize(("steps", "traced"), [(1, "1 to 1"), (5, "2 to 5"), (9, "3 to 6")])
def test_a_profile_of_few_steps_and_of_other_ranks(steps: int, traced: str, tmp_path: Path) -> None:
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        said: list[str] = []
        config = SimpleNamespace(train=SimpleNamespace(steps=steps + 3))
        trainer: Any = SimpleNamespace(
            step=3, config=config, world=World(torch.device("cpu"), rank, size), say=said.append
        )
        hook = Profile(tmp_path)
        for _ in range(steps):
            hook.before_step(trainer)
            hook.after_step(trainer)
        assert said == ([f"profile of steps {traced}: {tmp_path / 'trace.json'}"] if rank == 0 else [])
        assert torch.autograd.profiler._is_profiler_enabled is False


def test_the_log_has_what_there_is_to_see(settings: list[str], corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for i in range(12):
        (other / f"{i}.txt").write_text(f"{i} is not {i + 1}, " * 60)
    more = [f'data.sources=["a={corpus}", "b={other}"]', "data.weights.a=0.8->0.2", "data.weights.b=rest"]
    lines = read_metrics(run(settings, *more, "train.batch_size=8", "name=seen") / "metrics.jsonl")
    logged = [line for line in lines if "loss" in line]
    assert [line["sequences"] for line in logged] == [16, 32, 48, 64]
    assert [line["shares"]["a"] for line in logged] == pytest.approx([0.65, 0.5, 0.35, 0.2])
    for line in logged:
        assert line.keys() >= {"lr", "grad_norm", "tokens_per_s", "memory_bytes"}
        assert set(line["source_loss"]) == {"a", "b"} and all(1 < x < 7 for x in line["source_loss"].values())
    assert set(next(line for line in lines if "validation" in line)["validation"]) == {"a", "b"}


def test_an_evaluation_between_two_lines_counts_its_tokens(settings: list[str]) -> None:
    lines = read_metrics(run(settings, "name=odd", "train.log_every=4", "train.eval_every=3") / "metrics.jsonl")
    tokens = {line["step"]: line["tokens"] for line in lines}
    assert list(tokens) == [0, 3, 4, 6, 8]
    assert all(a < b for a, b in pairwise(tokens.values())) and tokens[3] == pytest.approx(0.75 * tokens[4], rel=0.1)


def test_the_model_cannot_change_on_resume(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run(settings, "name=kept", "train.steps=2")
    assert cli(settings[:1], "--resume", "--name=kept", "--set=model.layers=2") == 2
    assert "model.layers cannot change on --resume" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(settings, "name=whole")
    folder = run(settings, "name=kept")
    last = folder / "checkpoint-00000008"
    data = next(last.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    (folder / "model.safetensors").unlink()
    assert cli(settings[:1], "--resume", "--name=kept") == 0
    output = capsys.readouterr().out
    assert f"{last} is damaged ({data.name} has changed); trying the one before it" in output
    assert all(torch.equal(x, y) for x, y in zip(weights(whole).values(), weights(folder).values()))

    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "checksums.json").write_text("[" * 100_000)
    assert cli(settings[:1], "--resume", "--name=kept", "--set=train.steps=9") == 2
    assert f"no whole checkpoint in {folder}" in capsys.readouterr().err


def test_metrics_survive_a_line_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "tokens": 5, "loss": 2.0}\n{"step": 2, "tokens": 9, "loss": 1.5}\n{"step": 3, "lo')
    metrics = MetricsFile(file, resume_at=1)
    metrics.write(step=2, tokens=9, loss=1.0)
    metrics.close()
    assert [json.loads(line)["loss"] for line in file.read_text().splitlines()] == [2.0, 1.0]


def test_files_of_a_run_are_on_disk_before_they_get_their_names(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run also writes its log in this way, so that the earlier log cannot be lost."""
    disk = Disk(monkeypatch)
    folder = run(settings, "name=safe")
    disk.expect_names(*(folder / name for name in ("config.toml", "tokenizer.json", "metrics.jsonl")))
    disk.named.clear()
    run(settings, "name=safe", "train.steps=9", resume=True)
    disk.expect_names(*(folder / name for name in ("config.toml", "metrics.jsonl", "checkpoint-00000009")))


def test_a_run_without_end_can_be_looked_at(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(settings, "--set=train.steps=1000000000000000000", "--dry-run") == 0
    assert "nothing was trained" in capsys.readouterr().out


def test_too_little_memory_is_one_line(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(*args: Any) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("llmfast.train.run.make_model", make)
    assert cli(settings) == 2
    error = capsys.readouterr().err
    assert error.startswith("llmfast: error: out of memory; try a smaller train.micro_batch_size")
    assert error.count("\n") == 1


def _signed_again(checkpoint: Path) -> None:
    """Recompute the checksums for the current contents of the files."""
    files = [file for file in sorted(checkpoint.iterdir()) if file.name != "checksums.json"]
    sums = {file.name: [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files}
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("meta.json", b"[" * 100_000, "meta.json is not JSON"),
        ("meta.json", b'{"step": 8}', "meta.json must have the counts step, sequences, tokens"),
        (".metadata", b"", ".metadata is damaged"),
        (".metadata", b"\xbb" * 100, ".metadata is damaged"),
        (".metadata", b"\x80\x04\x95" + b"\xff" * 26, ".metadata is damaged"),
    ],
)
def test_a_damaged_checkpoint_with_right_checksums_is_one_line(
    settings: list[str], capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    folder = run(settings, "name=kept")
    last = folder / "checkpoint-00000008"
    (last / name).write_bytes(content)
    _signed_again(last)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    begun = [["train", *(f"--set={s}" for s in settings[:1]), "--resume", "--name=kept", "--set=train.steps=9"]]
    if name == ".metadata":
        begun.append(["train", *(f"--set={s}" for s in settings), "--name=more", f"--set=train.init_from={folder}"])
    for arguments in begun:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("llmfast: error: ") and message in error and error.count("\n") == 1
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_state_of_no_mixture_changes_nothing(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(settings, "name=kept")
    first, last = folder / "checkpoint-00000004", folder / "checkpoint-00000008"
    meta = json.loads((first / "meta.json").read_text())
    (first / "meta.json").write_text(json.dumps({**meta, "data": {"rows": meta["data"]["rows"]}}))
    _signed_again(first)
    (last / "checksums.json").unlink()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert cli(settings[:1], "--resume", "--name=kept") == 2
    assert "data: this is not the state of a mixture" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1e308", "must be an object with the numbers step and tokens; got 1e+308"),
        (b'{"step": "x", "tokens": 1}', "must be an object with the numbers step and tokens"),
        (b'{"step": 1, "tokens": 1, "loss": "x"}', "loss must be a number; got 'x'"),
        (b'{"step": 1, "tokens": 1, "validation": {"a": []}}', "validation must be an object of numbers"),
        (b"\xff\xfe", "is not text"),
    ],
)
def test_damaged_metrics_change_nothing(
    settings: list[str], capsys: pytest.CaptureFixture[str], line: bytes, message: str
) -> None:
    folder = run(settings, "name=kept")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(line)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert cli(settings[:1], "--resume", "--name=kept", "--set=train.steps=9") == 2
    error = capsys.readouterr().err
    assert error.startswith("llmfast: error: ") and message in error and error.count("\n") == 1
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_metrics_without_end_of_brackets_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "tokens": 2}\n' + "[" * 100_000 + "\n")
    assert read_metrics(file) == [{"step": 1, "tokens": 2}]
