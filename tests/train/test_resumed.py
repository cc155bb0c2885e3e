"""Tests that `--resume` and `train.init_from` either apply every setting or reject it by name."""

import ast
import dataclasses
import io
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from llmfast.data import Mixed
from llmfast.models import Decoder
from llmfast.optim.kept import decoded
from llmfast.train.config import (
    SCHEMA,
    WEIGHTS,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    decoder_config,
    load_config,
)
from llmfast.train.earlier import resumed_config
from llmfast.train.parts import make_optimizer
from llmfast.train.run import train
from llmfast.train.schedule import lr_of_step
from llmfast.train.settings import ConfigError
from llmfast.train.trainer import Hooks, Trainer
from support.checkpoints import signed

pytestmark = pytest.mark.usefixtures("one_thread", "unpictured")
SETTINGS = [name for name in SCHEMA.settings if "." in name]
# Read only where there are several ranks; tests/train/test_ranks.py resumes under others.
OF_RANKS = {"train.parallel", "train.shard_size"}
VOCABULARY = 264  # 256 bytes, five special tokens, and three that the texts here have enough of
# With these, every other setting means something: depths, heads of their own, a scaled rate, 16-bit parameters.
BASE = [
    *("data.tokenizer=bpe", f"data.vocab_size={VOCABULARY}"),
    *("data.seq_len=16", "data.held_out=0.3", "data.fim_rate=0.5"),
    *("model.width=16", "model.layers=1", "model.heads=2", "model.tie_embeddings=false"),
    *("model.mtp=sequential", "model.mtp_heads=1"),
    *("optimizer.lr_scaling=sqrt", "optimizer.base_batch_size=2", "optimizer.master_weights=split16"),
    *("train.steps=2", "train.batch_size=2", "train.eval_rows=2", "train.log_every=1", "train.sample_tokens=1"),
    *("train.device=cpu", "train.param_dtype=bfloat16", "train.shard_size=1"),
]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a run of two steps with some optimizer, once."""
    folder = tmp_path_factory.mktemp("resumed")
    for source in ("a", "b"):
        (folder / source).mkdir()
        for i in range(12):
            (folder / source / f"{i}.txt").write_text(f"{i} and {source} make {i}{source}.\n" * 9)
    where = [f"data.sources=['{folder / 'a'}', 'b={folder / 'b'}']", *BASE, "name=base"]

    @cache
    def base(optimizer: str) -> Path:
        mine = [f"runs={folder / optimizer}", f"optimizer.name={optimizer}"]
        return train(load_config(None, [*where, *mine]), console=QUIET)

    return base


@pytest.fixture
def base(bases: Callable[[str], Path]) -> Path:
    return bases("adamw")


@pytest.fixture
def copied(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "runs" / "copied"))


@pytest.fixture(autouse=True, scope="module")
def _not_compiled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda self: None)
        patch.setattr("llmfast.train.finish.ACCEPTANCE_PROMPTS", 1)
        yield


def value_of(config: Config, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


def changed(config: Config, name: str) -> str:
    """Return an override that gives a setting another meaningful value."""
    value = value_of(config, name)
    others: list[Any]
    if isinstance(value, bool):
        return f"{name}={'false' if value else 'true'}"
    if isinstance(value, dict):
        return f"{name}.b=" + {"data.split": "'end'"}.get(name, "0.25")
    if isinstance(value, list):
        others = [[*value, "prose"]]
    elif isinstance(value, str):
        others = [{"train.device": "auto", "data.tokenizer": "bytes"}.get(name, "other")]
        if choices := re.search(r"must be one of (.*); got", refusal(config, f"{name}={others[0]}")):
            others = [x for x in ast.literal_eval(f"[{choices[1]}]") if x not in (value, "")]
    else:
        others = [value * 2 or 1, value // 2] if isinstance(value, int) else [value / 2 or 0.5]
    return next(f"{name}={other!r}" for other in others if not refusal(config, f"{name}={other!r}"))


def refusal(config: Config, override: str) -> str:
    """Return what is wrong with the value, if anything."""
    try:
        found = load_config(None, [override], base=config)
        if not found.model.pretrained:
            decoder_config(found, VOCABULARY)
    except ValueError as e:
        return str(e)
    return ""


class Reads:
    """Recorder of the full names of the settings that the trainer's code has read."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.names: set[str] = set()
        for section, kind in zip(
            ("model", "data", "optimizer", "train"), (ModelConfig, DataConfig, OptimizerConfig, TrainConfig)
        ):
            patch.setattr(kind, "__getattribute__", self._reader(section))

    def _reader(self, section: str) -> Any:
        def read(node: Any, key: str) -> Any:
            by = sys._getframe(1).f_globals["__name__"]  # not by what only copies or compares all of them
            if by.startswith("llmfast.") and by not in ("llmfast.train.config", "llmfast.train.settings"):
                self.names.add(f"{section}.{key}")
            return object.__getattribute__(node, key)

        return read


