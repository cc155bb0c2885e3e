"""Faults planted in the library: the check-up's case of each must notice it. Here on a CPU, in plain torch."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from llmfast import losses, optim
from llmfast._gpus import H100
from llmfast.checkup import behaviour, further_losses, numerics, several
from llmfast.checkup.record import Finding
from llmfast.losses import LinearCrossEntropyPlan
from llmfast.optim import FusedAdamW, FusedSGD
from support.pretended_gpu import Graph

CPU = torch.device("cpu")
BUDGET = 8192
TENSOR = object()  # any tensor
OF_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap and scale": {"softcap": 20.0, "logit_scale": 0.7},
    "z-loss": {"z_loss": 1e-3, "reduction": "sum"},
    "smoothing and weights": {"class_weights": TENSOR, "token_weights": TENSOR, "label_smoothing": 0.1},
    "four weighted targets": {"target_weights": TENSOR},
    "losses per token": {"reduction": "none", "label_smoothing": 0.1},
    "statistics": {"return_stats": True},
}
# What each case gives to the loss, by the function and the case.
GIVEN: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"cross_entropy, {name}, bfloat16": ("cross_entropy", options) for name, options in OF_VARIANTS.items()},
    **{
        f"linear_cross_entropy, {name}, bfloat16": ("linear_cross_entropy", {**options, "bias": TENSOR})
        for name, options in OF_VARIANTS.items()
    },
    "linear_cross_entropy, in chunks": ("linear_cross_entropy", {"memory_budget": BUDGET}),
    "linear_cross_entropy, in chunks, float32 logits": (
        "linear_cross_entropy",
        {"memory_budget": BUDGET, "slab_dtype": torch.float32},
    ),
    "linear_cross_entropy, computed twice": ("linear_cross_entropy", {"memory_budget": BUDGET, "reduction": "none"}),
    "linear_cross_entropy, into a float32 gradient": (
        "linear_cross_entropy",
        {"memory_budget": BUDGET, "accumulate_into": TENSOR},
    ),
    "linear_cross_entropy, filtered": ("linear_cross_entropy", {"grad_filter": 1e-7}),
    "mtp_cross_entropy, own hidden states": ("mtp_cross_entropy", {}),
    "mtp_cross_entropy, shared": ("mtp_cross_entropy", {"head_weights": TENSOR}),
    "cross_entropy, probabilities": (
        "cross_entropy",
        {"class_weights": TENSOR, "label_smoothing": 0.1, "softcap": 20.0},
    ),
    "logprobs": ("logprobs", {"return_stats": True, "temperature": 0.7}),
    **{
        f"linear_distillation, {kind}": ("linear_distillation", {"kind": kind, "temperature": 2.0, "hard_weight": 0.5})
        for kind in ("forward_kl", "reverse_kl", "jsd")
    },
}
# Options that say how to compute, and change no number here.
HOW = {"memory_budget", "slab_dtype", "grad_filter"}
Make = Callable[[Callable[..., Any]], Callable[..., Any]]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each case once, at a budget that is enough for float32 logits on a CPU."""
    monkeypatch.setattr(numerics, "SMALL", numerics.SMALL._replace(repeats=1, budget=BUDGET))


@contextmanager
def replaced(name: str, make: Make) -> Iterator[None]:
    """Replace a loss in every section."""
    with ExitStack() as stack:
        for module in (numerics, further_losses):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, make(getattr(losses, name))))
        yield


def findings(case: str, section: Any = numerics) -> Iterator[Finding]:
    (run,) = (one.run for one in section.cases(CPU, "small") if one.name == case)
    yield from run()


def is_wrong(case: str, section: Any = numerics) -> bool:
    """Return whether a case finds something wrong; an exception is such a finding."""
    try:
        return any(found.ok is False for found in findings(case, section))
    except (RuntimeError, TypeError, ValueError):
        return True


def without(name: str) -> Make:
    """Make a loss that forgets an option, or takes another divergence."""

    def make(right: Callable[..., Any]) -> Callable[..., Any]:
        def forgetful(*tensors: Any, **options: Any) -> Any:
            if name == "kind":
                options["kind"] = {"forward_kl": "jsd"}.get(options["kind"], "forward_kl")
            elif name == "accumulate_into":
                options[name] = torch.zeros_like(options[name])
            else:
                options.pop(name, None)
            return right(*tensors, **options)

        return forgetful

    return make


