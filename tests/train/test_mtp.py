"""Training to predict more than the next token: each kind through the command line, and what is written down."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from evidence.pretend_cuda import pretending_cuda
from llmfast.cli import main
from llmfast.train.config import Config, load_config
from llmfast.train.metrics import read_metrics
from llmfast.train.run import train
from llmfast.train.schedule import head_weights_at
from llmfast.train.settings import ConfigError
from llmfast.train.trainer import Trainer
from support.launched import unrecorded
from support.waiting import NoWaiting

pytestmark = pytest.mark.usefixtures("unpictured")
KINDS = {"parallel": 2, "sequential": 1, "shared": 3}  # mtp_heads


def kind(mtp: str, heads: int) -> list[str]:
    return [f"model.mtp={mtp}", f"model.mtp_heads={heads}"]


def run(settings: list[str], *more: str) -> Path:
    return train(load_config(None, [*settings, *more]), console=Console(quiet=True))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "model.safetensors"))


@pytest.mark.parametrize("mtp", KINDS)
def test_each_kind_trains(mtp: str, settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = [
        *kind(mtp, KINDS[mtp]),
        "train.steps=30",
        "optimizer.lr=0.01",
        "train.micro_batch_size=1",
        "train.eval_every=15",
    ]
    assert main(["train", *(f"--set={s}" for s in [*settings, *more]), "--name=first"]) == 0
    lines = read_metrics(Path(settings[0].removeprefix("runs=")) / "first" / "metrics.jsonl")
    K = 3 if mtp == "shared" else 2
    logged = [line for line in lines if "loss" in line]
    assert len(logged) == 15
    for line in logged:
        assert len(line["head_loss"]) == len(line["head_accuracy"]) == len(line["head_weights"]) == K
        assert line["loss"] == pytest.approx(line["head_loss"][0], rel=1e-5)
        assert all(0 <= a <= 1 for a in line["head_accuracy"])
        if mtp != "shared":  # whose weights change between lines
            objective = sum(w * x for w, x in zip(line["head_weights"], line["head_loss"]))
            assert line["objective"] == pytest.approx(objective, rel=1e-4)
    assert all(last < 0.9 * first for first, last in zip(logged[0]["head_loss"], logged[-1]["head_loss"]))
    validation = [line["validation_mean"] for line in lines if "validation_mean" in line]
    assert validation[-1] < 0.9 * validation[0] and validation[0] == pytest.approx(logged[0]["loss"], rel=0.1)

    output = capsys.readouterr().out
    if mtp == "shared":
        assert "acceptance" not in lines[-1] and "guesses accepted" not in output
    else:
        assert len(lines[-1]["acceptance"]) == 1 and lines[-1]["tokens_per_pass"] >= 1
        assert re.search(r"guesses accepted, by head +\d+ %", output)


def test_one_parallel_head_trains_as_none_to_the_last_bit(settings: list[str]) -> None:
    plain, parallel = (weights(run(settings, *more, f"name=n{len(more)}")) for more in ([], kind("parallel", 1)))
    for name, p in plain.items():
        assert torch.equal(p, parallel[name.replace("blocks.0.", "mtp.blocks.0.")]), name


@pytest.mark.parametrize("mtp", ["none", *KINDS])
def test_a_step_waits_for_nothing(mtp: str, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer._train_step

    def step(self: Trainer) -> Any:
        with pretending_cuda(), nullcontext() if self.step == 0 else NoWaiting():  # the first makes states and tables
            return original(self)

    monkeypatch.setattr(Trainer, "_train_step", step)
    more = [] if mtp == "none" else kind(mtp, KINDS[mtp])
    with unrecorded():
        run(settings, *more, "train.steps=2", "train.micro_batch_size=1", "train.eval_rows=1", "data.seq_len=8")


@pytest.mark.parametrize("mtp", KINDS)
def test_accumulation_is_the_same_batch_in_parts(mtp: str, settings: list[str]) -> None:
    """The parts have different numbers of valid labels for each head."""
    more = [*kind(mtp, KINDS[mtp]), "train.steps=3", "train.log_every=1"]
    folders = [
        run(settings, *more, "name=a", "train.batch_size=4"),
        run(settings, *more, "name=b", "train.batch_size=4", "train.micro_batch_size=1"),
    ]
    whole, parts = map(weights, folders)
    for k in whole:
        torch.testing.assert_close(parts[k], whole[k], rtol=2e-4, atol=2e-4)
    a, b = ([line for line in read_metrics(f / "metrics.jsonl") if "loss" in line] for f in folders)
    for one, two in zip(a, b):
        for key in ("objective", "head_loss", "head_accuracy"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-3), key


def test_detached_depths_do_not_change_the_model(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of the model's own parameters do not depend on the depths' weights."""
    gradients: list[dict[str, torch.Tensor]] = []

    def step(self: Trainer) -> Any:
        gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})
        return original(self)

    original = Trainer._optimizer_step
    monkeypatch.setattr(Trainer, "_optimizer_step", step)
    more = [*kind("sequential", 2), "model.mtp_detach=true", "train.steps=1"]
    for weight in ("1", "5"):
        run(settings, *more, f"train.mtp_weight={weight}", f"name=w{weight}")
    one, five = gradients
    for name in one:
        torch.testing.assert_close(five[name], one[name] * (5 if name.startswith("mtp.") else 1), rtol=1e-4, atol=1e-7)
    # The unembedding, here the embedding too, learns of the next token: every class, and not those of the text alone.
    assert one["embedding.weight"].any(1).all()


