"""Each setting reaches the part of a run that it is about, and each choice between parts is made as settings say."""

import math
from itertools import chain
from typing import Any
from unittest import mock

import pytest
import torch

import llmfast.train.parts as parts
from llmfast.data import Mixture
from llmfast.models import Decoder
from llmfast.optim import FusedAdamW
from llmfast.optim.scaling import optimal_lr
from llmfast.train.config import load_config
from llmfast.train.objective import FurtherTokens, NextToken
from llmfast.train.pretrained import OwnLoss
from llmfast.train.settings import ConfigError

SMALL = ["model.width=32", "model.layers=1", "model.heads=2"]


@pytest.mark.parametrize(("dtype", "there"), [("auto", True), ("bfloat16", True), ("float32", False)])
def test_the_dtype_of_autocast(dtype: str, there: bool) -> None:
    """bfloat16 is the default on a GPU alone."""
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        device, low = parts.choose_device(load_config(None, [f"train.dtype={dtype}"]))
    assert device.type == "cpu" and low == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    empty = mock.Mock()
    with mock.patch.object(torch.cuda, "is_available", return_value=True), mock.patch.object(torch, "empty", empty):
        device, low = parts.choose_device(load_config(None, [f"train.dtype={dtype}"]))
        assert device.type == "cuda" and low == (torch.bfloat16 if there else torch.float32)
        assert parts.choose_device(load_config(None, ["train.device=cpu"])) == (torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match=r"train\.device = 'nonsense' is not usable: "):
        parts.choose_device(load_config(None, ["train.device=nonsense"]))


DATA = {  # settings, as `prepare` gets them
    "sources": ["a", "b"],
    "vocab_size": 300,
    "seq_len": 64,
    "held_out": 0.125,
    "packing": "best_fit",
    "fim_unit": "document",
    "text_column": "body",
    "split": {"a": "end"},
}
FIM = {"rate": 0.25, "spm_rate": 0.75, "level": "token", "spm_variant": 1, "loss": "middle", "seed": 7}


def test_every_setting_of_data_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, say = mock.Mock(), print
    monkeypatch.setattr(parts, "prepare", prepare)
    config = load_config(None, ["train.seed=7"])
    for name, value in DATA.items():
        setattr(config.data, name, value)
    parts.prepare_data(config, "bytes", say)
    (sources,), given = prepare.call_args
    assert {"sources": sources, **given} == DATA | {"tokenizer": "bytes", "say": say}
    config.data.fim_rate, config.data.fim_spm_rate, config.data.fim_level = 0.25, 0.75, "token"
    config.data.fim_spm_variant, config.data.fim_loss = 1, "middle"
    parts.prepare_data(config, "bytes", say)
    assert prepare.call_args.kwargs["fim"].keywords == FIM
    fields = {"weights", "tokenizer", "fim_rate", "fim_spm_rate", "fim_level", "fim_spm_variant", "fim_loss"}
    assert vars(config.data).keys() == DATA.keys() | fields, "a setting that this test does not know"


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 5), (0.5, 3), (2.0, 10), (1e-6, 1), (0.0, 50)])
def test_epochs_become_steps(epochs: float, steps: int) -> None:
    """Nineteen rows of two sources in batches of four: the last step reads what is left, and more."""
    config = load_config(None, ["train.steps=50", "train.batch_size=4"])
    config.train.epochs = epochs
    data: Any = mock.Mock(train={"a": range(12), "b": range(7)}, split={"a": "end"})
    parts.settle(config, data)
    assert config.train.steps == steps and config.train.epochs == 0 and config.data.split == {"a": "end"}


def test_doubts_about_the_length_of_a_run() -> None:
    def told(steps: int, warmup: int, total: int = 400) -> list[str]:
        config = load_config(None, [f"train.steps={steps}", f"optimizer.warmup_steps={warmup}", "optimizer.lr=1e-4"])
        return list(parts.doubts(config, Mixture({"a": 100}, {}, total=total, seed=0), parameters=1000))

    assert told(10, 9) == []
    (rising,) = told(10, 10)
    assert rising.startswith("the learning rate never falls: optimizer.warmup_steps=10 is not below")
    (often,) = told(10, 9, total=410)
    assert often.startswith("the run reads a 4.1 times. After 4 passes")


