"""Every tensor argument of every loss in every layout: a kernel that takes it for contiguous reads something else.

The arguments are found in the signatures. One that is added later fails here until `VALUES` says what it may hold.
"""

import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import llmfast.losses
from llmfast import _dispatch
from llmfast.losses import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    TeacherLogits,
    TeacherProbabilities,
    TeacherStates,
    TeacherTopK,
    mtp_cross_entropy,
    mtp_logprobs,
    mtp_valid_counts,
)
from support import devices
from support.launched import unrecorded
from support.layouts import LAYOUTS, expanded, strided, transposed
from support.plans import SIZES, forced

T, D, V, K = 3, 16, 130, 2


def labels(*shape: int) -> Tensor:
    """Draw labels, some of them ignored; not the last of a sequence, so that a mean is of something."""
    y, ignored = torch.randint(0, V, shape), torch.rand(shape) < 0.2
    ignored[..., -1] = False
    return y.masked_fill(ignored, -100)


# What each argument may hold; tensors alone, other arguments have their defaults.
VALUES: dict[str, Callable[[], Tensor]] = {
    "logits": lambda: torch.randn(2, T, V),
    "hidden": lambda: torch.randn(2, T, D),
    "hiddens": lambda: torch.randn(K, 2, T, D),
    "weight": lambda: torch.randn(V, D),
    "bias": lambda: torch.randn(V),
    "targets": lambda: labels(2, T),
    "labels": lambda: labels(2, T),
    "ids": lambda: labels(2, T, K),
    "class_weights": lambda: torch.rand(V),
    "token_weights": lambda: torch.rand(2, T),
    "target_weights": lambda: torch.rand(2, T, K),
    "document_ids": lambda: torch.arange(T).div(4, rounding_mode="floor").expand(2, T).contiguous(),
    "num_valid": lambda: torch.tensor([9]),
    "head_weights": lambda: torch.rand(K),
    "accumulate_into": lambda: torch.randn(V, D),
    "temperature": lambda: torch.rand(2, T) + 0.5,
    "teacher.hidden": lambda: torch.randn(2, T, D + 3),
    "teacher.weight": lambda: torch.randn(V, D + 3),
    "teacher.bias": lambda: torch.randn(V),
    "teacher.logits": lambda: torch.randn(2, T, V),
    "teacher.probabilities": lambda: torch.randn(2, T, V).softmax(-1),
    "teacher.ids": lambda: torch.rand(2, T, V).topk(3).indices,
    "teacher.logprobs": lambda: torch.randn(2, T, V).log_softmax(-1)[..., :3],
}
# A teacher is a record of tensors, which have names here too.
TEACHERS: dict[Any, tuple[str, ...]] = {
    TeacherStates: ("teacher.hidden", "teacher.weight", "teacher.bias"),
    TeacherLogits: ("teacher.logits",),
    TeacherProbabilities: ("teacher.probabilities",),
    TeacherTopK: ("teacher.ids", "teacher.logprobs"),
}
FUNCTIONS = [f for name in llmfast.losses.__all__ if inspect.isfunction(f := getattr(llmfast.losses, name))]


def arguments(function: Callable[..., Any]) -> list[str]:
    """Return the names of the function's arguments that may be tensors."""
    hints = {name: p.annotation for name, p in inspect.signature(function).parameters.items()}
    found = [name for name, hint in hints.items() if "Tensor" in str(hint) or "Numbers" in str(hint)]
    return [*found, *(name for names in TEACHERS.values() for name in names if "teacher" in hints)]


def needed(function: Callable[..., Any], name: str) -> list[str]:
    """Return the tensors that a call takes at least, with one more argument."""
    parameters = inspect.signature(function).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if "teacher" in required:
        required.remove("teacher")
        required += next((names for names in TEACHERS.values() if name in names), TEACHERS[TeacherStates])
    return [n for n in dict.fromkeys([*required, name]) if n != "heads"]


def value(function: Callable[..., Any], name: str) -> Tensor:
    if function is mtp_cross_entropy and name == "num_valid":
        return torch.tensor([9.0, 8.0])
    if function is mtp_logprobs and name == "temperature":
        return torch.rand(K, 2, T) + 0.5
    return VALUES[name]()


