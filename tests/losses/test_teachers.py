"""Distillation that makes some of its gradients: any two settings around it, against its definition in float64."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from evidence.traffic import counting
from llmfast.losses import (
    TeacherLogits,
    TeacherProbabilities,
    TeacherStates,
    TeacherTopK,
    linear_distillation,
    reference,
)
from llmfast.losses.options import DistillationOptions, declared
from support.devices import DEVICE
from support.pairs import Case, covering
from support.plans import SIZES, forced

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
N, D, V, START = 5, 6, 37, 2.0**-10  # START of a main_grad is too much to be overlooked
FACTORS: dict[str, list[Any]] = {
    "path": ["plain", "kernels"],
    "teacher": ["states", "logits", "probabilities", "drop", "bucket"],
    "learns": ["", "everything", "hidden", "weight", "bias"],  # of a teacher; the last three of its states
    "wants": ["hidden weight bias", "hidden", "weight", "bias", "weight bias", ""],
    "dtype": [F32, BF16, F16, F64],
    "kind": ["forward_kl", "reverse_kl", "jsd"],
    "beta": [None, 0.3],
    "temperature": [1.0, 1.6, "N"],
    "soft_weight": [1.0, 0.7],
    "hard_weight": [0.0, 0.4],
    "ignore_index": [-100, 0, V - 1, V + 3],
    "index_dtype": [torch.int64, torch.int32],
    "ignored": ["some", "all", "none", "no targets"],
    "token_weights": [None, F32, BF16],
    "reduction": ["mean", "sum", "none"],
    "num_valid": [None, 3, 0.0],
    "softcap": [None, 5.0],
    "logit_scale": [None, -1.3],
    "slab_dtype": [None, F32],
    "accumulate_into": [False, True],
    "accumulate_dtype": [None, "weight"],
    "autocast": [False, True],
    "transposed": [False, True],
    "again": [False, True],  # a second backward pass
    "upstream": [1.0, -1.5],
    "size": [None, *SIZES],
}


def possible(case: Case) -> bool:
    """Return False for settings that exclude each other, or leave nothing to differentiate."""
    given, teacher, learns = case.get, case.get("teacher", "states"), case.get("learns", "")
    into = given("accumulate_into", False)
    return (
        not (learns in ("hidden", "weight", "bias") and teacher != "states")
        and not (given("wants", "hidden") == "" and given("learns", "everything") == "")
        and not (into and ("weight" not in given("wants", "weight") or given("accumulate_dtype")))
        and not (teacher == "drop" and given("kind") == "reverse_kl")
        and not (given("beta") and given("kind", "jsd") != "jsd")
        and not (given("ignored") == "no targets" and given("hard_weight"))
        and not (given("num_valid") is not None and given("reduction", "mean") != "mean")
        and not (given("autocast") and (given("dtype", F32) != F32 or given("accumulate_dtype")))
        and not (given("accumulate_dtype") and given("dtype", BF16) not in (BF16, F16))
        and not (given("dtype") == F64 and given("slab_dtype"))
    )


def drawn(case: Case) -> tuple[Any, Tensor | None, dict[str, Any]]:
    """Draw a teacher, targets and options."""
    dtype, ignore_index, said = case["dtype"], case["ignore_index"], torch.randn(N, V) * 2
    targets = torch.randint(1, V - 1, (N,))
    if case["ignored"] in ("some", "all"):
        targets[slice(0, None, 2) if case["ignored"] == "some" else slice(None)] = ignore_index
    teacher: Any = TeacherStates(
        torch.randn(N, 4).to(dtype), torch.randn(V, 4).to(dtype), torch.randn(V), softcap=4.0, logit_scale=0.7
    )
    if case["teacher"] == "logits":
        teacher = TeacherLogits(said.to(dtype))
    elif case["teacher"] == "probabilities":
        teacher = TeacherProbabilities(said.softmax(1).to(dtype))
    elif case["teacher"] != "states":
        values, ids = said[:, 1:-1].log_softmax(1).sub(0.1).topk(4)
        ids = (ids + 1).masked_fill(torch.tensor([False, False, True, False]), ignore_index)
        teacher = TeacherTopK(ids.to(case["index_dtype"]), values.to(dtype), case["teacher"])
    options = {name: case[name] for name in declared(DistillationOptions) if name in case}
    options["temperature"] = torch.rand(N) + 0.5 if case["temperature"] == "N" else case["temperature"]
    options["token_weights"] = (
        None if case["token_weights"] is None else (torch.rand(N) + 0.5).to(case["token_weights"])
    )
    options["accumulate_into"] = torch.full((V, D), START, dtype=torch.promote_types(dtype, F32))
    options["accumulate_into"] = options["accumulate_into"] if case["accumulate_into"] else None
    options["accumulate_dtype"] = dtype if case["accumulate_dtype"] else None
    return teacher, None if case["ignored"] == "no targets" else targets.to(case["index_dtype"]), options


def learning(teacher: Any, learns: str, dtype: torch.dtype | None = None) -> tuple[Any, list[Tensor]]:
    """Return a teacher some of whose tensors are leaves that want a gradient, in `dtype` if given; and these."""
    floats = {name: t for name, t in vars(teacher).items() if isinstance(t, Tensor) and t.is_floating_point()}
    leaves = {
        name: t.detach().clone().to(dtype or t.dtype).requires_grad_(learns in ("everything", name))
        for name, t in floats.items()
    }
    return replace(teacher, **leaves), [t for t in leaves.values() if t.requires_grad]


CASES = [case for seed in range(2) for case in covering(FACTORS, possible, seed)]


@pytest.mark.parametrize(
    ("path", "case"),
    [pytest.param(case["path"], case, id=f"{i}-{case['path']}") for i, case in enumerate(CASES)],
    indirect=["path"],
)
def test_any_of_the_gradients_with_any_two_settings(path: str, case: Case) -> None:
    """Make the gradients that are wanted of student and teacher, and compare with the definition's."""
    teacher, targets, options = drawn(case)
    tensors = [torch.randn(N, D).to(case["dtype"]), torch.randn(V, D).to(case["dtype"]), torch.randn(V)]
    wants = [name in case["wants"].split() for name in ("hidden", "weight", "bias")]
    upstream = torch.randn(N) if case["reduction"] == "none" else torch.tensor(1.0)
    low = BF16 if case["autocast"] else case["dtype"]
    main = options["accumulate_into"]

    def run(function: Any, dtype: torch.dtype | None) -> list[Tensor]:
        own = [t.mT.contiguous().mT if case["transposed"] and t.dim() == 2 else t.clone() for t in tensors]
        if dtype is not None:  # what is multiplied is rounded first
            own = [t.to(low).to(dtype) if t.dim() == 2 else t.to(dtype) for t in own]
        said = teacher
        if dtype is not None and isinstance(teacher, TeacherStates):
            said = replace(teacher, hidden=teacher.hidden.to(low), weight=teacher.weight.to(low))
        own = [t.requires_grad_(wanted) for t, wanted in zip(own, wants)]
        said, theirs = learning(said, case["learns"], dtype)
        given = options if dtype is None else {**options, "accumulate_into": None}
        loss = function(own[0], own[1], said, targets, bias=own[2], **given)
        leaves = [*(t for t in own if t.requires_grad), *theirs]
        for _ in range(1 + (case["again"] and dtype is None)):
            found = torch.autograd.grad(
                loss, leaves, (upstream * case["upstream"]).to(loss.dtype), retain_graph=True, allow_unused=True
            )
        results = [
            torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves)
        ]  # the definition's tokens may all be ignored
        assert all((g.dtype, g.shape) == (t.dtype, t.shape) for g, t in zip(results, leaves))
        if dtype is None and main is not None:
            results[int(wants[0])] = (main - START) / (1 + case["again"])
        return [loss.detach(), *results]

    planned = nullcontext() if case["size"] is None else forced(None, case["size"])
    with planned, torch.autocast(DEVICE, BF16, enabled=case["autocast"]):
        ours = run(linear_distillation, None)
    plain, truth = run(reference.linear_distillation, low), run(reference.linear_distillation, F64)
    for a, b, c in zip(ours, plain, truth, strict=True):
        nothing = not truth[0].isfinite().all()  # to divide by
        if nothing:
            assert not a.isfinite().any() if a is ours[0] else not a.any()
            continue
        eps = 8 * max(torch.finfo(low).eps, torch.finfo(a.dtype).eps)
        a, b, c = (t.double() for t in (a, b, c))
        error, allowed, slack = (a - c).norm(), (b - c).norm(), max(eps, 1e-13) * (c.norm() + 1)
        assert error <= 1.5 * allowed + slack, f"error {error:.3g}, torch's {allowed:.3g}, slack {slack:.3g}"


