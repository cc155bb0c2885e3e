"""Checkpoints of a program of one's own: what they keep, what is damaged, and disks that are full."""

import copy
import errno
import hashlib
import json
import math
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from llmfast.optim import FusedAdamW, FusedSGD
from llmfast.train import checkpoint
from llmfast.train.checkpoint import Checkpoints, settings_of
from llmfast.train.config import Config
from llmfast.train.metrics import read_metrics
from llmfast.train.parallel import World
from llmfast.train.parts import make_optimizer
from llmfast.train.trainer import Hooks, NonFinite, Stream, Trainer
from support.disk import Disk
from support.programs import (
    OPTIMIZERS,
    ROWS,
    VOCABULARY,
    Model,
    Optimizer,
    adamw,
    assert_same,
    batches,
    fused,
    model_of,
    settings,
    trainer_of,
    weighted,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")

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
    """Use dropout, tied weights and a generator of batches, and resume within a line of the log."""
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
def test_counts_survive_a_resume(make: Callable[[nn.Module], Optimizer], tmp_path: Path) -> None:
    """They are the skipped steps, and the losses by which a jump of the loss is recognised."""
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
    """Return weights and moments with all their bits, in whatever format they are kept."""
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
    """Model that is partly frozen, partly unused, and has a tensor that is not a parameter."""

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


def test_an_old_checkpoint_elsewhere_loses_its_link(tmp_path: Path) -> None:
    """Leave what was moved to another disk there, and no link to it: that was the next one's `.partial`."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    trainer, _ = trainer_of(settings(steps=3, save_every=10, keep_last=1), run=run)
    trainer.fit()
    (run / "checkpoint-00000003").rename(disk)
    (run / "checkpoint-00000003").symlink_to(disk)
    (run / ".checkpoint-00000004.partial").symlink_to(disk)
    trainer.config.train.steps = 4
    trainer.fit()
    assert [f.name for f in run.iterdir() if "checkpoint" in f.name] == ["checkpoint-00000004"]
    assert (disk / "meta.json").exists()


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
def test_a_damaged_checkpoint_is_skipped_and_written_again(
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
    """Keep one checkpoint; if the damaged one counted as the newest, those written later would be removed."""
    trainer_of(settings(steps=8, save_every=4, keep_last=2), run=tmp_path)[0].fit()
    cut(tmp_path / "checkpoint-00000008")
    resumed, _ = trainer_of(settings(steps=6, keep_last=1), run=tmp_path)
    good = Checkpoints(tmp_path, World(torch.device("cpu")))
    assert good.last_good() == f"the last good one is {tmp_path / 'checkpoint-00000004'}"
    resumed.resume()
    resumed.fit()
    assert saved(tmp_path) == [6]
    cut(tmp_path / "checkpoint-00000006")
    assert good.last_good() == "there is no earlier one"


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


def rewrite(file: Path, meta: dict[str, Any]) -> None:
    """Replace a checkpoint's meta.json, and its checksum."""
    file.write_text(json.dumps(meta))
    sums = json.loads((file.parent / "checksums.json").read_text())
    sums["meta.json"] = [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
    (file.parent / "checksums.json").write_text(json.dumps(sums))


def test_a_meta_that_no_trainer_wrote_is_an_error(tmp_path: Path) -> None:
    """Spoil one value at a time, in a file whose checksum is right."""
    trainer_of(settings(steps=4), fused, run=tmp_path)[0].fit()
    (file,) = tmp_path.glob("checkpoint-*/meta.json")
    meta = json.loads(file.read_text())
    counts = {name: (None, "4", 4.0, True, -1, 1 << 63) for name in ("step", "sequences", "tokens", "skipped")}
    wrong = {
        **counts,
        "logged_step": (None, -1),
        "step": (*counts["step"], 3, 5),  # of another folder
        "recent": (None, 1.5, [1], ["1.5"]),
        "about": (None, []),
        "groups": ({}, [1]),
    }
    resumed, _ = trainer_of(settings(), fused, run=tmp_path, model=model_of(seed=5))
    before = weights(resumed)
    for key, values in wrong.items():
        for value in values:
            rewrite(file, meta | {key: value})
            with pytest.raises(OSError, match=r"meta\.json must have the counts step, sequences, tokens"):
                resumed.resume()
            assert resumed.step == 0
    assert_same(weights(resumed), before)
    rewrite(file, meta)
    resumed.resume()
    assert resumed.step == 4


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_groups_of_earlier_checkpoints(make: Callable[[nn.Module], Optimizer], tmp_path: Path) -> None:
    """Earlier checkpoints do not record the settings with which groups were made; our groups hold nothing else."""
    trainer_of(settings(steps=4), make, run=tmp_path)[0].fit()
    for file in tmp_path.glob("checkpoint-*/meta.json"):
        rewrite(file, {k: v for k, v in json.loads(file.read_text()).items() if k != "groups"})

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

    with pytest.raises(OSError, match=r"checkpoint-00000004 does not fit the current optimizer: ") as e:
        trainer_of(settings(), refusing, run=tmp_path)[0].resume()
    assert str(e.value).endswith("optimizer: master_weights='split16' must be 'split8'; not both")


def test_a_stream_refuses_another_batch_size() -> None:
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
    model.register_buffer("ballast", torch.zeros(250_000))  # much larger than random numbers' states
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
            if trainer.step == 7:
                assert trainer.checkpoints._writing is not None
                trainer.checkpoints._writing[1].exception(20)

    trainer, _ = trainer_of(settings(steps=100, save_every=3, keep_last=2), run=tmp_path, hooks=[Fill()])
    with pytest.raises(OSError, match=r"^checkpoint-00000006 could not be written: .*No space left on device; ") as e:
        trainer.fit()
    assert str(e.value).endswith(f"; the last good one is {tmp_path / 'checkpoint-00000003'}")
    assert str(e.value).count("\n") == 0
    assert 6 <= trainer.step <= 8 and saved(tmp_path) == [3] and not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    resumed, _ = trainer_of(settings(steps=7), run=tmp_path)
    resumed.resume()
    assert resumed.step == 3 and resumed.fit()
    assert saved(tmp_path) == [3, 7] and not list(tmp_path.glob(".*"))


def test_the_last_one_that_could_not_be_written_can_be_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train nothing in between; the checkpoint must still not count as saved."""

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
                (tmp_path / "metrics.jsonl").unlink()
                (tmp_path / "metrics.jsonl").symlink_to("/dev/full")

    trainer, _ = trainer_of(settings(save_every=3), run=tmp_path, hooks=[Fill()])
    with pytest.raises(OSError, match=r"metrics.jsonl could not be written: .*No space left on device; the last") as e:
        trainer.fit()
    assert str(e.value).endswith(f"the last good one is {tmp_path / 'checkpoint-00000003'}") and trainer.step == 5


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    def remove(then: Callable[..., Any]) -> Callable[..., Any]:
        def first(*args: Any) -> Any:
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").write_text("a file")
            return then(*args)

        return first

    for method, message in (("_log", "metrics.jsonl could not be"), ("save", "checkpoint-00000001 cannot be")):
        trainer, _ = trainer_of(settings(steps=1), run=tmp_path / "run")
        setattr(trainer, method, remove(getattr(trainer, method)))
        with pytest.raises(OSError, match=rf"^{message} written.*{tmp_path / 'run'}.*; there is no earlier one$"):
            trainer.fit()
        (tmp_path / "run").unlink()


# Parts, each by itself.


@pytest.mark.parametrize(("free", "fits"), [(1049, False), (1050, True), (10**9, True), (0, False)])
def test_room_is_needed_for_a_little_more_than_the_tensors(
    free: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    (stale := tmp_path / ".checkpoint-00000001.partial").mkdir()
    checkpoints = Checkpoints(tmp_path, World(torch.device("cpu")))
    problem = checkpoints._make_room(tmp_path / "checkpoint-00000007", 1000)
    assert (problem == "") == fits == (tmp_path / ".checkpoint-00000007.partial").exists() and not stale.exists()
    assert fits or problem.endswith("are free; there is no earlier one")


def test_bytes_of_all_tensors_are_counted() -> None:
    t = torch.zeros(3, dtype=torch.float64)
    assert checkpoint._bytes_of({"a": [t, (t.half(), {"b": t.to(torch.int8)})], "c": 5, "d": "x", "e": None}) == 33
    assert checkpoint._bytes_of([]) == 0


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    names = ["checkpoint-00000009", "checkpoint-100000000", "checkpoint-00000010", "checkpoint-99999999"]
    for name in [*names, "checkpoint-best", ".checkpoint-00000011.partial", "checkpoint-", "checkpoint-1e3", "other-3"]:
        (tmp_path / name).mkdir()
    steps = [9, 10, 99999999, 100000000]
    assert [checkpoint._step_of(folder) for folder in checkpoint._checkpoints(tmp_path)] == steps
    assert [checkpoint._step_of(folder) for folder in checkpoint._checkpoints(tmp_path, after=10)] == steps[2:]
    assert checkpoint.newest_step(tmp_path) == 100000000 and checkpoint.newest_step(tmp_path / "none") is None


META = {"step": 7, "sequences": 28, "tokens": 99, "skipped": 0, "logged_step": 5, "recent": [1.0, math.nan]}


@pytest.mark.parametrize(
    ("changed", "good"),
    [
        ({}, True),
        ({"about": {"a": 1}, "groups": [{}, {"lr": "1"}], "more": None}, True),
        ({"recent": [], "tokens": 2**63 - 1}, True),
        *(({name: wrong}, False) for name in META if name != "recent" for wrong in (-1, 2**63, 1.0, True, "1", None)),
        *(({"recent": wrong}, False) for wrong in (None, {}, "1.0", [1], ["x"], [None])),
        *(({"about": wrong}, False) for wrong in (None, [], "x")),
        *(({"groups": wrong}, False) for wrong in (None, {}, [1], [{}, []])),
        ({"step": 8}, False),
    ],
    ids=str,
)
def test_what_is_saved_next_to_the_tensors_is_checked(changed: dict[str, Any], good: bool, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-00000007"
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps(META | changed))
    with nullcontext() if good else pytest.raises(OSError, match="must have the counts step, sequences, tokens, "):
        assert checkpoint._meta(folder)["step"] == 7
    for name in META:
        (folder / "meta.json").write_text(json.dumps({key: x for key, x in META.items() if key != name}))
        with pytest.raises(OSError, match="must have the counts"):
            checkpoint._meta(folder)
    for text in ("", "{", "[]", "[" * 100_000):
        (folder / "meta.json").write_text(text)
        with pytest.raises(OSError, match=r"meta\.json (is not JSON|must have)"):
            checkpoint._meta(folder)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5 << 19])
def test_the_digest_is_of_the_whole_file(size: int, tmp_path: Path) -> None:
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "file").write_bytes(content)
    assert checkpoint._sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("cuda", [False, True])
def test_each_rank_has_generators_of_its_own(rank: int, cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.ones(2))
    found = checkpoint._rng(rank)
    assert found.keys() == {f"cpu{rank}"} | ({f"cuda{rank}"} if cuda else set())
    assert torch.equal(found[f"cpu{rank}"], torch.get_rng_state())


@pytest.mark.parametrize("save_again", [False, True])
def test_an_error_of_the_disk_is_told_once_and_leaves_nothing(
    save_again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer, _ = trainer_of(run=tmp_path)
    trainer.save()
    assert trainer.checkpoints is not None
    trainer.checkpoints.wait()
    trainer.step = 3
    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", full)
        trainer.save()
        with pytest.raises(OSError, match=r"checkpoint-00000003 could not be written: .*No space.*; the last good one"):
            trainer.checkpoints.wait()
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-00000000"]
    assert not trainer.checkpoints.is_saved(3) and not trainer.checkpoints.failed
    trainer.checkpoints.wait()  # has nothing more to say
    if save_again:
        trainer.save()
        trainer.checkpoints.wait()
        assert saved(tmp_path) == [0, 3] and trainer.checkpoints.is_saved(3)


def test_settings_of_groups_are_noted_in_full() -> None:
    """A rate in a tensor, which prints as 0.1235, is compared to its last bit; parameters and names are none."""
    optimizer = fused(nn.Linear(2, 2))
    optimizer.param_groups[0] |= {"lr": torch.tensor(0.123456789), "param_names": ["a"]}
    (noted,) = settings_of(optimizer)
    assert noted["lr"] == repr(torch.tensor(0.123456789).item()) and not noted.keys() & {"params", "param_names"}


def test_the_last_good_checkpoint_is_the_newest_whole_one(tmp_path: Path) -> None:
    trainer_of(settings(steps=6, save_every=2, keep_last=3), run=tmp_path)[0].fit()
    found = Checkpoints(tmp_path, World(torch.device("cpu")))
    for step in (6, 4, 2):
        assert found.last_good() == f"the last good one is {tmp_path / f'checkpoint-0000000{step}'}"
        assert found._newest() == tmp_path / f"checkpoint-0000000{step}"
        cut(tmp_path / f"checkpoint-0000000{step}")
    assert found.last_good() == "there is no earlier one" and checkpoint.newest_step(tmp_path) == 6