def call(function: Callable[..., Any], tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Return the function's results, all gradients, and the accumulated tensors."""
    tensors = dict(tensors)
    if "target_weights" in tensors:
        y = torch.stack([tensors["targets"], tensors["targets"].flip(0)], -1)
        tensors["targets"] = y if tensors["targets"].is_contiguous() else strided(y)
    leaves = {}
    for name in ("logits", "hidden", "hiddens", "weight", "bias"):
        if name in tensors and tensors[name].is_floating_point():
            leaves[name] = tensors[name].detach().requires_grad_()
    if "document_ids" in tensors and "shift" in inspect.signature(function).parameters:
        options["shift"] = 1
    main = tensors.get("accumulate_into")
    taught = {n: tensors.pop(n) for n in [*tensors] if n.startswith("teacher.")}
    if taught:
        kind = next(kind for kind, names in TEACHERS.items() if names[0] in taught)
        options["teacher"] = kind(**{n.removeprefix("teacher."): t for n, t in taught.items()})
    result = function(**{**tensors, **leaves}, **options)
    if not leaves:
        return [result]
    upstream = torch.linspace(-1, 1, result.numel()).view(result.shape) if result.dim() else None
    found = torch.autograd.grad(result, list(leaves.values()), upstream, allow_unused=True)
    return [result.detach(), *(g for g in found if g is not None), *([] if main is None else [main])]


cases = [(f, name) for f in FUNCTIONS for name in arguments(f)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=3)
@given(
    others=st.lists(st.sampled_from(sorted(VALUES)), unique=True, max_size=4),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=len(VALUES), max_size=len(VALUES)),
    layout=st.sampled_from(LAYOUTS),
    size=st.sampled_from([*SIZES]),
    filtered=st.booleans(),
    seed=st.integers(0, 100),
)
@pytest.mark.parametrize(("function", "name"), cases, ids=lambda x: x if isinstance(x, str) else x.__name__)
@unrecorded()
def test_any_layout(
    path: str,
    function: Callable[..., Any],
    name: str,
    others: list[str],
    layouts: list[Any],
    layout: Any,
    size: str,
    filtered: bool,
    seed: int,
) -> None:
    """Compare with plain torch, which is faster than the interpreter, and takes contiguous tensors."""
    torch.manual_seed(seed)
    more = (n for n in others if n in arguments(function) and not n.startswith("teacher."))
    names = dict.fromkeys([*needed(function, name), *more])
    if function is mtp_cross_entropy:
        names.pop("target_weights", None)
    chosen = dict(zip(VALUES, layouts)) | {name: layout}
    options: dict[str, Any] = {}
    if function.__name__ in ("linear_cross_entropy", "mtp_cross_entropy"):
        options = {"grad_filter": 1e-9 if filtered else None}
    if function is mtp_valid_counts:
        options = {"heads": K}
    tensors = {}
    for n in names:
        as_is = n == "accumulate_into" and chosen[n] is expanded  # refused, see below
        tensors[n] = value(function, n) if as_is else chosen[n](value(function, n))
    plain = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    with forced(None, size):
        got = call(function, tensors, **options)
        with mock.patch.object(_dispatch, "_kernels_on_cpu", False), devices.plain():
            want = call(function, plain, **options)
    assert len(got) == len(want)
    # The same rows of a weight, expanded, cancel in gradients. Those of log-probabilities are not divided by a count.
    least = 1.0 if function.__name__.endswith("logprobs") else 0.1
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(b.abs().max().item(), least))


def test_every_tensor_argument_has_a_value() -> None:
    names = {name for _, name in cases}
    assert names == set(VALUES), "VALUES must say what a new argument may hold"
    assert {f.__name__ for f in FUNCTIONS} == {
        "cross_entropy",
        "linear_cross_entropy",
        "linear_distillation",
        "linear_logprobs",
        "logprobs",
        "mtp_cross_entropy",
        "mtp_logprobs",
        "mtp_valid_counts",
    }


DTYPES = {
    "bias": [torch.bfloat16, torch.float16, torch.float64],
    "class_weights": [torch.bfloat16, torch.float16, torch.float64],
    "token_weights": [torch.bfloat16, torch.float16, torch.float64],
    "target_weights": [torch.bfloat16, torch.float16, torch.float64],
    "head_weights": [torch.bfloat16, torch.float64],
    "num_valid": [torch.int32, torch.float32, torch.float64],
    "targets": [torch.int32],
    "labels": [torch.int32],
    "ids": [torch.int32],
    "document_ids": [torch.int32, torch.int16, torch.uint8],
    "temperature": [torch.float64],
    "teacher.ids": [torch.int32],
    "teacher.logprobs": [torch.float64],
}


