"""Each optimizer that settings can name: as torch's own in the same loop, and bit for bit after a stop."""

import contextlib
import copy
import inspect
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from llmfast.train.config import SCHEMA, Config, load_config
from llmfast.train.continued import continued_config
from llmfast.train.earlier import resumed_config
from llmfast.train.estimate import estimate_run
from llmfast.train.optimizers import OPTIMIZERS
from llmfast.train.parts import make_optimizer
from llmfast.train.report.logs import flat
from llmfast.train.run import train
from llmfast.train.settings import ConfigError
from llmfast.train.trainer import Hooks, Trainer

pytestmark = pytest.mark.usefixtures("one_thread", "unpictured")
QUIET = Console(quiet=True)


class Lion(torch.optim.Optimizer):
    """Lion as Chen et al. write it in their Algorithm 2. It notes where rounding may decide a sign."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                c = beta1 * m + (1 - beta1) * p.grad
                unsure = (c != 0) & (c.abs() < 1e-6 * c.abs().max())
                self.state[p]["unsure"] = unsure | self.state[p].get("unsure", torch.zeros_like(unsure))
                p -= group["lr"] * (c.sign() + group["weight_decay"] * p)
                self.state[p]["m"] = beta2 * m + (1 - beta2) * p.grad


PLAIN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "lion": Lion,
}
# Every setting of every optimizer is away from its default in one of them.
CHOSEN: list[list[str]] = [
    *([name] for name in OPTIMIZERS),
    ["adamw", "amsgrad=true", "beta1=0.8", "beta2=0.9", "eps=1e-3", "weight_decay=0.3", "lr=0.01"],
    ["adam", "amsgrad=true", "beta1=0.8", "beta2=0.9", "eps=1e-3", "weight_decay=0.3", "lr=0.01"],
    ["sgd", "nesterov=true", "momentum=0.8", "weight_decay=0.3", "lr=0.05"],
    ["sgd", "dampening=0.5"],
    ["sgd", "momentum=0"],
    ["rmsprop", "momentum=0.9", "alpha=0.9", "eps=1e-3", "weight_decay=0.3", "lr=0.001"],
    ["rmsprop", "centered=true", "momentum=0.5", "eps=1e-2"],
    ["adagrad", "lr_decay=0.1", "initial_accumulator_value=0.1", "eps=1e-3", "weight_decay=0.3", "lr=0.02"],
    ["lion", "beta1=0.8", "beta2=0.9", "weight_decay=0.5", "lr=0.001"],
]


def overrides(chosen: list[str]) -> list[str]:
    return [f"optimizer.name={chosen[0]}", *(f"optimizer.{override}" for override in chosen[1:])]


def test_every_setting_of_every_optimizer_is_tried() -> None:
    assert PLAIN.keys() == OPTIMIZERS.keys()
    tried = {(c[0], f"optimizer.{o.partition('=')[0]}") for c in CHOSEN for o in c[1:]}
    # `decay` is not torch's.
    assert tried == {(o, n) for n, s in SCHEMA.settings.items() for o in s.by if n != "optimizer.decay"}


def test_what_a_constructor_takes_is_a_setting() -> None:
    """Ways to compute the same are not; nor is the one argument that makes Adam AdamW."""
    no_settings = {"params", "maximize", "foreach", "capturable", "differentiable", "fused", "extras"}
    for name, (kind, own) in OPTIMIZERS.items():
        arguments = {*inspect.signature(kind).parameters} - no_settings - {"decoupled_weight_decay"}
        arguments |= {"beta1", "beta2"} if "betas" in arguments else set()
        settings = {n.rpartition(".")[2] for n, s in SCHEMA.settings.items() if name in s.by}
        assert settings == arguments - {"betas"} and own.keys() <= settings


class Stop(Hooks):
    """A signal to stop after some steps."""

    def __init__(self, after: int) -> None:
        self._after = after

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == self._after:
            signal.raise_signal(signal.SIGTERM)


def trained(config: Config, *hooks: Hooks, **options: bool) -> tuple[Trainer, nn.Module]:
    """Train; return the trainer, and the model as it was before."""
    seen: list[Any] = []
    original = Trainer.fit

    def fit(self: Trainer) -> bool:
        seen.extend((self, copy.deepcopy(self.model)))
        self.hooks.extend(hooks)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", fit)
        with contextlib.suppress(KeyboardInterrupt):  # after `Stop`
            train(config, console=QUIET, **options)
    return seen[0], seen[1]


def plain_loop(trainer: Trainer, model: nn.Module, optimizer: torch.optim.Optimizer, each: Any = None) -> None:
    """Train a model as the trainer does, but for the optimizer."""
    o, t = trainer.config.optimizer, trainer.config.train
    for step in range(t.steps):
        lr = o.lr * (step + 1) / o.warmup_steps if step < o.warmup_steps else o.lr
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = trainer.data.batch(step * t.batch_size, t.batch_size)
        loss, _ = trainer.objective(model, batch, trainer.objective.num_valid(batch), step, False)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm)
        if each is not None:
            each(lr)
        optimizer.step()
        optimizer.zero_grad()


def groups_of(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": [p], "weight_decay": weight_decay if p.dim() > 1 else 0.0} for p in model.parameters()]


def assert_near(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chosen", CHOSEN, ids=" ".join)
def test_twenty_steps_are_those_of_torchs_optimizer(chosen: list[str], settings: list[str]) -> None:
    more = ["optimizer.schedule=constant", "train.steps=20", "train.eval_every=20", "train.sample_tokens=0"]
    # RMSprop's first steps move by ten times lr whatever a gradient's size: one that is next to nothing, and is rounded
    # differently, must not count as much as any.
    more += ["optimizer.eps=1e-3"] * (chosen[0] == "rmsprop")
    config = load_config(None, [*settings, *more, *overrides(chosen)])
    trainer, model = trained(config)
    begun = copy.deepcopy(model)
    arguments = {n.rpartition(".")[2]: s.of(config) for n, s in SCHEMA.settings.items() if chosen[0] in s.by}
    arguments.pop("decay", None)
    if "beta1" in arguments:
        arguments["betas"] = (arguments.pop("beta1"), arguments.pop("beta2"))
    plain = PLAIN[chosen[0]](groups_of(model, arguments["weight_decay"]), **arguments)
    plain_loop(trainer, model, plain)
    ours = []
    for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True):
        unsure = plain.state[b].get("unsure", torch.zeros_like(b, dtype=torch.bool))
        assert unsure.double().mean() < 0.03
        ours.append(torch.where(unsure, b, a))
    assert_near(ours, model.parameters())
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(begun.parameters(), model.parameters()))
    assert moved > 1e-3, "nothing was trained"


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("decay", ["independent", "relative"])
@pytest.mark.parametrize("scaling", [[], ["optimizer.lr_scaling=linear", "optimizer.base_batch_size=1"]])
def test_decay_that_torch_does_not_have(name: str, decay: str, scaling: list[str], settings: list[str]) -> None:
    """A step's decay is weight_decay, or that times the rate's share of its highest, for any batch size."""
    more = ["optimizer.schedule=constant", "train.steps=6", f"optimizer.name={name}"]
    more += ["optimizer.eps=1e-3"] * (name in SCHEMA.settings["optimizer.eps"].by)
    more += ["optimizer.weight_decay=0.01", f"optimizer.decay={decay}"]
    trainer, model = trained(load_config(None, [*settings, *more, *scaling]))
    o = copy.deepcopy(trainer.config.optimizer)
    trainer.config.optimizer.lr *= 2 if scaling else 1  # as the loop below should have it

    def shrink(lr: float) -> None:
        share = lr / trainer.config.optimizer.lr if decay == "relative" else 1.0
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.mul_(1 - 0.01 * share)

    eps = {} if o.eps is None else {"eps": o.eps}
    plain = PLAIN[name](model.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), **eps, weight_decay=0.0)
    plain_loop(trainer, model, plain, shrink)
    assert_near(trainer.model.parameters(), model.parameters())


FORMATS = {
    "float32": [],
    "split16, 8-bit": ["train.param_dtype=bfloat16", "optimizer.master_weights=split16", "optimizer.state_dtype=8bit"],
    "stochastic": ["train.param_dtype=bfloat16", "optimizer.master_weights=stochastic"],
}


# Each optimizer by itself in every format, and with other settings in one of them.
GOING_ON = [(c, f) for i, c in enumerate(CHOSEN) for j, f in enumerate(FORMATS) if len(c) == 1 or i % 3 == j]


@pytest.mark.parametrize(("chosen", "formats"), GOING_ON, ids=lambda of: of if isinstance(of, str) else " ".join(of))
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(chosen: list[str], formats: str, settings: list[str]) -> None:
    if "centered=true" in chosen and "8-bit" in formats:
        pytest.skip("the optimizer refuses these")
    more = [*overrides(chosen), *FORMATS[formats], "train.steps=6", "train.save_every=4", "train.sample_tokens=0"]
    whole, _ = trained(load_config(None, [*settings, *more, "name=whole"]))
    assert whole.run is not None
    folder = Path(shutil.copytree(whole.run, whole.run.with_name("resumed")))
    shutil.rmtree(folder / "checkpoint-00000006")
    resumed, _ = trained(resumed_config(folder, []), resume=True)
    assert resumed.step == whole.step == 6
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    states = [trainer.optimizer.state_dict()["state"] for trainer in (resumed, whole)]
    for mine, theirs in zip(*(state.values() for state in states), strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize(("name", "override"), [("sgd", "momentum=0.5"), ("rmsprop", "momentum=0.5")])
def test_momentum_may_begin_on_resume(name: str, override: str, settings: list[str]) -> None:
    """Compare with a run in which a program sets it; the first gradient from then on enters a buffer of zeros."""
    begin = [*settings, f"optimizer.name={name}", "optimizer.momentum=0", "train.sample_tokens=0"]

    class Begin(Hooks):
        def before_step(self, trainer: Trainer) -> None:
            if trainer.step == 4:
                for group in trainer.optimizer.param_groups:
                    group["momentum"] = 0.5

    whole, _ = trained(load_config(None, [*begin, "name=whole"]), Begin())
    stopped, _ = trained(load_config(None, [*begin, "name=stopped"]), Stop(after=4))
    assert stopped.run is not None
    resumed, _ = trained(resumed_config(stopped.run, [f"optimizer.{override}"]), resume=True)
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))


def test_a_run_keeps_its_optimizer_and_another_may_continue_with_another(
    settings: list[str], corpus: Path, tmp_path: Path
) -> None:
    new = shutil.copytree(corpus, tmp_path / "new")
    first, _ = trained(load_config(None, [*settings, "name=first", "optimizer.name=adagrad", "optimizer.lr=0.5"]))
    assert first.run is not None
    with pytest.raises(
        ConfigError, match=r"^optimizer\.name cannot change on --resume: .* has 'adagrad'; got 'lion'\."
    ):
        resumed_config(first.run, ["optimizer.name=lion"])
    with pytest.raises(ConfigError, match=r"^optimizer\.beta1 is a setting of adamw, adam, lion, and .* is 'adagrad'"):
        resumed_config(first.run, ["optimizer.beta1=0.5"])
    logged = {n for n in flat(first.config) if n.startswith("optimizer.")}
    assert logged == {
        n for n, s in SCHEMA.settings.items() if n.startswith("optimizer.") and "adagrad" in (s.by or "adagrad")
    }
    same = continued_config(first.run, [f"new={new}"], overrides=["train.steps=2", "name=same"])
    assert (same.optimizer.name, same.optimizer.lr) == ("adagrad", 0.5)
    other = continued_config(first.run, [f"new={new}"], overrides=["train.steps=2", "optimizer.name=lion"])
    assert (other.optimizer.name, other.optimizer.lr, other.optimizer.eps) == ("lion", 0.0005, None)
    for config in (same, other):
        trainer, begun = trained(config)
        assert type(trainer.optimizer) is OPTIMIZERS[config.optimizer.name][0]
        assert_near(begun.parameters(), first.model.parameters())


def test_contradictions_are_found_before_any_work(settings: list[str], tmp_path: Path) -> None:
    for chosen, message in (
        (["optimizer.name=sgd", "optimizer.nesterov=true", "optimizer.momentum=0"], "Nesterov momentum requires"),
        (
            ["optimizer.name=rmsprop", "optimizer.centered=true", "optimizer.state_dtype=8bit"],
            'state_dtype must not be "8bit" with centered=True',
        ),
        (["optimizer.decay=relative", "optimizer.lr=0"], "decay='relative' needs a group's lr"),
    ):
        config = load_config(None, [*settings, *chosen])
        config.data.sources = ["nothing"]  # which would be named first if it were read
        with pytest.raises(ConfigError, match=f"^optimizer: {message}"):
            train(config, console=QUIET)
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("chosen", CHOSEN, ids=" ".join)
def test_the_plan_knows_its_states(chosen: list[str], settings: list[str]) -> None:
    trainer, model = trained(load_config(None, [*settings, "train.steps=1", *overrides(chosen)]))
    kept = sum(t.nbytes for state in trainer.optimizer.state.values() for t in state.values())
    assert estimate_run(trainer.config, trainer.model.config).optimizer == kept
    assert make_optimizer(trainer.config, model).state_bytes() == kept


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_formats_given_to_make_take_precedence_over_the_settings(name: str) -> None:
    formats = ["optimizer.master_weights=split8", "optimizer.state_dtype=bfloat16"]
    config = load_config(None, [f"optimizer.name={name}", *formats])
    params = [nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))]
    given = {"master_weights": "kahan", "state_dtype": torch.float32}
    for extras in ({}, {"master_weights": "kahan"}, {"state_dtype": torch.float32}, given):
        options = config.optimizer.make(params, **extras).options
        wanted = {"master_weights": "split8", "state_dtype": torch.bfloat16} | extras
        assert {name: getattr(options, name) for name in wanted} == wanted
