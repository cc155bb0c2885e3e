"""The output of `llmfast plan`."""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from llmfast import _gpus
from llmfast._commands import columns
from llmfast._units import duration, number, short
from llmfast.plan import BESIROGLU, ChinchillaLaw, PowerLaw, Run
from llmfast.plan.advice import Wish
from llmfast.plan.command import _wish, add_arguments, run
from llmfast.plan.fit import Fit
from support import gpus

MakeRun = Callable[..., Path]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command and return its output, or its one-line error if it fails."""

    def call(*arguments: str | Path, code: int = 0) -> str:
        parser = argparse.ArgumentParser(prog="llmfast plan")
        add_arguments(parser)
        assert run(parser.parse_args([str(a) for a in arguments])) == code
        out, err = capsys.readouterr()
        if code:
            assert out == "" and err.startswith("llmfast: error: ") and err.count("\n") == 1
            return err
        assert err == ""
        return out

    return call


def line(text: str, start: str) -> str:
    """Return the rest of the only line with this beginning."""
    (found,) = [row.strip() for row in text.splitlines() if row.strip().startswith(start)]
    return found.removeprefix(start).strip()


def test_the_best_for_a_budget(plan: Callable[..., str]) -> None:
    text = plan("--flops", "1e21")
    assert "by Besiroglu et al. 2024" in text
    assert line(text, "parameters           ").startswith("2.78 B, embeddings included")
    assert line(text, "tokens               ") == "60.0 B"
    assert line(text, "tokens per parameter") == "21.6"
    assert line(text, "loss      ").startswith("2.306 nats per token")
    assert line(text, "critical batch").startswith("3.75 M tokens")  # 2e8 / 2.30553^(1 / 0.21)
    assert line(text, "2.78 B ").endswith("the best")
    assert line(text, "Hoffmann et al. 2022").split()[4] == "50.1"
    assert line(text, "Kaplan et al. 2020, without").startswith("embeddings")


def test_the_budget_for_a_size_or_a_length(plan: Callable[..., str]) -> None:
    for option, value in (("--params", "2.778459B"), ("--tokens", "59.98528B")):
        text = plan(option, value)
        assert line(text, "FLOPs").startswith("1e+21 (11.6 PF-days")
        assert line(text, "tokens per parameter") == "21.6"


def test_two_numbers_determine_the_third(plan: Callable[..., str]) -> None:
    text = plan("--params", "8B", "--tokens", "15T")
    assert line(text, "FLOPs").startswith("7.2e+23")
    assert line(text, "loss  ").startswith(f"{BESIROGLU.loss(8e9, 15e12):.3f}")
    assert line(text, "8.00 B").endswith("this training")
    for two in (("--flops", "7.2e23", "--params", "8e9"), ("--flops", "7.2e23", "--tokens", "15e12")):
        assert plan(*two) == text


def test_another_law(plan: Callable[..., str]) -> None:
    text = plan("--flops", "1e21", "--law", "hoffmann")
    assert "by Hoffmann et al. 2022" in text and line(text, "tokens per parameter") == "50.1"
    assert line(text, "Besiroglu et al. 2024").split()[4] == "21.6"


def test_a_law_of_ones_own_runs(
    plan: Callable[..., str], make_run: MakeRun, law: ChinchillaLaw, tmp_path: Path
) -> None:
    off = {(64, 16000): 1.3}
    folders = [make_run(w, s, off=off.get((w, s), 1.0)) for w in (16, 64, 256, 1024) for s in (250, 1000, 4000, 16000)]
    text = plan("fit", *folders, "--out", tmp_path / "fit.png", "--flops", "1e16", "--resamples", "5")
    assert "of 16 runs, N with embeddings" in text and "95 % of 5 fits" in text
    assert float(line(text, "alpha").split()[0]) == pytest.approx(0.3, rel=0.01)
    assert float(line(text, "beta").split()[0]) == pytest.approx(0.28, rel=0.01)
    assert line(text, "w64-s16000").endswith("outlier") and text.count("outlier") == 1
    best = law.optimal(1e16)
    cells = line(text, "1.00e+16").split()
    assert float(cells[0]) * 1e6 == pytest.approx(best.params, rel=0.05)
    assert float(cells[-1]) == pytest.approx(best.loss, rel=0.01)
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


RUNS = [Run(f"run{i}", 10**6 * (2 + i), 10**6 * (1 + i), 10**7 * (6 - i) ** 2, 4.0 - 0.1 * i) for i in range(6)]


@pytest.fixture
def given_runs(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Let names of runs stand for these, and collect what is fitted, by fits that are the same for any."""
    seen: list[Any] = []
    given = SimpleNamespace(runs=list(RUNS), seen=seen)

    def fitting(fit: Any) -> Callable[..., Any]:
        return lambda *columns, **options: (seen.append((*columns, options)), fit(len(columns[0]), **options))[1]

    residuals = np.array([0.001, -0.0145, 0.3, 0.0, 0.0, 0.00555])
    laws = [ChinchillaLaw(1.5 + i / 100, 300.0 + i, 400.0 + i, 0.3 + i / 1000, 0.28 + i / 1000) for i in range(41)]
    powers = [PowerLaw(1e9 + 1e6 * i, 0.3 + i / 1000, 1.5 + i / 100) for i in range(41)]
    for name, found in (("fit_chinchilla", laws), ("fit_power", powers)):
        resampled = tuple(found)

        def fit(count: int, resamples: int, laws: Any = resampled) -> Any:
            return Fit(laws[20], residuals[:count], laws if resamples else ())

        monkeypatch.setattr(f"llmfast.plan.command.{name}", fitting(fit))
    monkeypatch.setattr("llmfast.plan.command.read_run", lambda folder: given.runs[int(str(folder)[3:])])
    return given


