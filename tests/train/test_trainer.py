"""The trainer inside a program of one's own, in one process: what it computes, says, keeps and refuses."""

import copy
import errno
import hashlib
import io
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from llmfast.data import ByteTokenizer, Dataset, Mixed, Mixture, pack
from llmfast.models import Decoder, DecoderConfig
from llmfast.optim import FusedAdamW, FusedSGD, optimizer_in_backward
from llmfast.train.config import Config
from llmfast.train.metrics import read_metrics
from llmfast.train.objective import NextToken
from llmfast.train.parts import make_optimizer
from llmfast.train.settings import ConfigError
from llmfast.train.trainer import Hooks, NonFinite, Stream, Trainer, on_device
from support.disk import Disk

VOCABULARY, ROWS = 50, 4
Optimizer = torch.optim.Optimizer
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# A program of one's own.


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dropout = nn.Linear(16, 16), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.dropout(self.inner(x).tanh())
        return out


class Model(nn.Module):
    """With dropout, and an unembedding that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.unembedding = nn.Linear(16, VOCABULARY, bias=False)
        self.unembedding.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.unembedding(x)
        return logits


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten(), reduction="sum")


def batches(rows: int = ROWS, seed: int = 0, bad: tuple[int, ...] = ()) -> Iterator[Batch]:
    """A row at a time is what several are. Of row i, all labels or only some count. NaN losses where `bad` says so."""
    generator = torch.Generator().manual_seed(seed)
    number = 0
    while True:
        tokens = torch.randint(0, VOCABULARY, (rows, 9), generator=generator)
        labels = tokens[:, 1:].clone()
        for row in range(rows):
            labels[row, : (number * rows + row) % 4 * 2] = -100
        weight = torch.tensor(math.nan if number in bad else 1.0)
        yield {"tokens": tokens[:, :-1], "labels": labels, "weight": weight}
        number += 1


def model_of(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def settings(**values: Any) -> Config:
    """`lr=` of the optimizer's, `steps=` of the trainer's."""
    config = Config()
    config.optimizer.warmup_steps, config.optimizer.lr = 2, 0.01
    config.train.steps, config.train.batch_size, config.train.log_every = 6, ROWS, 1
    for name, value in values.items():
        section = config.optimizer if hasattr(config.optimizer, name) else config.train
        assert hasattr(section, name)
        setattr(section, name, value)
    return config


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def fused(model: nn.Module) -> Optimizer:
    return FusedAdamW(model.parameters(), lr=0.01, max_grad_norm=1.0)


OPTIMIZERS = [adamw, fused]


class Written(Hooks):
    """The lines of the log, but for times."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, trainer: Trainer, values: dict[str, Any]) -> None:
        self.lines.append({k: v for k, v in values.items() if k not in ("tokens_per_s", "memory_bytes")})

    def __getitem__(self, key: str) -> list[Any]:
        return [line.get(key) for line in self.lines]


