"""Runs for GPUs and days: what is said of them agrees with itself, with the laws, and with the trainer's settings."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmfast._gpus import chosen
from llmfast.models.cost import AGAIN, count_parameters, step_flops
from llmfast.models.memory import MemoryEstimate
from llmfast.plan import BESIROGLU, laws, optimal_batch, optimal_lr
from llmfast.plan.advice import (
    READ_WHOLE,
    Advice,
    Machine,
    Shape,
    Wish,
    _settings,
    _sized,
    advise,
    decoder_for,
    size,
)
from llmfast.plan.command import add_arguments, run
from llmfast.plan.screen import WIDTH, _bytes_of, _doubts, remedies, smaller_model
from llmfast.train.config import decoder_config, load_config
from llmfast.train.estimate import estimate_run

DAY = 86_400


def advice(gpu: str, gpus: int, **wish: Any) -> tuple[Advice, Machine]:
    machine = Machine(chosen(gpu), gpus)
    return advise(machine, Wish(**wish), BESIROGLU), machine


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Run the command and return the lines that it prints; where it refuses, the last one is the error."""

    def call(*arguments: str, code: int = 0) -> list[str]:
        parser = argparse.ArgumentParser(prog="llmfast plan")
        add_arguments(parser)
        assert run(parser.parse_args(arguments)) == code
        out, err = capsys.readouterr()
        assert err.count("\n") == (code > 0)
        return [*out.splitlines(), *err.splitlines()]

    return call


@pytest.mark.parametrize("params", [1e6, 7e6, 124e6, 1.1e9, 2.9e9, 7e9, 70e9, 1e12])
def test_a_decoder_has_about_the_parameters_that_it_should(params: float) -> None:
    model = decoder_for(params, 8192 if params < 1e8 else 32768)
    assert size(model) == count_parameters(model).total
    close = 0.15 if params < 1e8 else 0.05 if params < 1e9 else 0.02
    assert count_parameters(model).total == pytest.approx(params, rel=close)
    if params > 1e8:
        assert 70 < model.width / model.layers < 140 and model.width // model.heads in (64, 128)
    assert model.tie_embeddings == (params < 3e9)


@pytest.mark.parametrize(
    ("gpu", "gpus", "days"), [("RTX4090", 1, 1.0), ("A100", 4, 7.0), ("H100", 8, 3.0), ("H100", 8, 60.0)]
)
def test_the_run_takes_the_time_there_is_on_the_best_model(gpu: str, gpus: int, days: float) -> None:
    found, machine = advice(gpu, gpus, seconds=days * DAY)
    shape = found.shape
    assert shape.steps * shape.seconds == pytest.approx(days * DAY, rel=0.01)
    again = AGAIN if found.tried[-1].way.again else 1
    flops = step_flops(shape.model, shape.tokens, shape.seq_len).flops
    assert flops * again / machine.rate == pytest.approx(days * DAY, rel=0.01)
    spent = laws.training_flops(shape.params, shape.tokens)
    best = BESIROGLU.optimal(spent)
    assert BESIROGLU.loss(shape.params, shape.tokens) == pytest.approx(best.loss, abs=0.001)
    assert shape.params == pytest.approx(best.params, rel=0.02)  # near the best, the loss hardly depends on it
    assert 0.7 < shape.batch * shape.seq_len / optimal_batch(spent) < 1.5
    assert shape.lr == pytest.approx(min(optimal_lr(spent), 1.5e-3), rel=0.05)


def test_the_first_way_that_fits_is_taken() -> None:
    names = {days: [t.way.name for t in advice("H100", 8, seconds=days * DAY)[0].tried] for days in (3, 60)}
    assert names[3] == ["DDP"]
    assert names[60][:4] == ["DDP", "FSDP2", "DDP, recomputing", "FSDP2, recomputing"]
    assert names[60][-1] == "FSDP2, recomputing, bf16"
    found, _ = advice("H100", 16, params=8e9, tokens=1e11)
    assert [t.fits for t in found.tried] == [False] * (len(found.tried) - 1) + [True]
    assert found.settings["train.parallel"] == "hsdp" and found.settings["train.shard_size"] == 8


@pytest.mark.parametrize(
    ("params", "seq_len", "vocab_size", "tied"),
    [
        *((1e6, 256, 8192, True), (9.99e6, 256, 8192, True), (1e7, 1024, 8192, True), (9.99e7, 1024, 8192, True)),
        *((1e8, 2048, 32768, True), (9.99e8, 2048, 32768, True), (1e9, 4096, 32768, True)),
        *((2.99e9, 4096, 32768, True), (3e9, 4096, 32768, False), (1e13, 4096, 32768, False)),
    ],
)
def test_rows_and_vocabulary_grow_with_the_model(params: float, seq_len: int, vocab_size: int, tied: bool) -> None:
    machine = Machine(chosen("H100"))
    a, model, rows = _sized(machine, Wish(params=params, tokens=1e10), BESIROGLU, 1.0)
    assert a.params == params and (rows, model.vocab_size, model.tie_embeddings) == (seq_len, vocab_size, tied)
    own = Wish(params=params, tokens=1e10, seq_len=512, vocab_size=5000)
    _, model, rows = _sized(machine, own, BESIROGLU, 1.0)
    assert (rows, model.vocab_size) == (512, 5000)


