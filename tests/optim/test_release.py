"""Stepping inside backward."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmfast.optim import FusedAdamW, FusedSGD, optimizer_in_backward


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    made[2].weight = nn.Parameter(made[2].weight.detach().clone())
    return made


def loss(net: nn.Module, step: int) -> Tensor:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
    return net(x).square().mean()


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"amsgrad": True, "state_dtype": torch.bfloat16}])
def test_gives_the_numbers_of_stepping_after(path: str, options: dict[str, Any]) -> None:
    ours, theirs = model(), model()
    a, b = FusedAdamW(ours.parameters(), lr=1e-2, **options), FusedAdamW(theirs.parameters(), lr=1e-2, **options)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 5) for o in (a, b)]
    optimizer_in_backward(ours, a)
    for step in range(5):
        loss(ours, step).backward()
        assert all(p.grad is None for p in ours.parameters())
        a.step()
        b.zero_grad()
        loss(theirs, step).backward()
        b.step()
        for schedule in schedules:
            schedule.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert a.state[p]["step"] == 5


def test_few_gradients_are_there_at_a_time(path: str) -> None:
    net = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)])
    optimizer = FusedSGD(net.parameters(), lr=0.1)
    optimizer_in_backward(net, optimizer)
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in net.parameters()))

    for layer in net[1:]:
        layer.register_full_backward_hook(count)
    net(torch.randn(2, 32)).sum().backward()
    assert most <= 2


def test_a_shared_parameter_is_stepped_once(path: str) -> None:
    net = model()
    net[2].weight = nn.Parameter(torch.eye(16))
    shared = nn.Sequential(net[0], net[2], net[2], net[4])
    optimizer = FusedSGD(shared.parameters(), lr=0.1)
    optimizer_in_backward(shared, optimizer)
    shared(torch.randn(3, 8)).sum().backward()
    assert optimizer.state[net[2].weight]["step"] == 1


def test_it_ends(path: str) -> None:
    net = model()
    optimizer = FusedSGD(net.parameters(), lr=0.1)
    optimizer_in_backward(net, optimizer).remove()
    before = [p.detach().clone() for p in net.parameters()]
    loss(net, 0).backward()
    assert all(torch.equal(p, old) and p.grad is not None for p, old in zip(net.parameters(), before))
    optimizer.step()
    assert not torch.equal(net[0].weight, before[0])


def test_nothing_is_kept_alive(path: str) -> None:
    net = model()
    seen: list[weakref.ref[Tensor]] = []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(weakref.ref(p.grad)))
    optimizer = FusedSGD(net.parameters(), lr=0.1)
    optimizer_in_backward(net, optimizer)
    loss(net, 0).backward()
    gc.collect()
    assert len(seen) == 6 and all(ref() is None for ref in seen)


def test_refuses_what_it_could_not_do() -> None:
    net = model()
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 needs all gradients at once"):
        optimizer_in_backward(net, FusedAdamW(net.parameters(), max_grad_norm=1.0))
    with pytest.raises(ValueError, match=r"parameter 0.weight of the model is not the optimizer's"):
        optimizer_in_backward(net, FusedAdamW(list(net.parameters())[1:]))
    with pytest.raises(ValueError, match="differentiable"):
        optimizer_in_backward(net, FusedAdamW(net.parameters(), differentiable=True))


def test_a_grad_scaler_is_refused() -> None:
    """It tells its scale to `step`, which is too late."""
    net = model()
    optimizer = FusedSGD(net.parameters(), lr=0.1)
    optimizer_in_backward(net, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss(net, 0)).backward()
    with pytest.raises(RuntimeError, match="GradScaler comes too late"):
        scaler.step(optimizer)
