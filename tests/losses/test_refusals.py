"""Every argument of every loss that does not fit is refused by its name, whatever else is right."""

import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmfast.losses import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    TeacherLogits,
    TeacherProbabilities,
    TeacherStates,
    TeacherTopK,
    cross_entropy,
    linear_cross_entropy,
    linear_distillation,
    linear_logprobs,
    logprobs,
    mtp_cross_entropy,
    mtp_logprobs,
    mtp_valid_counts,
    reference,
)
from llmfast.losses.teachers import AnyTeacher

N, D, V = 4, 3, 7
IDS = torch.tensor([0, 1, 2, 6])


def positional(function: Callable[..., Any]) -> dict[str, Any]:
    """Return arguments that fit, by name."""
    names = [name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.KEYWORD_ONLY]
    tensors: dict[str, Any] = {"logits": torch.zeros(N, V), "hidden": torch.zeros(N, D), "weight": torch.zeros(V, D)}
    tensors |= {"hiddens": torch.zeros(2, N, D), "targets": IDS, "ids": IDS, "labels": IDS}
    tensors |= {"teacher": TeacherLogits(torch.zeros(N, V))}
    return {name: tensors[name] for name in names}


def tensors(fits: Tensor, *, differentiable: bool = False) -> list[Tensor]:
    """Return tensors of another shape, kind of number and device, and one that wants a gradient."""
    other = fits.long() if fits.is_floating_point() else fits.float()
    wrong = [torch.cat([fits, fits[:1]]), other, fits.to("meta")]
    return wrong if differentiable or not fits.is_floating_point() else [*wrong, fits.clone().requires_grad_()]


# Values that an option must not have, next to arguments that fit, and other options that it needs.
WRONG: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "label_smoothing": ([-0.1, 1.1], {}),
    "softcap": ([0.0, -1.0], {}),
    "memory_budget": ([0, -1], {}),
    "grad_filter": ([0.0, -1.0], {}),
    "shift": ([-1], {}),
    "reduction": (["average", ""], {}),
    "num_valid": ([-1, torch.ones(3)], {}),
    "vocab_size": ([V + 1, V - 1], {}),
    "slab_dtype": ([torch.float64, torch.int32], {}),
    "accumulate_dtype": ([torch.float16, torch.float64], {}),
    "temperature": ([0.0, -1.0, torch.zeros(N)], {}),
    "kind": (["kl"], {}),
    "beta": ([-0.1, 1.1], {"kind": "jsd"}),
    "bias": (tensors(torch.zeros(V), differentiable=True), {}),
    "class_weights": (tensors(torch.ones(V)), {}),
    "token_weights": (tensors(torch.ones(N)), {}),
    "target_weights": (tensors(torch.ones(N, 2)), {"targets": IDS[:, None].expand(N, 2)}),
    "document_ids": (tensors(torch.zeros(N, dtype=torch.int64)), {"shift": 1}),
    "accumulate_into": ([torch.zeros(V + 1, D), torch.zeros(V, D).half(), torch.zeros(V, D, device="meta")], {}),
    "head_weights": ([[1.0], torch.ones(3), torch.ones(2, requires_grad=True)], {}),
    "detach_unembedding": ([[True]], {}),
    "heads": ([0], {"hiddens": torch.zeros(N, D)}),
    "hard_weight": ([0.5], {"targets": None}),
    "return_rank": ([True], {}),
    "inplace": ([True], {"logits": torch.zeros(V, N).T}),
}
# Options of which every value is taken, or whose checks need several ranks.
ANY = {"ignore_index", "z_loss", "logit_scale", "soft_weight", "return_stats", "process_group"}
# Changes after which an argument does not fit the others.
CLASSES: list[Callable[[Tensor], Any]] = [
    *(lambda t: t.float(), lambda t: t[:3], lambda t: t + 1, lambda t: t - 1, lambda t: t.to("meta")),
    lambda t: t[:, None][:, :0],
]
MISFITS: dict[str, list[Callable[[Tensor], Any]]] = {
    "logits": [lambda t: t.long(), lambda t: t[0, 0], lambda t: t[:, :0]],
    "hidden": [lambda t: t.long(), lambda t: t[0, 0], lambda t: t[:, :0]],
    "weight": [lambda t: t.long(), lambda t: t[:, :2], lambda t: t[0], lambda t: t[:0], lambda t: t.to("meta")],
    "targets": [*CLASSES, lambda t: torch.zeros(N, V, device="meta")],  # of classes, or probabilities of all
    "ids": CLASSES,
    "hiddens": [lambda t: t[:, :3], lambda t: t[:0], lambda t: t[0, 0]],
    "teacher": [lambda t: TeacherLogits(torch.zeros(N, V + 1)), lambda t: torch.zeros(N, V)],
}
FUNCTIONS = [
    cross_entropy,
    linear_cross_entropy,
    logprobs,
    linear_logprobs,
    linear_distillation,
    mtp_cross_entropy,
    mtp_logprobs,
]