@pytest.mark.parametrize(("limit", "passed"), [("0", math.inf), ("0.5", 0.5)])
def test_the_optimizer_measures_and_clips_as_settings_say(limit: str, passed: float) -> None:
    config = load_config(None, [f"optimizer.max_grad_norm={limit}"])
    optimizer = parts.make_optimizer(config, torch.nn.Linear(4, 4))
    assert isinstance(optimizer, FusedAdamW) and optimizer.option(0, "max_grad_norm") == passed
    assert not optimizer.steps_in_backward


def test_an_optimizer_in_backward_does_not_measure() -> None:
    model = torch.nn.Linear(4, 4)
    config = load_config(None, ["optimizer.in_backward=true", "optimizer.max_grad_norm=0"])
    optimizer = parts.make_optimizer(config, model)
    assert optimizer.steps_in_backward and optimizer.option(0, "max_grad_norm") is None
    model(torch.ones(1, 4)).sum().backward()
    assert model.weight.grad is None


def test_relative_decay_is_of_the_highest_rate() -> None:
    more = [
        "optimizer.decay=relative",
        "optimizer.lr_scaling=linear",
        "optimizer.base_batch_size=2",
        "train.batch_size=8",
    ]
    optimizer = parts.make_optimizer(load_config(None, ["optimizer.lr=0.01", *more]), torch.nn.Linear(4, 4))
    assert [group["lr_max"] for group in optimizer.param_groups] == pytest.approx([0.04] * len(optimizer.param_groups))
    assert len(optimizer.param_groups) == 2


def test_the_objective_is_that_of_the_models_heads() -> None:
    def made(mtp: str, *more: str) -> Any:
        heads = [] if mtp == "none" else [f"model.mtp={mtp}", f"model.mtp_heads={2 if mtp == 'sequential' else 3}"]
        config = load_config(None, [*SMALL, *heads, *more])
        model = parts.make_model(config, mock.Mock(vocab_size=50))
        return parts.make_objective(config, model, ["a", "b"])

    plain = made("none")
    assert isinstance(plain, NextToken) and plain.sources == ["a", "b"]
    for mtp in ("parallel", "sequential", "shared"):
        for detach in (False, True):
            if detach and mtp != "sequential":
                continue
            found = made(mtp, f"model.mtp_detach={str(detach).lower()}", "train.mtp_weight=0.5")
            assert isinstance(found, FurtherTokens) and found.heads == 3
            assert found._detached == [False, detach, detach] and not found._alone
            assert found._weights_at(0)[:2] == [1.0, 0.25 if mtp == "sequential" else 0.5]
    assert made("shared", "model.mtp_heads=1")._alone is False
    assert isinstance(parts.make_objective(load_config(None, SMALL), torch.nn.Linear(1, 1), []), OwnLoss)
    assert isinstance(parts.make_model(load_config(None, SMALL), mock.Mock(vocab_size=50)), Decoder)


@pytest.mark.parametrize(("micro", "sizes"), [(0, [4, 3]), (2, [2, 2, 2, 1])])
def test_validation_reads_the_first_rows_in_batches(micro: int, sizes: list[int]) -> None:
    config = load_config(None, ["train.batch_size=4", f"train.micro_batch_size={micro}", "train.eval_rows=7"])
    rows: Any = mock.MagicMock(batch=list, **{"__len__.return_value": 20})
    begin = parts.make_validation(config, mock.Mock(validation={"a": rows}))["a"]
    for _ in range(2):
        found = list(begin())
        assert [len(batch) for batch in found] == sizes and [*chain(*found)] == list(range(7))
    assert [
        list(b) for b in parts.evaluation_batches(mock.MagicMock(batch=list, **{"__len__.return_value": 3}), 7, 2)
    ] == [
        [0, 1],
        [2],
    ]