def trained(config: Config, **options: bool) -> Trainer:
    """Return the trainer of a run after its last step."""
    seen: list[Trainer] = []
    original = Trainer.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda self: (seen.append(self), original(self))[1])
        train(config, console=QUIET, **options)
    return seen[0]


def described(trainer: Trainer) -> dict[str, Any]:
    """Describe how settings have configured a trainer, without what it has learned."""
    config, optimizer = trainer.config, trainer.optimizer
    assert isinstance(trainer.data, Mixed) and trainer.checkpoints is not None
    return {
        "config": dataclasses.replace(config, name=""),
        "groups": [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups],
        "options": vars(optimizer)["options"],
        "formats": {
            name: {k: (t.dtype, t.shape) for k, t in optimizer.state[p].items()}
            for name, p in trainer.model.named_parameters()
        },
        "rates": [lr_of_step(step, config) for step in range(5)],
        "lr": [group["lr"] for group in optimizer.param_groups],
        "mixture": trainer.data.mixture.phases[-1][1:],
        "rows": trainer.micro_batch_size,
        "kept": (trainer.checkpoints._keep_last, trainer.checkpoints._keep_every),
        "as": (trainer.device, trainer.dtype, list(trainer.validation)),
        "ids": trainer.data.dataset.tokenizer.encode("1 and a make 1a").tolist(),
        # Of a mixture without a past of other weights.
        "text": None if config.data.weights else trainer.data.batch(50, 4).tokens.tolist(),
    }


