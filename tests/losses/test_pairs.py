"""Any two values of any two arguments together, against the definitions in float64.

The options come from their table. A new number is tried by itself, in all combinations of two; another kind of option
fails `test_every_option_has_values` until `VALUES` says what it may be.
"""

import contextlib
import typing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from llmfast.losses import (
    cross_entropy,
    linear_cross_entropy,
    linear_logprobs,
    mtp_cross_entropy,
    reference,
    targets,
)
from llmfast.losses.options import (
    TABLE,
    CrossEntropyOptions,
    LinearLogprobOptions,
    LinearOptions,
    LogprobOptions,
    LossOptions,
    MTPOptions,
    declared,
)
from support.devices import DEVICE
from support.layouts import offset, sliced, strided, transposed
from support.pairs import Case, covering
from support.plans import forced

D, START = 6, 2.0**-10  # START of a main_grad is too large to be overlooked, and too small to round the gradient away
SMALL = dict(targets.SMALL)  # the fixture `path` turns it off


class Draw:
    """Sizes and targets, on which the values of options depend."""

    def __init__(self, case: Case) -> None:
        self.V, self.tokens, self.K = case["V"], case["tokens"], case["K"]
        self.wide = torch.float64 if case["dtype"] == torch.float64 else torch.float32
        full = self.tokens if self.K is None else (*self.tokens, self.K)
        ignore_index = case["ignore_index"](self) if callable(case["ignore_index"]) else case["ignore_index"]
        self.targets = torch.randint(0, self.V, full)
        self.targets[self.targets == ignore_index] = 0
        if case["ignored"] == "some":
            self.targets[torch.rand(full) < 0.3] = ignore_index
        elif case["ignored"] == "all":
            self.targets.fill_(ignore_index)
        valid = self.targets != ignore_index
        self.valid = int((valid if self.K is None else valid.any(-1)).sum())
        self.targets = self.targets.to(case["index_dtype"])


def class_weights(draw: Draw) -> Tensor:
    """Return weights that are zero for a class that no token has as its target, if there is one."""
    weights = torch.rand(draw.V) + 0.1
    others = sorted({*range(draw.V)} - {*draw.targets.flatten().tolist()})
    weights[others[:1]] = 0.0
    return weights


def token_weights(draw: Draw) -> Tensor:
    weights = torch.rand(draw.tokens) + 0.1
    if weights.numel() > 1:
        weights.view(-1)[-1] = 0.0
    return weights


