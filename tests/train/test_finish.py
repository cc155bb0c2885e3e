"""Figures and files that a finished run leaves: the closing table, drafts that were right, the sample."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from rich.console import Console

import llmfast.train.finish as module
from llmfast.data import ByteTokenizer, Dataset, pack
from llmfast.models import Decoder, DecoderConfig
from llmfast.mtp import Speculation
from llmfast.train.config import load_config
from llmfast.train.metrics import MetricsFile, read_metrics

T = 16
SETTINGS = [f"data.seq_len={T}", "train.eval_rows=3", "train.batch_size=2", "train.sample_tokens=5", "train.seed=3"]
LINES: list[dict[str, Any]] = [
    {"step": 0, "tokens": 0, "validation": {"a": 4.0, "b": 2.0}, "validation_mean": 3.5},
    {"step": 5, "tokens": 50, "loss": 3.0},
    {"step": 5, "tokens": 50, "validation": {"a": 9.0, "b": 9.0}, "validation_mean": 9.0},
    {"step": 8, "tokens": 80, "validation": {"a": 3.25, "b": 2.5}, "validation_mean": 3.125},
]


def data_of() -> Dataset:
    tokenizer = ByteTokenizer()
    rows = {
        name: pack([np.arange(i, i + 12) * step % 200 for i in range(9)], T, tokenizer.eot_id)
        for name, step in (("a", 1), ("b", 3))
    }
    return Dataset(rows, rows, tokenizer)


def finished(run: Path, model: Any, *more: str, **facts: Any) -> tuple[str, Any]:
    """Finish a run of eight steps that logged `LINES`; return what it prints and its trainer."""
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    metrics = MetricsFile(run / "metrics.jsonl", resume_at=8)
    told = {"run": run, "metrics": metrics, "device": torch.device("cpu"), "step": 8, "tokens": 80, "seconds": 4.0}
    trainer: Any = SimpleNamespace(**told | {"skipped": 2} | facts)
    out = io.StringIO()
    config = load_config(None, [*SETTINGS, *more])
    module.finish(config, trainer, model, data_of(), 30, Console(file=out, width=200))
    return out.getvalue(), trainer


def model_of(**more: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(ByteTokenizer().vocab_size, **{"width": 32, "layers": 1, "heads": 2} | more))


def table(text: str) -> dict[str, str]:
    rows = [line.strip().split("  ", 1) for line in text.splitlines() if "  " in line.strip()]
    return {name: value.strip() for name, value in rows}


def test_every_figure_of_the_table(tmp_path: Path) -> None:
    said = table(finished(tmp_path, model_of())[0])
    averaged = "averaged over the held-out tokens of all sources"
    assert said["validation loss, first"] == f"3.500 nats per token, {averaged}"
    assert said["validation loss, last"] == "3.125"
    assert said["tokens per second"] == "12"  # those since this start: (80 - 30) / 4
    assert said["steps skipped"] == "2"
    assert said["in the run folder"] == "loss.png, metrics.jsonl, model.safetensors, sample.txt"
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # who can read one file can read all
    # The first three rows of each source: the frequencies of their labels, each once.
    labels = torch.cat([rows.batch([0, 1, 2]).labels.flatten() for rows in data_of().validation.values()])
    share = torch.bincount(labels[labels >= 0]).double() / (labels >= 0).sum()
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    assert said["unigram entropy of held-out text"] == f"{entropy:.3f}"
    assert said["peak memory"].endswith("iB")
    assert not any(name.startswith(("...", "guesses")) for name in said)
    assert table(finished(tmp_path, model_of(), seconds=0.0)[0])["tokens per second"] == "-"


def test_what_was_learned_and_forgotten_since_other_weights(tmp_path: Path) -> None:
    said = table(finished(tmp_path, model_of(), "train.init_from=x")[0])
    assert said["... of a"] == "4.000 -> 3.250, 0.750 better"
    assert said["... of b"] == "2.000 -> 2.500, 0.500 worse: forgotten"


def test_the_drafts_of_two_prompts_of_each_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = model_of(mtp="sequential", mtp_heads=2), []

    def generate(model: Decoder, prompt: torch.Tensor, count: int) -> Speculation:
        assert not model.training
        given.append((prompt.tolist(), count))
        return Speculation(prompt, 3, [4, len(given)], [len(given), 1])

    monkeypatch.setattr(module, "speculative_generate", generate)
    text, _ = finished(tmp_path, model.train())
    rows = data_of().validation
    assert given == [(rows[name].batch([i]).tokens[0, : T // 2].tolist(), T // 2) for name in "ab" for i in range(2)]
    line = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert line == {"step": 8, "tokens": 80, "acceptance": [10 / 16, 4 / 10], "tokens_per_pass": 32 / 12}
    assert table(text)["guesses accepted, by head"] == "62 %, 40 %"
    assert table(text)["tokens per pass, decoding greedily"] == "2.67"


def test_drafts_are_written_once(tmp_path: Path) -> None:
    model = model_of(mtp="parallel", mtp_heads=2)
    with mock.patch.dict(LINES[-1], acceptance=[0.5], tokens_per_pass=1.5):
        finished(tmp_path, model)
    assert sum("acceptance" in line for line in read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_the_sample_goes_on_from_the_prompt_by_the_seed(tmp_path: Path) -> None:
    model = model_of()
    text, _ = finished(tmp_path, model, "train.sample_prompt=abc")
    prompt = torch.tensor([*b"abc"])
    generator = torch.Generator().manual_seed(3)
    wanted = model.eval().generate(prompt, 5, context=T, temperature=0.8, generator=generator)
    assert (tmp_path / "sample.txt").read_text() == ByteTokenizer().decode(wanted.numpy())
    assert "a sample" in text
    text, _ = finished(tmp_path / "none", model, "train.sample_tokens=0")
    assert "a sample" not in text and not (tmp_path / "none" / "sample.txt").exists()


@pytest.mark.parametrize(
    ("before", "after", "verdict"), [(2.0, 1.9, "better"), (2.0, 2.0, "better"), (2.0, 2.1, "worse: forgotten")]
)
def test_what_is_not_worse_is_better(before: float, after: float, verdict: str) -> None:
    assert module._verdict(before, after) == verdict
    lines: list[dict[str, Any]] = [{"validation": {"a": before}}, {"loss": 1.0}, {"validation": {"a": after}}]
    assert module._changes(lines) == [("... of a", f"{before:.3f} -> {after:.3f}, {abs(after - before):.3f} {verdict}")]


@pytest.mark.parametrize(("T", "half", "count"), [(16, 8, 8), (17, 8, 9), (200, 100, 64)])
def test_drafts_continue_half_a_row(T: int, half: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def generate(model: Decoder, prompt: torch.Tensor, count: int) -> Speculation:
        asked.append((len(prompt), count))
        return Speculation(prompt, 2, [0], [0])

    monkeypatch.setattr(module, "speculative_generate", generate)
    rows: Any = mock.MagicMock(**{"__len__.return_value": 1})
    rows.batch = lambda which: SimpleNamespace(tokens=torch.zeros(len(which), T, dtype=torch.int64))
    config = load_config(None, [f"data.seq_len={T}"])
    data: Any = SimpleNamespace(validation={"a": rows})
    model = model_of(mtp="parallel", mtp_heads=2)
    assert module._acceptance(config, model, data, torch.device("cpu")) == ([0.0], count / 2)
    assert asked == [(half, count)]


@pytest.mark.parametrize(
    ("start", "prompt", "ids"), [((), "ab", b"ab"), ((5,), "ab", b"\5ab"), ((5,), "", b"\5"), ((), "", None)]
)
def test_what_a_sample_begins_with(
    start: tuple[int, ...], prompt: str, ids: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def stream(model: Any, tokenizer: Any, tokens: torch.Tensor, *, context: int, sampler: Any) -> Any:
        given.append((tokens.tolist(), context, sampler, model.training))
        return iter(torch.tensor([[65 + i] for i in range(9)]))

    monkeypatch.setattr(module, "stream_of", stream)
    tokenizer = ByteTokenizer()
    monkeypatch.setattr(type(tokenizer), "start_ids", start)
    config = load_config(None, ["train.sample_tokens=3", f"train.sample_prompt={prompt}", "data.seq_len=24"])
    config.train.seed = 11
    text = module._sample(config, model_of().train(), tokenizer, torch.device("cpu"))
    ((tokens, context, sampler, training),) = given
    assert tokens == ([tokenizer.eot_id] if ids is None else [*ids]) and context == 24 and not training
    assert text.endswith("ABC") and sampler.temperature == 0.8
    assert sampler.generator.initial_seed() == 11


def test_tokens_per_second_of_a_short_run(tmp_path: Path) -> None:
    assert table(finished(tmp_path, model_of(), seconds=0.5)[0])["tokens per second"] == "100"


def test_the_log_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(MetricsFile, "close", lambda log: closed.append(True))
    finished(tmp_path, model_of(), "train.sample_tokens=0")
    assert closed


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("pretrained", ["", "there"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_several_ranks_has_the_whole_model(
    main: bool, pretrained: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["model.width=32", "model.layers=1", "model.heads=2", f"train.param_dtype={str(dtype)[6:]}"]
    config = load_config(None, [*settings, "optimizer.master_weights=fp32"] if dtype != torch.float32 else settings)
    config.model.pretrained = pretrained
    model = model_of().to(dtype)
    opened: list[Any] = []

    def new_model(run: Path, dtype: torch.dtype) -> Decoder:
        opened.append((run, dtype))
        return model_of().to(dtype)

    monkeypatch.setattr(module, "new_model", new_model)
    monkeypatch.setattr(module, "whole_weights", lambda spread: spread.state_dict())
    world = SimpleNamespace(size=2, main=main)
    trainer: Any = SimpleNamespace(world=world, model=None, module=model, run=tmp_path, device=torch.device("cpu"))
    found = module.whole_model(config, trainer, ByteTokenizer())
    if not main:
        assert found is None
        return
    assert found is not model and opened == ([(tmp_path, dtype)] if pretrained else [])
    for name, t in found.state_dict().items():
        assert t.dtype == dtype and torch.equal(t, model.state_dict()[name])
    world.size, trainer.model = 1, "its own"
    assert module.whole_model(config, trainer, ByteTokenizer()) == "its own"


@pytest.mark.parametrize(
    ("kind", "heads", "guessed"),
    [
        ("none", 0, 0),
        ("parallel", 1, 0),
        ("parallel", 2, 1),
        ("sequential", 1, 1),
        ("sequential", 2, 2),
        ("shared", 2, 0),
    ],
)
def test_drafts_are_of_heads_that_predict_further_tokens(
    kind: Any, heads: int, guessed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with one head has none of them; neither has one without heads of their own."""
    monkeypatch.setattr(
        module,
        "speculative_generate",
        lambda model, prompt, count: Speculation(prompt, 2, [2] * guessed, [1] * guessed),
    )
    model = model_of(mtp=kind, mtp_heads=heads) if kind != "parallel" else model_of(mtp=kind, mtp_heads=heads, layers=2)
    said = table(finished(tmp_path, model, "train.sample_tokens=0")[0])
    found = [line["acceptance"] for line in read_metrics(tmp_path / "metrics.jsonl") if "acceptance" in line]
    assert found == ([[0.5] * guessed] if guessed else [])
    assert said.get("guesses accepted, by head") == (", ".join(["50 %"] * guessed) if guessed else None)