def contents(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_stays_what_it_was() -> None:
    """Refuse another model, other data except for weights of the future, and other beginnings."""
    kept = {name for name in SETTINGS if SCHEMA.settings[name].declared["kept"]}
    whole = {name for name in SETTINGS if name.startswith(("data.", "model."))} - {"data.weights", "model.mtp_detach"}
    assert kept - whole == {
        *("optimizer.initial_accumulator_value", "optimizer.name", "train.init_from"),
        *("train.param_dtype", "train.seed"),
    }
    assert kept >= whole


@pytest.mark.filterwarnings("ignore:the state holds remainder")  # bits that "stochastic" has no place for
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_takes_effect_or_is_refused_by_name(
    name: str, bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is added later is tried as well, with an optimizer that has it."""
    base = bases(next(iter(SCHEMA.settings[name].by), "adamw"))
    copied = Path(shutil.copytree(base, tmp_path / "runs" / "copied"))
    before, saved = contents(copied), load_config(base / "config.toml")
    override = changed(saved, name)
    # "rest" of a weight that is given; of no meaning elsewhere.
    more = ["train.steps=3", *([f"data.weights.{saved.data.sources[0]}=rest"] if name == "data.weights" else [])]
    kept = SCHEMA.settings[name].declared["kept"]
    if kept:
        begin = f"; train.init_from={copied} begins it with these weights" if kept != WEIGHTS else ""
        message = rf"^{re.escape(name)} cannot change on --resume: .* has .*; got .*\. Only a new run can have that"
        with pytest.raises(ConfigError, match=message + re.escape(begin) + "$"):
            resumed_config(copied, [override])
        direct = load_config(copied / "config.toml", [override, f"runs={copied.parent}", "name=copied"])
        with pytest.raises(ConfigError, match=rf"^{re.escape(name)} cannot change on --resume: "):
            train(direct, resume=True, console=QUIET)
        assert contents(copied) == before
        return

    def settings(*others: str) -> Config:
        return load_config(base / "config.toml", [*([] if name == "train.steps" else more), override, *others])

    try:
        new = trained(settings(f"runs={tmp_path / 'runs'}", "name=new"))
    except ConfigError as e:  # a new run cannot have it here either
        refused = str(e)
    else:
        refused = ""
    if refused:
        assert name in refused
        with pytest.raises(ConfigError, match=re.escape(refused)):
            train(settings(f"runs={copied.parent}", "name=copied"), resume=True, console=QUIET)
        assert contents(copied) == before
        return
    reads = Reads(monkeypatch)
    resumed = trained(settings(f"runs={copied.parent}", "name=copied"), resume=True)
    assert value_of(load_config(copied / "config.toml"), name) == value_of(resumed.config, name)
    if name == "train.epochs":  # settled as the steps that it takes
        assert resumed.config.train.epochs == 0 and resumed.config.train.steps not in (saved.train.steps, 3)
    else:
        assert value_of(resumed.config, name) != value_of(saved, name)
    assert described(resumed) == described(new)
    assert resumed.step == new.step > 2
    assert name in reads.names | OF_RANKS, f"{name} does nothing in a run that goes on: declare it as `kept`"


@pytest.fixture(scope="module")
def plain(bases: Callable[[str], Path]) -> Path:
    """Make a run of six steps at a constant rate, with a checkpoint in the middle."""
    base = bases("adamw")
    always = ["train.steps=6", "train.save_every=3", "optimizer.schedule=constant", "optimizer.warmup_steps=1"]
    return train(load_config(base / "config.toml", [*always, f"runs={base.parent}", "name=plain"]), console=QUIET)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    "override",
    [
        *("optimizer.beta1=0.0", "optimizer.beta2=0.5", "optimizer.eps=1.0", "optimizer.weight_decay=50.0"),
        *("optimizer.max_grad_norm=1e-3", "optimizer.max_grad_norm=0", "optimizer.lr=0.0", "optimizer.lr=0.1"),
        *("optimizer.schedule='linear'", "optimizer.warmup_steps=7", "train.mtp_weight=2.0"),
    ],
)
def test_what_is_given_on_resume_is_what_happens_from_then_on(override: str, plain: Path, tmp_path: Path) -> None:
    """Compare bit for bit with a run that never stopped and in which a program changed the setting."""

    class Change(Hooks):
        def before_step(self, trainer: Trainer) -> None:
            if trainer.step == 3:
                changed = load_config(None, [override], base=trainer.config)
                for section in ("optimizer", "train"):
                    vars(getattr(trainer.config, section)).update(vars(getattr(changed, section)))
                fresh = make_optimizer(trainer.config, trainer.model)
                for group, new in zip(trainer.optimizer.param_groups, fresh.param_groups):
                    group |= {key: new[key] for key in ("betas", "eps", "weight_decay")}
                vars(trainer.optimizer)["options"].max_grad_norm = fresh.options.max_grad_norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmfast.train.run.Utilisation", lambda *_: Change())
        whole = train(load_config(plain / "config.toml", [f"runs={tmp_path}", "name=whole"]), console=QUIET)
    shutil.copytree(plain, folder := tmp_path / "resumed")
    shutil.rmtree(folder / "checkpoint-00000006")
    train(resumed_config(folder, [override]), resume=True, console=QUIET)
    found, wanted, before = weights(folder), weights(whole), weights(plain)
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert not all(torch.equal(found[k], before[k]) for k in before)


def test_fewer_steps_than_are_done_are_refused(copied: Path) -> None:
    before = contents(copied)
    with pytest.raises(ConfigError, match=r"train\.steps must be at least the 2 that .*copied has done; got 1"):
        train(resumed_config(copied, ["train.steps=1"]), resume=True, console=QUIET)
    assert contents(copied) == before


def test_a_run_that_is_not_there_is_told_those_that_are(copied: Path) -> None:
    missing = copied.with_name("nope")
    for run, others in ((missing, f"; it holds runs: {copied.name}"), (missing / "nope", "")):
        with pytest.raises(ConfigError, match=f"^there is no run {run}{others}$"):
            resumed_config(run, [])


def test_a_run_that_was_moved_says_where_it_is(copied: Path) -> None:
    moved = copied.rename(copied.with_name("moved"))
    assert load_config(moved / "config.toml").name == "base"
    console = Console(file=io.StringIO(), width=400)
    assert train(resumed_config(moved, ["train.steps=3"]), resume=True, console=console) == moved
    assert f"run folder {moved}, going on after step 2, ready after" in console.file.getvalue()  # type: ignore[attr-defined]
    train(resumed_config(moved, []), resume=True, console=console)
    done = "all 3 steps were done before: more need a larger train.steps; ready after"
    assert f"run folder {moved}, {done}" in console.file.getvalue()  # type: ignore[attr-defined]
    config = load_config(moved / "config.toml")
    assert (config.name, config.runs, config.train.steps) == ("moved", str(moved.parent), 3)


def edited(folder: Path, before: str, after: str) -> None:
    file = folder / "config.toml"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [("heads = 2", "heads = 4", "model.heads"), ("seed = 0", "seed = 1", "train.seed")],
)
def test_settings_edited_in_a_runs_folder_are_noticed(before: str, after: str, name: str, copied: Path) -> None:
    edited(copied, before, after)
    now = contents(copied)
    with pytest.raises(ConfigError, match=rf"{name} cannot change on --resume: the checkpoint in .* has .; got "):
        train(resumed_config(copied, ["train.steps=3"]), resume=True, console=QUIET)
    assert contents(copied) == now
    signed(copied / "checkpoint-00000002", about=None)  # as earlier versions wrote it
    train(resumed_config(copied, ["train.steps=3"]), resume=True, console=QUIET)


def test_another_tokenizer_in_a_runs_folder_is_noticed(copied: Path, base: Path) -> None:
    file = copied / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    message = r"tokenizer\.json is not the tokenizer that .* was trained with: its SHA-256 was .*, and is "
    with pytest.raises(ConfigError, match=message):
        train(resumed_config(copied, ["train.steps=3"]), resume=True, console=QUIET)
    with pytest.raises(ConfigError, match=message):
        begun_from(copied, base)


def test_settings_of_a_checkpoint_that_are_none(copied: Path) -> None:
    for settings, message in ((3, "settings must be a table; got 3"), ({"model": {"hight": 2}}, "unknown key model.h")):
        signed(copied / "checkpoint-00000002", about={"settings": settings})
        with pytest.raises(ConfigError, match=f"the checkpoint in .*: {message}"):
            train(resumed_config(copied, []), resume=True, console=QUIET)


STILL = ["optimizer.lr=0", "train.steps=3", "train.save_every=9"]


@pytest.fixture(scope="module")
def same(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Return the trainer of a run that went on for a step in the formats that it had."""
    other = shutil.copytree(bases("adamw"), tmp_path_factory.mktemp("same") / "other")
    return trained(resumed_config(Path(other), STILL), resume=True)


@pytest.mark.parametrize("master", ["", "fp32", "split16", "split8", "kahan", "stochastic"])
@pytest.mark.parametrize("state_dtype", ["", "float32", "8bit"])
@pytest.mark.filterwarnings("ignore:the state holds")
def test_formats_convert(master: str, state_dtype: str, copied: Path, same: Trainer) -> None:
    """Convert the parameters' extra bits and the moments from split16 and bfloat16 to all other formats."""
    overrides = [f"optimizer.master_weights='{master}'", f"optimizer.state_dtype='{state_dtype}'", "optimizer.lr=0"]

    def values(trainer: Trainer) -> list[tuple[Tensor, ...]]:
        optimizer: Any = trainer.optimizer
        return [
            (optimizer.master_value(p).float(), *(number(optimizer, p, name) for name in ("exp_avg", "exp_avg_sq")))
            for p in trainer.model.parameters()
        ]

    def number(optimizer: Any, p: Tensor, name: str) -> Tensor:
        state = optimizer.state[p]
        found: Tensor = decoded(state, name) if f"{name}_scale" in state else state[name].float()
        return found

    now = trained(resumed_config(copied, [*STILL, *overrides]), resume=True)
    kept = {"fp32": 24, "split16": 24, "split8": 16, "kahan": 15}.get(master, 8)  # bits of a significand
    for (p, *moments), (q, *theirs) in zip(values(now), values(same)):
        torch.testing.assert_close(p, q, rtol=2.0**-kept, atol=0)
        for found, wanted in zip(moments, theirs):
            torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


# Weights to begin with.


def begun_from(run: Path, base: Path, *overrides: str, name: str = "begun") -> Path:
    where = [f"runs={run.parent}", f"name={name}", f"train.init_from={run}", "train.steps=1"]
    return train(load_config(base / "config.toml", [*overrides, *where]), console=QUIET)


def hidden(config: Config, state: dict[str, Any]) -> Tensor:
    """Return what a decoder with such settings computes from weights, whose shapes must fit."""
    model = Decoder(decoder_config(config, VOCABULARY))
    model.load_state_dict(state)
    with torch.no_grad():
        found: Tensor = model(torch.arange(8)[None], all_heads=True)
    return found


# A run with model.pretrained has no train.init_from; tests/integrations/test_pretrained.py begins from one.
@pytest.mark.parametrize("name", [n for n in SETTINGS if n.startswith("model.") and n != "model.pretrained"])
def test_weights_of_another_run_compute_the_same(name: str, base: Path, copied: Path) -> None:
    """A setting that would change what they compute is refused by name."""
    saved = load_config(base / "config.toml")
    override = changed(saved, name)
    config = load_config(base / "config.toml", [override])
    refused = ""
    try:
        begun_from(copied, base, override)
    except ConfigError as e:
        refused = str(e)
    if refused:
        there, here = (value_of(c, name) for c in (saved, config))
        assert refused == (
            f"{name} must be that of the weights in train.init_from={copied}, {there!r}; got {here!r}. "
            f"Give {name}={there}, or begin without train.init_from"
        )
    else:
        state = {key: t.float() for key, t in weights(base).items()}
        torch.testing.assert_close(hidden(config, state), hidden(saved, state), rtol=0, atol=0)


def test_settings_edited_beside_weights_do_not_change_what_these_are(copied: Path, base: Path) -> None:
    """Read the checkpoint, not the file next to it; earlier versions have only the file."""
    edited(copied, "heads = 2", "heads = 4")
    message = r"^model\.heads must be that of the weights in train\.init_from=.*, 2; got 4\."
    with pytest.raises(ConfigError, match=message):
        begun_from(copied, base, "model.heads=4")
    begun_from(copied, base)
    signed(copied / "checkpoint-00000002", about=None)
    with pytest.raises(ConfigError, match=message.replace("2; got 4", "4; got 2")):
        begun_from(copied, base, name="again")


def test_every_declaration_of_weights_is_of_the_model_or_the_tokenizer() -> None:
    names = {name for name, s in SCHEMA.settings.items() if s.declared["kept"] == WEIGHTS}
    assert names == {n for n in SETTINGS if n.startswith("model.")} - {"model.mtp_detach"} | {"data.tokenizer"}


@pytest.fixture
def with_bpe(base: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """Create a run with a trained tokenizer, and overrides that train another of the same size on more text."""
    sources = load_config(base / "config.toml").data.sources
    bpe = ["data.tokenizer=bpe", "data.vocab_size=270", "model.mtp=none", "model.mtp_heads=0"]
    here = [f"runs={tmp_path}", "name=bpe", f"data.sources={sources[:1]}"]
    config = load_config(base / "config.toml", [*bpe, *here])
    config.data.split = {}  # it names both sources
    return train(config, console=QUIET), bpe


def test_another_tokenizer_is_refused(with_bpe: tuple[Path, list[str]], base: Path, tmp_path: Path) -> None:
    run, bpe = with_bpe
    file = run / "tokenizer.json"
    with pytest.raises(ConfigError) as caught:
        begun_from(run, base, *bpe)
    assert str(caught.value) == (
        f"data.tokenizer must be that of the weights in train.init_from={run}, of 270 ids; got 'bpe', of 270 others. "
        f"Give data.tokenizer={file}"
    )
    assert not (tmp_path / "begun").exists()
    begun = begun_from(run, base, *bpe, f"data.tokenizer={file}")
    assert (begun / "tokenizer.json").read_bytes() == file.read_bytes()
    file.unlink()
    with pytest.raises(ConfigError, match=r"train\.init_from=.* needs the tokenizer of its weights: "):
        begun_from(run, base, *bpe, name="again")


def test_weights_of_earlier_versions_are_known_by_their_folder(
    copied: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signed(copied / "checkpoint-00000002", about=None)
    with pytest.raises(ConfigError, match=r"model\.heads must be that of the weights"):
        begun_from(copied, base, "model.heads=4")
    begun_from(copied, base)
    (copied / "config.toml").unlink()  # as a program with a model of its own leaves it
    where = [f"runs={copied.parent}", "name=last", f"train.init_from={copied}", "train.steps=1"]
    train(load_config(base / "config.toml", where), console=Console(width=300))
    assert f"{copied} does not say how its weights were trained: only their shapes are compared" in (
        capsys.readouterr().out
    )
