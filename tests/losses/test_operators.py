"""Operators of torch.compile, called as they are: any two settings, against the same loss outside of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from evidence.traffic import counting
from llmfast.losses import autograd, cross_entropy, linear_cross_entropy, linear_logprobs, logprobs, operators
from llmfast.losses.from_hidden import LinearCrossEntropy
from llmfast_kernels.terms import Targets, Terms
from support.devices import DEVICE, kernels, plain
from support.pairs import Case, covering
from support.plans import SIZES, forced

D = 6
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (cross_entropy, logprobs, linear_cross_entropy, linear_logprobs)
}
RESULTS = [("loss",), ("lse",), ("entropy",), ("loss", "lse"), ("loss", "entropy"), ("lse", "entropy")]
OF_LOSSES: dict[str, list[Any]] = {
    "reduction": ["mean", "sum", "none"],
    "label_smoothing": [0.0, 0.2],
    "z_loss": [0.0, 0.03],
    "class_weights": [None, "V"],
    "token_weights": [None, "N"],
    "target_weights": [None, "NK"],
    "num_valid": [None, 3, 0.0],
}
OF_PRODUCTS: dict[str, list[Any]] = {
    "slab_dtype": [None, torch.float32],
    "accumulate_dtype": [None, "weight"],
    "grad_filter": [None, 1e-30],
    "bias": [None, "fixed", "learns"],
    "memory_budget": ["auto", 1],  # the plan is forced; this says whether a gradient of the weight may be returned
    "size": [None, *SIZES],
    "wants": [(True, True), (True, False), (False, True)],
}
OF_LOGPROBS: dict[str, list[Any]] = {"temperature": [1.0, 0.6, "N"], "return_rank": [False, True]}
FACTORS: dict[str, list[Any]] = {
    "path": ["plain", "kernels"],
    "function": [*FUNCTIONS],
    "dtype": DTYPES,
    "used": ["alone", *RESULTS, ("loss", "lse", "entropy")],
    "upstream": [1.0, -1.5],
    "targets": ["one", "three", "probabilities"],
    "ignored": ["some", "all"],
    "softcap": [None, 5.0],
    "logit_scale": [None, -1.7],
    "transposed": [False, True],
    "autocast": [False, True],
    **OF_LOSSES,
    **OF_PRODUCTS,
    **OF_LOGPROBS,
}


def possible(case: Case) -> bool:
    """Return False for settings that a function does not have, or that exclude each other."""
    set_ = {name for name, value in case.items() if value != FACTORS[name][0]}
    function, targets, alone = case.get("function", ""), case.get("targets"), case.get("used") == "alone"
    indices = set_ & {"target_weights", "grad_filter", "return_rank", "ignored"} or case.get("used", "alone") != "alone"
    return (
        not (function.endswith("logprobs") and set_ & {*OF_LOSSES, "grad_filter"})
        and not (function.endswith("entropy") and set_ & {*OF_LOGPROBS})
        and not (function and not function.startswith("linear") and set_ & {*OF_PRODUCTS})
        and not (targets == "probabilities" and (indices or function.endswith("logprobs")))
        and not ("target_weights" in set_ and case.get("targets", "three") != "three")
        and not ("num_valid" in set_ and "reduction" in set_)
        and not ("grad_filter" in set_ and (case.get("reduction") == "none" or "accumulate_dtype" in set_))
        and not ("return_rank" in set_ and alone)
        and not ("autocast" in set_ and (function.endswith("entropy") and not function.startswith("linear")))
        and not ("autocast" in set_ and (function == "logprobs" or case.get("dtype", torch.float32) != torch.float32))
        and not ("autocast" in set_ and "accumulate_dtype" in set_)
        and not (case.get("memory_budget") == 1 and case.get("size", "least") is None)
        and not (case.get("dtype") == torch.float64 and set_ & {"slab_dtype"})
        and not (case.get("dtype", torch.bfloat16) in (torch.float32, torch.float64) and "accumulate_dtype" in set_)
    )


@contextmanager
def as_operators(*, compared: bool = False) -> Iterator[list[str]]:
    """Run losses by their operators, and list their calls; compare what they return to what a graph is told of it."""
    ran: list[str] = []

    def expect_as_said(real: Any, said: Any) -> None:
        real, said = ((t,) if isinstance(t, Tensor) else t for t in (real, said))
        for a, b in zip(real, said, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())

    def watched(made: operators.Operators, name: str) -> Callable[..., Any]:
        run, fake = getattr(made, name), getattr(made, f"_fake_{name}")

        def call(*arguments: Any) -> Any:
            found = run(*arguments)
            if compared:
                expect_as_said(found, fake(*arguments))
            ran.append(name)
            return found

        return call

    with mock.patch.object(autograd.EagerLoss, "apply", operators.apply):
        patches = [
            mock.patch.object(made, name, watched(made, name))
            for made in operators.OPERATORS.values()
            for name in ("forward", "backward")
        ]
        for patch in patches:
            patch.start()
        try:
            yield ran
        finally:
            for patch in patches:
                patch.stop()


def outcome(case: Case, seed: int) -> list[Tensor]:
    """Return all results of a case, and the gradients of what is used of them."""
    torch.manual_seed(seed)
    function, dtype, K = FUNCTIONS[case["function"]], case["dtype"], 3 if case["targets"] == "three" else 1
    N, V, wide = 5, 37, torch.promote_types(case["dtype"], torch.float32)
    ids = torch.randint(0, V, (N, K) if K > 1 else (N,))
    ids[slice(0, None, 2) if case["ignored"] == "some" else slice(None)] = -100
    targets = torch.rand(N, V).softmax(1) if case["targets"] == "probabilities" else ids
    drawn: dict[Any, Tensor] = {"V": torch.rand(V) + 0.1, "N": torch.rand(N) + 0.5, "NK": torch.rand(N, K)}
    linear, of_losses = case["function"].startswith("linear"), not case["function"].endswith("logprobs")
    names = ["softcap", "logit_scale", *(OF_LOSSES if of_losses else OF_LOGPROBS)]
    given = {name: drawn.get(case[name], case[name]) for name in names}
    stats = case["used"] != "alone"
    if linear:
        leaves = [torch.randn(N, D), torch.randn(V, D)]
        wants = [*case["wants"], case["bias"] == "learns"]
        leaves += [] if case["bias"] is None else [torch.randn(V)]
        given |= {name: case[name] for name in ("slab_dtype", "memory_budget")}
        given["accumulate_dtype"] = dtype if case["accumulate_dtype"] else None
        given |= {"grad_filter": case["grad_filter"]} if of_losses else {}
    else:
        leaves, wants = [torch.randn(N, V) * 2], [True]
    if case["transposed"]:
        leaves = [t.mT.contiguous().mT if t.dim() == 2 else t for t in leaves]
    leaves = [t.to(dtype).requires_grad_(wanted) for t, wanted in zip(leaves, wants)]
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=case["autocast"])
    with nullcontext() if case["size"] is None else forced(None, case["size"]), autocast:
        if linear:
            given["bias"] = None if case["bias"] is None else leaves[2]
            found = function(leaves[0], leaves[1], targets, return_stats=stats, **given)
        else:
            found = function(leaves[0], targets, return_stats=stats, **given)
        results = [found] if isinstance(found, Tensor) else [found[0], *(t for t in found[1] if t is not None)]
        used = {"loss": results[0]} | ({} if isinstance(found, Tensor) else found[1]._asdict())
        outputs = [used[name] for name in (("loss",) if case["used"] == "alone" else case["used"])]
        upstream = [torch.randn(t.shape).to(wide) * case["upstream"] for t in outputs]
        if case["reduction"] != "none" and of_losses and outputs[0].dim() == 0:
            upstream[0] = torch.full((), case["upstream"], dtype=wide)
        wanted = [t for t in leaves if t.requires_grad]
        gradients = torch.autograd.grad(outputs, wanted, upstream)
    assert all((g.dtype, g.shape) == (t.dtype, t.shape) for g, t in zip(gradients, wanted))
    return [t.detach() for t in (*results, *gradients)]


CASES = covering(FACTORS, possible)


@pytest.mark.parametrize(
    ("path", "case"),
    [pytest.param(case["path"], case, id=f"{i}-{case['path']}") for i, case in enumerate(CASES)],
    indirect=["path"],
)
def test_an_operator_finds_what_the_loss_finds_outside(path: str, case: Case) -> None:
    """Compare all results and gradients; an operator only rounds them in other places."""
    wanted = outcome(case, 1)
    with as_operators(compared=True) as ran:
        found = outcome(case, 1)
    made = (
        case["function"].startswith("linear") and case["reduction"] != "none" and case["used"] in ("alone", ("loss",))
    )
    made = made and case["function"].endswith("entropy") and (case["memory_budget"] == "auto" or not case["wants"][1])
    assert ran == ["forward"] if made else ["forward", "backward"], "gradients of a sum are made in the forward pass"
    eps = torch.finfo(torch.bfloat16 if case["autocast"] else case["dtype"]).eps
    eps = max(eps, 2e-6 if eps > 1e-10 else 1e-14)
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(a.isfinite(), b.isfinite())
        a, b = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (a, b))
        assert (a - b).norm() <= 4 * eps * (b.norm() + 0.1)


def test_an_operator_is_named_by_where_gradients_are_divided() -> None:
    """torch.compile keeps graphs on disk: one that divides in the forward pass must not be taken for one that does not.

    The kernels divide float32 gradients as they write them, plain torch does not.
    """
    fields: dict[str, Any] = dict.fromkeys(("slab_dtype", "weight_dtype", "accumulate_dtype"), torch.float32)
    fields |= {"targets": Targets(torch.zeros(3, 1).long()), "terms": Terms(9), "reduction": "mean", "stats": False}
    loss = LinearCrossEntropy(
        **fields, count=torch.tensor(3.0), dtype=torch.float32, budget=None, held=0, grad_filter=None
    )
    names = []
    for path in (plain, kernels):
        with path():
            names.append(operators.OPERATORS[LinearCrossEntropy].flatten(loss)[-1])
    assert names[0] != names[1] and all(name.startswith(operators.REVISION) for name in names)


HELD: dict[str, list[Any]] = {
    "function": ["linear_cross_entropy", "linear_logprobs"],
    "dtype": [torch.float32, torch.bfloat16],
    "reduction": ["mean", "none"],
    "return_stats": [False, True],
    "wants": [(True, True), (True, False), (False, True)],
    "bias": [False, True],
}


def can_be(case: Case) -> bool:
    return not (case.get("function") == "linear_logprobs" and case.get("reduction", "mean") == "none")


@pytest.mark.cpu("bytes that plain torch holds are counted")
@pytest.mark.parametrize("path", ["plain"], indirect=True)
@pytest.mark.parametrize("case", covering(HELD, can_be), ids=lambda case: "-".join(map(str, case.values())))
def test_an_operator_keeps_its_budget(path: str, case: Case) -> None:
    """Count what it holds and returns. What the graph multiplies in the end is the compiler's."""
    N, D, V, dtype = 32, 64, 2048, case["dtype"]
    function, of_losses = FUNCTIONS[case["function"]], case["function"] == "linear_cross_entropy"
    leaves = [torch.randn(*shape).to(dtype) for shape in ((N, D), (V, D), (V,))[: 2 + case["bias"]]]
    wants = [*case["wants"], True][: len(leaves)]
    leaves = [t.requires_grad_(wanted) for t, wanted in zip(leaves, wants)]
    gradients = sum(t.nbytes for t in leaves if t.requires_grad)
    given = {"reduction": case["reduction"]} if of_losses else {}
    given |= {"bias": leaves[2]} if case["bias"] else {}

    def held(budget: int) -> tuple[int, list[str]]:
        with as_operators() as ran, counting() as counts:
            found = function(
                *leaves[:2], torch.arange(N), memory_budget=budget, return_stats=case["return_stats"], **given
            )
            in_forward = counts.peak_bytes
            loss = found[0] if case["return_stats"] else found
            torch.autograd.grad(loss.sum(), [t for t in leaves if t.requires_grad])
        return (in_forward if ran == ["forward"] else counts.peak_bytes) - gradients, ran

    with pytest.raises(ValueError, match="memory_budget must be at least") as error:
        held(1)
    least = int(str(error.value).split("at least ")[1].split()[0])
    calls = []
    for budget in (least, 2 * least, 4 * V * D, 6 * V * D, 8 << 20):
        bytes_, ran = held(budget)
        assert bytes_ <= budget, budget
        calls.append(len(ran))
    made = of_losses and case["reduction"] == "mean"
    assert calls[-1] == (1 if made else 2), "there is room for a gradient of the weight"
    assert calls[0] == (1 if made and not case["wants"][1] else 2), "there is none"