@pytest.mark.parametrize("params", [0.999e6, 1.001e13])
def test_no_plan_is_made_for_smaller_or_larger_models(params: float) -> None:
    with pytest.raises(ValueError, match=r"plans are made for 1.00 M to 10.0 T; ask for another --days, --gpus"):
        _sized(Machine(chosen("H100")), Wish(params=params, tokens=1e10), BESIROGLU, 1.0)


def shape_of(**changes: Any) -> Shape:
    given: dict[str, Any] = {"model": decoder_for(2e6, 8192), "seq_len": 256, "params": 2_345_678, "batch": 8}
    given |= {"steps": 100, "best_batch": 2e3, "lr": 1e-3, "seconds": 1.0}
    return Shape(**given | changes)


@pytest.mark.parametrize(
    ("steps", "seconds", "warmup", "often"),
    [
        *((10**6, 1.0, 2000, 1800), (40_000, 1.0, 2000, 1800), (39_999, 1.0, 1999, 1800), (17_990, 1.0, 899, 1799)),
        *((10**6, 7.0, 2000, 260), (10**6, 11.2, 2000, 160), (10**6, 5000.0, 2000, 1)),
        *((19, 0.1, 0, 1), (9, 0.1, 0, 1), (20, 0.1, 1, 2)),
    ],
)
def test_a_run_warms_up_and_saves_as_often_as_its_length_allows(
    steps: int, seconds: float, warmup: int, often: int
) -> None:
    """A twentieth of the steps, at most 2000; every half hour by two digits of a number of steps, or ten times."""
    found = _settings(shape_of(steps=steps, seconds=seconds))
    assert found["optimizer.warmup_steps"] == warmup
    assert found["train.save_every"] == found["train.eval_every"] == often
    assert found["train.steps"] == steps and found["train.batch_size"] == 8 and found["optimizer.lr"] == 1e-3


@pytest.mark.parametrize(("steps", "mapped"), [(62_500, False), (62_501, True)])
def test_more_than_a_billion_tokens_are_mapped(steps: int, mapped: bool) -> None:
    shape = shape_of(seq_len=1000, batch=16, steps=steps)
    found = _settings(shape)
    assert shape.tokens == steps * 16_000 and shape.mapped == mapped
    assert found["data.sources"] == ("path/to/tokens.ds" if mapped else "path/to/text")
    assert found.get("data.vocab_size") == (None if mapped else 8192) and ("data.tokenizer" in found) == mapped


@pytest.mark.parametrize(("seq_len", "rows"), [(1024, 32), (4200, 4), (40_000, 1)])
def test_a_micro_batch_has_at_most_32768_tokens_or_a_row(seq_len: int, rows: int) -> None:
    found, _ = advice("B200", 1, params=1e7, tokens=1e11, seq_len=seq_len)
    assert found.tried[0].rows == rows and found.settings["train.micro_batch_size"] == rows


def test_how_to_ask_for_a_smaller_model() -> None:
    found = Advice(shape_of(), [], {})
    for wish, told in (
        (Wish(params=1e9), "fewer --params"),
        (Wish(params=1e9, tokens=1e9), "fewer --params"),
        (Wish(params=1e9, seconds=1e9), "fewer --params"),
        (Wish(seconds=1e9), "--params below 2.35 M"),
        (Wish(flops=1e20), "--params below 2.35 M"),
        (Wish(tokens=1e9), "--params below 2.35 M"),
        (Wish(tokens=1e9, flops=1e20), "a smaller --flops"),
        (Wish(tokens=1e9, seconds=1e9), "fewer --days"),
    ):
        assert smaller_model(found, wish) == told, wish


def test_a_batch_of_twice_the_best_one_is_no_doubt() -> None:
    assert _doubts(1000.0, 2000, 8) == []
    (line,) = _doubts(1000.0, 2001, 8)
    assert line.strip().startswith("With 8 GPUs the batch is 2.0 times the best one")
    assert [_bytes_of(n) for n in (4e8, 9.99e11, 1e12, 8e12)] == ["0.4 GB", "999 GB", "1 TB", "8 TB"]