@pytest.mark.cpu("bytes that plain torch holds are counted")
@pytest.mark.parametrize(
    ("teacher", "learns", "autocast"),  # any two of them meet
    [
        (teacher, learns, bool((i + learns) % 2))
        for i, teacher in enumerate(("states", "logits", "probabilities", "drop", "bucket"))
        for learns in (False, True)
    ],
)
def test_numbers_of_many_tokens_keep_to_the_least_budget(teacher: str, learns: bool, autocast: bool) -> None:
    """Let numbers per token be the most that is held: there are few classes, and a teacher says much of them."""
    n, v, k = 64, 40, 32
    hidden, weight = torch.randn(n, 16).requires_grad_(), torch.randn(v, 16).requires_grad_()
    values, ids = torch.randn(n, v).log_softmax(1).topk(k)
    said: Any = {
        "states": lambda: TeacherStates(torch.randn(n, 4), torch.randn(v, 4)),
        "logits": lambda: TeacherLogits(torch.randn(n, v)),
        "probabilities": lambda: TeacherProbabilities(torch.rand(n, v).softmax(1)),
    }.get(teacher, lambda: TeacherTopK(ids, values, teacher))()  # type: ignore[arg-type]
    said, theirs = learning(said, "everything" if learns else "")
    leaves, targets = [hidden, weight, *theirs], torch.zeros(n, dtype=torch.int64)

    def held(budget: int) -> int:
        with counting() as counts, torch.autocast("cpu", BF16, enabled=autocast):
            loss = linear_distillation(hidden, weight, said, targets, memory_budget=budget, hard_weight=0.5)
            torch.autograd.grad(loss, leaves)
        return counts.peak_bytes - sum(t.nbytes for t in leaves)

    with pytest.raises(ValueError, match="memory_budget must be at least") as error:
        held(1)
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert held(least) <= least