def test_the_screen_of_a_law_has_the_figures_of_its_fit(plan: Callable[..., str], given_runs: SimpleNamespace) -> None:
    names = [each.name for each in RUNS]
    text = plan("fit", *names, "--resamples", "41")
    (N, D, losses, options) = given_runs.seen.pop()
    assert (N, D, losses) == ([r.params for r in RUNS], [r.tokens for r in RUNS], [r.loss for r in RUNS])
    assert options == {"resamples": 41}
    assert text.startswith("L = E + A / N^alpha + B / D^beta of 6 runs, N with embeddings:\n")
    for name, value, low, high in (  # the 2.5th and 97.5th of a hundred
        *(("E", "1.7", "1.51", "1.89"), ("A", "320", "301", "339"), ("B", "420", "401", "439")),
        *(("alpha", "0.32", "0.301", "0.339"), ("beta", "0.3", "0.281", "0.319")),
    ):
        assert line(text, f"{name} ").split() == [value, f"[{low},", f"{high}]"]
    assert "(intervals: 95 % of 41 fits to resampled runs)" in text
    for each, off in zip(RUNS, ("+0.10 %", "-1.45 %", "+30.00 %   outlier", "+0.00 %", "+0.00 %", "+0.56 %")):
        cells = [short(each.params), short(each.tokens), f"{each.loss:.4f}", off]
        assert line(text, each.name).split() == " ".join(cells).split()
    largest, law = max(each.flops for each in RUNS), ChinchillaLaw(1.7, 320.0, 420.0, 0.32, 0.3)
    budgets = text.partition("compute-optimal by this fit:\n")[2].splitlines()[1:4]
    for row, budget in zip(budgets, (largest, 10 * largest, 100 * largest)):
        best = law.optimal(budget)
        cells = [f"{budget:.2e}", *short(best.params).split(), *short(best.tokens).split()]
        cells += [f"{best.tokens_per_param:.1f}", f"{best.loss:.3f}"]
        found, interval = re.sub(r"\[.*\]", "", row).split(), re.findall(r"[\d.]+ [kMB]", row.partition("[")[2])[:2]
        assert found == cells
        sizes = [ChinchillaLaw(1.5, 300.0 + i, 400.0 + i, 0.3 + i / 1000, 0.28 + i / 1000) for i in range(41)]
        assert interval == [short(x) for x in np.quantile([s.optimal(budget).params for s in sizes], [0.025, 0.975])]
    assert f"(the largest run took {largest:.2e}; what is far beyond that is a guess)" in text
    text = plan("fit", *names, "--resamples", "0", "--flops", "1e16")
    assert "[" not in text and "intervals" not in text
    plan("fit", *names)
    assert [fitted[-1] for fitted in given_runs.seen] == [{"resamples": 0}, {"resamples": 100}]
    assert [row.split()[0] for row in text.partition("fit:\n")[2].splitlines()[1:-1]] == ["1.00e+16"]