def test_the_mixture_is_over_all_sequences_of_the_run() -> None:
    config = load_config(
        None, ["train.batch_size=4", "train.steps=5", "train.seed=3", "data.weights.a=0.25", "data.weights.b=rest"]
    )
    data: Any = mock.Mock(train={"a": range(8), "b": range(9)})
    found = parts.make_mixture(config, data)
    wanted = Mixture({"a": 8, "b": 9}, config.data.weights, total=20, seed=3)
    assert [x.tolist() for x in found.sequences(0, 20)] == [x.tolist() for x in wanted.sequences(0, 20)]
    assert found.epochs() == wanted.epochs()
    config.data.weights = {"c": 1.0}
    with pytest.raises(ConfigError, match=r"data\.weights: "):
        parts.make_mixture(config, data)


def rates_doubted(rate: float, parameters: int, *more: str, pretrained: str = "", steps: int = 1000) -> list[str]:
    settings = ["train.batch_size=8", "data.seq_len=512", f"train.steps={steps}", "optimizer.warmup_steps=1", *more]
    config = load_config(None, settings)
    config.optimizer.lr, config.model.pretrained = rate, pretrained
    return list(parts.doubts(config, mock.Mock(epochs=dict), parameters))


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "sgd"])
def test_doubts_about_the_rate_of_a_pretrained_model(name: str) -> None:
    default = parts.SCHEMA.settings["optimizer.lr"].by[name]
    chosen = f"optimizer.name={name}"
    assert rates_doubted(0.99 * default, 1000, chosen, pretrained="there") == []
    for rate in (default, 3 * default):
        (doubt,) = rates_doubted(rate, 10**10, chosen, pretrained="there")  # and nothing about its size
        share = default / parts.SCHEMA.settings["optimizer.lr"].by["adamw"]
        assert doubt.startswith(f"optimizer.lr={rate:g} is for small models that are trained from scratch")
        assert doubt.endswith(f": try optimizer.lr={2e-5 * share:.2g}") and "there has learned" in doubt
        assert (f"and {name} as large a share of its default" in doubt) == (share != 1)


def test_doubts_about_the_rate_of_a_large_model() -> None:
    parameters, tokens = 200_000_000, 8 * 512 * 1000
    best = optimal_lr(6 * parameters * tokens)
    default = parts.SCHEMA.settings["optimizer.lr"].by["adamw"]
    steps = 1000
    while 1.5 * best < default:  # a shorter run may have a higher rate
        steps //= 2
        best = optimal_lr(6 * parameters * 8 * 512 * steps)
    too_high, just_not = 1.501 * best, 1.499 * best
    (doubt,) = rates_doubted(too_high, parameters, steps=steps)
    assert doubt.startswith(f"optimizer.lr={too_high:g} is for small models: with 200 M parameters and ")
    assert doubt.endswith(f"try optimizer.lr={best:.2g}")
    assert (
        rates_doubted(just_not, parameters, steps=steps) == rates_doubted(too_high, parameters - 1, steps=steps) == []
    )


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, NotImplementedError])
def test_a_device_that_fails_is_told_in_one_line(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **more: Any) -> None:
        raise error("no such thing\nand a long trace")

    monkeypatch.setattr(torch, "empty", fails)
    with pytest.raises(ConfigError, match=r"^train\.device = 'cpu' is not usable: no such thing$"):
        parts.choose_device(load_config(None, ["train.device=cpu"]))


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
def test_what_is_wrong_with_the_text_is_of_the_settings(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "prepare", mock.Mock(side_effect=error("no text")))
    with pytest.raises(ConfigError, match=r"^data: no text$"):
        parts.prepare_data(load_config(None, []), "bytes", print)


def test_scaled_rates_reach_a_relative_decay() -> None:
    more = ["optimizer.decay=relative", "optimizer.lr_scaling=sqrt", "optimizer.base_batch_size=2"]
    config = load_config(None, [*more, "train.batch_size=8", "optimizer.lr=0.01"])
    optimizer = parts.make_optimizer(config, torch.nn.Linear(4, 4))
    assert [group["lr_max"] for group in optimizer.param_groups] == pytest.approx([0.02] * 2)