def options_of(function: Callable[..., Any]) -> list[str]:
    return [name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]


OPTIONS = [(function, name) for function in FUNCTIONS for name in options_of(function) if name not in ANY]
ARGUMENTS = [(function, name) for function in FUNCTIONS for name in positional(function) if name in MISFITS]


def named(case: object) -> str:
    return getattr(case, "__name__", str(case))


@pytest.mark.parametrize(("function", "name"), OPTIONS, ids=named)
def test_an_option_that_does_not_fit_is_named(function: Callable[..., Any], name: str) -> None:
    values, needed = WRONG[name]
    known = {*positional(function), *options_of(function)}
    given = positional(function) | {k: v for k, v in needed.items() if k in known}
    if name in ("accumulate_into", "accumulate_dtype"):
        given["weight"] = given["weight"].clone().requires_grad_()
    for value in values:
        with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
            function(**given, **{name: value})


@pytest.mark.parametrize(("function", "name"), ARGUMENTS, ids=named)
def test_an_argument_that_does_not_fit_is_named(function: Callable[..., Any], name: str) -> None:
    given = positional(function)
    for change in MISFITS[name]:
        with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
            function(**given | {name: change(given[name])})


BF16 = torch.bfloat16
# Options that fit by themselves, but not with the rest; and how the message goes on.
TOGETHER: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (cross_entropy, {"logits": torch.zeros(V), "targets": torch.tensor(1), "shift": 1}, "shift needs a token axis"),
    (cross_entropy, {"document_ids": torch.zeros(N).long()}, "document_ids need shift > 0; got shift=0$"),
    (cross_entropy, {"target_weights": torch.ones(1)}, r"target_weights need targets of shape \(\.\.\., K\)$"),
    (cross_entropy, {"num_valid": 3, "reduction": "sum"}, "num_valid needs reduction='mean', .*; got reduction='sum'$"),
    (linear_cross_entropy, {"grad_filter": 0.1, "reduction": "none"}, "grad_filter needs reduction 'mean' or 'sum'$"),
    (linear_cross_entropy, {"num_valid": 3, "reduction": "none"}, "num_valid needs reduction='mean'"),
    (linear_cross_entropy, {"accumulate_dtype": BF16, "grad_filter": 0.1}, ".* does not work with grad_filter$"),
    (
        linear_cross_entropy,
        {"accumulate_dtype": BF16, "accumulate_into": torch.zeros(V, D)},
        ".* does not work with accumulate_into$",
    ),
    (linear_cross_entropy, {"accumulate_into": torch.zeros(V, D)}, "accumulate_into needs a weight that requires a gr"),
    (linear_distillation, {"beta": 0.5}, "beta needs kind='jsd'; got kind='forward_kl'$"),
    (linear_logprobs, {"temperature": torch.ones(N, requires_grad=True)}, "temperature gets no gradient here; detach"),
]