@pytest.mark.parametrize("varied", ["both", "non_embedding", "tokens"])
def test_a_picture_is_of_what_was_fitted(
    plan: Callable[..., str],
    given_runs: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    varied: str,
    tmp_path: Path,
) -> None:
    same = {"both": {}, "non_embedding": {"tokens": 9}, "tokens": {"params": 7, "non_embedding": 5}}[varied]
    given_runs.runs, drawn = [replace(each, **same) for each in RUNS], list[Any]()
    for name in ("plot_chinchilla", "plot_power"):
        monkeypatch.setattr(f"llmfast.plan.command.{name}", lambda *args, **options: drawn.append((args, options)))
    names, out = [each.name for each in RUNS], tmp_path / "fit.svg"
    text = plan("fit", *names, "--out", out)
    assert text.endswith(f"\n\npicture: {out}\n")
    (((fit, *columns, picture), options),) = drawn
    *fitted, _ = given_runs.seen.pop()
    losses = [each.loss for each in RUNS]
    wanted = [[getattr(each, name) for each in given_runs.runs] for name in ("params", "tokens")]
    wanted = [*wanted, losses] if varied == "both" else [[getattr(r, varied) for r in given_runs.runs], losses]
    assert columns == fitted == wanted and picture == out and len(fit.resampled) == 41
    label = {"non_embedding": "parameters N, without embeddings", "tokens": "tokens D"}.get(varied)
    assert options == ({} if label is None else {"xlabel": label})
    assert "picture" not in plan("fit", *names) and len(drawn) == 1


@pytest.mark.parametrize("varied", ["non_embedding", "tokens"])
def test_the_screen_of_a_law_of_one_variable(
    plan: Callable[..., str], given_runs: SimpleNamespace, varied: str
) -> None:
    same = {"tokens": RUNS[0].tokens} if varied == "non_embedding" else {"params": 7, "non_embedding": 5}
    given_runs.runs = [replace(each, **same) for each in RUNS]
    text = plan("fit", *(each.name for each in RUNS), "--resamples", "3")
    (x, losses, options) = given_runs.seen.pop()
    assert (x, losses) == ([getattr(each, varied) for each in given_runs.runs], [each.loss for each in RUNS])
    label = {"non_embedding": "parameters N, without embeddings", "tokens": "tokens D"}[varied]
    assert options == {"resamples": 3}
    assert text.startswith(f"L = floor + (scale / x)^exponent of 6 runs, x: {label}:\n")
    assert line(text, "floor").split() == ["1.7", "[1.51,", "1.89]"]
    assert line(text, "scale").split() == ["1.02e+09", "[1.001e+09,", "1.039e+09]"]
    assert line(text, "exponent").split() == ["0.32", "[0.301,", "0.339]"]


def test_a_law_of_runs_that_vary_one_thing(plan: Callable[..., str], make_run: MakeRun, law: ChinchillaLaw) -> None:
    text = plan("fit", *(make_run(64, s) for s in (250, 1000, 4000, 16000, 64000)), "--resamples", "0")
    assert "x: tokens D" in text
    exponent, more = line(text, "exponent").split()[0], line(text, "exponent").split()[1:]
    assert float(exponent) == pytest.approx(law.beta, rel=0.01) and more == []
    assert "x: parameters N, without embeddings" in plan("fit", *(make_run(w, 500) for w in (16, 64, 256, 1024)))
    assert "--flops needs runs that vary both" in plan(
        "fit", *(make_run(64, s) for s in (300, 1300, 5000)), "--flops", "1e16", code=2
    )