def trainer_of(
    config: Config | None = None, make: Callable[[nn.Module], Optimizer] = adamw, *, data: Any = None, **more: Any
) -> tuple[Trainer, Written]:
    written = Written()
    hooks = [written, *more.pop("hooks", [])]
    more = {"console": Console(quiet=True), "loss": loss_of, "model": model_of(), **more}
    return Trainer(optimizer=make, data=batches() if data is None else data, config=config or settings(),
                   hooks=hooks, **more), written  # fmt: skip


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in trainer.model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """To the last bit."""
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        torch.testing.assert_close(found[name], t, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


# What is computed.


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_it_trains_like_a_loop_of_ones_own(make: Callable[[nn.Module], Optimizer]) -> None:
    trainer, written = trainer_of(settings(schedule="linear", final_lr=0.1), make, model=model_of().eval())
    trainer.fit()  # with dropout, though models may come without

    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step, batch in zip(range(6), batches()):
        progress = (step - 1) / 4
        lr = 0.01 * (step + 1) / 2 if step < 2 else 0.01 * (0.1 + 0.9 * (1 - progress))
        optimizer.param_groups[0]["lr"] = lr
        loss = loss_of(model, batch) / (batch["labels"] != -100).sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wanted = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
        assert {key: written.lines[step][key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(weights(trainer), dict(model.state_dict()), rtol=1e-5, atol=1e-6)


def test_parts_with_few_labels_count_for_as_much_as_they_have() -> None:
    """Four rows at once, or one by one, of which each has another number of labels; without dropout."""
    found = []
    for rows in (4, 1):
        trainer, written = trainer_of(settings(micro_batch_size=rows), fused, model=model_of().eval(), data=batches(4))
        if rows == 1:
            each = (
                {name: t[row : row + 1] for name, t in b.items() if name != "weight"}
                for b in batches(4)
                for row in range(4)
            )
            trainer.data = Stream(each)
        for layer in trainer.model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        trainer.fit()
        found.append((written.lines, weights(trainer)))
    for one, two in zip(found[0][0], found[1][0]):
        assert one == pytest.approx(two, rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


def test_a_step_without_labels_changes_nothing_but_by_momentum() -> None:
    def emptied() -> Iterator[Batch]:
        for number, batch in enumerate(batches()):
            yield {**batch, "labels": batch["labels"].fill_(-100)} if number == 3 else batch

    trainer, written = trainer_of(settings(), fused, data=emptied())
    trainer.fit()
    assert written["loss"][3] == 0 and written["grad_norm"][3] == 0
    assert "skipped" not in written.lines[-1] and all(map(math.isfinite, written["loss"]))


def test_each_group_keeps_its_own_learning_rate() -> None:
    def make(model: nn.Module) -> Optimizer:
        matrices, gains = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
        return torch.optim.AdamW([{"params": matrices}, {"params": gains, "lr": 1e-4}], lr=2e-3)

    seen = []

    class Look(Hooks):
        def after_step(self, trainer: Trainer) -> None:
            seen.append([group["lr"] for group in trainer.optimizer.param_groups])

    config = settings(schedule="wsd", decay_share=0.5, final_lr=0.0, warmup_steps=2)
    trainer, written = trainer_of(config, make, hooks=[Look()])
    trainer.fit()
    shape = [0.5, 1, 1, 1, 0.5, 0]
    assert [lr for lr, _ in seen] == pytest.approx([2e-3 * x for x in shape])
    assert [lr for _, lr in seen] == pytest.approx([1e-4 * x for x in shape])
    assert written["lr"] == [lr for lr, _ in seen]

    config = settings(schedule="constant", lr_scaling="sqrt", base_batch_size=1, warmup_steps=0)
    trainer, written = trainer_of(config, make)
    trainer.fit()
    assert written["lr"] == pytest.approx([2e-3 * 2] * 6)  # for four times the batch


@pytest.mark.parametrize("how", ["checkpoint_activations", "compile", "both"])
def test_blocks_computed_otherwise_give_the_same(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compiler(self: nn.Module) -> None:
        compiled.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compiler)
    trainer, written = trainer_of(make=fused)
    trainer.fit()
    chosen = {"checkpoint_activations", "compile"} if how == "both" else {how}
    other, also = trainer_of(settings(**dict.fromkeys(chosen, True)), fused)
    other.fit()
    assert len(compiled) == 2 * ("compile" in chosen)
    assert also.lines == written.lines
    assert_same(weights(other), weights(trainer))


def test_stepping_in_backward() -> None:
    def in_backward(model: nn.Module) -> Optimizer:
        optimizer = FusedAdamW(model.parameters(), lr=0.01)
        optimizer_in_backward(model, optimizer)
        return optimizer

    trainer, written = trainer_of(settings(), in_backward)
    trainer.fit()
    other, also = trainer_of(settings(), lambda model: FusedAdamW(model.parameters(), lr=0.01, max_grad_norm=math.inf))
    other.fit()
    assert written["loss"] == also["loss"] and written["grad_norm"] == [None] * 6
    assert_same(weights(trainer), weights(other))
    with pytest.raises(ConfigError, match="needs all of a step's rows in one micro-batch"):
        trainer_of(settings(micro_batch_size=1), in_backward)


def test_an_optimizer_that_would_step_with_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="the optimizer needs max_grad_norm"):
        trainer_of(make=lambda model: FusedAdamW(model.parameters()))


# Data, hooks and validation.


def test_a_stream_goes_forward_and_ends() -> None:
    stream = Stream(iter("abcdef"))
    assert [stream.batch(0, 4), stream.batch(4, 4), stream.batch(12, 4)] == ["a", "b", "d"]
    with pytest.raises(ValueError, match="a stream of batches cannot go back"):
        stream.batch(8, 4)
    with pytest.raises(ValueError, match=r"data has fewer batches than train.steps needs: there is none with number 6"):
        stream.batch(24, 4)


class Pair(NamedTuple):
    a: Tensor
    b: list[Any]


def test_batches_of_every_kind_reach_the_device() -> None:
    meta = torch.device("meta")
    moved = on_device({"x": Pair(torch.ones(2), [torch.ones(3), "text"]), "y": (torch.ones(1), 5)}, meta)
    assert isinstance(moved["x"], Pair) and moved["x"].a.device == moved["x"].b[0].device == meta
    assert moved["x"].b[1] == "text" and moved["y"][0].device == meta and moved["y"][1] == 5


def test_hooks_are_called_in_order_and_validation_is_measured() -> None:
    calls: list[str] = []

    class Record(Hooks):
        def before_step(self, trainer: Trainer) -> None:
            calls.append(f"before {trainer.step}")
            assert trainer.model.training

        def after_step(self, trainer: Trainer) -> None:
            calls.append(f"after {trainer.step}")

        def on_log(self, trainer: Trainer, values: dict[str, Any]) -> None:
            calls.append(f"log {trainer.step}")
            values["mine"] = 7

        def on_evaluate(self, trainer: Trainer, losses: dict[str, float]) -> None:
            calls.append(f"evaluate {trainer.step}")
            found[trainer.step] = losses["held out"]
            model = copy.deepcopy(trainer.model).eval()
            given = list(held_out())
            total = sum(loss_of(model, batch).item() for batch in given)
            wanted[trainer.step] = total / sum(int((batch["labels"] != -100).sum()) for batch in given)

    def held_out() -> Iterator[Batch]:
        for number, batch in zip(range(3), batches(rows=2, seed=9)):
            yield {**batch, "labels": batch["labels"].fill_(-100)} if number == 1 else batch

    found: dict[int, float] = {}
    wanted: dict[int, float] = {}
    config = settings(steps=3, log_every=2, eval_every=2)
    trainer, _ = trainer_of(config, hooks=[Record()], model=model_of().eval(), validation={"held out": held_out})
    assert trainer.fit()
    assert calls == [
        "evaluate 0",
        *("before 0", "after 1"),
        *("before 1", "after 2", "log 2", "evaluate 2"),
        *("before 2", "after 3", "log 3", "evaluate 3"),
    ]
    assert found == pytest.approx(wanted, rel=1e-6) and len(found) == 3


def test_what_is_logged_does_not_change_what_is_trained() -> None:
    found = []
    for log_every in (1, 4):
        trainer, _ = trainer_of(settings(log_every=log_every), fused)
        trainer.fit()
        found.append(weights(trainer))
    assert_same(*found)


# Steps that go wrong.


def weighted(model: nn.Module, batch: Batch) -> Tensor:
    return loss_of(model, batch) * batch["weight"]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_is_skipped(
    make: Callable[[nn.Module], Optimizer], capsys: pytest.CaptureFixture[str]
) -> None:
    kept: dict[int, dict[str, Tensor]] = {}

    class Keep(Hooks):
        def after_step(self, trainer: Trainer) -> None:
            kept[trainer.step] = weights(trainer)

    data = batches(bad=(2, 3))
    trainer, written = trainer_of(settings(), make, data=data, loss=weighted, hooks=[Keep()], console=Console())
    trainer.fit()
    assert_same(kept[4], kept[2])
    assert not torch.equal(kept[5]["embedding.weight"], kept[4]["embedding.weight"])
    assert all(t.isfinite().all() for t in kept[6].values())
    assert written["skipped"] == [None, None, 1, 2, 2, 2]
    output = capsys.readouterr().out
    assert output.count("1 steps so far had a gradient that is not finite") == 1
    assert output.count("2 steps so far had a gradient that is not finite") == 1  # and not at every line from then on


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_too_many_of_them_end_the_run(make: Callable[[nn.Module], Optimizer], tmp_path: Path) -> None:
    config = settings(max_skipped=2, save_every=2, steps=20)
    trainer, _ = trainer_of(config, make, data=batches(bad=tuple(range(3, 20))), loss=weighted, run=tmp_path)
    with pytest.raises(NonFinite) as caught:
        trainer.fit()
    assert str(caught.value) == (
        "3 steps had a gradient that is not finite, more than train.max_skipped=2; "
        f"the last good one is {tmp_path / 'checkpoint-00000004'}"
    )


def test_a_loss_that_jumps_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    factors = {20: 3.0, 22: math.nan}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return loss_of(model, batch) * factors.get(trainer.step, 1.0)

    trainer, written = trainer_of(settings(steps=26, lr=1e-5), loss=loss, console=Console())
    trainer.fit()
    assert [i for i, x in enumerate(written["spike"]) if x] == [20, 22]  # and not those after a NaN
    assert "step 21: the loss has jumped to 31.619, from about 11.192" in capsys.readouterr().out


# Checkpoints.


def plan(how: str) -> tuple[Config, Callable[[nn.Module], Optimizer]]:
    config = settings(steps=7, log_every=5, save_every=3, keep_last=9)
    if how == "bfloat16":
        config.train.param_dtype, config.optimizer.master_weights = "bfloat16", "split16"
        config.optimizer.state_dtype = "bfloat16"
        return config, lambda model: make_optimizer(config, model)
    if how == "in_backward":
        config.optimizer.in_backward = True
        return config, lambda model: make_optimizer(config, model)
    if how == "sgd":
        return config, lambda model: FusedSGD(model.parameters(), lr=0.1, momentum=0.9, max_grad_norm=1.0)
    return config, {"adamw": adamw, "fused": fused}[how]


@pytest.mark.parametrize("how", ["adamw", "fused", "bfloat16", "in_backward", "sgd"])
def test_a_run_goes_on_to_the_last_bit(how: str, tmp_path: Path) -> None:
    """With dropout, tied weights, a generator of batches, and from the middle of a line of the log."""
    config, make = plan(how)
    dtype = getattr(torch, config.train.param_dtype)
    whole, written = trainer_of(config, make, run=tmp_path, model=model_of().to(dtype))
    assert whole.fit()
    for step in (6, 7):
        shutil.rmtree(tmp_path / f"checkpoint-{step:08d}")
    resumed, also = trainer_of(config, make, run=tmp_path, model=model_of(seed=5).to(dtype))
    torch.manual_seed(77)
    resumed.resume()
    assert (resumed.step, resumed.sequences) == (3, 12)
    assert resumed.fit()
    assert also.lines == written.lines
    assert_same(weights(resumed), weights(whole))
    assert_same(states(resumed), states(whole))


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_what_was_counted_goes_on(make: Callable[[nn.Module], Optimizer], tmp_path: Path) -> None:
    """Skipped steps, and the losses that one which jumps is measured by."""
    config = settings(steps=24, save_every=20, lr=1e-5, max_skipped=1)
    bad = {"loss": weighted, "run": tmp_path}
    whole, written = trainer_of(config, make, data=batches(bad=(2, 22)), **bad)
    with pytest.raises(NonFinite, match=r"^2 steps had a gradient that is not finite"):
        whole.fit()
    resumed, also = trainer_of(config, make, data=batches(bad=(2, 22)), **bad)
    resumed.resume()
    assert (resumed.step, resumed.skipped) == (20, 1)
    with pytest.raises(NonFinite, match=r"^2 steps had a gradient that is not finite"):
        resumed.fit()
    assert written["spike"][20:] == [None, None, True] and written["skipped"][20:] == [1, 1, 2]
    assert json.dumps(also.lines) == json.dumps(written.lines[20:])  # in which NaN is NaN
    assert (resumed.tokens, resumed.sequences, resumed.skipped) == (whole.tokens, whole.sequences, whole.skipped)


# master_weights and state_dtype of bfloat16 parameters, before and after.
OTHER_FORMATS = [
    (("split16", "8bit"), ("split8", "bfloat16")),
    (("split8", "float32"), ("split16", "8bit")),
    (("", ""), ("fp32", "8bit")),
    (("fp32", "8bit"), ("kahan", "float32")),
    (("kahan", "bfloat16"), ("split16", "float32")),
    (("stochastic", "8bit"), ("fp32", "")),
    (("split16", "float32"), ("", "8bit")),
]


def with_formats(formats: tuple[str, str]) -> tuple[Config, Callable[[nn.Module], Optimizer]]:
    config, make = plan("bfloat16")
    config.optimizer.master_weights, config.optimizer.state_dtype = formats
    config.optimizer.schedule = "constant"
    return config, make


def what_is_held(trainer: Trainer) -> dict[str, Tensor]:
    """Weights and moments with all their bits, whatever they are kept in."""
    optimizer = trainer.optimizer
    assert isinstance(optimizer, FusedAdamW)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = {f"weight {i}": optimizer.master_value(p).float() for i, p in enumerate(params)}
    for i, state in optimizer.torch_state_dict()["state"].items():
        found |= {f"{name} {i}": state[name].float() for name in ("exp_avg", "exp_avg_sq", "step")}
    return {name: t.clone() for name, t in found.items()}


@pytest.mark.parametrize(("before", "after"), OTHER_FORMATS, ids=str)
@pytest.mark.filterwarnings("ignore:the state holds")
def test_a_run_goes_on_with_other_formats(before: tuple[str, str], after: tuple[str, str], tmp_path: Path) -> None:
    config, make = with_formats(before)
    whole, _ = trainer_of(config, make, run=tmp_path, model=model_of().to(torch.bfloat16))
    assert whole.fit()
    config, make = with_formats(after)
    config.train.steps = 9
    resumed, _ = trainer_of(config, make, run=tmp_path, model=model_of(seed=5).to(torch.bfloat16))
    resumed.resume()
    loaded, wanted = what_is_held(resumed), what_is_held(whole)
    for name, t in wanted.items():
        # Weights keep all their bits until the first step; moments may be rounded to bfloat16 by then.
        rounding = 0.0 if name.startswith(("weight", "step")) else 2.0**-8
        torch.testing.assert_close(loaded[name], t, rtol=rounding, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert resumed.fit() and resumed.step == 9
    ours, (_, state) = states(resumed), after
    assert {name.split()[1] for name in ours if "exp_avg" in name} == (
        {"exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale"}
        if state == "8bit"
        else {"exp_avg", "exp_avg_sq"}
    )


def test_a_run_of_before_low_bits_had_their_name_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, make = with_formats(("split8", "8bit"))
    whole, _ = trainer_of(config, make, run=tmp_path, model=model_of().to(torch.bfloat16))
    save = whole.optimizer.state_dict

    def as_before() -> Any:
        saved = save()
        for state in saved["state"].values():
            state["remainder"] = (state.pop("low_bits") // 256).to(torch.int8)
        return saved

    monkeypatch.setattr(whole.optimizer, "state_dict", as_before)
    assert whole.fit()
    monkeypatch.undo()
    resumed, _ = trainer_of(config, make, run=tmp_path, model=model_of(seed=5).to(torch.bfloat16))
    resumed.resume()
    assert_same(what_is_held(resumed), what_is_held(whole))


class Partial(Model):
    """Of which some is frozen, some is not used, and some is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding.weight.requires_grad_(False)
        self.unused, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.norm(super().forward(tokens).transpose(1, 2)).transpose(1, 2)
        return logits


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_so_does_a_model_of_which_not_all_is_trained(make: Callable[[nn.Module], Optimizer], tmp_path: Path) -> None:
    config, model = settings(steps=7, save_every=3, keep_last=9), Partial()
    copied = copy.deepcopy(model)
    whole, _ = trainer_of(config, make, run=tmp_path, model=model)
    whole.fit()
    for step in (6, 7):
        shutil.rmtree(tmp_path / f"checkpoint-{step:08d}")
    resumed, _ = trainer_of(config, make, run=tmp_path, model=copied)
    resumed.resume()
    resumed.fit()
    assert_same(weights(resumed), weights(whole))
    assert_same(states(resumed), states(whole))


def states(trainer: Trainer) -> dict[str, Tensor]:
    saved = trainer.optimizer.state_dict()["state"]
    return {f"{i} {name}": t.clone() for i, s in saved.items() for name, t in s.items() if isinstance(t, Tensor)}


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_run_saved_before_its_first_step(make: Callable[[nn.Module], Optimizer], tmp_path: Path) -> None:
    whole, _ = trainer_of(make=make)
    whole.fit()
    saved, _ = trainer_of(make=make, run=tmp_path)
    saved.save()
    saved.fit()
    assert_same(weights(saved), weights(whole))
    for folder in tmp_path.glob("checkpoint-0000000[1-9]"):
        shutil.rmtree(folder)
    resumed, _ = trainer_of(make=make, run=tmp_path, model=model_of(seed=5))
    resumed.resume()
    resumed.fit()
    assert_same(weights(resumed), weights(whole))
    assert_same(states(resumed), states(whole))


class Gate:
    """Holds up those that write, until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        original = FileSystemWriter.write_data

        def write_data(*args: Any) -> Any:
            self.reached.set()
            assert self.open.wait(20)
            return original(*args)

        patch.setattr(FileSystemWriter, "write_data", write_data)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_what_is_saved_is_what_was_while_training_goes_on(
    make: Callable[[nn.Module], Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    then: list[dict[str, Tensor]] = []
    gate = Gate(monkeypatch)

    class Watch(Hooks):
        def before_step(self, trainer: Trainer) -> None:
            if trainer.step == 2:
                trainer.save()
                then.extend((weights(trainer), states(trainer)))

        def after_step(self, trainer: Trainer) -> None:
            if trainer.step == 5:  # three more while it is being written
                assert gate.reached.wait(20)
                assert [f.name for f in tmp_path.glob(".*")] == [".checkpoint-00000002.partial"]
                assert not list(tmp_path.glob("checkpoint-*"))
                gate.open.set()

    trainer, _ = trainer_of(settings(steps=5), make, run=tmp_path, hooks=[Watch()])
    trainer.fit()
    shutil.rmtree(tmp_path / "checkpoint-00000005")
    assert [f.name for f in tmp_path.glob("*checkpoint-*")] == ["checkpoint-00000002"]
    other, _ = trainer_of(make=make, run=tmp_path, model=model_of(seed=5))
    other.resume()
    assert_same(weights(other), then[0])
    assert_same(states(other), then[1])


def saved(run: Path) -> list[int]:
    return sorted(int(f.name.split("-")[1]) for f in run.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, [11]), (2, 0, [10, 11]), (2, 4, [4, 8, 10, 11]), (3, 4, [4, 8, 10, 11]), (1, 5, [10, 11])],
)
def test_old_checkpoints_go(keep_last: int, keep_every: int, kept: list[int], tmp_path: Path) -> None:
    config = settings(steps=11, save_every=2, keep_last=keep_last, keep_every=keep_every)
    trainer_of(config, run=tmp_path)[0].fit()
    assert saved(tmp_path) == kept and not list(tmp_path.glob(".*"))


def cut(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])


def flip(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "data missing": (lambda f: next(f.glob("*.distcp")).unlink(), "__0_0.distcp is missing"),
    "data cut": (cut, "__0_0.distcp has "),
    "a bit": (flip, "__0_0.distcp has changed"),
    "metadata": (lambda f: (f / ".metadata").write_bytes(b""), ".metadata has 0 bytes of "),
    "meta": (lambda f: (f / "meta.json").unlink(), "meta.json is missing"),
    "checksums missing": (lambda f: (f / "checksums.json").unlink(), "checksums.json: "),
    "checksums cut": (lambda f: (f / "checksums.json").write_text("{"), "checksums.json: "),
    "checksums of nothing": (
        lambda f: (f / "checksums.json").write_text("{}"),
        "meta.json is not among checksums.json",
    ),
    "checksums otherwise": (lambda f: (f / "checksums.json").write_text('["meta.json"]'), "checksums.json: "),
    "all": (lambda f: [file.unlink() for file in f.iterdir()], "checksums.json: "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_passed_over_and_written_anew(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(steps=6, save_every=2, keep_last=2)
    whole, _ = trainer_of(config, fused, run=tmp_path)
    whole.fit()
    spoil, told = DAMAGE[damage]
    spoil(tmp_path / "checkpoint-00000006")
    resumed, _ = trainer_of(config, fused, run=tmp_path, model=model_of(seed=5), console=Console(width=200))
    resumed.resume()
    assert resumed.step == 4
    assert f"checkpoint-00000006 is damaged ({told}" in capsys.readouterr().out
    resumed.fit()
    assert_same(weights(resumed), weights(whole))
    assert saved(tmp_path) == [4, 6]
    again, _ = trainer_of(config, fused, run=tmp_path, model=model_of(seed=5))
    again.resume()
    assert again.step == 6
    assert_same(weights(again), weights(whole))


def test_a_damaged_one_does_not_push_out_whole_ones(tmp_path: Path) -> None:
    """With one kept, those written before it is reached again would go at once, were it taken for the newest."""
    trainer_of(settings(steps=8, save_every=4, keep_last=2), run=tmp_path)[0].fit()
    cut(tmp_path / "checkpoint-00000008")
    resumed, _ = trainer_of(settings(steps=6, keep_last=1), run=tmp_path)
    resumed.resume()
    resumed.fit()
    assert saved(tmp_path) == [6]


class Counting(torch.optim.SGD):
    """Keeps a count in its groups, among the settings, as schedule-free optimizers do."""

    def __init__(self, params: Any, momentum: float) -> None:
        super().__init__(params, lr=0.01, momentum=momentum)
        self.defaults["counted"] = self.param_groups[0]["counted"] = 0

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["counted"] += 1
        return super().step(closure)


def test_groups_keep_what_was_counted_and_take_what_was_changed(tmp_path: Path) -> None:
    trainer_of(settings(steps=4), lambda m: Counting(m.parameters(), momentum=0.9), run=tmp_path)[0].fit()
    for momentum in (0.9, 0.5, 0.5):  # a change holds for the starts after it
        resumed, _ = trainer_of(settings(), lambda m, x=momentum: Counting(m.parameters(), x), run=tmp_path)
        resumed.resume()
        (group,) = resumed.optimizer.param_groups
        assert (group["counted"], group["momentum"]) == (resumed.step, momentum)
        resumed.config.train.steps = resumed.step + 1
        resumed.fit()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_groups_of_earlier_checkpoints(make: Callable[[nn.Module], Optimizer], tmp_path: Path) -> None:
    """They do not say what the groups were made with: those of ours hold settings alone."""
    trainer_of(settings(steps=4), make, run=tmp_path)[0].fit()
    for file in tmp_path.glob("checkpoint-*/meta.json"):
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "groups"}))
        sums = json.loads((file.parent / "checksums.json").read_text())
        sums["meta.json"] = [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
        (file.parent / "checksums.json").write_text(json.dumps(sums))

    def other(model: nn.Module) -> Optimizer:
        made = make(model)
        made.param_groups[0] |= {"eps": 1.0, "later": 3}  # one that no optimizer had by then
        return made

    resumed, _ = trainer_of(settings(), other, run=tmp_path)
    resumed.resume()
    assert resumed.optimizer.param_groups[0]["eps"] == (1.0 if make is fused else 1e-8)
    assert resumed.optimizer.param_groups[0]["later"] == 3


def test_an_optimizer_of_another_kind_is_an_error(tmp_path: Path) -> None:
    trainer_of(settings(steps=4), fused, run=tmp_path)[0].fit()

    def refusing(model: nn.Module) -> Optimizer:
        made = fused(model)

        def refuse(optimizer: Any, state: Any) -> None:
            raise ValueError("master_weights='split16' must be 'split8';\nnot both")

        made.register_load_state_dict_pre_hook(refuse)
        return made

    with pytest.raises(OSError, match=r"checkpoint-00000004 does not go with the optimizer there is now: ") as e:
        trainer_of(settings(), refusing, run=tmp_path)[0].resume()
    assert str(e.value).endswith("now: master_weights='split16' must be 'split8'; not both")


def test_a_stream_is_not_cut_anew() -> None:
    stream = Stream(batches())
    stream.batch(0, ROWS)
    with pytest.raises(ValueError, match="a stream has batches of 3 sequences: none begins at sequence 4"):
        stream.batch(4, 3)


def test_nothing_whole_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        trainer_of(run=tmp_path)[0].resume()
    trainer_of(settings(save_every=3), run=tmp_path)[0].fit()
    (tmp_path / "checkpoint-of-mine").mkdir()  # is not looked at
    for step in (3, 6):
        cut(tmp_path / f"checkpoint-{step:08d}")
    with pytest.raises(OSError, match="no whole checkpoint in"):
        trainer_of(run=tmp_path)[0].resume()
    assert len(list(tmp_path.glob("checkpoint-0*"))) == 2
    with pytest.raises(ValueError, match="resume needs a run folder"):
        trainer_of()[0].resume()


def test_another_model_is_an_error(tmp_path: Path) -> None:
    trainer_of(run=tmp_path)[0].fit()
    model = model_of()
    model.embedding = nn.Embedding(VOCABULARY, 8)
    with pytest.raises(OSError, match="is damaged or of another model: "):
        trainer_of(run=tmp_path, model=model)[0].resume()


def test_anothers_checkpoints_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    trainer_of(run=tmp_path)[0].fit()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="holds checkpoints of another run: resume it, or choose another folder"):
        trainer_of(run=tmp_path)[0].fit()
    assert sorted(tmp_path.rglob("*")) == before and read_metrics(tmp_path / "metrics.jsonl")


# Power that fails.


def test_a_checkpoint_has_its_name_when_all_of_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    trainer_of(settings(steps=4, save_every=2), fused, run=tmp_path)[0].fit()
    assert saved(tmp_path) == [2, 4]
    disk.expect_names(tmp_path / "metrics.jsonl", *tmp_path.glob("checkpoint-*"))
    assert {"meta.json", "checksums.json", ".metadata"} < {f.name for f in tmp_path.glob("checkpoint-*/*")}


# A disk that is full.


def test_too_little_room_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next time, there may be enough."""
    model = model_of()
    model.register_buffer("ballast", torch.zeros(250_000))  # beside which random numbers' states are nothing
    trainer, _ = trainer_of(settings(save_every=2), fused, run=tmp_path, model=model)
    needed = 3 * 4 * sum(p.numel() for p in model.parameters()) + 1_000_000  # weights, two moments, and the ballast
    room = 2 * needed

    class Fill(Hooks):
        def before_step(self, trainer: Trainer) -> None:
            monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room))

        def on_save(self, trainer: Trainer) -> None:
            nonlocal room
            room = 1.03 * needed  # for tensors alone, but more than they is written

    trainer.hooks.append(Fill())
    with pytest.raises(OSError, match=r"checkpoint-00000004 cannot be written to .*: it takes about .* are free;") as e:
        trainer.fit()
    assert str(e.value).endswith(f"; the last good one is {tmp_path / 'checkpoint-00000002'}")
    assert trainer.step == 4 and saved(tmp_path) == [2]
    room = 2 * needed
    trainer.save()
    assert trainer.checkpoints is not None
    trainer.checkpoints.wait()
    assert saved(tmp_path) == [2, 4]


@pytest.mark.parametrize("what", ["FileSystemWriter.write_data", "FileSystemWriter.finish", "sync"])
def test_a_disk_that_fills_up_meanwhile_ends_the_run_soon(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the next step, and not with the next checkpoint."""

    def full(*args: Any, **more: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Fill(Hooks):
        def before_step(self, trainer: Trainer) -> None:
            assert trainer.checkpoints is not None
            if trainer.step == 3:
                trainer.checkpoints.wait()
                monkeypatch.setattr(f"llmfast.train.checkpoint.{what}", full)
            if trainer.step == 8:
                assert trainer.checkpoints._writing is not None
                trainer.checkpoints._writing[1].exception(20)

    trainer, _ = trainer_of(settings(steps=100, save_every=3, keep_last=2), run=tmp_path, hooks=[Fill()])
    with pytest.raises(OSError, match=r"^checkpoint-00000006 could not be written: .*No space left on device; ") as e:
        trainer.fit()
    assert str(e.value).endswith(f"; the last good one is {tmp_path / 'checkpoint-00000003'}")
    assert str(e.value).count("\n") == 0
    assert 6 <= trainer.step <= 9 and saved(tmp_path) == [3] and not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    resumed, _ = trainer_of(settings(steps=7), run=tmp_path)
    resumed.resume()
    assert resumed.step == 3 and resumed.fit()
    assert saved(tmp_path) == [3, 7] and not list(tmp_path.glob(".*"))


def test_the_last_one_that_could_not_be_written_can_be_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing trained in between, it is not taken for saved."""

    def full(*args: Any, **more: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Fill(Hooks):
        def before_step(self, trainer: Trainer) -> None:
            if trainer.step == 3:
                assert trainer.checkpoints is not None
                trainer.checkpoints.wait()
                monkeypatch.setattr("llmfast.train.checkpoint.sync", full)

    trainer, _ = trainer_of(settings(steps=4, save_every=2), run=tmp_path, hooks=[Fill()])
    with pytest.raises(OSError, match=r"^checkpoint-00000004 could not be written: .*No space left on device; "):
        trainer.fit()
    assert trainer.step == 4 and saved(tmp_path) == [2]
    monkeypatch.undo()
    trainer.fit()
    assert saved(tmp_path) == [2, 4]
    resumed, _ = trainer_of(settings(steps=4), run=tmp_path)
    resumed.resume()
    assert resumed.step == 4


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    class Fill(Hooks):
        def before_step(self, trainer: Trainer) -> None:
            if trainer.step == 4:
                assert trainer.metrics is not None and trainer.checkpoints is not None
                trainer.checkpoints.wait()
                trainer.metrics._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115

    trainer, _ = trainer_of(settings(save_every=3), run=tmp_path, hooks=[Fill()])
    with pytest.raises(OSError, match=r"metrics.jsonl could not be written: .*No space left on device; the last") as e:
        trainer.fit()
    assert str(e.value).endswith(f"the last good one is {tmp_path / 'checkpoint-00000003'}") and trainer.step == 5


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    class Remove(Hooks):
        def before_step(self, trainer: Trainer) -> None:
            if trainer.step == 1:
                shutil.rmtree(tmp_path / "run")
                (tmp_path / "run").write_text("a file")

    trainer, _ = trainer_of(settings(steps=2), run=tmp_path / "run", hooks=[Remove()])
    with pytest.raises(OSError, match=r"checkpoint-00000002 cannot be written to .*run: .*; there is no earlier one"):
        trainer.fit()


# What it costs.


class Resident(Hooks):
    """MiB that the process holds, by step."""

    def __init__(self) -> None:
        self.at: dict[int, float] = {}

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step % 500 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.at[trainer.step] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_what_it_is(tmp_path: Path) -> None:
    resident = Resident()
    config = settings(steps=2000, log_every=10, save_every=250, eval_every=250)
    held_out = {"held out": lambda: islice(batches(), 2)}
    trainer, _ = trainer_of(config, fused, run=tmp_path, validation=held_out)
    trainer.hooks[:] = [resident]
    trainer.fit()
    assert resident.at[2000] - resident.at[500] < 3


def test_next_to_nothing_is_spent_outside_of_model_and_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the size of `make train`. Of the processor's time: others may be busy."""
    config = Config()
    config.train.steps = config.train.log_every = 6
    random = np.random.default_rng(0)
    documents = [random.integers(1, config.data.vocab_size, size=300) for _ in range(100)]
    rows = pack(documents, config.data.seq_len, eot_id=0)
    data = Mixed(Dataset({"random": rows}, {}, ByteTokenizer()), Mixture({"random": len(rows)}, {}, total=1000))
    m = config.model
    model = Decoder(DecoderConfig(config.data.vocab_size, width=m.width, layers=m.layers, heads=m.heads))
    quiet = Console(file=io.StringIO())
    trainer = Trainer(
        model, NextToken(["random"]), lambda model: make_optimizer(config, model), data, config, console=quiet
    )
    spent: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **more: Any) -> Any:
            start = time.process_time()
            result = function(*args, **more)
            spent.append(time.process_time() - start)
            return result

        return wrapper

    class Whole(Hooks):
        def before_step(self, trainer: Trainer) -> None:
            if trainer.step == 1:  # the first makes states
                spent.clear()
                self.start = time.process_time()

        def on_log(self, trainer: Trainer, values: dict[str, Any]) -> None:
            self.seconds = time.process_time() - self.start

    whole = Whole()
    trainer.hooks.append(whole)
    monkeypatch.setattr(trainer.module, "forward", timed(trainer.module.forward))
    monkeypatch.setattr(Tensor, "backward", timed(Tensor.backward))
    monkeypatch.setattr(trainer.optimizer, "step", timed(trainer.optimizer.step))
    trainer.fit()
    assert len(spent) == 3 * 5
    assert 1 - sum(spent) / whole.seconds < 0.03