@pytest.mark.parametrize(("function", "options", "message"), TOGETHER, ids=named)
def test_options_that_do_not_fit_each_other_are_named(
    function: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    given = positional(function) | options
    if options.get("accumulate_dtype") is BF16:
        given |= {"hidden": given["hidden"].to(BF16), "weight": given["weight"].to(BF16).requires_grad_()}
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        function(**given)


def test_a_weight_that_is_cast_is_not_summed_in_its_own_dtype() -> None:
    hidden, weight = torch.zeros(N, D).half(), torch.zeros(V, D).half().requires_grad_()
    with (
        torch.autocast("cpu", BF16),
        pytest.raises(ValueError, match=r"^accumulate_dtype must be torch\.float32 for a we"),
    ):
        linear_cross_entropy(hidden, weight, IDS, accumulate_dtype=torch.float16)


def test_only_targets_may_be_probabilities() -> None:
    with pytest.raises(TypeError, match=r"^targets must be int64 .*, or floating point probabilities \(4, 7\); got "):
        cross_entropy(torch.zeros(N, V), torch.zeros(N))
    with pytest.raises(TypeError, match=r"^ids must be int64 or int32 class indices; got "):
        logprobs(torch.zeros(N, V), torch.zeros(N))


@pytest.mark.parametrize("function", [mtp_cross_entropy, mtp_logprobs])
@pytest.mark.parametrize(
    ("label", "error", "says"),
    [(7, ValueError, r"in \[0, 7\) or ignore_index=-100; found 7"), (1.0, TypeError, "int64 or int32 class indices")],
)
def test_labels_are_called_labels(path: str, function: Any, label: float, error: Any, says: str) -> None:
    hiddens, weight = torch.randn(2, 4, 3), torch.randn(7, 3)
    with pytest.raises(error, match=f"^labels must be {says}"):
        function(hiddens, weight, torch.full((4,), label))


# What an option is if it is not given, in all functions that have it.
DEFAULTS: dict[str, Any] = {
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "reduction": "mean",
    "shift": 0,
    "memory_budget": "auto",
    "temperature": 1.0,
    "kind": "forward_kl",
    "soft_weight": 1.0,
    "hard_weight": 0.0,
    **dict.fromkeys(("inplace", "return_stats", "return_rank", "detach_unembedding"), False),
    **dict.fromkeys(("softcap", "logit_scale", "class_weights", "token_weights", "target_weights", "document_ids")),
    **dict.fromkeys(("num_valid", "process_group", "vocab_size", "bias", "slab_dtype", "accumulate_into")),
    **dict.fromkeys(("accumulate_dtype", "grad_filter", "beta", "heads", "head_weights")),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_option_that_is_not_given_has_its_default(function: Callable[..., Any]) -> None:
    """Most of these change nothing, so that a default which did would change results of code that does not name it."""
    shown = {name: p.default for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert shown == {name: DEFAULTS[name] for name in shown}
    given = positional(function)
    idle = {name: value for name, value in DEFAULTS.items() if name in shown}
    for one, other in zip(*(torch.atleast_1d(function(**given, **more)) for more in ({}, idle)), strict=True):
        assert torch.equal(one, other)


def test_every_option_has_a_default_here() -> None:
    assert DEFAULTS.keys() == {name for function in FUNCTIONS for name in options_of(function)}


TEACHERS: list[Any] = [
    TeacherStates(torch.zeros(N, 2), torch.zeros(V, 2), torch.zeros(V)),
    TeacherLogits(torch.zeros(N, V)),
    TeacherProbabilities(torch.ones(N, V)),
    TeacherTopK(torch.arange(2).expand(N, 2), torch.zeros(N, 2)),
]
TAUGHT = [(teacher, name) for teacher in TEACHERS for name, t in vars(teacher).items() if isinstance(t, Tensor)]


def learned(teacher: Any) -> Tensor:
    return linear_distillation(torch.zeros(N, D), torch.zeros(V, D), teacher)


@pytest.mark.parametrize(("teacher", "name"), TAUGHT, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_a_tensor_of_a_teacher_that_does_not_fit_is_named(teacher: Any, name: str) -> None:
    assert learned(teacher).isfinite()
    t = getattr(teacher, name)
    other = t.long() if t.is_floating_point() else t.float()
    for wrong in (torch.cat([t, t[:1]]), t[:-1], t[..., :0], t[None], t[0], other, t.to("meta")):
        with pytest.raises((ValueError, TypeError), match=rf"^teacher\.{name} must be .*; got "):
            learned(replace(teacher, **{name: wrong}))


def test_every_tensor_of_every_teacher_is_tried() -> None:
    kinds = typing.get_args(AnyTeacher)
    assert [type(teacher) for teacher in TEACHERS] == [*kinds]
    assert {name for _, name in TAUGHT} == {f.name for kind in kinds for f in fields(kind) if "Tensor" in str(f.type)}


@pytest.mark.parametrize("wrong", [-1, -101, V])
def test_an_id_of_a_teacher_is_a_class_or_ignored(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"^teacher\.ids must be in \[0, 7\) or .*=-100; got tensor\(\[{wrong}\]\)$"):
        learned(TeacherTopK(torch.tensor([[0, 1]] * 3 + [[2, wrong]]), torch.zeros(N, 2)))
    with pytest.raises(ValueError, match=r"^teacher\.ids must differ within a token; got tensor\(\[5\]\) twice$"):
        learned(TeacherTopK(torch.tensor([[0, 1, 2]] * 3 + [[5, -100, 5]]), torch.zeros(N, 3)))
    assert learned(TeacherTopK(torch.tensor([[0, 1]] * 3 + [[2, -100]]), torch.zeros(N, 2))).isfinite()


def test_what_is_nearly_too_much_is_taken() -> None:
    """Take the limits themselves, and tensors that would learn where nothing does."""
    z, h, w = torch.randn(N, V), torch.randn(N, D), torch.randn(V, D)
    learns = torch.ones(N, requires_grad=True)
    assert cross_entropy(z, IDS, num_valid=0).isinf()
    assert linear_cross_entropy(h, w, torch.full_like(IDS, -100), num_valid=0).isnan()
    for smoothing in (0.0, 1.0):
        assert cross_entropy(z, IDS, label_smoothing=smoothing).isfinite()
    assert linear_cross_entropy(h, w, IDS, memory_budget=1 << 16, vocab_size=V).isfinite()
    with torch.no_grad():
        assert cross_entropy(z.clone().requires_grad_(), IDS, inplace=True).isfinite()
        assert torch.equal(logprobs(z, IDS, temperature=learns), logprobs(z, IDS))
        assert linear_distillation(h, w, TeacherLogits(z), temperature=learns).isfinite()
        assert linear_cross_entropy(h, w, IDS, accumulate_into=torch.zeros(V, D)).isfinite()
        assert cross_entropy(z, z.softmax(1).requires_grad_()).isfinite()
        assert cross_entropy(z, IDS[:, None], target_weights=learns[:, None]).isfinite()
        assert linear_distillation(h, w, TeacherLogits(z), token_weights=learns).isfinite()
    for beta in (0.0, 1.0):
        assert linear_distillation(h, w, TeacherLogits(z), kind="jsd", beta=beta).isfinite()


# What an annotation allows by its words, and values that it never does.
NO_TENSORS: list[Any] = [[1, 2], np.zeros((N, V)), torch.nn.Linear(D, V), "x", None]
NO_NUMBERS: list[Any] = ["-100", None, [1, 2], True, torch.nn.Linear(D, V)]
DEFINED = [reference.cross_entropy, reference.linear_cross_entropy, reference.logprobs, reference.linear_logprobs]
EVERYWHERE = [*FUNCTIONS, *DEFINED, reference.linear_distillation, mtp_valid_counts]


def annotated(function: Callable[..., Any]) -> dict[str, str]:
    """Return what the signature says about each argument: "Tensor | None"."""
    hints = {name: p.annotation for name, p in inspect.signature(function).parameters.items()}
    return {name: hint.__name__ if isinstance(hint, type) else str(hint) for name, hint in hints.items()}


def of_kind(*wanted: str) -> list[tuple[Callable[..., Any], str]]:
    found = [(f, name) for f in EVERYWHERE for name, hint in annotated(f).items() if any(w in hint for w in wanted)]
    return [(f, name) for f, name in found if name not in ("return_stats", "process_group", "teacher")]


def refused(function: Callable[..., Any], name: str, values: list[Any]) -> None:
    hint = annotated(function)[name]
    given = {"labels": IDS, "heads": 2} if function is mtp_valid_counts else positional(function)
    for value in values:
        allowed = (value is None and "None" in hint) or (isinstance(value, list) and "Sequence[float]" in hint)
        if not allowed and not (value is True and "bool" in hint):
            with pytest.raises(TypeError, match=rf"^{name}(\[0\])? must be .*; got (a|an|None|True|'|1\b)"):
                function(**given | {name: value})


@pytest.mark.parametrize(("function", "name"), of_kind("Tensor"), ids=named)
def test_what_is_no_tensor_is_refused_by_its_name(function: Callable[..., Any], name: str) -> None:
    refused(function, name, NO_TENSORS)


@pytest.mark.parametrize(("function", "name"), of_kind("int", "float", "bool"), ids=named)
def test_what_is_no_number_is_refused_by_its_name(function: Callable[..., Any], name: str) -> None:
    refused(function, name, NO_NUMBERS)


@pytest.mark.parametrize("name", ["reduction", "kind", "memory_budget"])
def test_a_word_is_refused_by_the_name_of_its_option(name: str) -> None:
    for function in (f for f in FUNCTIONS if name in annotated(f)):
        for value in (None, [1], torch.zeros(1)):
            with pytest.raises(TypeError, match=rf"^{name} must be .*; got (None|a (list|tensor))$"):
                function(**positional(function) | {name: value})


def test_the_message_says_what_was_wanted_and_what_came() -> None:
    given = torch.zeros(N, V), IDS
    for options, message in (
        ({"ignore_index": None}, "ignore_index must be an int; got None"),
        ({"z_loss": "1"}, "z_loss must be a number; got '1'"),
        ({"class_weights": [1.0]}, "class_weights must be a tensor or None; got a list"),
        ({"num_valid": "2"}, "num_valid must be a number, a tensor or None; got '2'"),
        ({"reduction": None}, "reduction must be 'mean', 'sum' or 'none'; got None"),
    ):
        wrong: Any = options
        with pytest.raises(TypeError, match=rf"^{re.escape(message)}$"):
            cross_entropy(*given, **wrong)
    with pytest.raises(TypeError, match=r"^hiddens\[1\] must be a tensor; got a list$"):
        mtp_cross_entropy([torch.zeros(N, D), [0.0]], torch.zeros(V, D), IDS)  # type: ignore[list-item]


def test_numbers_of_numpy_are_numbers() -> None:
    logits, targets = torch.randn(N, V), IDS.clone()
    targets[0] = 3
    numpys: Any = {"ignore_index": np.int64(3), "softcap": np.float32(5.0), "z_loss": np.float64(0.5)}
    plain: Any = {name: value.item() for name, value in numpys.items()}
    assert torch.equal(cross_entropy(logits, targets, **numpys), cross_entropy(logits, targets, **plain))


@pytest.mark.parametrize("taught", [linear_distillation, reference.linear_distillation], ids=["ours", "reference"])
@pytest.mark.parametrize(("teacher", "name"), TAUGHT, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_what_is_no_tensor_of_a_teacher_is_refused(taught: Callable[..., Any], teacher: Any, name: str) -> None:
    for value in NO_TENSORS[: -1 if name == "bias" else None]:
        with pytest.raises(TypeError, match=rf"^teacher\.{name} must be a tensor( or None)?; got (an? |None|'x')"):
            taught(torch.zeros(N, D), torch.zeros(V, D), replace(teacher, **{name: value}))
    with pytest.raises(TypeError, match=r"^teacher must be a TeacherStates, .*; got a tensor$"):
        taught(torch.zeros(N, D), torch.zeros(V, D), torch.zeros(N, V))


@pytest.mark.parametrize("value", NO_TENSORS, ids=lambda value: type(value).__name__)
def test_the_modules_refuse_what_is_no_tensor(value: Any) -> None:
    for module, width in ((CrossEntropyLoss(), V), (LinearCrossEntropyLoss(D, V), D)):
        for given in ({"input": value, "target": IDS}, {"input": torch.zeros(N, width), "target": value}):
            with pytest.raises(TypeError, match=r"^(input|target) must be a tensor; got "):
                module(**given)
    if value is not None:
        for make in (CrossEntropyLoss, lambda **given: LinearCrossEntropyLoss(D, V, **given)):
            with pytest.raises(TypeError, match=r"^weight must be a tensor or None; got "):
                make(weight=value)


@pytest.mark.parametrize("name", ["ignore_index", "label_smoothing", "z_loss"])
def test_the_modules_refuse_options_when_they_are_made(name: str) -> None:
    for make in (CrossEntropyLoss, lambda **given: LinearCrossEntropyLoss(D, V, **given)):
        with pytest.raises(TypeError, match=rf"^{name} must be (an int|a number); got '1'$"):
            make(**{name: "1"})
    with pytest.raises(TypeError, match=r"^num_classes must be an int; got '7'$"):
        LinearCrossEntropyLoss(D, "7")  # type: ignore[arg-type]