def test_what_a_configuration_takes(plan: Callable[..., str]) -> None:
    settings = ("--set", "data.tokenizer=bytes", "--set", "model.width=512", "--set", "model.layers=8")
    settings += ("--set", "model.heads=8", "--set", "data.seq_len=1024", "--set", "train.batch_size=16")
    text = plan("memory", *settings, "--gpu", "H100", "--utilisation", "0.3")
    parameters = 264 * 512 + 8 * (4 * 512**2 + 3 * 512 * 1408 + 2 * 512) + 512
    assert text.startswith(f"{parameters / 1e6:.1f} M parameters, 135 k of them embeddings (tied)")
    assert line(text, "parameters, float32") == f"{parameters * 4 / 2**20:.1f} MiB"
    assert line(text, "states of adamw") == f"{parameters * 8 / 2**20:.1f} MiB"
    assert line(text, "at most at a time").endswith("fits (74.51 GiB)")
    assert line(text, "bf16, split16").startswith(f"{parameters * 2 / 2**20:.1f} MiB")
    flops = 6 * 16384 * (parameters - 17 * 512) + 12 * 8 * 1024 * 512 * 16384
    assert f"a step takes {flops:.3g} FLOPs" in text
    assert f"modelled on H100 SXM: {flops / (0.3 * 989e12) * 1e3:.3g} ms per step" in text
    assert "utilisation 0.3 assumed" in text
    tight = plan("memory", *settings, "--gpu-memory", "2GiB")
    assert "too large (2.00 GiB)" in tight and "modelled" not in tight
    less = plan("memory", *settings, "--set", "train.checkpoint_activations=true", "--set", "train.micro_batch_size=4")
    assert "4 micro-batch(es) of 4 rows of 1024" in less and "of one block, computed again" in less
    assert "modelled on RTX 4090: " in plan("memory", "--gpu", "RTX 4090")


def test_what_each_of_several_gpus_holds(plan: Callable[..., str]) -> None:
    shape = ("width=2048", "layers=16", "heads=16", "tie_embeddings=false")
    settings = ("data.tokenizer=bytes", "data.seq_len=2048", "train.batch_size=64", *(f"model.{s}" for s in shape))
    flags = [*(f"--set={s}" for s in settings), "--gpu", "H100"]
    alone, text = plan("memory", *flags, "--set=train.micro_batch_size=8"), plan("--gpus", "8", "memory", *flags)
    assert "1 micro-batch(es) of 8 rows of 2048 on each of 8 GPUs" in text and "train.parallel=ddp" in text
    for name in ("parameters, float32", "states of adamw", "activations   "):
        assert line(text, name) == line(alone, name)
    ddp, fsdp = (line(text, f"{way}   ").split() for way in ("DDP", "FSDP2"))
    for kind in (0, 4):  # parameters, states
        assert float(fsdp[kind]) * (1 / 1024 if fsdp[kind + 1] == "MiB" else 1) == pytest.approx(
            float(ddp[kind]) / 8, rel=0.01
        )
    assert "it fits with" not in text
    fewer = plan("memory", *flags, "--gpus", "8", "--set=train.parallel=fsdp", "--gpu-memory", "8GiB")
    assert "parameters outside blocks, whole" in fewer and "whole model in float32, to begin with" in fewer
    assert "at most at a time" in fewer and "too large (8.00 GiB)" in fewer
    changes = line(fewer, "it fits with ").replace("--set ", "--set=").split()
    assert any("checkpoint_activations=true" in change for change in changes)
    again = plan("memory", *flags, "--gpus", "8", "--gpu-memory", "8GiB", "--set=train.parallel=fsdp", *changes)
    assert line(again, "at most at a time").endswith("fits (8.00 GiB)") and "it fits with" not in again
    whole = "none of these fits: each GPU first holds the whole model in float32, 3.0"
    assert whole in plan("memory", *flags, "--gpus", "8", "--gpu-memory", "1GiB")
    rows = "none of these fits: take more --gpus, a --gpu with more memory, a smaller model or shorter rows"
    assert rows in plan("memory", *flags, "--gpus", "8", "--gpu-memory", "3.5GiB", "--data.seq_len=65536")
    assert "/ (8 GPUs * utilisation * FLOPs per second of the data sheet)" in text and " GPUs * util" not in alone
    assert "launches and communication are not in it" in text and "launches are not in it" in alone
    seconds = [float(t.partition("modelled on ")[2].split(": ")[1].split()[0]) for t in (fewer, again)]
    assert seconds[1] == pytest.approx(seconds[0] * 4 / 3, rel=0.01)
    assert "* 4 / 3" in again and "* 4 / 3" not in fewer


def test_several_gpus_share_the_time_of_a_step(plan: Callable[..., str]) -> None:
    found = []
    for count in ("1", "4"):
        text = plan(
            "memory", "--gpu", "H100", "--gpus", count, "--set=train.batch_size=64", "--set=train.steps=100000000"
        )
        said = text.partition("modelled on ")[2].partition(": ")[2].split("\n")[0]
        per_step, speed, whole = (part.split() for part in said.split(", "))
        assert per_step[1:] == ["ms", "per", "step"] and whole[-2:] == ["in", "all"]
        found.append((float(per_step[0]), number("speed", "".join(speed[:2])), float(whole[0])))
    (one, slow, long), (four, fast, short_) = found
    assert (four, fast, short_) == pytest.approx((one / 4, 4 * slow, long / 4), rel=5e-3)