@pytest.mark.parametrize("case", GIVEN)
def test_a_case_notices_each_option_that_is_forgotten(case: str) -> None:
    function, options = GIVEN[case]
    given: list[dict[str, Any]] = []

    def noting(right: Callable[..., Any]) -> Callable[..., Any]:
        def run(*tensors: Any, **options: Any) -> Any:
            given.append({name: TENSOR if torch.is_tensor(value) else value for name, value in options.items()})
            return right(*tensors, **options)

        return run

    with replaced(function, noting):
        assert not is_wrong(case)
    assert given[0] == options
    for name in options.keys() - HOW:
        with replaced(function, without(name)):
            assert is_wrong(case), name


def test_every_loss_and_every_option_is_looked_at() -> None:
    cases = {case.name for case in numerics.cases(CPU, "small")}
    of_losses = {name for name in cases if not name.startswith(("Fused", "rows", "offsets"))}
    assert of_losses == GIVEN.keys() | {
        f"{name}, plain, {dtype}"
        for name in ("cross_entropy", "linear_cross_entropy")
        for dtype in ("float16", "float32")
    }
    offered = {name for name in losses.__all__ if name[0].islower() and "_" in name} - {"linear_logprobs"}
    assert offered - {function for function, _ in GIVEN.values()} == {"mtp_logprobs", "mtp_valid_counts"}
    full = [case.name for case in numerics.cases(CPU, "full")]
    for variant in list(OF_VARIANTS)[1:]:
        for dtype in ("bfloat16", "float16", "float32"):
            assert {f"cross_entropy, {variant}, {dtype}", f"linear_cross_entropy, {variant}, {dtype}"} <= {*full}
    assert {name.removeprefix("rows, ") for name in full if name.startswith("rows, ")} == {*numerics.LAYOUTS}


def test_sizes_are_those_that_a_check_is_for() -> None:
    """Split the linear loss into several slabs, and pass 2^31 with the offsets of the rows that are compared."""
    N, V, D, repeats, budget, wide, numels = numerics.FULL
    plan = LinearCrossEntropyPlan.make(N, D, V, memory_budget=budget, gpu=H100, device="cpu")
    assert len(list(plan)) > 1 and repeats == 50
    assert (wide[0] - 4) * wide[1] >= 2**31 and max(numels) >= 1_000_000 and {1, 4096, 4097} <= {*numels}


@pytest.mark.parametrize("layout", numerics.LAYOUTS)
def test_a_write_outside_of_rows_is_found_in_each_layout(layout: str) -> None:
    """Let the loss that overwrites its logits write one element more."""

    def make(right: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, *args: Any, **options: Any) -> Any:
            result = right(x, *args, **options)
            if options.get("inplace"):
                x.data.as_strided((1,), (1,), x.storage_offset() + x.numel()).zero_()
            return result

        return run

    case = f"rows, {layout}"
    assert not is_wrong(case)
    with replaced("cross_entropy", make):
        assert [found.what for found in findings(case) if found.ok is False] == ["memory around it"]
    with replaced("cross_entropy", without("softcap")):
        assert is_wrong(case) or layout == "one class"  # whose loss is 0 in any case


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_wrong_far_behind_is_found(what: str) -> None:
    """Let the last row be of others' numbers."""

    def make(right: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, targets: Tensor, **options: Any) -> Any:
            found = right(x, targets, **options)
            kept = torch.ones_like(found).index_fill_(0, torch.tensor([len(found) - 1]), 0.0)
            return found * kept if what == "loss" else found * kept + (found * (1 - kept)).detach()

        return run

    case = "offsets above 2^31"
    assert not is_wrong(case)
    with replaced("cross_entropy", make):
        wrong = [found.what for found in findings(case) if found.ok is False]
    assert f"{what} of the last rows" in wrong and (what == "loss" or len(wrong) == 1)


@pytest.mark.parametrize("heads", ["own hidden states", "shared"])
def test_labels_that_are_not_moved_are_found(heads: str) -> None:
    def make(right: Callable[..., Any]) -> Callable[..., Any]:
        return lambda hidden, weight, labels, **options: right(hidden, weight, labels.roll(1), **options)

    with replaced("mtp_cross_entropy", make):
        assert is_wrong(f"mtp_cross_entropy, {heads}")


def test_a_gradient_that_is_left_besides_the_sum_is_found() -> None:
    def make(right: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Tensor, weight: Tensor, *args: Any, **options: Any) -> Any:
            weight.grad = torch.zeros_like(weight)
            return right(hidden, weight, *args, **options)

        return run

    case = "linear_cross_entropy, into a float32 gradient"
    with replaced("linear_cross_entropy", make):
        assert [found.what for found in findings(case) if found.ok is False] == ["weight.grad"]


