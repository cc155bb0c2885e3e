"""The modules: each argument at another value than its default, against torch and the functions."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfast.losses import CrossEntropyLoss, LinearCrossEntropyLoss, modules, reference

N, D, V = 10, 6, 13
CLASSES = torch.linspace(0.5, 2.0, V)
# Arguments that torch's function has as well, under its names.
TORCHS: dict[str, Any] = {"weight": CLASSES, "ignore_index": 3, "reduction": "sum", "label_smoothing": 0.2}
# Further keywords, that the functions take.
MORE: dict[str, Any] = {
    "z_loss": 0.1,
    "softcap": 2.0,
    "logit_scale": 0.7,
    "num_valid": 17,
    "token_weights": torch.linspace(0.1, 1.0, N),
    "shift": 1,
    "return_stats": True,
}


@pytest.fixture
def targets() -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0)).index_fill(0, torch.tensor([2]), 3)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def each_and_all(options: dict[str, Any]) -> list[dict[str, Any]]:
    return [{}, *({name: value} for name, value in options.items()), options]


def expect_same(got: Any, want: Any, leaves: list[Tensor], others: list[Tensor]) -> None:
    if isinstance(got, tuple):
        torch.testing.assert_close(got[1].token_loss, want[1].token_loss)
        got, want = got[0], want[0]
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), others)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", each_and_all(TORCHS), ids=lambda o: ",".join(o))
def test_logits_as_torchs_module(options: dict[str, Any], targets: Tensor) -> None:
    logits = random(N, V)
    got = CrossEntropyLoss(**options)(logits, targets.where(targets != 3, options.get("ignore_index", -100)))
    wanted = nn.CrossEntropyLoss(**options)(logits, targets.where(targets != 3, options.get("ignore_index", -100)))
    expect_same(got, wanted, [logits], [logits])


def test_classes_are_on_dimension_1_and_one_row_is_enough() -> None:
    logits, targets = random(3, V, 2, 4), torch.randint(0, V, (3, 2, 4))
    for reduction in ("mean", "none"):
        got = CrossEntropyLoss(reduction=reduction)(logits, targets)
        expect_same(got, F.cross_entropy(logits, targets, reduction=reduction), [logits], [logits])
    expect_same(
        CrossEntropyLoss()(logits[0, :, 0, 0], targets[0, 0, 0]),
        F.cross_entropy(logits[0, :, 0, 0], targets[0, 0, 0]),
        [logits],
        [logits],
    )


@pytest.mark.parametrize("options", each_and_all(MORE), ids=lambda o: ",".join(o))
def test_further_keywords_are_those_of_the_functions(options: dict[str, Any], targets: Tensor) -> None:
    logits, hidden = random(N, V), random(N, D)
    expect_same(
        CrossEntropyLoss(**options)(logits, targets),
        reference.cross_entropy(logits, targets, **options),
        [logits],
        [logits],
    )
    module = LinearCrossEntropyLoss(D, V, **options, memory_budget=1 << 16)
    leaves = [hidden, module.linear.weight]
    expect_same(module(hidden, targets), reference.linear_cross_entropy(*leaves, targets, **options), leaves, leaves)


@pytest.mark.parametrize("options", each_and_all(TORCHS | {"bias": True}), ids=lambda o: ",".join(o))
def test_hidden_states_as_a_linear_layer_and_torchs_module(options: dict[str, Any], targets: Tensor) -> None:
    module, hidden = LinearCrossEntropyLoss(D, V, **options), random(N, D)
    leaves = [hidden, *module.linear.parameters()]
    assert len(leaves) == (3 if options.get("bias") else 2) and module.linear.weight.shape == (V, D)
    rest = {name: value for name, value in options.items() if name != "bias"}
    expect_same(module(hidden, targets), nn.CrossEntropyLoss(**rest)(module.linear(hidden), targets), leaves, leaves)


# What is divided by, and what is ignored of class indices, together: a mean counts what is not ignored.
COUNTED = [
    (divided, ignored)
    for divided in ("mean", "mean of 99", "sum", "none")
    for ignored in ("probabilities", "none", "some", "some of 3", "all of 3")
]
AROUND: dict[str, list[Any]] = {
    "module": [CrossEntropyLoss, LinearCrossEntropyLoss],
    "places": [(), (2, 3), (2,)],  # axes after the classes: a module of logits has them too
    "counted": COUNTED,
    "weight": [None, CLASSES],
    "label_smoothing": [0.0, 0.1],
    "bias": [False, True],
}
CASES = [
    {"module": module, "places": places, "counted": counted}
    | {name: AROUND[name][(i + j + k * n) % 2] for n, name in enumerate(("weight", "label_smoothing", "bias"), 1)}
    for i, module in enumerate(AROUND["module"])
    for j, places in enumerate(AROUND["places"])
    for k, counted in enumerate(COUNTED)
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join(str(getattr(v, "__name__", v)) for v in case.values())
)
def test_any_two_arguments_are_torchs(case: dict[str, Any]) -> None:
    """Compare losses and gradients with those of torch's own loss, classes on axis 1."""
    linear, places = case["module"] is LinearCrossEntropyLoss, case["places"]
    divided, ignored = case["counted"]
    shared = {name: case[name] for name in ("weight", "label_smoothing")} | {"reduction": divided.split()[0]}
    more = {"num_valid": 99} if divided == "mean of 99" else {}
    target = torch.rand(N, V, *places).softmax(1)
    if ignored != "probabilities":
        target = torch.randint(4, V, (N, *places))  # none is ignored by chance
        shared |= {"ignore_index": 3} if ignored.endswith("of 3") else {}
        if ignored != "none":
            target[1 : 3 if ignored.startswith("some") else None] = shared.get("ignore_index", -100)
            target[0] = 5 if ignored.startswith("some") else 3
    if linear:
        module: Any = LinearCrossEntropyLoss(D, V, out_features=places, bias=case["bias"], **shared, **more)
        inputs, leaves = random(N, D), [*module.parameters()]
        logits = module.linear(inputs).view(N, V, *places)
    else:
        module, inputs, leaves = CrossEntropyLoss(**shared, **more), random(N, V, *places), []
        logits = inputs
    leaves = [inputs, *leaves]
    wanted = F.cross_entropy(logits, target, **{**shared, **({"reduction": "sum"} if more else {})})
    wanted = wanted / 99 if more else wanted
    found = module(inputs, target)
    torch.testing.assert_close(found, wanted, equal_nan=True)
    upstream = torch.randn(found.shape)
    pairs = zip(torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream))
    for a, b in pairs:  # with nothing to average torch's are NaN or zero, ours are zero
        torch.testing.assert_close(a, b.nan_to_num(0.0), rtol=1e-4, atol=1e-6)