def test_what_is_given_is_kept() -> None:
    found, _ = advice("H100", 8, params=1e9, tokens=5e9)
    assert found.shape.params == pytest.approx(1e9, rel=0.02) and found.shape.tokens == pytest.approx(5e9, rel=0.01)
    found, _ = advice("H100", 8, flops=1e20)
    best = BESIROGLU.optimal(1e20)
    assert found.shape.params == pytest.approx(best.params, rel=0.02)
    assert found.shape.tokens == pytest.approx(best.tokens, rel=0.02)
    found, _ = advice("H100", 8, seconds=DAY, tokens=1e10)
    assert found.shape.tokens == pytest.approx(1e10, rel=0.02)
    assert found.shape.steps * found.shape.seconds == pytest.approx(DAY, rel=0.03)
    found, _ = advice("H100", 8, seconds=DAY, params=1e9, seq_len=1024, vocab_size=50304)
    assert found.settings["data.seq_len"] == 1024 and found.shape.model.vocab_size == 50304
    assert found.shape.params == pytest.approx(1e9, rel=0.02)
    found, _ = advice("H100", 8, params=3e7, tokens=6e8, vocab_size=50304)
    assert found.settings["data.vocab_size"] == found.shape.model.vocab_size == 50304


@pytest.mark.parametrize(
    ("gpu", "gpus", "days"), [("RTX4090", 1, 0.01), ("H100", 8, 3), ("H100", 8, 60), ("B200", 32, 5)]
)
def test_the_command_starts_the_run_that_was_planned(
    gpu: str, gpus: int, days: float, plan: Callable[..., list[str]], tmp_path: Path
) -> None:
    options = ("--gpu", gpu, "--gpus", str(gpus), "--days", str(days))
    lines = plan(*options)
    assert len(lines) <= 35 and max(map(len, lines)) <= 120
    start = next(i for i, line in enumerate(lines) if line.startswith(("  llmfast train", "  torchrun")))
    machines = f"run this on each of {gpus // 8} machines, with the first one's name in place of HOST:"
    assert (machines in lines) == (gpus > 8)
    assert max(map(len, lines[start:])) <= WIDTH + 2
    words = shlex.split(" ".join(line.removesuffix("\\") for line in lines[start:]))
    assert words[0] == ("torchrun" if gpus > 1 else "llmfast")
    several = [int(words[words.index(f"--{n}") + 1]) for n in ("nnodes", "nproc-per-node") if f"--{n}" in words]
    assert several == ([] if gpus == 1 else [gpus] if gpus <= 8 else [gpus // 8, 8])
    flags = words[words.index("train") + 1 :]
    config = load_config(None, [f"{name.removeprefix('--')}={value}" for name, value in zip(flags[::2], flags[1::2])])

    found, machine = advice(gpu, gpus, seconds=days * DAY)
    assert decoder_config(config, found.shape.model.vocab_size) == found.shape.model
    text = "\n".join(lines)
    if found.shape.tokens < READ_WHOLE:
        assert config.data.sources == ["path/to/text"] and "put your text in place of path/to/text:" in lines
        assert config.data.vocab_size == found.shape.model.vocab_size and config.data.tokenizer == "bpe"
    else:
        assert config.data.sources == ["path/to/tokens.ds"] and config.data.tokenizer == "path/to/tokenizer.json"
        assert (
            "write its tokens once, with `llmfast clean --tokenizer` or\nllmfast.data.write_ds (docs/data.md)" in text
        )
        assert f"about\n{found.shape.model.vocab_size} ids, in place of path/to/tokenizer.json:" in text
    tokens = config.train.steps * config.train.batch_size * config.data.seq_len
    assert tokens == found.shape.tokens and config.optimizer.lr == found.shape.lr
    assert config.optimizer.warmup_steps < config.train.steps / 10
    assert config.train.save_every == config.train.eval_every <= config.train.steps / 10
    assert config.train.save_every * found.shape.seconds < 1900
    memory = estimate_run(config, found.shape.model, gpus=gpus, gpu_memory=machine.gpu.memory)
    assert memory == found.tried[-1].memory and memory.peak < 0.9 * machine.gpu.memory

    written = plan(*options, "--out", str(tmp_path / "run.toml"))
    assert load_config(tmp_path / "run.toml") == config
    assert written[-1].endswith(f" --config {tmp_path}/run.toml")
    intro = next(i for i, line in enumerate(lines) if line.startswith(("put ", "so much text")))
    assert written[:intro] == lines[:intro]
    into = [
        line.removesuffix(":") + f" in {tmp_path}/run.toml; then:" for line in lines[intro:start] if " of path" in line
    ]
    assert into and into[-1] in written and (machines in written) == (gpus > 8)


def test_only_a_file_of_its_own_is_replaced(plan: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run.toml"
    options = ("--gpu", "H100", "--days", "0.01", "--out", str(out))
    out.write_text("[train]\nsteps = 7\n")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(options)) == 2
    assert "exists and was not written by llmfast" in capsys.readouterr().err
    assert out.read_text() == "[train]\nsteps = 7\n"
    out.unlink()
    assert plan(*options) == plan(*options)


def test_what_fits_nowhere_says_so_and_starts_nothing(plan: Callable[..., list[str]], tmp_path: Path) -> None:
    """The exit code tells a script not to start what an earlier plan has left in that file."""
    out = ("--out", str(tmp_path / "run.toml"))
    lines = plan("--gpu", "RTX4090", "--params", "13B", "--days", "1", *out, code=2)
    error, whole = "llmfast: error: no way fits: ", "each GPU first holds the whole model in float32, "
    assert lines[-1].startswith(f"{error}{whole}48.")
    assert lines[-1].endswith(": take a --gpu with more memory, or fewer --params")
    assert sum("too large" in line for line in lines) == 4 and not (tmp_path / "run.toml").exists()
    assert not any("llmfast train" in line for line in lines)
    lines = plan("--gpu", "RTX4090", "--params", "3B", "--days", "1", code=2)
    assert lines[-1] == f"{error}take more --gpus, a --gpu with more memory or fewer --params"
    lines = plan("--gpu", "H100", "--gpus", "64", "--days", "30", code=2)
    N = advice("H100", 64, seconds=30 * DAY)[0].shape.params
    assert whole in lines[-1] and lines[-1].endswith(
        f": take a --gpu with more memory, or --params below {N / 1e9:.1f} B"
    )
    lines = plan("--gpu", "RTX4090", "--days", "4000", "--tokens", "10B", code=2)
    assert lines[-1].endswith("take a --gpu with more memory, or fewer --days")


def test_remedies_are_those_that_help() -> None:
    """More GPUs do not help against what each of them holds whole, nor shorter rows against what rows do not take."""
    nothing = dict.fromkeys(("parameters", "gradients", "optimizer", "activations", "recomputed", "weight_copies"), 0)
    nothing |= dict.fromkeys(("loss", "loss_unfused", "loss_gradients", "tied_gradients"), 0)

    def told(**held: int) -> str:
        need = MemoryEstimate(**nothing | {"accumulate": False} | held)
        return remedies(need, 1 << 30, model="M", rows="R")

    assert told(begin=1 << 30, activations=1 << 40) == (
        "each GPU first holds the whole model in float32, 1.00 GiB: take a --gpu with more memory, or M"
    )
    assert told(begin=1 << 29, activations=1 << 40) == "take more --gpus, a --gpu with more memory, M or R"
    assert told(begin=1 << 29, optimizer=1 << 30) == "take more --gpus, a --gpu with more memory or M"


def test_gpus_of_several_machines_fill_them(plan: Callable[..., list[str]]) -> None:
    (line,) = plan("--gpu", "H100", "--gpus", "12", "--days", "1", code=2)
    assert line.endswith("--gpus must be at most 8, the number in a machine, or a multiple of 8; got 12")
    assert any("--nproc-per-node 6 " in line for line in plan("--gpu", "H100", "--gpus", "6", "--days", "1"))


def test_the_screen_says_how_sure_it_is(plan: Callable[..., list[str]]) -> None:
    text = "\n".join(plan(*["--gpu", "H100", "--gpus", "8", "--days", "3", "--utilisation", "0.5"]))
    found, _ = advice("H100", 8, seconds=3 * DAY * 0.5 / 0.4)
    shape = found.shape
    assert "for 3 days, at 0.5 of 9.89e+14 FLOPs per second each, which is assumed" in text
    spent = laws.training_flops(shape.params, shape.tokens)
    low, high = BESIROGLU.sizes_within(spent, 0.01)
    assert f"{low / 1e9:.2f} B to {high / 1e9:.2f} B parameters come within 0.01 nats of the best" in text
    assert f"DeepSeek LLM 2024: 0.292 C^0.3271 = {shape.best_batch / 1e6:.2f} M" in text
    assert "modelled seconds = (6 * matrix parameters * tokens + 12 * layers * row * width * tokens)" in text
    others = laws.HOFFMANN.optimal(spent).params, laws.kaplan_optimal(spent).params
    best = f"{others[0] / 1e9:.2f} B (Hoffmann), {others[1] / 1e9:.2f} B (Kaplan, without embeddings)"
    assert f"best by other laws: {best};" in text
    assert "/ (8 GPUs * utilisation * FLOPs" in text and "launches and communication are not in it" in text
    crowd = plan("--gpu", "H100", "--gpus", "512", "--flops", "1e19")
    assert any("With 512 GPUs the batch is 2.2 times the best one" in line for line in crowd)