def test_a_model_of_transformers_is_saved_by_it_and_says_what_it_forgot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Any] = []
    monkeypatch.setattr(module, "save_pretrained", lambda model, run: saved.append((model, run)))
    model = torch.nn.Linear(1, 1)
    said = table(finished(tmp_path, model, "train.sample_tokens=0", "model.pretrained=x")[0])
    assert saved == [(model, tmp_path)] and said["in the run folder"] == "loss.png, metrics.jsonl"
    assert said["... of a"] == "4.000 -> 3.250, 0.750 better" and "... of b" in said


def test_the_loss_of_one_source_is_no_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of()
    one = replace(data, validation=dict([*data.validation.items()][:1]))
    monkeypatch.setattr(sys.modules[__name__], "data_of", lambda: one)
    assert table(finished(tmp_path, model_of())[0])["validation loss, first"] == "3.500 nats per token"


def test_the_picture_has_the_entropy_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(module, "plot_loss", lambda *files, **how: drawn.append((files, how)))
    said = table(finished(tmp_path, model_of(), "train.sample_tokens=0")[0])
    ((files, how),) = drawn
    assert files == (tmp_path / "metrics.jsonl", tmp_path / "loss.png") and how.keys() == {"unigram_entropy"}
    assert said["unigram entropy of held-out text"] == f"{how['unigram_entropy']:.3f}"