def test_places_of_a_token(path: str) -> None:
    """Each place of `out_features` has logits of its own, as in torch's module, of which all losses are one mean."""
    module = LinearCrossEntropyLoss(D, 5, out_features=(2, 3), bias=True, weight=torch.rand(5))
    h = torch.randn(4, D, requires_grad=True)
    x = module.linear(h).view(4, 5, 2, 3)
    y = torch.randint(0, 5, (4, 2, 3)).index_fill(0, torch.tensor([1]), -100)
    for target in (y, torch.rand(4, 5, 2, 3)):
        ours, want = module(h, target), F.cross_entropy(x, target, weight=module.weight)
        leaves = [h, *module.parameters()]
        torch.testing.assert_close(ours, want)
        for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(want, leaves, retain_graph=True)):
            torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"target must be \(N, 2, 3\), or probabilities"):
        module(h, y[:, 0])
    with pytest.raises(TypeError, match=r"target must be floating point probabilities .*; got \(4, 5, 2, 3\)"):
        module(h, torch.zeros(4, 5, 2, 3, dtype=torch.int64))
    for name in ("token_weights", "target_weights", "shift", "document_ids", "return_stats"):
        with pytest.raises(ValueError, match=rf"out_features must be \(\) with {name}; got \(2,\)"):
            LinearCrossEntropyLoss(D, 5, out_features=(2,), **{name: 1})


def test_places_are_computed_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = LinearCrossEntropyLoss(D, 5, out_features=(2, 3)), []
    one = modules.linear_cross_entropy
    monkeypatch.setattr(
        modules, "linear_cross_entropy", lambda h, w, *a, **o: seen.append(w.shape) or one(h, w, *a, **o)
    )
    module(torch.randn(4, D), torch.randint(0, 5, (4, 2, 3)))
    assert seen == [(5, D)] * 6


def test_places_are_divided_by_what_is_said() -> None:
    h, y = torch.randn(4, D), torch.randint(0, 5, (4, 2))
    losses = []
    for options in ({"num_valid": 7}, {"num_valid": torch.tensor(7.0)}, {"reduction": "sum"}):
        torch.manual_seed(0)
        losses.append(LinearCrossEntropyLoss(D, 5, out_features=(2,), **options)(h, y))
    torch.testing.assert_close(losses[:2], [losses[2] / 7] * 2)


def test_parameters_are_where_and_what_is_said() -> None:
    module = LinearCrossEntropyLoss(D, V, device="meta", dtype=torch.bfloat16, weight=CLASSES)
    assert (module.linear.weight.device.type, module.linear.weight.dtype) == ("meta", torch.bfloat16)
    assert {name for name, _ in module.named_buffers()} == {"weight"}
    assert {name for name, _ in CrossEntropyLoss(weight=CLASSES).named_buffers()} == {"weight"}


@pytest.mark.parametrize(
    ("kind", "argument"),
    [
        (CrossEntropyLoss, {"size_average": True}),
        (CrossEntropyLoss, {"reduce": False}),
        (LinearCrossEntropyLoss, {"options": object()}),
    ],
)
def test_what_has_no_meaning_here_is_refused(kind: Any, argument: dict[str, Any]) -> None:
    sizes = {"in_features": D, "num_classes": V} if kind is LinearCrossEntropyLoss else {}
    with pytest.raises(ValueError, match=f"{next(iter(argument))}.* must be"):
        kind(**sizes, **argument)


def test_every_argument_is_tried() -> None:
    tried = {*TORCHS, "bias", "device", "dtype", "in_features", "num_classes", "out_features"}
    refused = {"size_average", "reduce", "options"}
    for kind in (CrossEntropyLoss, LinearCrossEntropyLoss):
        named = {name for name, p in inspect.signature(kind).parameters.items() if p.kind is not p.VAR_KEYWORD}
        assert named <= tried | refused
        if theirs := getattr(nn, kind.__name__, None):  # torch 2.13 has both
            assert {*inspect.signature(theirs).parameters} <= named