# Optimizers.


def options_of(listed: list[tuple[Any, dict[str, Any]]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for cls, options in listed:
        found.setdefault(cls.__name__, set()).update(options)
    return found


def test_every_option_of_the_optimizers_is_looked_at() -> None:
    against_torch = options_of(numerics.OPTIMIZERS)
    assert against_torch == {
        "FusedAdamW": {"weight_decay"},
        "FusedAdam": {"weight_decay", "amsgrad"},
        "FusedSGD": {"momentum", "nesterov", "weight_decay", "maximize"},
        "FusedRMSprop": {"momentum", "centered"},
        "FusedAdagrad": {"lr_decay", "weight_decay"},
    }
    beyond = set().union(*options_of(numerics.FORMATS).values())
    assert beyond >= {*optim.Extras.__annotations__} - {"seed"}
    masters = {options.get("master_weights") for _, options in numerics.FORMATS}
    assert masters >= {"fp32", "split16", "split8", "kahan", "stochastic"}


def forgetting(cls: Any, name: str, which: int) -> Any:
    """Return a maker of optimizers of which the first, second, ... forgets an option."""
    made: list[int] = []

    def make(params: Any, **options: Any) -> Any:
        made.append(1)
        if len(made) == which:
            del options[name]
        return cls(params, **options)

    return make


@pytest.mark.parametrize(
    ("number", "name"),
    [(i, name) for i, (_, options) in enumerate(numerics.FORMATS) for name in options if name != "state_dtype"],
)
def test_an_optimizer_that_forgets_an_option_on_the_device_is_found(number: int, name: str) -> None:
    cls, options = numerics.FORMATS[number]
    device = torch.device("cpu")
    assert all(found.ok for found in numerics.formats(cls, options, device, numerics.SMALL))
    running = numerics.formats(forgetting(cls, name, 1), options, device, numerics.SMALL)
    if name == "ema_decay":  # there are none to compare
        with pytest.raises(ValueError, match="zip"):
            list(running)
        return
    assert [one.what for one in running if one.ok is False] == {
        "zero_grads": ["gradients are zero"],
        "max_grad_norm": ["parameters", "averages"] if options.get("ema_decay") else ["parameters"],
    }.get(name, ["parameters"])


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_clip_by_another_norm_is_found(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clip on one of the devices, or ranks, by another norm; Adam's steps would hardly change."""
    wanted = [several._reference(CPU, 2, rule) for rule in range(len(several.OPTIMIZERS))]
    seen: list[list[Tensor]] = []

    def other(cls: Any) -> Any:
        def make(params: Any, **options: Any) -> Any:
            seen.append([])
            if len(seen) != 1 and "max_grad_norm" in options:
                options["max_grad_norm"] *= factor
            return cls(params, **options)

        return make

    monkeypatch.setattr(behaviour, "FusedSGD", other(FusedSGD))
    assert is_wrong("CPU and GPU parameters in one optimizer, clipped", behaviour)
    monkeypatch.setattr(several, "OPTIMIZERS", [(other(cls), options) for cls, options in several.OPTIMIZERS])
    errors = [
        max(several._error(p, w) for p, w in zip(several._reference(CPU, 2, rule), wanted[rule])) for rule in range(2)
    ]
    assert max(errors) > 1e-4


# What only a GPU has.


def noted_step(cls: Any, note: Callable[[Any], None]) -> Any:
    """Return a class whose steps are noted."""

    class Noting(cls):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            note(self)
            return super().step(closure)

    return Noting


def test_a_rate_on_the_device_is_a_tensor_there(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[Any] = []
    noting = noted_step(FusedAdamW, lambda optimizer: rates.append(optimizer.param_groups[0]["lr"]))
    monkeypatch.setattr(behaviour, "FusedAdamW", noting)
    assert not is_wrong("a learning rate on the device", behaviour)
    assert [torch.is_tensor(rate) for rate in rates] == [False] * 3 + [True] * 3 and rates[-1].dtype == torch.float64


def test_gradients_are_freed_before_they_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[bool] = []
    right = behaviour.set_gradients

    def noting(params: list[Tensor], step: int) -> None:
        freed.append(all(p.grad is None for p in params))
        right(params, step)

    monkeypatch.setattr(behaviour, "set_gradients", noting)
    assert not is_wrong("gradients freed and made again", behaviour)
    assert freed == [True, False, False, False] + [True] * 4


@pytest.mark.parametrize("forgotten", ["grad_scale", "found_inf"])
def test_a_scale_or_an_overflow_that_is_forgotten_is_found(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(optimizer: Any) -> None:
        if getattr(optimizer, forgotten, None) is not None:
            setattr(optimizer, forgotten, torch.ones(()) if forgotten == "grad_scale" else None)

    assert not is_wrong("GradScaler", behaviour)
    monkeypatch.setattr(behaviour, "FusedAdamW", noted_step(FusedAdamW, forget))
    assert is_wrong("GradScaler", behaviour)


def test_a_step_that_backward_does_not_take_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_wrong("step in backward", behaviour)
    monkeypatch.setattr(behaviour, "optimizer_in_backward", lambda model, optimizer: None)
    assert is_wrong("step in backward", behaviour)


@pytest.mark.parametrize("case", ["graph of cross_entropy", "graph of FusedSGD(momentum=0.9)"])
def test_a_graph_that_replays_what_it_was_made_of_is_found(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay on other numbers than those of the capture: a graph that has read those is wrong."""
    monkeypatch.setattr(behaviour, "Graph", Graph)
    assert not is_wrong(case, behaviour)

    class Stale(Graph):  # type: ignore[misc]
        def __init__(self, work: Callable[[], Any], warm_up: Callable[[], Any]) -> None:
            super().__init__(work, warm_up)
            self.made = work() if "cross" in case else None

        def replay(self) -> None: ...

    monkeypatch.setattr(behaviour, "Graph", Stale)
    assert is_wrong(case, behaviour)


def test_a_loss_under_another_default_device_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    right = behaviour.stepped
    monkeypatch.setattr(torch, "set_default_device", log.append)
    fails = [False]

    def noting(*args: Any) -> Any:
        log.append("steps")
        if fails[0] and len(log) > 2:
            raise RuntimeError
        return right(*args)

    monkeypatch.setattr(behaviour, "stepped", noting)
    for fails[0] in (False, True):
        assert is_wrong("another default device", behaviour) is fails[0]
        assert log == ["steps", CPU, "steps", None]
        log.clear()


def test_streams_wait_for_each_other_at_both_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss is on one stream while an optimizer is on the other; a fault of any of ten rounds counts."""
    log: list[tuple[str, ...]] = []

    class Stream:
        made = 0

        def __init__(self, name: str = "") -> None:
            Stream.made += not name
            self.name = name or f"{Stream.made}"

        def wait_stream(self, other: "Stream") -> None:
            log.append((self.name, "waits for", other.name))

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        log.append(("on", stream.name))
        yield

    main, rounds, broken = Stream("main"), [0], [""]
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    right = {name: getattr(behaviour, name) for name in ("with_gradients", "stepped")}

    def run(name: str, *args: Any) -> Any:
        log.append((name,))
        made = right[name](*args)
        rounds[0] += name == broken[0]
        return [made[0] + 1.0, *made[1:]] if name == broken[0] and rounds[0] == 11 else made

    for name in right:
        monkeypatch.setattr(behaviour, name, lambda *args, name=name: run(name, *args))
    (found,) = findings("two streams", behaviour)
    assert (found.what, found.ok) == ("ten times", True)
    once: list[tuple[str, ...]] = [("1", "waits for", "main"), ("2", "waits for", "main"), ("on", "1")]
    once += [("with_gradients",), ("on", "2"), ("stepped",), ("main", "waits for", "1"), ("main", "waits for", "2")]
    assert log == [("with_gradients",), ("stepped",), *once * 10]
    for broken[0], what in (("with_gradients", "loss and gradients"), ("stepped", "parameters")):
        rounds[0] = 0
        (found,) = findings("two streams", behaviour)
        assert (found.what, found.ok) == (what, False)


def test_what_waits_is_looked_for_where_waiting_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything has run once before; afterwards waiting is as it was, whatever happened."""
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    found = {one.what: one.ok for one in findings("no step waits for the device", behaviour)}
    names = [f"{cls.__name__}(" for cls, _ in behaviour.OPTIMIZERS]
    assert all(found.values()) and len(found) == 3 + len(names)
    assert {name for name in found if "(" not in name} == {
        "cross_entropy",
        "linear_cross_entropy",
        "mtp_cross_entropy",
    }
    assert modes == ["error", 1] * len(found)

    def waiting() -> None:
        assert modes[-1] == "error"
        raise RuntimeError("x" * 1000)

    assert behaviour._does_not_raise("step", waiting).figures == {"error": "x" * 500} and modes[-1] == 1
