"""Parameters that no kernel can take go other ways, each for itself; and the forms of weight decay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedLion, FusedRMSprop, FusedSGD

PAIRS: list[tuple[Any, Any, dict[str, Any]]] = [
    (FusedAdamW, torch.optim.AdamW, {"amsgrad": True}),
    (FusedAdam, torch.optim.Adam, {"weight_decay": 0.1}),
    (FusedSGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    (FusedRMSprop, torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (FusedAdagrad, torch.optim.Adagrad, {"lr_decay": 0.1}),
]


def together(ours: Any, theirs: Any, options: dict[str, Any], p: Callable[[], Tensor], g: Callable[[int], Tensor]):  # type: ignore[no-untyped-def]
    """Step an odd parameter together with an ordinary one, and the same in torch."""
    found = []
    for cls, more in ((ours, {}), (theirs, {"foreach": False})):
        odd, beside = p(), torch.ones(5, requires_grad=True)
        optimizer = cls([beside, odd], lr=0.05, **options, **more)
        for step in range(3):
            odd.grad, beside.grad = g(step), torch.full((5,), float(step + 1))
            optimizer.step()
        found.append((odd, beside, optimizer))
    return found


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes(path: str, ours: Any, theirs: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    (a, beside, _), (b, other, _) = together(
        ours,
        theirs,
        options,
        lambda: torch.ones(6, dtype=dtype).requires_grad_(),
        lambda step: (torch.arange(6) - 2.5 * step).to(dtype),
    )
    torch.testing.assert_close(a, b, rtol=1e-13 if dtype == torch.float64 else 1e-6, atol=1e-7)
    torch.testing.assert_close(beside, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_gradients_in_another_memory_order(path: str, ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    """Such gradients would silently be read in the wrong order by the fused CPU kernels of torch."""
    (a, beside, optimizer), (b, other, _) = together(
        ours,
        theirs,
        options,
        lambda: torch.arange(12.0).view(3, 4).requires_grad_(),
        lambda step: torch.randn(4, 3, generator=torch.Generator().manual_seed(step)).T,
    )
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(beside, other, rtol=1e-6, atol=1e-6)
    assert optimizer.state[beside]["step"] == optimizer.state[a]["step"] == 3


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_parameters_with_gaps_in_memory(path: str, ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    def make() -> Tensor:
        return torch.arange(24.0).view(4, 6)[:, ::2].detach().requires_grad_()

    (a, _, _), (b, _, _) = together(ours, theirs, options, make, lambda step: torch.full((4, 3), step - 0.5))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [(FusedSGD, torch.optim.SGD, {}), (FusedAdagrad, torch.optim.Adagrad, {"lr_decay": 0.1})],
)
def test_sparse_gradients_where_torch_takes_them(path: str, ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    def g(step: int) -> Tensor:
        return torch.sparse_coo_tensor(
            torch.tensor([[1, 3, 1]]), torch.ones(3, 2) * (step + 1), (5, 2), check_invariants=True
        )

    (a, beside, _), (b, other, _) = together(ours, theirs, options, lambda: torch.ones(5, 2, requires_grad=True), g)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(beside, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ours", [FusedAdamW, FusedAdam, FusedRMSprop])
def test_sparse_gradients_are_refused_where_torch_refuses_them(path: str, ours: Any) -> None:
    beside, p = torch.ones(4, requires_grad=True), torch.ones(5, 2, requires_grad=True)
    optimizer = ours([beside, p])
    beside.grad = torch.ones(4)
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (5, 2), check_invariants=True)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*sparse.*SparseAdam"):
        optimizer.step()
    assert torch.equal(beside.detach(), torch.ones(4)) and len(optimizer.state) == 0


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_gradients_can_flow_through_a_differentiable_step(path: str, ours: Any, theirs: Any, options: Any) -> None:
    def through(cls: Any) -> Tensor:
        start = torch.linspace(0.1, 1, 6, requires_grad=True)
        p = start.clone()
        optimizer = cls([p], lr=0.1, differentiable=True, **options)
        for _ in range(2):
            p.grad = start * 2
            optimizer.step()
        p.sum().backward()
        assert start.grad is not None
        return start.grad

    # In torch, gradients cannot flow through two steps of these.
    options = {name: value for name, value in options.items() if name not in ("amsgrad", "centered")}
    if theirs is torch.optim.RMSprop:
        options = {}
    torch.testing.assert_close(through(ours), through(theirs))


THROUGH: list[tuple[Any, dict[str, Any]]] = [
    *((FusedAdamW, {"decay": decay}) for decay in ("lr", "independent", "relative")),
    *((FusedAdam, {"decoupled_weight_decay": decoupled, "maximize": True}) for decoupled in (False, True)),
    *((FusedSGD, {}), (FusedRMSprop, {"momentum": 0.9}), (FusedAdagrad, {})),  # torch detaches the momentum of SGD
]


@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize(("cls", "options"), THROUGH)
def test_gradients_through_a_step_are_those_of_differences(cls: Any, options: Any, scale: float | None) -> None:
    """They flow through weight decay of any form too, and through gradients that a GradScaler has scaled."""

    def stepped(start: Tensor) -> Tensor:
        p = start.clone()
        optimizer = cls([p], lr=0.1, weight_decay=0.25, differentiable=True, **options)
        if scale is not None:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        for step in (1.0, 2.0):
            p.grad = step * start**2 * (scale or 1.0)
            optimizer.step()
        return p

    start = torch.linspace(0.5, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stepped, start, rtol=1e-5)


def test_gradients_flow_through_what_is_clipped() -> None:
    """The norm counts as a constant."""
    start = torch.full((4,), 3.0, requires_grad=True)
    p = start.clone()
    optimizer = FusedSGD([p], lr=0.5, max_grad_norm=1.0, differentiable=True)
    p.grad = start * 2
    optimizer.step()
    torch.testing.assert_close(torch.autograd.grad(p.sum(), start)[0], torch.full((4,), 1 - 0.5 * 2 / 12.0))


@pytest.mark.parametrize("cls", [FusedSGD, FusedAdamW])
def test_a_group_may_become_differentiable_between_steps(path: str, cls: Any) -> None:
    start = torch.linspace(0.5, 1, 4, requires_grad=True)
    found = []
    for from_the_start in (True, False):
        p = start.clone()
        p.retain_grad()  # without it, torch refuses what is no leaf
        optimizer = cls([p], lr=0.1, differentiable=from_the_start)
        for differentiable in (from_the_start, True):
            optimizer.param_groups[0]["differentiable"] = differentiable
            p.grad = start * 2 if differentiable else (start * 2).detach()
            optimizer.step()
        found.append(p.detach().clone())
        (through,) = torch.autograd.grad(p.sum(), start)
        assert not torch.equal(through, torch.ones(4))
    torch.testing.assert_close(*found)


def test_odd_parameters_are_skipped_with_the_others(path: str) -> None:
    params = [torch.ones(4, requires_grad=True), torch.ones(3, dtype=torch.complex64, requires_grad=True)]
    params += [torch.ones(3, dtype=torch.float64, requires_grad=True)]
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    for found_inf in (1.0, 0.0):
        for p in params:
            p.grad = torch.ones_like(p) * 64
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(64.0), torch.tensor(found_inf)
        optimizer.step()
        for p in params:
            torch.testing.assert_close(p.detach(), torch.full_like(p, 1.0 if found_inf else 0.9))


def decayed(cls: Any, decay: Any, lrs: list[float], **options: Any) -> float:
    p = torch.ones(3, requires_grad=True)
    optimizer = cls([p], lr=lrs[0], weight_decay=0.1, decay=decay, **options)
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.zeros(3)
        optimizer.step()
    return p[0].item()


@pytest.mark.parametrize("cls", [FusedAdamW, FusedLion])
def test_forms_of_decoupled_decay(path: str, cls: Any) -> None:
    lrs = [0.5, 0.25, 0.0]
    assert decayed(cls, "lr", lrs) == pytest.approx((1 - 0.05) * (1 - 0.025))
    assert decayed(cls, "independent", lrs) == pytest.approx((1 - 0.1) ** 2)  # at lr 0 nothing moves
    assert decayed(cls, "relative", lrs) == pytest.approx((1 - 0.1) * (1 - 0.05))


def test_the_largest_rate_can_be_given_to_a_group(path: str) -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = FusedAdamW([{"params": [p], "lr_max": 1.0}], lr=0.5, weight_decay=0.1, decay="relative")
    p.grad = torch.zeros(3)
    optimizer.step()
    assert p[0].item() == pytest.approx(0.95)
    torchs = torch.optim.AdamW([p], lr=0.5)
    optimizer.load_state_dict(torchs.state_dict())  # knows nothing of it
    assert optimizer.param_groups[0]["lr_max"] == 1.0
    other = FusedAdamW([p], lr=0.25, decay="relative")
    other.load_state_dict(optimizer.state_dict())  # which does, and is the run that goes on
    assert other.param_groups[0]["lr_max"] == 1.0
    torchs.load_state_dict(optimizer.torch_state_dict())  # torch would keep a key that it does not know
    assert torchs.param_groups[0].keys() == torch.optim.AdamW([p]).param_groups[0].keys()


@pytest.mark.parametrize("cls", [FusedAdamW, FusedLion])
def test_refuses_other_decay(cls: Any) -> None:
    with pytest.raises(ValueError, match="decay must be one of"):
        cls([torch.ones(2)], decay="none")
    with pytest.raises(ValueError, match="above 0"):
        cls([torch.ones(2)], lr=0.0, decay="relative")


@pytest.mark.parametrize("cls", [FusedAdam, FusedAdamW, FusedSGD, FusedRMSprop, FusedAdagrad, FusedLion])
@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}], ids=str)
def test_a_rate_of_one_element_gives_a_number_no_dimension(path: str, cls: Any, options: dict[str, Any]) -> None:
    found = []
    for lr in (0.125, torch.tensor(0.125), torch.tensor([0.125])):
        p = torch.nn.Parameter(torch.tensor(2.0))
        optimizer = cls([p], lr=lr, weight_decay=0.5, **options)
        for _ in range(2):
            p.grad = torch.tensor(0.5)
            optimizer.step()
        assert p.shape == ()
        found.append(p.detach())
    torch.testing.assert_close(found[1:], [found[0]] * 2)


def test_betas_learn_through_a_differentiable_step() -> None:
    betas = tuple(torch.tensor(beta, requires_grad=True) for beta in (0.5, 0.75))
    p = torch.ones(3, requires_grad=True).clone()
    optimizer = FusedAdam([p], lr=0.1, betas=betas, differentiable=True)  # type: ignore[arg-type]
    for _ in range(2):
        p.grad = torch.tensor([1.0, -2.0, 3.0])
        optimizer.step()
    assert all(g.abs() > 0 for g in torch.autograd.grad(p.square().sum(), betas))


class Marked(Tensor):
    """A tensor of a class of its own, whose operations may mean anything."""


def test_a_parameter_of_another_class_goes_by_torch(kernels: None) -> None:
    """Kernels would read its memory and ask nothing of the class."""
    marked = torch.ones(4).as_subclass(Marked).requires_grad_()
    parameter, tensor = torch.nn.Parameter(torch.ones(4)), torch.ones(4, requires_grad=True)
    params: list[Tensor] = [parameter, marked, tensor]
    optimizer = FusedAdamW(params, lr=0.1)
    for p in params:
        p.grad = torch.ones(4)
    with torch.no_grad():
        plan, _ = optimizer.make_plan()
    assert [row.param for batch in plan.batches for row in batch.rows] == [marked]
    assert [p is q for table in plan.tables for p, q in zip(table._params, (parameter, tensor))] == [True, True]
    optimizer.step()
    torch.testing.assert_close(marked.detach().as_subclass(Tensor), parameter.detach())
