"""The trainer inside a program of one's own, in one process: what it computes, says and refuses, and what it costs."""

import copy
import io
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import accumulate, islice, pairwise, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from llmfast.data import ByteTokenizer, Dataset, Mixed, Mixture, pack
from llmfast.models import Decoder, DecoderConfig
from llmfast.optim import FusedAdamW, optimizer_in_backward
from llmfast.train.config import Config
from llmfast.train.objective import NextToken, Summed
from llmfast.train.parallel import World
from llmfast.train.parts import make_optimizer
from llmfast.train.settings import ConfigError
from llmfast.train.signals import handled
from llmfast.train.trainer import Hooks, NonFinite, Stream, Trainer, on_device
from support.programs import (
    OPTIMIZERS,
    Batch,
    Optimizer,
    assert_same,
    batches,
    fused,
    loss_of,
    model_of,
    settings,
    trainer_of,
    weighted,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")

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


def test_a_schedule_over_an_optimizers_own_rate_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Say nothing if the rate is that of the settings, or if they leave it alone."""

    def sgd(model: nn.Module, lr: float = 0.02) -> Optimizer:
        return torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=lr)

    def said(lr: float, *, made: bool = True, other: bool = False, **values: Any) -> str:
        model = model_of()
        optimizer = sgd(model, lr)
        if other:
            torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        given: Any = optimizer if made else lambda model: sgd(model, lr)
        trainer, _ = trainer_of(settings(**values), given, model=model, console=Console(width=500))
        trainer.fit()
        return capsys.readouterr().out

    over = "config.optimizer.schedule is laid over the optimizer's own learning rate, "
    usual = f"{over}0.02: 2 steps of warm-up, then cosine"
    assert f"{usual} to 10 % at step 6. With schedule='constant', warmup_steps=0 and lr_sc" in said(0.02)
    assert usual in said(0.02, made=False)
    assert "; what another scheduler sets is replaced in each step" in said(0.02, other=True)
    linear: dict[str, Any] = {"warmup_steps": 0, "schedule": "linear", "final_lr": 0.5}
    assert "0.01: linear to 50 % at step 6." in said(0.01, **linear)
    constant: dict[str, Any] = {"warmup_steps": 0, "schedule": "constant"}
    assert "laid over" not in said(0.02, **constant) + said(0.01, made=False)
    assert "0.02: times 2 for the batch size." in said(0.02, **constant, lr_scaling="sqrt", base_batch_size=1)


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


def test_a_line_is_about_the_steps_since_the_last_one(tmp_path: Path) -> None:
    """Compute each line of seven steps by hand: a line every three steps, an evaluation every two."""
    config = settings(steps=7, log_every=3, eval_every=2, save_every=100)
    held_out = next(batches(rows=2, seed=9))
    given = list(islice(batches(), 7))
    steps: list[tuple[float, float]] = []  # the rate and the gradient's norm of each

    class Record(Hooks):
        def after_step(self, trainer: Trainer) -> None:
            norm: Tensor = trainer.optimizer.grad_norm  # type: ignore[attr-defined]
            steps.append((trainer.optimizer.param_groups[0]["lr"], norm.item()))
            losses.append(loss_of(copy.deepcopy(trainer.model), given[len(steps)]).item() if len(steps) < 7 else 0.0)

    model = model_of()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    validation = {"held out": lambda: [held_out]}
    trainer, _ = trainer_of(config, fused, hooks=[Record()], model=model, run=tmp_path, validation=validation)
    losses = [loss_of(copy.deepcopy(trainer.model), given[0]).item()]
    assert trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    counts = [int((batch["labels"] != -100).sum()) for batch in given]
    tokens = [0, *accumulate(counts)]
    means = [loss / count for loss, count in zip(losses, counts)]
    assert [(line["step"], "loss" in line) for line in lines] == [
        *((0, False), (2, False), (3, True), (4, False), (6, True), (6, False), (7, True), (7, False))
    ]
    for line in lines:
        assert line["tokens"] == tokens[line["step"]]
        if "loss" not in line:
            assert line.keys() == {"step", "tokens", "validation", "validation_mean"}
            continue
        first, last = {3: (0, 3), 6: (3, 6), 7: (6, 7)}[line["step"]]
        assert line["loss"] == pytest.approx(sum(means[first:last]) / (last - first), rel=1e-5)
        assert (line["lr"], line["grad_norm"]) == pytest.approx(steps[last - 1], rel=1e-5)
        assert line["sequences"] == last * config.train.batch_size and line["tokens_per_s"] > 0
        assert line["memory_bytes"] > 1 << 20 and "skipped" not in line and "spike" not in line


def test_the_time_of_a_step_is_without_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a clock that goes on by a second with each batch of training, and by an hour with each evaluation."""
    now = [0.0]

    def passing(some: Iterator[Batch], seconds: float) -> Iterator[Batch]:
        for batch in some:
            now[0] += seconds
            yield batch

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("llmfast.train.trainer.time", clock)
    speeds, tokens = [], [0]

    class Look(Hooks):
        def on_log(self, trainer: Trainer, values: dict[str, Any]) -> None:
            speeds.append(values["tokens_per_s"])
            tokens.append(trainer.tokens)

    config, held_out = (
        settings(steps=6, log_every=2, eval_every=3),
        {"held out": lambda: passing(islice(batches(), 1), 3600.0)},
    )
    trainer, _ = trainer_of(config, data=passing(batches(), 1.0), validation=held_out, hooks=[Look()])
    trainer.fit()
    assert trainer.seconds == 6.0
    assert speeds == [(b - a) / 2 for a, b in pairwise(tokens)]


def test_details_are_asked_for_in_the_steps_that_end_in_a_line() -> None:
    asked: list[tuple[int, bool]] = []

    class Looking(Summed):
        def __call__(self, model: nn.Module, batch: Any, num_valid: Tensor, step: int, detail: bool) -> Any:
            asked.append((step, detail))
            return super().__call__(model, batch, num_valid, step, detail)

    trainer, written = trainer_of(settings(steps=7, log_every=3), fused, loss=Looking(loss_of))
    trainer.fit()
    assert len(written.lines) == 3
    assert asked == [(step, step + 1 in (3, 6, 7)) for step in range(7)]


def test_what_is_logged_does_not_change_what_is_trained() -> None:
    found = []
    for log_every in (1, 4):
        trainer, _ = trainer_of(settings(log_every=log_every), fused)
        trainer.fit()
        found.append(weights(trainer))
    assert_same(*found)


# Steps that go wrong.


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
    """Measure processor time at the size of `make train`; other processes may be running."""
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

    outside: list[float] = []

    class Whole(Hooks):
        def before_step(self, trainer: Trainer) -> None:
            spent.clear()
            self.start = time.process_time()

        def after_step(self, trainer: Trainer) -> None:
            assert len(spent) == 3
            outside.append(1 - sum(spent) / (time.process_time() - self.start))

    trainer.hooks.append(Whole())
    monkeypatch.setattr(trainer.module, "forward", timed(trainer.module.forward))
    monkeypatch.setattr(Tensor, "backward", timed(Tensor.backward))
    monkeypatch.setattr(trainer.optimizer, "step", timed(trainer.optimizer.step))
    trainer.fit()
    # The median, because the garbage collector may run in one step, and this process has many objects.
    assert statistics.median(outside) < 0.03


@pytest.mark.parametrize(
    ("recent", "limit"),
    [
        ([3.0] * 30, 3.06),  # losses that hardly differ are taken to differ by 0.01
        ([2.0, 4.0] * 10, 9.0),  # mean 3, deviation 1
        ([2.0, 4.0] * 15, 9.0),
        ([2.0, 4.0] * 7, math.inf),  # too few to tell
        ([2.0, 4.0] * 7 + [3.0], 3 + 6 * math.sqrt(14 / 15)),
    ],
)
def test_a_jump_is_six_deviations_above_the_mean(recent: list[float], limit: float) -> None:
    trainer: Any = SimpleNamespace(_recent=recent)
    for loss in (0.0, 3.0, limit - 1e-6 if math.isfinite(limit) else 1e9):
        assert not Trainer._is_spike(trainer, loss)
    for loss in (limit + 1e-6, math.inf, math.nan):
        assert Trainer._is_spike(trainer, loss) == math.isfinite(limit)


def test_thirty_lines_are_remembered() -> None:
    trainer, written = trainer_of(settings(steps=35, lr=1e-5), fused)
    trainer.fit()
    assert trainer._recent == written["loss"][-30:]


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_ends_the_run_after_the_step_and_the_second_at_once(number: int) -> None:
    before, calls = signal.getsignal(number), list[int]()

    class Stop(Hooks):
        def before_step(self, trainer: Trainer) -> None:
            if trainer.step == 2:
                signal.raise_signal(number)

        def after_step(self, trainer: Trainer) -> None:
            calls.append(trainer.step)

    trainer, _ = trainer_of(hooks=[Stop()])
    assert not trainer.fit() and calls == [1, 2, 3] and signal.getsignal(number) is before
    with handled(trainer._stop_soon):
        signal.raise_signal(number)
        # A closed terminal sends several signals, of the system and of the shell.
        with nullcontext() if number == signal.SIGHUP else pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("terminal", [False, True])
def test_a_console_that_fails_does_not_end_training(
    terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Break the pipe before step 3 of 6; all else of the run is written, and a word on stderr."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal)

    def broken(text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    class Break(Hooks):
        def before_step(self, trainer: Trainer) -> None:
            if trainer.step == 2:
                stream.write = broken  # type: ignore[method-assign]

    trainer, written = trainer_of(settings(steps=6), hooks=[Break()], console=console, run=tmp_path)
    assert trainer.fit() and len(written["loss"]) == 6
    assert [f.name for f in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000006"]
    console.print("nothing of this is written")
    assert console.quiet and console.file is stream
    told = "llmfast: output could not be written, and ends here; all else goes on: [Errno 32] Broken pipe\n"
    assert capsys.readouterr().err == told


def test_every_group_must_skip_bad_steps() -> None:
    def make(model: nn.Module, *limits: float | None) -> Optimizer:
        groups = [{"params": [p], "max_grad_norm": x} for p, x in zip(model.parameters(), limits)]
        return FusedAdamW(groups)

    with pytest.raises(ValueError, match=r"needs max_grad_norm in every group .*; got None in group 1$"):
        trainer_of(make=lambda model: make(model, 1.0, None))


def test_the_rate_of_settings_may_be_zero() -> None:
    trainer, written = trainer_of(settings(lr=0.0), fused)
    before = weights(trainer)
    trainer.fit()
    assert written["lr"] == [0.0] * 6
    assert_same(weights(trainer), before)


def test_the_length_of_data_of_ones_own_is_not_known() -> None:
    with pytest.raises(ConfigError, match=r"train.epochs must be 0 here, .*; got 0.5$"):
        trainer_of(settings(epochs=0.5))


def test_a_stream_begins_where_its_batches_do() -> None:
    stream = Stream(iter("abc"))
    assert [stream.batch(0, 4), stream.batch(4, 4)] == ["a", "b"]
    for first in (1, 9):
        with pytest.raises(ValueError, match=f"batches of 4 sequences: none begins at sequence {first}"):
            stream.batch(first, 4)
    for first in (0, 4):
        with pytest.raises(ValueError, match="cannot go back"):
            stream.batch(first, 4)
    assert stream.batch(8, 4) == "c"


def test_a_set_without_labels_has_no_loss_and_no_tokens() -> None:
    empty = {**next(batches()), "labels": torch.full((4, 8), -100)}
    modes: list[bool] = []
    trainer, _ = trainer_of(validation={"none": lambda: [empty], "no batch": lambda: []})
    trainer.module.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    assert trainer.evaluate() == {"none": (0.0, 0), "no batch": (0.0, 0)}
    assert modes == [False] and trainer.module.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_on_for_every_other_type(dtype: torch.dtype) -> None:
    seen: list[Any] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["tokens"])
        seen.append((torch.is_autocast_enabled("cpu"), logits.dtype))
        return loss_of(model, batch)

    trainer, _ = trainer_of(
        settings(steps=1), fused, loss=loss, dtype=dtype, validation={"x": lambda: [next(batches())]}
    )
    trainer.fit()
    assert seen == [(dtype == torch.bfloat16, dtype)] * 3


def test_gradients_are_gone_after_a_step() -> None:
    class Look(Hooks):
        def after_step(self, trainer: Trainer) -> None:
            assert all(p.grad is None for p in trainer.model.parameters())

    for make in OPTIMIZERS:
        trainer_of(settings(steps=2), make, hooks=[Look()])[0].fit()


class Counted:
    """Data that knows where it was: what it says is saved, and shown to it again."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.read = Stream(batches())

    def batch(self, first: int, count: int) -> Any:
        return self.read.batch(first, count)

    def state(self) -> dict[str, int]:
        return {"number": self.read._next}

    def resume(self, *args: Any) -> None:
        self.taken.append(args)


def test_what_is_saved_is_shown_again(tmp_path: Path) -> None:
    saved: list[int] = []

    class Look(Hooks):
        def on_save(self, trainer: Trainer) -> None:
            saved.append(trainer.step)

    def made(**more: Any) -> tuple[Trainer, Counted]:
        data = Counted()
        config = settings(steps=7, save_every=3, log_every=5, keep_last=1)
        return trainer_of(config, fused, data=data, run=tmp_path, hooks=[Look()], about={"mine": [1]}, **more)[0], data

    trainer, _ = made()
    trainer.fit()
    assert saved == [3, 6, 7] and [f.name for f in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000007"]
    trainer.save()  # nothing was trained since
    assert saved == [3, 6, 7]
    shown: list[Any] = []
    again, data = made()
    again.resume(shown.append)
    (meta,) = shown
    assert meta["about"] == {"mine": [1]} and data.taken == [({"number": 7}, 28)]
    assert (again.step, again.sequences, again.tokens, again.logged_step) == (7, 28, trainer.tokens, 7)
    assert again._recent == trainer._recent == meta["recent"] and meta["groups"] == again._settings

    class Refused(Exception):
        pass

    def refuse(meta: Any) -> None:
        raise Refused

    third, data = made()
    before = weights(third)
    with pytest.raises(Refused):
        third.resume(refuse)
    assert third.step == 0 and data.taken == []
    assert_same(weights(third), before)
    with pytest.raises(ValueError, match="resume needs a run folder"):
        trainer_of()[0].resume()


def test_the_rate_of_the_first_group_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(model: nn.Module) -> Optimizer:
        first, *rest = model.parameters()
        return FusedAdamW([{"params": [first], "lr": 0.5}, {"params": rest}], lr=0.01, max_grad_norm=1.0)

    trainer, written = trainer_of(settings(steps=2, schedule="constant", warmup_steps=0), make)
    trainer.fit()
    assert written["lr"] == pytest.approx([0.5, 0.5])
    assert trainer.optimizer.param_groups[1]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_log_may_also_be_events(tensorboard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmfast.train import trainer as module

    made: list[Any] = []
    original = module.MetricsFile
    monkeypatch.setattr(module, "MetricsFile", lambda path, **how: made.append(how) or original(path))
    trainer_of(settings(steps=1, tensorboard=tensorboard), run=tmp_path)[0].fit()
    assert made == [{"resume_at": 0, "tensorboard": tensorboard}]


@pytest.mark.parametrize(("most", "ends"), [(0, None), (1, 2), (3, 4), (6, None)])
def test_a_run_ends_with_one_skipped_step_more_than_it_may_have(most: int, ends: int | None) -> None:
    """None of six gradients is finite, and 0 sets no limit."""
    trainer, _ = trainer_of(settings(max_skipped=most), fused, data=batches(bad=tuple(range(6))), loss=weighted)
    if ends is None:
        assert trainer.fit() and trainer.skipped == 6
    else:
        with pytest.raises(NonFinite, match=rf"^{ends} steps had a gradient .*, more than train\.max_skipped={most}$"):
            trainer.fit()
        assert trainer.step == ends


@pytest.mark.parametrize(("log", "evaluate", "save"), list(permutations((2, 3, 5))))
def test_each_thing_is_done_as_often_as_its_own_setting_says(
    log: int, evaluate: int, save: int, tmp_path: Path
) -> None:
    """Everything is done after the last of seven steps, too, and only the evaluation before the first."""
    done: dict[str, list[int]] = {"log": [], "evaluate": [], "save": []}

    class Note(Hooks):
        def on_log(self, trainer: Trainer, values: dict[str, Any]) -> None:
            done["log"].append(trainer.step)

        def on_evaluate(self, trainer: Trainer, losses: dict[str, float]) -> None:
            done["evaluate"].append(trainer.step)

        def on_save(self, trainer: Trainer) -> None:
            done["save"].append(trainer.step)

    config = settings(steps=7, log_every=log, eval_every=evaluate, save_every=save)
    trainer, _ = trainer_of(config, fused, run=tmp_path, hooks=[Note()], validation={"x": lambda: [next(batches())]})
    trainer.fit()
    every = {"log": log, "evaluate": evaluate, "save": save}
    assert done == {
        name: [0] * (name == "evaluate") + [i for i in range(1, 8) if i % n == 0 or i == 7] for name, n in every.items()
    }


def test_one_label_is_enough_to_validate() -> None:
    batch = next(batches())
    batch["labels"].flatten()[1:] = -100
    trainer, _ = trainer_of(validation={"one": lambda: [batch], "twice": lambda: [batch, batch]})
    loss = loss_of(copy.deepcopy(trainer.model).eval(), batch).item()
    assert int((batch["labels"] != -100).sum()) == 1 and loss > 0
    assert trainer.evaluate() == {"one": (pytest.approx(loss), 1), "twice": (pytest.approx(loss), 2)}


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_prints(rank: int, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(torch.device("cpu"), rank)
    trainer, _ = trainer_of(settings(steps=1), fused, world=world, console=None)
    trainer.say("a line of the first")
    assert capsys.readouterr().out == ("a line of the first\n" if rank == 0 else "")