def test_the_settings_own_precision(plan: Callable[..., str]) -> None:
    settings = ("train.param_dtype=bfloat16", "optimizer.master_weights=split16", "data.tokenizer=bytes")
    text = plan("memory", *(f"--set={s}" for s in settings))
    row = line(text, "bf16, split16")
    for name in ("parameters, bfloat16", "gradients   ", "states of adamw", "at most at a time"):
        assert line(text, name) in row
    assert "copies of the matrices" not in text


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "products", "rate"),
    [
        ("auto", "float32", "bfloat16", 989e12),
        ("bfloat16", "float32", "bfloat16", 989e12),
        ("float32", "float32", "float32", 66.9e12),
        ("float32", "bfloat16", "bfloat16", 989e12),  # without autocast, in the dtype of the parameters
    ],
)
def test_products_are_modelled_in_the_dtype_they_are_in(
    plan: Callable[..., str], dtype: str, param_dtype: str, products: str, rate: float
) -> None:
    settings = ("data.tokenizer=bytes", f"train.dtype={dtype}", f"train.param_dtype={param_dtype}")
    text = plan("memory", *(f"--set={s}" for s in settings), "--gpu", "H100", "--utilisation", "0.5")
    assert f"`llmfast train` on one GPU, products in {products}:" in text
    assert ("copies of the matrices in bfloat16" in text) == (products != param_dtype)
    flops = float(text.partition("a step takes ")[2].split()[0])
    seconds = float(text.partition("modelled on H100 SXM: ")[2].split(" ms per step")[0]) / 1e3
    assert seconds == pytest.approx(flops / (0.5 * rate), rel=0.01)


def test_a_learning_rate_for_another_batch(plan: Callable[..., str]) -> None:
    text = plan("lr", "--lr", "3e-4", "--base-batch", "0.5M", "--batch", "2M")
    assert line(text, "linear").startswith("0.0012") and line(text, "square root").startswith("0.0006")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "plan needs --flops, --params or --tokens, or one of fit, memory, lr"),
        (["--gpu", "H100"], "plan needs --days, --flops, --params or --tokens, or one of fit, memory, lr"),
        (["--days", "3"], "--days needs --gpu"),
        (["--flops", "1e21", "--out", "x.toml"], "--out needs --gpu"),
        (["--flops", "1e21", "--seq-len", "512"], "--seq-len needs --gpu"),
        (["--flops", "1e21", "--gpus", "8"], "--gpus needs --gpu"),
        (["--gpu", "H100", "--days", "0"], "--days must be finite and above 0; got '0'"),
        (["--gpu", "H100", "--days", "soon"], "--days must be a number"),
        (["--gpu", "H100", "--days", "1", "--flops", "1e21"], "--flops and --days are both a budget; leave one out"),
        (["--gpu", "H100", "--days", "1", "--params", "1B", "--tokens", "1B"], "leave one out"),
        (["--gpu", "H100", "--days", "1e-9"], "this would be a model of 12.0 k parameters, and plans are made for"),
        (["--gpu", "H100", "--days", "1e12"], "T parameters, and plans are made for 1.00 M to 10.0 T; ask for another"),
        (
            ["--gpu", "H100", "--days", "1", "--seq-len", "1.5"],
            "--seq-len must be a whole number in [2, 2^24]; got 1.5",
        ),
        *(
            (["--gpu", "H100", "--days", "1", name, text], f"{name} must be a whole number in [2, 2^24]; got {text}")
            for name in ("--seq-len", "--vocab-size")
            for text in ("1.0", "16777217.0")
        ),
        *(
            (["memory", f"--utilisation={text}"], f"above 0 and at most 1; got {text}")
            for text in ("0.0", "1.01", "-1.0")
        ),
        (["--gpu", "H100", "--params", "2M", "--vocab-size", "128k"], "a vocabulary of 128000 is too large for"),
        (["--gpu", "cpu", "--days", "3"], "--gpu must be one of A100, A100-40, H100, "),
        (["--gpu", "H100", "--days", "1", "memory"], "--days before memory has no meaning"),
        (["--gpus", "3", "memory"], "train.batch_size=4 does not divide by 3 ranks"),
        (
            ["--gpus=12", "memory", "--train.parallel=hsdp", "--train.shard_size=8", "--train.batch_size=12"],
            "train.shard_size must divide the number of ranks, 12, for train.parallel='hsdp'; got 8",
        ),
        (["--gpu", "H100", "--days", "1", "--params", "1B", "--tokens", "1B"], "two determine the third; leave one"),
        (["memory", "--gpus", "0"], "--gpus must be above 0; got 0"),
        (["--flops", "1", "--params", "1", "--tokens", "1"], "leave one out"),
        (["--flops", "much"], "--flops must be a number, such as 2.8e9 or 2.8B; got 'much'"),
        (["--params=-1B"], "--params must be finite and above 0; got '-1B'"),
        (["--tokens", "inf"], "--tokens must be finite and above 0; got 'inf'"),
        (["--tokens", "1e308"], "these numbers are too large or too small to compute with"),
        (["--flops", "1e21", "--gpu", "H1000"], "--gpu must be one of"),
        (["--flops", "1e21", "--gpu", "H100", "--utilisation", "2"], "--utilisation must be above 0 and at most 1"),
        (["--flops", "1e21", "--gpus", "0"], "--gpus must be above 0"),
        (["--flops", "1e21", "fit", "/nowhere"], "--flops before fit has no meaning"),
        (["--gpu", "H1000", "memory"], "--gpu must be one of"),
        (["fit", "/nowhere"], "cannot read /nowhere/config.toml"),
        (["memory", "--set", "train.stpes=7"], "did you mean train.steps?"),
        (
            ["memory", "--train.epochs=2"],
            "train.epochs must be 0: a plan reads no text, so it needs train.steps; got 2.0",
        ),
        (["memory", "--set", "model.heads=5"], "model: width must be a multiple of 2"),
        (["memory", "--set", "data.tokenizer=nothing.json"], "nothing.json"),
        (["memory", "--set", "train.micro_batch_size=3"], "does not divide into micro-batches of 3 rows"),
        (["memory", "--config", "nothing.toml"], "cannot read nothing.toml"),
        (["memory", "--gpu-memory", "plenty"], "expected an amount of memory such as 24GiB"),
        (["memory", "--gpu", "H1000"], "--gpu must be one of"),
        (["lr", "--lr", "0", "--base-batch", "1", "--batch", "2"], "lr must be greater than 0"),
    ],
)
def test_mistakes_are_one_line(plan: Callable[..., str], arguments: list[str], message: str) -> None:
    assert message in plan(*arguments, code=2)


