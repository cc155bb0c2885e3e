"""Parameters and gradients of every optimizer in every layout: equal to contiguous ones.

An expanded gradient is what `x.sum().backward()` leaves behind.
"""

import inspect
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import llmfast.optim
from llmfast.optim import FusedAdamW
from llmfast.optim.formats import PARAM_FORMATS, STATE_FORMATS
from support.launched import unrecorded
from support.layouts import LAYOUTS, WRITABLE
from support.training import through_a_file

CLASSES = [
    c
    for name in llmfast.optim.__all__
    if inspect.isclass(c := getattr(llmfast.optim, name))
    and issubclass(c, torch.optim.Optimizer)
    and not inspect.isabstract(c)
]
SHAPES = [(6, 10), (17,), (3, 4, 5)]
STEPS = 3


def train(cls: Any, start: list[Tensor], gradients: list[list[Tensor]], **options: Any) -> list[Tensor]:
    parameters = [nn.Parameter(t) for t in start]
    optimizer = cls(parameters, **options)
    for step in gradients:
        for p, g in zip(parameters, step):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in parameters]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=6)
@given(
    of_parameters=st.lists(st.sampled_from(WRITABLE), min_size=len(SHAPES), max_size=len(SHAPES)),
    of_gradients=st.lists(st.sampled_from(LAYOUTS), min_size=STEPS, max_size=STEPS),
    of_lr=st.sampled_from([None, *LAYOUTS]),
    options=st.sampled_from(
        [{}, {"max_grad_norm": 0.5}, {"master_weights": "fp32", "ema_decay": 0.9}, {"maximize": True}]
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
@unrecorded()
def test_any_layout(
    path: str,
    cls: Any,
    of_parameters: list[Any],
    of_gradients: list[Any],
    of_lr: Any,
    options: dict[str, Any],
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    start = [layout(torch.randn(shape).to(dtype)) for layout, shape in zip(of_parameters, SHAPES)]
    gradients = [[layout(torch.randn(shape).to(dtype)) for shape in SHAPES] for layout in of_gradients]
    lr = torch.tensor([0.01])
    given = {"lr": 0.01 if of_lr is None else of_lr(lr)[0], **options}

    def contiguous(tensors: list[Tensor]) -> list[Tensor]:
        return [t.clone(memory_format=torch.contiguous_format) for t in tensors]

    want = train(cls, contiguous(start), [contiguous(step) for step in gradients], **given)
    got = train(cls, start, gradients, **given)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_there_are_optimizers() -> None:
    assert len(CLASSES) >= 6


FORMS: list[tuple[torch.dtype, dict[str, Any]]] = [
    *(
        (dtype, more)
        for dtype in (torch.float32, torch.bfloat16)
        for more in ({}, {"zero_grads": True}, {"scaled": True})
    ),
    *((torch.float32, {"state_dtype": state}) for state in STATE_FORMATS),
    *(
        (torch.bfloat16, {"master_weights": master, "state_dtype": state})
        for i, master in enumerate(PARAM_FORMATS)
        for j, state in enumerate(STATE_FORMATS)
        if (i + j) % 2 == 0
    ),
]


@pytest.mark.parametrize(("dtype", "options"), FORMS, ids=str)
def test_gradients_at_odd_addresses_change_no_bit(path: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """DistributedDataParallel may keep them in one buffer, where one of an odd size moves those behind it."""
    start, gradient = torch.randn(5003).to(dtype), torch.randn(5003).to(dtype)
    given = {name: value for name, value in options.items() if name != "scaled"}

    def step(offset: int) -> list[Tensor]:
        p = nn.Parameter(start.clone())
        buffer = torch.full((offset + len(gradient) + 1,), 7.0, dtype=dtype)
        optimizer: Any = FusedAdamW([p], lr=0.1, seed=3, **given)
        for _ in range(2):
            p.grad = buffer[offset:-1].copy_(gradient)
            if options.get("scaled"):
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
            optimizer.step()
        assert buffer[-1] == 7.0 and (buffer[:offset] == 7.0).all()
        return [p.detach(), buffer[offset:-1], *(t for t in optimizer.state[p].values() if isinstance(t, Tensor))]

    aligned = step(0)
    for offset in (1, 8 // dtype.itemsize):
        for a, b in zip(step(offset), aligned, strict=True):
            assert torch.equal(a, b)


# Every two of the formats, with and without averages; a third of them with kernels.
MOVED = [
    pytest.param(path, master, state, (i + j) % 2 == 0, id=f"{path}-{master}-{state}")
    for i, master in enumerate([None, *PARAM_FORMATS])
    for j, state in enumerate([None, torch.float32, "8bit"])
    for path in ("plain", "kernels")
    if path == "plain" or j == i // 2
]


@pytest.mark.parametrize(("path", "master", "state", "averaged"), MOVED, indirect=["path"])
@unrecorded()
def test_a_run_goes_on_in_another_memory_order(path: str, master: Any, state: Any, averaged: bool) -> None:
    """States that are loaded have the order of the run that saved them."""
    given: dict[str, Any] = {"master_weights": master, "state_dtype": state, "ema_decay": 0.5 if averaged else None}
    start, gradients = torch.randn(8, 12).bfloat16(), torch.randn(4, 8, 12).bfloat16()
    source = FusedAdamW([nn.Parameter(start.clone())], lr=0.01, **given)
    (p,) = source.param_groups[0]["params"]
    for g in gradients[:2]:
        p.grad = g
        source.step()
    q = nn.Parameter(p.detach().T.contiguous().T)
    other = FusedAdamW([q], lr=0.01, **given)
    other.load_state_dict(through_a_file(source.state_dict()))
    for g in gradients[2:]:
        p.grad, q.grad = g, g.T.contiguous().T
        source.step(), other.step()
    assert other._plan is not None and len(other._plan.tables) == (path == "kernels")  # in which it stays
    noise = 0.05 if state == "8bit" or master == "stochastic" else 0.0  # it goes by the order in memory
    held = [
        {"weight": each.master_value(t).float(), **each.torch_state_dict()["state"][0]}
        for each, t in ((source, p), (other, q))
    ]
    if averaged:
        for found, each, t in ((held[0], source, p), (held[1], other, q)):
            found["average"] = each.state[t]["ema_param"]
    assert held[0].keys() == held[1].keys()
    for name, mine in held[0].items():
        torch.testing.assert_close(held[1][name], mine, rtol=max(noise, 2e-7), atol=noise * mine.abs().max().item())
