"""Tests of reading points from run folders."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from llmfast.models import Decoder, DecoderConfig
from llmfast.plan import ChinchillaLaw, model_config, read_run
from llmfast.train.config import load_config
from llmfast.train.run import train

MakeRun = Callable[..., Path]


def numel(config: DecoderConfig) -> int:
    return sum(p.numel() for p in Decoder(config).parameters())


def test_a_run_is_a_point(make_run: MakeRun, law: ChinchillaLaw) -> None:
    run = read_run(make_run(64, 500))
    plain = DecoderConfig(264, width=64, layers=1, heads=2)
    assert run.name == "w64-s500" and run.tokens == 500 * 4 * 256
    assert run.params == numel(plain)
    assert run.non_embedding == run.params - 264 * 64
    assert run.loss == pytest.approx(law.loss(run.params, run.tokens))
    assert run.flops == 6 * run.params * run.tokens


def test_heads_for_further_tokens_do_not_count(make_run: MakeRun) -> None:
    run = read_run(make_run(64, 500, "model.mtp=sequential", "model.mtp_heads=2"))
    assert run.params == numel(DecoderConfig(264, width=64, layers=1, heads=2))


def test_a_trained_run_is_read(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} and so on, " * 60)
    settings = [
        f"runs={tmp_path / 'runs'}",
        f'data.sources=["{tmp_path / "text"}"]',
        "data.tokenizer=bytes",
        "data.seq_len=16",
        "data.held_out=0.4",
        "model.width=16",
        "model.layers=1",
        "model.heads=2",
        "train.steps=3",
        "train.device=cpu",
        "train.batch_size=2",
        "train.sample_tokens=0",
        "train.eval_rows=2",
    ]
    run = read_run(train(load_config(None, settings), console=Console(quiet=True)))
    assert run.params == numel(DecoderConfig(264, width=16, layers=1, heads=2))
    assert 3 * 2 * 15 <= run.tokens <= 3 * 2 * 16  # where a document ends, a label is nobody's
    assert 3 < run.loss < 8


@pytest.mark.parametrize(
    ("settings", "vocab_size"),
    [(["data.tokenizer=bytes"], 264), (["data.tokenizer=bpe", "data.vocab_size=32000"], 32000)],
)
def test_the_vocabulary_is_what_the_settings_say_or_the_file(
    make_run: MakeRun, settings: list[str], vocab_size: int
) -> None:
    config = load_config(None, settings)
    assert model_config(config).vocab_size == vocab_size
    file = make_run(64, 500) / "tokenizer.json"
    assert model_config(config, file).vocab_size == 264
    assert model_config(config, file.parent / "none.json").vocab_size == vocab_size
    config.data.tokenizer = str(file)
    assert model_config(config).vocab_size == 264


def test_refuses_runs_that_are_no_points(make_run: MakeRun) -> None:
    with pytest.raises(ValueError, match="w64-s500 stopped at step 400 of 500"):
        read_run(make_run(64, 500, stopped_at=400))
    with pytest.raises(ValueError, match="began with the weights of runs/other"):
        read_run(make_run(64, 600, "train.init_from=runs/other"))
    silent = make_run(64, 700)
    (silent / "metrics.jsonl").write_text('{"step": 700, "tokens": 1, "loss": 2.0}\n{"step": 70')
    with pytest.raises(ValueError, match="w64-s700 has no validation loss"):
        read_run(silent)
    (silent / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError):
        read_run(silent)
    with pytest.raises(ValueError, match="cannot read"):
        read_run(silent / "nothing")
    (silent / "metrics.jsonl").write_text('{"step": 700, "tokens": {}, "validation_mean": 2.0}')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: a line must be an object with the numbers step and tokens"):
        read_run(silent)
    (silent / "metrics.jsonl").write_text('{"step": 700, "tokens": 1, "validation_mean": "x"}')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: validation_mean must be a number; got 'x'"):
        read_run(silent)


def test_one_evaluation_is_enough(make_run: MakeRun) -> None:
    """A run shorter than train.eval_every is evaluated at its end; what other lines say does not count."""
    folder = make_run(64, 500)
    whole, log = read_run(folder), folder / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([line for line in lines if "validation_mean" not in line] + lines[-1:]) + "\n")
    assert read_run(folder) == whole
    log.write_text('{"step": 500, "tokens": 3, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=f"{folder.name} has no validation loss in its metrics.jsonl"):
        read_run(folder)


def test_why_a_run_is_no_point_word_for_word(make_run: MakeRun) -> None:
    stopped, began = make_run(64, 500, stopped_at=400), make_run(64, 600, "train.init_from=runs/other")
    none = make_run(64, 700)
    (none / "metrics.jsonl").write_text('{"step": 700, "tokens": 1, "loss": 2.0}\n')
    for folder, message in (
        (stopped, "stopped at step 400 of 500: its loss is not that of a whole run"),
        (began, "began with the weights of runs/other: its loss is not due to its own tokens alone"),
        (none, "has no validation loss in its metrics.jsonl"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{folder} {message}')}$"):
            read_run(folder)