def test_what_is_not_installed_is_told_with_the_extra_that_has_it(
    plan: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmfast.plan.command._memory", Mock(side_effect=ImportError("No module named 'pydantic'")))
    told = "No module named 'pydantic'; this needs the extra: pip install 'llmfast-torch[train]'\n"
    assert plan("memory", code=2) == f"llmfast: error: {told}"


GIVEN = {"--flops": "1e21", "--params": "1B", "--tokens": "1B", "--days": "3", "--seq-len": "512"}
GIVEN |= {"--vocab-size": "5000", "--out": "x.toml", "--law": "hoffmann", "--gpu": "H100", "--gpus": "4"}
GIVEN |= {"--utilisation": "0.3"}


@pytest.mark.parametrize("topic", ["fit runs/a", "lr --lr 1 --base-batch 1 --batch 2", "memory"])
@pytest.mark.parametrize("option", GIVEN)
def test_an_option_that_a_topic_does_not_read_is_refused(plan: Callable[..., str], option: str, topic: str) -> None:
    name, *words = topic.split()
    read = name == "memory" and option in ("--gpu", "--gpus", "--utilisation")
    text = plan(option, GIVEN[option], name, *words, code=0 if read else 2)
    assert (f"error: {option} before {name} has no meaning" in text) != read


@pytest.mark.parametrize("option", sorted(GIVEN.keys() - {"--flops", "--params", "--tokens", "--law", "--gpu"}))
def test_an_option_of_a_run_needs_a_gpu(plan: Callable[..., str], option: str) -> None:
    assert f"error: {option} needs --gpu" in plan("--params", "1B", option, GIVEN[option], code=2)


def test_a_wish_is_what_was_asked_for() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = "--flops 1e20 --params 2B --seq-len 2 --vocab-size 16777216 --gpu H100"
    asked = _wish(parser.parse_args(words.split()))
    assert asked == Wish(flops=1e20, seconds=None, params=2e9, tokens=None, seq_len=2, vocab_size=2**24)
    asked = _wish(parser.parse_args(["--days", "1.5", "--tokens", "3k", "--gpu", "H100"]))
    assert asked == Wish(flops=None, seconds=129_600.0, params=None, tokens=3000.0)


def test_all_of_the_rate_may_be_assumed(plan: Callable[..., str]) -> None:
    assert "utilisation 1 assumed" in plan("memory", "--gpu", "H100", "--utilisation", "1")
    assert "utilisation 0.4 assumed" in plan("memory", "--gpu", "H100")


def test_too_few_runs(plan: Callable[..., str], make_run: MakeRun) -> None:
    assert "got 1 sizes and 1 numbers of tokens" in plan("fit", make_run(64, 500), code=2)
    folders = [make_run(w, s) for w in (16, 32) for s in (250, 1000, 4000)]
    assert "N must take at least 3 values" in plan("fit", *folders, code=2)


def test_imports_without_the_packages_of_the_trainer() -> None:
    code = """if True:
        import sys
        for name in ("matplotlib", "rich", "tomli", "tomli_w", "tomllib", "tokenizers", "safetensors"):
            sys.modules[name] = None
        import llmfast.plan, llmfast.plan.command
        print(llmfast.plan.BESIROGLU.optimal(1e21).params)"""
    path = f"{ROOT}:{ROOT / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=gpus.HIDDEN | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(2.778e9, rel=1e-3)


def test_a_closed_pipe_prints_no_error() -> None:
    command = [sys.executable, "-m", "llmfast", "plan", "--flops", "1e21"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_only_a_picture_of_its_own_is_replaced(
    suffix: str, plan: Callable[..., str], make_run: MakeRun, tmp_path: Path
) -> None:
    picture = tmp_path / f"fit.{suffix}"
    command = ("fit", *(make_run(64, s) for s in (250, 1000, 4000, 16000)), "--out", picture, "--resamples", "0")
    picture.write_bytes(b"a photograph" * 1000)
    assert "exists and was not written by llmfast" in plan(*command, code=2)
    assert picture.read_bytes() == b"a photograph" * 1000
    picture.unlink()
    plan(*command)
    before = picture.stat().st_mtime_ns
    plan(*command)
    assert picture.stat().st_mtime_ns > before


@pytest.mark.parametrize("name", ["fit", "fit.", "fit.jpg", "fit.nothing"])
def test_a_picture_has_a_suffix_of_a_format(
    name: str, plan: Callable[..., str], make_run: MakeRun, tmp_path: Path
) -> None:
    """Reject a name without a suffix: matplotlib would add .png and overwrite the file of that name."""
    (tmp_path / "fit.png").write_text("a photograph")
    runs = [make_run(64, s) for s in (250, 1000, 4000, 16000)]
    said = plan("fit", *runs, "--out", f"{tmp_path}/{name}", "--resamples", "0", code=2)
    assert "a picture's name must end in .png, .svg or .pdf" in said
    assert (tmp_path / "fit.png").read_text() == "a photograph"
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("fit")} == {"fit.png"}


def test_words_are_left_aligned_and_numbers_right_aligned() -> None:
    rows = [("name", "size", "what"), ("a", "9", "it fits"), ("longer", "1,234", "")]
    assert columns(rows) == [
        "name      size   what",
        "a            9   it fits",
        "longer   1,234",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (1, "1 s"), (119, "119 s"), (120, "2 minutes"), (7200, "2 hours"), (3e5, "3.47 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("x", "text"),
    [(999.4, "999"), (999.6, "1.00 k"), (999_400, "999 k"), (999_600, "1.00 M"), (0.5, "0.5")],
)
def test_three_digits_are_never_four(x: float, text: str) -> None:
    assert short(x) == text


def test_numbers_are_read_as_they_are_written() -> None:
    for text in ("70.0 B", "1.50 T", "999 k", "12.5 M"):
        assert short(number("--params", text.replace(" ", "")) or 0) == text
    assert number("--params", "2K") == number("--params", "2k") == 2000
    assert number("--params", None) is None


def test_the_help_of_a_fit_names_its_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    add_arguments(parser := argparse.ArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args(["fit", "--help"])
    assert "(default: 1, 10 and 100 times the largest run)" in " ".join(capsys.readouterr().out.split())


GIVE = "--flops, --params or --tokens, or one of fit, memory, lr; see llmfast plan --help"
CARDS = ", ".join(_gpus.KNOWN)
THIRD = "of a budget (--flops or --days), --params and --tokens, two determine the third; leave one out"
LIMITS = "and plans are made for 1.00 M to 10.0 T; ask for another --days, --gpus, --flops, --params or --tokens"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", f"plan needs {GIVE}"),
        ("--gpu H100", f"plan needs --days, {GIVE}"),
        ("--days 3", "--days needs --gpu, for which a run is planned"),
        ("--params 1B --out a.toml", "--out needs --gpu, for which a run is planned"),
        ("--params 1B --gpus 2", f"--gpus needs --gpu, one of {CARDS}"),
        ("--params 1B --utilisation 0.3", f"--utilisation needs --gpu, one of {CARDS}"),
        ("--gpu H100 --days 1 --flops 1e21", "--flops and --days are both a budget; leave one out"),
        ("--gpu H100 --days 1 --params 1B --tokens 1B", THIRD),
        ("--flops 1e20 --params 1B --tokens 1B", THIRD),
        ("--gpu H100 --params 1k --tokens 1M", f"this would be a model of 1.00 k parameters, {LIMITS}"),
        (
            "--gpu H100 --params 2M --vocab-size 128k",
            "a vocabulary of 128000 is too large for a model of 2.00 M parameters",
        ),
        ("--flops 1 --gpus 0", "--gpus must be above 0; got 0"),
        ("--flops 1 --utilisation 2", "--utilisation must be above 0 and at most 1; got 2.0"),
        ("--flops 1 fit a", "--flops before fit has no meaning"),
        ("lr --lr 1 --base-batch x --batch 2", "--base-batch must be a number, such as 2.8e9 or 2.8B; got 'x'"),
        ("lr --lr 1 --base-batch 2 --batch 0", "--batch must be finite and above 0; got '0'"),
        ("fit a --flops x", "--flops must be a number, such as 2.8e9 or 2.8B; got 'x'"),
    ],
)
def test_mistakes_are_told_word_for_word(plan: Callable[..., str], command: str, message: str) -> None:
    assert plan(*command.split(), code=2) == f"llmfast: error: {message}\n"


def test_runs_that_vary_too_little_are_told_word_for_word(
    plan: Callable[..., str], given_runs: SimpleNamespace
) -> None:
    less = "runs must vary the model's size or the tokens: at least 3 values; got"
    for changes, words, message in (
        ([{}] * 6, (), f"{less} 1 sizes and 1 numbers of tokens"),
        ([{"params": 10**6 * (1 + i % 2)} for i in range(6)], (), f"{less} 2 sizes and 1 numbers of tokens"),
        ([{"tokens": 10**6 * (1 + i % 2)} for i in range(6)], (), f"{less} 1 sizes and 2 numbers of tokens"),
        (
            [{"tokens": 10**6 * (1 + i)} for i in range(6)],
            ("--flops", "1e9"),
            "--flops needs runs that vary both the model's size and the tokens",
        ),
    ):
        given_runs.runs = [replace(RUNS[0], **more) for more in changes]
        said = plan("fit", *(f"run{i}" for i in range(6)), *words, code=2)
        assert said == f"llmfast: error: {message}\n" and given_runs.seen == []


@pytest.mark.parametrize("missing", ["--lr", "--base-batch", "--batch"])
def test_each_number_of_a_learning_rate_is_required(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--lr": "1", "--base-batch": "2", "--batch": "3"}
    add_arguments(parser := argparse.ArgumentParser())
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["lr", *(word for name in given.keys() - {missing} for word in (name, given[name]))])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f": error: the following arguments are required: {missing}\n")


def test_a_topic_has_no_gpu_unless_it_is_given(plan: Callable[..., str]) -> None:
    """An option before the topic counts, unless it is given after it too."""
    before, after, both = (
        plan(*words.split())
        for words in (
            "--gpu A100 --utilisation 0.5 memory",
            "memory --gpu A100 --utilisation 0.5",
            "--gpu H100 --utilisation 0.3 memory --gpu A100 --utilisation 0.5",
        )
    )
    assert before == after == both and "modelled on A100" in before and "utilisation 0.5 assumed" in before
    assert "modelled" not in plan("memory")
    own = plan("memory", "--gpu", "A100", "--gpu-memory", "24GiB")
    assert "(24.00 GiB)" in own and "modelled on A100" in own