@pytest.mark.parametrize(
    ("function", "name", "dtype"),
    [(f, name, dtype) for f, name in cases for dtype in DTYPES.get(name, [])],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
@unrecorded()
def test_any_dtype_that_is_allowed(path: str, function: Callable[..., Any], name: str, dtype: torch.dtype) -> None:
    """Equal to the same values in the usual dtype."""
    options = {"heads": K} if function is mtp_valid_counts else {}
    tensors = {n: value(function, n) for n in needed(function, name)}
    usual = tensors[name].dtype
    tensors[name] = tensors[name].to(dtype)
    got = call(function, tensors, **options)
    with mock.patch.object(_dispatch, "_kernels_on_cpu", False), devices.plain():
        want = call(function, {**tensors, name: tensors[name].to(usual)}, **options)
    for a, b in zip(got, want):
        eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0  # the gradient of a bias has the bias's dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=max(1e-5, eps), atol=max(1e-6, eps / 100))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_take_weights_in_any_layout(path: str, layout: Callable[[Tensor], Tensor]) -> None:
    weight, y, z = layout(torch.rand(V)), labels(12), torch.randn(12, V)
    torch.testing.assert_close(CrossEntropyLoss(weight)(z, y), nn.functional.cross_entropy(z, y, weight.contiguous()))
    linear = LinearCrossEntropyLoss(D, V, weight=weight)
    hidden = torch.randn(12, D)
    want = nn.functional.cross_entropy(linear.linear(hidden), y, weight.contiguous())
    torch.testing.assert_close(linear(hidden, y), want)


def test_an_expanded_tensor_is_nothing_to_accumulate_into(path: str) -> None:
    hidden, weight = torch.randn(4, D), torch.randn(V, D, requires_grad=True)
    with pytest.raises(ValueError, match=r"accumulate_into must have memory for each element; got strides \(0, 1\)"):
        llmfast.losses.linear_cross_entropy(hidden, weight, labels(4), accumulate_into=torch.zeros(1, D).expand(V, D))


def test_launchers_refuse_what_they_would_misread(kernels: None) -> None:
    """Callers make tensors contiguous; an argument that they forget is an error here."""
    from llmfast_kernels import cross_entropy as rows
    from llmfast_kernels.filtered_matmul import filtered_matmul
    from llmfast_kernels.places import count_above
    from llmfast_kernels.scale import scale
    from llmfast_kernels.terms import Softmax, Targets, Terms, Upstream

    y = Targets(torch.zeros(4, 1, dtype=torch.int64))
    z, half, one = torch.randn(4, V), strided(torch.ones(V)), strided(torch.ones(4))
    good = torch.ones(4)
    for terms in (Terms(V, bias=half), Terms(V, class_weights=half)):
        with pytest.raises(ValueError, match="must be contiguous"):
            rows.cross_entropy(z, y, terms)
    with pytest.raises(ValueError, match="token_weights must be contiguous"):
        rows.cross_entropy(z, Targets(y.classes, None, one), Terms(V))
    with pytest.raises(ValueError, match="logits must have stride 1 along V"):
        rows.cross_entropy(transposed(z), y, Terms(V))
    with pytest.raises(ValueError, match="logits must have at most 1024 columns for V=9; got 1025"):
        rows.cross_entropy(torch.zeros(4, 1025), y, Terms(9), V=9)
    for name in ("peak", "total", "d_loss", "d_lse", "entropy", "d_entropy"):
        given = {n: good for n in ("peak", "total", "entropy", "d_loss", "d_lse", "d_entropy")} | {name: one}
        softmax, upstream = Softmax(*list(given.values())[:3]), Upstream(*list(given.values())[3:])
        with pytest.raises(ValueError, match=f"{name} must be contiguous"):
            rows.cross_entropy_backward(z, y, Terms(V), softmax, upstream, d_logits=torch.empty_like(z))
    with pytest.raises(ValueError, match="out must be contiguous"):
        scale(z, torch.tensor(2.0), out=transposed(z))
    with pytest.raises(ValueError, match="b must have stride 1 along its rows"):
        filtered_matmul(z, strided(torch.randn(V, D)), torch.ones(1, 2, dtype=torch.int8), out=torch.empty(4, D))
    with pytest.raises(ValueError, match="out must have stride 1 along its rows"):
        filtered_matmul(z, torch.randn(V, D), torch.ones(1, 2, dtype=torch.int8), out=transposed(torch.empty(4, D)))
    with pytest.raises(ValueError, match="a must have stride 1 along its rows"):
        filtered_matmul(z[:, ::2][::2], torch.randn(V, D), torch.ones(1, 2, dtype=torch.int8), out=torch.empty(2, D))
    with pytest.raises(ValueError, match="x must be contiguous"):
        scale(transposed(z), torch.tensor(2.0))
    kinds = {"targets": strided(y.classes), "temperatures": one, "target_weights": transposed(torch.ones(4, 2))}
    for name, t in kinds.items():
        own = {"classes": y.classes, "weights": None, "temperatures": None}
        own["classes" if name == "targets" else "weights" if name == "target_weights" else name] = t
        own["classes"] = torch.zeros(4, 2, dtype=torch.int64) if name == "target_weights" else own["classes"]
        with pytest.raises(ValueError, match=f"{name} must be contiguous"):
            rows.cross_entropy(z, Targets(**own), Terms(V))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="class_weight_sums must be contiguous"):
        rows.cross_entropy(z, y, Terms(V, class_weights=torch.ones(V), class_weight_sums=strided(torch.ones(2))))
    for keys, bias, name in ((transposed(torch.zeros(4, 2)), None, "keys"), (torch.zeros(4, 2), half, "bias")):
        with pytest.raises(ValueError, match=f"{name} must be contiguous"):
            count_above(z, keys, Terms(V, bias=bias), V=V)