@pytest.mark.parametrize("mtp", KINDS)
def test_resuming_goes_on_where_it_was(mtp: str, settings: list[str]) -> None:
    more = [*kind(mtp, KINDS[mtp]), "train.mtp_schedule=linear"]
    whole = run(settings, *more, "name=whole")
    half = load_config(None, [*settings, *more, "name=half"])
    original = Trainer._train_step

    def step(self: Trainer) -> Any:
        result = original(self)
        self._stop = self.step == 4
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(half, console=Console(quiet=True))
    folder = whole.with_name("half")
    train(load_config(folder / "config.toml"), resume=True, console=Console(quiet=True))
    a, b = weights(whole), weights(folder)
    assert all(torch.equal(a[k], b[k]) for k in a)
    lines = read_metrics(whole / "metrics.jsonl")
    train(load_config(whole / "config.toml"), resume=True, console=Console(quiet=True))
    assert read_metrics(whole / "metrics.jsonl") == lines  # a finished run has nothing to add


def test_head_weights_by_default() -> None:
    def at(step: int, K: int, *settings: str) -> list[float]:
        return head_weights_at(step, K, load_config(None, ["train.steps=100", *settings], base=Config()))

    assert at(7, 3, "model.mtp=parallel") == [1.0, 1.0, 1.0]
    assert at(7, 3, "model.mtp=sequential") == [1.0, 0.15, 0.15]
    assert at(50, 2, "model.mtp=shared") == [1.0, 0.0]
    assert at(25, 2, "model.mtp=shared") == [1.0, 0.25]
    assert at(7, 3, "model.mtp=sequential", "train.mtp_mean=no", "train.mtp_weight=0.5") == [1.0, 0.5, 0.5]
    linear = ["train.mtp_schedule=linear", "train.mtp_weight=0.3", "train.mtp_final_weight=0.1"]
    assert at(50, 2, "model.mtp=parallel", *linear) == pytest.approx([1.0, 0.2])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.mtp_schedule=cosine", "train.mtp_schedule must be one of 'auto', 'constant', 'linear', 'staged'"),
        ("train.mtp_mean=true", "train.mtp_mean must be one of 'auto', 'yes', 'no'; got True"),
        ("train.mtp_mean=maybe", "train.mtp_mean must be one of 'auto', 'yes', 'no'; got 'maybe'"),
        ("train.mtp_weight=-1", "train.mtp_weight must be at least 0; got -1"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert message in str(caught.value)


def test_a_model_that_makes_no_sense_is_one_line(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *(f"--set={s}" for s in settings), "--set=model.mtp=parallel"]) == 2
    assert "model: mtp_heads must be at least 1 with mtp='parallel'; got 0" in capsys.readouterr().err
