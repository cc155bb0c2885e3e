"""Our modules on every input of cross-entropies in torch's own databases of modules and operations, against torch.

What is refused is listed in docs/migration.md: `options` of torch's linear loss, which have no meaning here, and
gradients of probabilities. Inputs with `options` are left out, as each has a twin without; probabilities are detached.
"""

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfast.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from support.launched import unrecorded

SAMPLED = 8  # inputs of each database for the kernels, which the interpreter runs slowly


class Case:
    """An input of a database: a module of ours, what torch computes, and the tensors that get gradients."""

    def __init__(self, ours: nn.Module, theirs: Callable[..., Tensor], input: Tensor, target: Tensor) -> None:
        self.ours, self.theirs, self.input, self.target = ours, theirs, input.detach(), target.detach()

    def check(self) -> None:
        found, wanted = (self._outcome(function) for function in (self.ours, self.theirs))
        for a, b in zip(found, wanted, strict=True):
            most = float(b.abs().nan_to_num(0.0, posinf=0.0).max())
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * (1 + most), equal_nan=True)

    def _outcome(self, function: Callable[..., Tensor]) -> list[Tensor]:
        input = self.input.clone().requires_grad_()
        loss = function(input, self.target)
        weights = torch.linspace(-1.0, 2.0, loss.numel()).view(loss.shape) if loss.dim() else 1.7
        return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), [input, *self.ours.parameters()])]


@functools.cache
def torchs_databases() -> tuple[list[Any], list[Any]]:
    """Return those of modules and operations. Their import takes seconds, and forbids setting torch.backends flags."""
    allowed = torch.backends.__allow_nonbracketed_mutation_flag
    try:
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
    finally:
        torch.backends.__allow_nonbracketed_mutation_flag = allowed
    return module_db, op_db


def inputs_of_modules(theirs: type[nn.Module]) -> list[Any]:
    (info,) = [info for info in torchs_databases()[0] if info.module_cls is theirs]
    inputs: list[Any] = info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=True, training=True
    )
    return inputs


def logits_of_modules() -> list[Case]:
    cases = []
    for given in inputs_of_modules(nn.CrossEntropyLoss):
        options = given.constructor_input.kwargs
        ours, theirs = (kind(**options) for kind in (CrossEntropyLoss, nn.CrossEntropyLoss))
        cases.append(Case(ours, theirs, *given.forward_input.args))
    return cases


def hidden_states_of_modules() -> list[Case]:
    theirs: Any = nn.LinearCrossEntropyLoss  # type: ignore[attr-defined]
    cases = []
    for given in inputs_of_modules(theirs):
        options = given.constructor_input.kwargs
        if options["options"] is not None:
            continue
        ours, module = (kind(*given.constructor_input.args, **options) for kind in (LinearCrossEntropyLoss, theirs))
        ours.load_state_dict(module.state_dict())
        module.linear = ours.linear
        cases.append(Case(ours, module, *given.forward_input.args))
    return cases


def samples(name: str) -> list[Any]:
    (info,) = [info for info in torchs_databases()[1] if info.name == name and not info.variant_test_name]
    return [*info.sample_inputs("cpu", torch.float32, requires_grad=True)]


def logits_of_operations() -> list[Case]:
    cases = []
    for given in samples("nn.functional.cross_entropy"):
        function = functools.partial(F.cross_entropy, **given.kwargs)
        cases.append(Case(CrossEntropyLoss(**given.kwargs), function, given.input, *given.args))
    return cases


def hidden_states_of_operations() -> list[Case]:
    cases = []
    for given in samples("nn.functional.linear_cross_entropy"):
        weight, target = given.args
        options = {name: value for name, value in given.kwargs.items() if name != "linear_bias"}
        bias, (classes, *places, width) = given.kwargs.get("linear_bias"), weight.shape
        ours = LinearCrossEntropyLoss(width, classes, out_features=tuple(places), bias=bias is not None, **options)
        with torch.no_grad():
            ours.linear.weight.copy_(weight.flatten(0, -2))
            if bias is not None:
                ours.linear.bias.copy_(bias.flatten())

        def theirs(
            input: Tensor, target: Tensor, linear: Any = ours.linear, shape: Any = weight.shape, o: Any = options
        ) -> Tensor:
            bias = None if linear.bias is None else linear.bias.view(shape[:-1])
            function: Any = F.linear_cross_entropy  # type: ignore[attr-defined]
            found: Tensor = function(input, linear.weight.view(shape), target, linear_bias=bias, **o)
            return found

        cases.append(Case(ours, theirs, given.input, target))
    return cases


# How many inputs torch 2.13 has, at least: an empty database would pass.
DATABASES = {
    logits_of_modules: 100,
    hidden_states_of_modules: 200,
    logits_of_operations: 20,
    hidden_states_of_operations: 100,
}


@pytest.mark.parametrize("cases", DATABASES)
@unrecorded()
def test_torchs_inputs(path: str, cases: Callable[[], list[Case]]) -> None:
    found = cases()
    assert len(found) >= DATABASES[cases]
    assert any(case.target.is_floating_point() for case in found)
    if path == "kernels":  # without further places, which are many launches of the same kinds
        found = [case for case in found if not getattr(case.ours, "out_features", ())]
        found = random.Random(0).sample(found, min(SAMPLED, len(found)))
    for case in found:
        case.check()