def test_launchers_of_pairs_refuse_what_they_would_misread(kernels: None) -> None:
    from llmfast_kernels import distillation
    from llmfast_kernels.teaching import TAUGHT, Divergence, TeacherRows
    from llmfast_kernels.terms import Softmax, Targets, Terms, Upstream

    z, p, one, half = torch.randn(4, V), torch.rand(4, V), strided(torch.ones(4)), strided(torch.ones(V))
    y, kl = Targets(torch.zeros(4, 1, dtype=torch.int64)), Divergence(0.0, 1.0, 1.0, None)
    plain = TeacherRows(Terms(V), logits=z)

    def refused(message: str, *given: Any, **more: Any) -> None:
        with pytest.raises(ValueError, match=message):
            distillation.distillation(*given, kl, **more)

    refused("targets must be contiguous", z, Targets(strided(y.classes)), Terms(V), plain)
    refused("token_weights must be contiguous", z, Targets(y.classes, None, one), Terms(V), plain)
    refused("^bias must be contiguous", z, y, Terms(V, bias=half), plain)
    refused("teachers_bias must be contiguous", z, y, Terms(V), TeacherRows(Terms(V, bias=half), logits=z))
    weighed = TeacherRows(Terms(V, class_weights=half), probabilities=p)
    refused("class_weights must be contiguous", z, y, Terms(V), weighed)
    for logits, teacher in (
        (transposed(z), plain),
        (z, TeacherRows(Terms(V), logits=transposed(z))),
        (z, TeacherRows(Terms(V), probabilities=transposed(p))),
        (z, TeacherRows(Terms(V))),
    ):
        refused("logits, and the teacher's .*, must have stride 1 along V", logits, y, Terms(V), teacher)
    refused("logits must have at most 1024 columns for V=9; got 1025", torch.zeros(4, 1025), y, Terms(9), plain, V=9)
    for name in ("peak", "total", "taught", "d_loss"):
        good = {"peak": one.contiguous(), "total": one.contiguous(), "d_loss": one.contiguous()}
        good |= {"taught": torch.ones(4, TAUGHT)}
        good[name] = transposed(good[name]) if name == "taught" else one
        softmax = Softmax(good["peak"], good["total"], None, good["taught"])
        with pytest.raises(ValueError, match=f"{name} must be contiguous"):
            distillation.distillation_backward(
                z, y, Terms(V), plain, kl, softmax, Upstream(good["d_loss"]), d_logits=torch.empty_like(z)
            )