# The values of an option; where they depend on the shapes, functions.
VALUES: dict[str, list[Any]] = {
    "ignore_index": [-100, lambda d: d.V - 1, lambda d: d.V + 3],
    "label_smoothing": [0.0, 0.2, 1.0],
    "softcap": [None, 0.7, 5.0],
    "logit_scale": [None, 1.0, -1.7],
    "temperature": [1.0, 0.6, lambda d: torch.rand(d.tokens) + 0.4],
    "return_rank": [False, True],
    "class_weights": [None, class_weights, lambda d: class_weights(d).double()],
    "token_weights": [None, token_weights, lambda d: token_weights(d).bfloat16()],
    "target_weights": [None, lambda d: torch.rand(d.K), lambda d: torch.rand(d.targets.shape)],
    "reduction": ["mean", "sum", "none"],
    "num_valid": [None, 7, lambda d: torch.tensor([5]), lambda d: max(d.valid, 1)],
    "shift": [0, 1, 3],
    "document_ids": [
        None,
        lambda d: torch.arange(d.tokens[-1]).div(2, rounding_mode="floor").expand(d.tokens),
        lambda d: torch.zeros(d.tokens, dtype=torch.int16),
    ],
    "process_group": [None],  # test_parallel.py
    "vocab_size": [None, lambda d: d.V],
    "inplace": [False, True],
    "bias": [None, lambda d: torch.randn(d.V), lambda d: torch.randn(d.V).bfloat16()],
    "memory_budget": ["auto", "least", "small"],  # the last two are chosen in its place: see `planned_as`
    "slab_dtype": [None, torch.float32],
    "accumulate_dtype": [None, lambda d: d.wide],  # test_budget.py has the other
    "accumulate_into": [None, lambda d: torch.full((d.V, D), START, dtype=d.wide)],
    "grad_filter": [None, 1e-30],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SURROUNDINGS: dict[str, list[Any]] = {
    "path": ["plain", "kernels"],
    "small": [False, True],  # torch's own loss is allowed where it is faster
    "dtype": DTYPES,
    "index_dtype": [torch.int64, torch.int32],
    "tokens": [(7,), (), (0,), (1,), (2, 3)],
    "K": [None, 1, 3],
    "V": [5, 1, 256, 1027],  # 1024 columns are a tile, 128 a slab of the smallest budget
    "ignored": ["some", "none", "all"],
    "layout": [lambda t: t, offset, strided, transposed, sliced],
    "upstream": [1.0, -1.5, 0.0, None],  # of the loss; None: it is not used
    "stats": [None, "unused", "lse", "entropy", "both"],
    "again": [False, True],  # a second backward pass
    "grad_mode": [True, False],
}
WANTS: dict[str, list[Any]] = {
    f"wants_{name}": [name != "bias", name == "bias"] for name in ("hidden", "weight", "bias")
}


def values_of(name: str) -> list[Any]:
    """Return the values of an option. A number that is declared with a value that changes nothing needs no entry."""
    if name in VALUES:
        return VALUES[name]
    option = TABLE[name]
    assert option.idle is not None, f"VALUES must say what {name} may be"
    return [option.default, option.idle, 0.03]


def factors_of(kind: type, **others: list[Any]) -> dict[str, list[Any]]:
    return {name: values_of(name) for name in declared(kind)} | SURROUNDINGS | others


def possible(case: Case) -> bool:
    """Return False for arguments that exclude each other; each of these has a test that says how they are refused."""

    def has(name: str) -> bool:
        return case.get(name) is not None

    given = case.get
    used = given("upstream", 1.0) is not None or given("stats", "both") in ("lse", "entropy", "both")
    return (
        not (has("num_valid") and given("reduction", "mean") != "mean")
        and not (has("target_weights") and "K" in case and case["K"] is None)
        and not (given("shift", 0) and given("tokens", (1,)) == ())
        and not (has("document_ids") and (given("shift", 1) == 0 or given("tokens", (1,)) == ()))
        and not (has("grad_filter") and given("reduction", "mean") == "none")
        and not (has("accumulate_into") and (given("wants_weight", True) is False or not given("grad_mode", True)))
        and not (given("inplace") and (given("layout", offset) in (strided, transposed, sliced) or given("again")))
        and not (given("wants_bias") and "bias" in case and case["bias"] is None)
        and not (given("autocast") and given("dtype") == torch.float64)
        and not (given("slab_dtype") is not None and given("dtype") == torch.float64)
        and not (given("return_rank") and given("stats", "both") is None)
        and not (given("small") and given("path", "plain") != "plain")
        and used
    )


def given_options(case: Case, kind: type, draw: Draw) -> Case:
    """Return the options that differ from their defaults, and now and then one that does not."""
    options = {name: v(draw) if callable(v := case[name]) else v for name in declared(kind)}
    options.pop("memory_budget", None)
    return {n: v for n, v in options.items() if v is not TABLE[n].default or len(n) % 3 == 0}


def planned_as(case: Case) -> AbstractContextManager[object]:
    """Take the way that a budget would lead to, which depends on the shapes."""
    size = case["memory_budget"]
    return nullcontext() if size == "auto" else forced(None, size)


def in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextlib.contextmanager
def unchanged(*values: Any) -> Iterator[None]:
    """Assert that tensors keep values, versions and flags, and torch its modes."""

    def seen() -> list[Any]:
        tensors = [t for t in values if isinstance(t, Tensor)]
        flags = [(t._version, t.requires_grad, t.stride(), t.dtype, t.grad) for t in tensors]
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled(DEVICE), torch.get_default_dtype()
        return [flags, modes, [t.detach().clone() for t in tensors]]

    before = seen()
    yield
    after = seen()
    assert before[:2] == after[:2]
    for a, b in zip(before[2], after[2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class Results(typing.NamedTuple):
    """Results of a loss and all its gradients."""

    loss: Tensor
    stats: Any  # of the loss, or None
    gradients: list[Tensor | None]


def run(loss: Callable[..., Any], inputs: list[Tensor], case: Case, upstream: list[Tensor]) -> Results:
    """Compute a loss of some inputs and the gradients of what the case says is used."""
    with torch.set_grad_enabled(case["grad_mode"]):
        found = loss(*inputs)
    value, stats = (found, None) if case["stats"] is None else found
    wanted = [t for t in inputs if t.requires_grad]
    if not case["grad_mode"] or not wanted:
        assert not value.requires_grad
        return Results(value, stats, [])
    used: list[tuple[Tensor, Tensor]] = [] if case["upstream"] is None else [(value, upstream[0])]
    if stats is not None:
        used += [(stats.lse, upstream[1])] * (case["stats"] in ("lse", "both"))
        used += [(stats.entropy, upstream[2])] * (case["stats"] in ("entropy", "both"))
    outputs, gradients = [t for t, _ in used], [g.to(t.dtype).expand(t.shape) for t, g in used]
    assert all(t.requires_grad for t in outputs), (case, [t.requires_grad for t in outputs])
    for _ in range(1 + case["again"]):
        found = torch.autograd.grad(outputs, wanted, gradients, retain_graph=case["again"], allow_unused=True)
    return Results(value.detach(), stats, list(found))


def upstream_of(case: Case) -> list[Tensor]:
    tokens, K = case["tokens"], case["K"]
    loss = torch.randn(tokens) if case.get("reduction") == "none" else torch.tensor(1.0)
    if "temperature" in case:
        loss = torch.randn(tokens if K is None else (*tokens, K))
    return [loss * (case["upstream"] or 0.0), torch.randn(tokens), torch.randn(tokens)]


def close(name: str, ours: Tensor, plain: Tensor, truth: Tensor, eps: float) -> None:
    """Assert that an error is no larger than torch's, but for some roundings, with which torch can be lucky."""
    assert ours.shape == truth.shape, name
    assert torch.equal(ours.isfinite(), truth.isfinite()), f"{name}: {ours}, not {truth}"
    a, b, c = (torch.where(truth.isfinite(), t.detach().double(), 0) for t in (ours, plain, truth))
    roundings = 4 if truth.dtype != ours.dtype else 16  # the truth itself is rounded
    error, allowed, slack = (a - c).norm(), (b - c).norm(), roundings * eps * (c.norm() + 1)
    assert error <= 1.5 * allowed + slack, f"{name}: error {error:.3g}, torch's {allowed:.3g}, slack {slack:.3g}"


def final(logits: Tensor, case: Case) -> Tensor:
    """Return the logits that the loss is of, in float64, but for the temperature, which changes no order."""
    x = logits.double() * (case["logit_scale"] or 1.0)
    x = x if case["softcap"] is None else case["softcap"] * torch.tanh(x / case["softcap"])
    return x


def compare(
    ours: Results, plain: Results, truth: Results, inputs: list[Tensor], x: Tensor, eps: float, fine: float
) -> None:
    """Compare everything; `x` are the final logits, `eps` is the rounding of gradients, `fine` that of losses."""
    wide = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    nothing = bool(truth.loss.isnan().any())  # to average
    assert ours.loss.dtype == wide
    if nothing:
        assert ours.loss.isnan().all()
    else:
        close("loss", ours.loss, plain.loss, truth.loss, fine)
    if truth.stats is not None:
        assert ours.stats is not None and plain.stats is not None
        for name in {"token_loss", "lse", "entropy"} & {*truth.stats._fields}:
            t = getattr(ours.stats, name)
            assert t.dtype == wide, name
            close(name, t, getattr(plain.stats, name), getattr(truth.stats, name), fine)
        assert ours.stats.argmax.dtype == torch.int64
        best, valid = ours.stats.argmax, truth.stats.argmax >= 0
        assert torch.equal(best >= 0, valid)
        found = x.gather(-1, best.clamp(min=0)[..., None])[..., 0]
        # Nearly equal ones are rounded; softcap takes 16-bit logits to within 1e-6 of the cap.
        near = 4 * fine if eps <= fine else 2e-6
        assert (found >= x.amax(-1) - near * x.abs().amax(-1))[valid].all()
        if "accuracy" in truth.stats._fields and torch.equal(best, truth.stats.argmax):
            torch.testing.assert_close(ours.stats.accuracy, truth.stats.accuracy, equal_nan=True)
    wanted = [t for t in inputs if t.requires_grad]
    for i, (a, b, c, t) in enumerate(zip(ours.gradients, plain.gradients, truth.gradients, wanted)):
        if a is None:  # of a weight whose gradient went elsewhere
            continue
        assert (a.dtype, a.shape) == (t.dtype, t.shape)
        if nothing:
            assert not a.any()
        else:
            close(f"gradient {i}", a, b, c, max(eps, eps_of(a.dtype)))


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


# Several times, in other combinations of three and more.
CROSS_ENTROPY, LINEAR, LOGPROBS = (
    [case for seed in range(3) for case in covering(factors, possible, seed)]
    for factors in (
        factors_of(CrossEntropyOptions, wants_logits=[True, False]),
        factors_of(LinearOptions, autocast=[False, True], **WANTS),
        factors_of(LinearLogprobOptions, autocast=[False, True], **WANTS),
    )
)

# Losses per token with the smallest budget: logits are made again in backward, in several slabs of columns.
LINEAR += [
    {**case, "memory_budget": "least", "V": 1027}
    for case in LINEAR
    if case["reduction"] == "none" and case["grad_mode"] and case["tokens"] != (0,) and case["V"] != 1027
]


def parametrized(cases: list[Case]) -> Any:
    """Parametrize a test with cases, each on its path."""
    given = [pytest.param(case["path"], case, id=f"{i}-{case['path']}") for i, case in enumerate(cases)]
    return pytest.mark.parametrize(("path", "case"), given, indirect=["path"])


def torchs_where_small(case: Case) -> AbstractContextManager[object]:
    return mock.patch.dict(targets.SMALL, SMALL) if case["small"] else nullcontext()


@parametrized(CROSS_ENTROPY)
def test_cross_entropy(path: str, case: Case) -> None:
    draw = Draw(case)
    options, upstream, dtype = given_options(case, CrossEntropyOptions, draw), upstream_of(case), case["dtype"]
    logits = (torch.randn(*case["tokens"], case["V"]) * 2).to(dtype)
    stats = case["stats"] is not None
    defined = {n: v for n, v in options.items() if n in declared(LossOptions)}

    def ours(x: Tensor) -> Any:
        x = x * 1.0 if case["inplace"] else x
        return cross_entropy(x, draw.targets, return_stats=stats, **options)

    def exact(x: Tensor, **more: Any) -> Any:
        return reference.cross_entropy(x, draw.targets, return_stats=stats, **{**defined, **more})

    x = case["layout"](logits).detach().requires_grad_(case["wants_logits"])
    with unchanged(x, draw.targets, *options.values()), torchs_where_small(case):
        found = run(ours, [x], case, upstream)
    plain = run(exact, [logits.clone().requires_grad_(x.requires_grad)], case, upstream)
    doubled = {n: in_float64(v) for n, v in options.items() if n in defined}
    truth = run(lambda x: exact(x, **doubled), [logits.double().requires_grad_(x.requires_grad)], case, upstream)
    fine = min(eps_of(torch.float32), eps_of(dtype))
    compare(found, plain, truth, [x], final(logits, case), eps_of(dtype), fine)


@parametrized(LINEAR)
def test_linear_cross_entropy(path: str, case: Case) -> None:
    check_linear(case, LinearOptions, LossOptions, linear_cross_entropy)


@parametrized(LOGPROBS)
def test_linear_logprobs(path: str, case: Case) -> None:
    check_linear(case, LinearLogprobOptions, LogprobOptions, linear_logprobs)


def check_linear(case: Case, kind: type, meaning: type, function: Callable[..., Any]) -> None:
    """Check a function of hidden states; `meaning` are those of its options that its definition takes."""
    draw, definition = Draw(case), getattr(reference, function.__name__)
    options, upstream, dtype = given_options(case, kind, draw), upstream_of(case), case["dtype"]
    compute = torch.bfloat16 if case["autocast"] else dtype
    tensors = [torch.randn(*case["tokens"], D).to(dtype), torch.randn(case["V"], D).to(dtype)]
    wants = [case["wants_hidden"], case["wants_weight"]]
    if (bias := options.pop("bias", None)) is not None:
        tensors, wants = [*tensors, bias], [*wants, case["wants_bias"]]
    stats, defined = case["stats"] is not None, {n: v for n, v in options.items() if n in declared(meaning)}

    def ours(h: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
        given = options if b is None else {**options, "bias": b}
        return function(h, w, draw.targets, return_stats=stats, **given)

    def exact(h: Tensor, w: Tensor, b: Tensor | None = None, **more: Any) -> Any:
        return definition(h, w, draw.targets, bias=b, return_stats=stats, **{**defined, **more})

    def leaves(layout: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        return [layout(t).detach().to(dtype or t.dtype).requires_grad_(want) for t, want in zip(tensors, wants)]

    def plainly(h: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
        return exact(h.to(compute), w.to(compute), b)

    inputs, main = leaves(case["layout"]), options.get("accumulate_into")
    fixed = [t for n, t in options.items() if n != "accumulate_into"]
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=case["autocast"])
    with unchanged(*inputs, draw.targets, *fixed), torchs_where_small(case), autocast, planned_as(case):
        found = run(ours, inputs, case, upstream)
    if main is not None and found.gradients:
        at = sum(wants[:1])
        assert found.gradients[at] is None
        found.gradients[at] = ((main - START) / (1 + case["again"])).to(inputs[1].dtype)
    plain = run(plainly, leaves(torch.clone), case, upstream)
    rounded = leaves(lambda t: t.to(compute) if t is not bias else t, torch.float64)
    doubled = {n: in_float64(v) for n, v in defined.items()}
    truth = run(lambda *t: exact(*t, **doubled), rounded, case, upstream)
    logits = rounded[0] @ rounded[1].T + (0.0 if bias is None else rounded[2])
    fine = eps_of(options.get("slab_dtype") or compute)
    compare(found, plain, truth, inputs, final(logits.detach(), case), eps_of(compute), fine)


# Heads.

OF_HEADS: dict[str, list[Any]] = {
    "document_ids": [None, VALUES["document_ids"][1]],
    "head_weights": [None, lambda d: [0.5, 2.0, 0.0][: d.heads], lambda d: torch.rand(d.heads) + 0.5],
    "num_valid": [None, lambda d: [7.0, 5.0, 3.0][: d.heads], lambda d: torch.arange(d.heads) + 3],
    "detach_unembedding": [False, True, lambda d: [k % 2 == 1 for k in range(d.heads)]],
}


def heads_can_be(case: Case) -> bool:
    given, shared = case.get, case.get("form") == "shared"
    return (
        possible({name: value for name, value in case.items() if name not in OF_HEADS})
        and not (shared and (given("head_weights", 1) is None or callable(given("detach_unembedding"))))
        and not (given("accumulate_into") is not None and given("detach_unembedding", False) is True)
    )


MTP = covering(
    {n: OF_HEADS.get(n) or values_of(n) for n in declared(MTPOptions)}
    | {n: SURROUNDINGS[n] for n in ("path", "index_dtype", "V", "ignored", "layout", "again")}
    | {"dtype": DTYPES, "tokens": [(7,), (2, 3), (2, 1)], "heads": [1, 2, 3], "form": ["tensor", "list", "shared"]}
    | {"stats": [None, "unused"], "upstream": [1.0, -1.5], **WANTS},
    heads_can_be,
)


def moved(t: Tensor, k: int, ids: Tensor | None, empty: float) -> Tensor:
    """Return what is `k` tokens on, token by token; `empty` beyond the sequence or document."""
    out = torch.full_like(t, empty)
    for i in range(t.shape[-1] - k):
        same = True if ids is None else ids[..., i] == ids[..., i + k]
        out[..., i] = torch.where(torch.as_tensor(same), t[..., i + k], empty)
    return out


def sum_of_heads(inputs: list[Tensor], draw: Draw, case: Case, o: Case) -> tuple[Tensor, Tensor]:
    """Return the loss by its definition, and the mean loss of each head, NaN for a head without tokens."""
    hidden, weight, bias = (*inputs, None)[:3]
    K, ignored = draw.heads, o.get("ignore_index", -100)
    labels = [moved(draw.targets, k, o.get("document_ids"), ignored) for k in range(K)]
    tokens = [None if (t := o.get("token_weights")) is None else moved(t.double(), k, None, 0.0) for k in range(K)]
    classes, detached = o.get("class_weights"), o.get("detach_unembedding", False)
    detached = [detached] * K if isinstance(detached, bool) else detached
    counts = []
    for y, t in zip(labels, tokens):
        known = torch.where(y == ignored, 0, y).long()
        each = torch.ones(y.shape).double() if classes is None else classes.double()[known]
        counts.append((torch.where(y == ignored, 0.0, each) * (1.0 if t is None else t)).sum())
    divisors = torch.as_tensor(o["num_valid"]).double() if o.get("num_valid") is not None else torch.stack(counts)
    scale = torch.ones(K) if o.get("head_weights") is None else torch.as_tensor(o["head_weights"])
    factors = torch.where(divisors > 0, scale.double() / divisors, 0.0)
    terms = ("ignore_index", "label_smoothing", "z_loss", "softcap", "logit_scale", "class_weights")
    rest = {n: in_float64(o[n]) for n in terms if n in o} | {"reduction": "sum"}
    if case["form"] == "shared":  # the term of logsumexp is a row's, and is divided by what all heads have in common
        weights = torch.stack(
            [f * (torch.ones(y.shape).double() if t is None else t) for f, y, t in zip(factors, labels, tokens)], -1
        )
        w, b = (t if t is None or not detached[0] else t.detach() for t in (weight, bias))
        common = divisors.max()
        loss = reference.linear_cross_entropy(
            hidden, w, torch.stack(labels, -1), bias=b, target_weights=weights * common, **rest
        )
        return loss / common, torch.full((K,), torch.nan)
    losses = []
    for k in range(K):
        w, b = (t if t is None or not detached[k] else t.detach() for t in (weight, bias))
        losses.append(reference.linear_cross_entropy(hidden[k], w, labels[k], bias=b, token_weights=tokens[k], **rest))
    found = torch.stack(losses)
    total = (factors * found).sum() if bool((divisors > 0).any()) else found.sum() * torch.nan
    return total, (found / divisors).detach()


@parametrized(MTP)
def test_mtp_cross_entropy(path: str, case: Case) -> None:
    draw = Draw({**case, "K": None})
    draw.heads, shared, dtype = case["heads"], case["form"] == "shared", case["dtype"]
    options = {n: v(draw) if callable(v := case[n]) else v for n in declared(MTPOptions)}
    options = {n: v for n, v in options.items() if v is not None and n != "memory_budget"}
    leading = () if shared else (draw.heads,)
    tensors = [torch.randn(*leading, *draw.tokens, D).to(dtype), torch.randn(draw.V, D).to(dtype)]
    wants = [case["wants_hidden"], case["wants_weight"], case["wants_bias"]]
    if (bias := options.pop("bias", None)) is not None:
        tensors.append(bias)
    if not any(wants[: len(tensors)]) or (wants == [False, True, False] and options["detach_unembedding"] is True):
        wants[0] = True
    main = options.get("accumulate_into")
    inputs = [case["layout"](t).detach().requires_grad_(want) for t, want in zip(tensors, wants)]
    given = {**options, **({} if bias is None else {"bias": inputs[2]})}
    hiddens = inputs[0] if case["form"] != "list" else [*inputs[0]]
    fixed = [t for n, t in options.items() if n != "accumulate_into"]
    with unchanged(*inputs, draw.targets, *fixed), planned_as(case):
        found = mtp_cross_entropy(hiddens, inputs[1], draw.targets, return_stats=bool(case["stats"]), **given)
        loss, stats = found if case["stats"] else (found, None)
        wanted = [t for t in inputs if t.requires_grad]
        if not loss.requires_grad:
            assert options["detach_unembedding"] is True and not wants[0]
            return
        for _ in range(1 + case["again"]):
            gradients = torch.autograd.grad(
                loss, wanted, torch.full_like(loss, case["upstream"]), True, allow_unused=True
            )
    found_grads = list(gradients)
    if main is not None and wants[1]:
        found_grads[int(wants[0])] = ((main - START) / (1 + case["again"])).to(dtype)
    results = []
    for wide in (dtype, torch.float64):
        leaves = [t.detach().to(wide).requires_grad_(t.requires_grad) for t in inputs]
        total, means = sum_of_heads(leaves, draw, case, options)
        mine = [t for t in leaves if t.requires_grad]
        results.append(
            (total, torch.autograd.grad(total, mine, torch.full_like(total, case["upstream"]), allow_unused=True))
        )
    (plain, plain_grads), (truth, true_grads) = results
    eps = eps_of(dtype)
    if truth.isnan():
        assert loss.isnan() and all(g is None or not g.any() for g in found_grads)
        return
    close("loss", loss, plain, truth, eps)
    for name, a, b, c, t in zip("hwb", found_grads, plain_grads, true_grads, wanted):
        assert a is None or (a.dtype, a.shape) == (t.dtype, t.shape)
        c = torch.zeros(t.shape).double() if c is None else c
        close(name, torch.zeros_like(t) if a is None else a, c if b is None else b, c, max(eps, eps_of(t.dtype)))
    if stats is not None:
        valid = torch.stack(
            [moved(draw.targets, k, options.get("document_ids"), options["ignore_index"]) for k in range(draw.heads)]
        )
        counts = (valid != options["ignore_index"]).flatten(1).sum(1)
        assert torch.equal(stats.num_valid, counts) and stats.num_valid.dtype == torch.int64
        assert torch.equal(stats.accuracy.isnan(), counts == 0)
        if not shared:
            torch.testing.assert_close(stats.head_loss.double(), means, rtol=8 * eps, atol=8 * eps, equal_nan=True)


def test_every_option_has_values() -> None:
    for name in TABLE:
        assert len(values_of(name)) > 1 or name == "process_group"
    assert VALUES.keys() <= TABLE.keys()
    assert 90 < len(CROSS_ENTROPY) < 200 and 90 < len(LINEAR) < 250 and 30 < len(MTP) < 90 and 90 < len(LOGPROBS) < 200
    for path in SURROUNDINGS["path"]:  # logits made again in backward, in several slabs of columns
        recomputed = [c for c in LINEAR if c["memory_budget"] == "least" and c["reduction"] == "none" and c["V"] > 128]
        assert any(c["grad_mode"] and c["tokens"] != (0,) and c["path"] == path for c in recomputed)
