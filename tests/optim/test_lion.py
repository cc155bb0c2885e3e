"""Lion against its rule in float64; torch has no Lion, so that the third party is the rule in plain torch."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.optim import FusedLion, reference
from support.numerics import assert_close_in_norm, assert_no_worse
from support.training import LATE, gradients, parameters, scaled, through_a_file, values

BF16, F32 = torch.bfloat16, torch.float32
STEPS = 12
OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
FORMATS = [
    {},
    {"state_dtype": F32},
    {"state_dtype": "8bit"},
    {"master_weights": "fp32", "state_dtype": F32},
    {"master_weights": "split16"},
    {"master_weights": "split8", "state_dtype": "8bit"},
    {"master_weights": "kahan"},
    {"master_weights": "stochastic"},
    {"ema_decay": 0.9, "zero_grads": True},
]


def train(dtype: torch.dtype = F32, steps: int = STEPS, *, reload_at: int = -1, **options: Any) -> Any:
    """Return optimizer and parameters after a run whose gradients have bfloat16 values in every dtype."""
    params = [p.detach().to(dtype).requires_grad_() for p in parameters(BF16)]
    optimizer = FusedLion(params, **OPTIONS | options)
    for step in range(steps):
        if step == reload_at:
            saved = through_a_file(optimizer.state_dict())
            optimizer = FusedLion(params, **OPTIONS | options)
            optimizer.load_state_dict(saved)
        gradients(step, params, BF16)
        optimizer.step()
    return optimizer, params


def by_the_rule(
    dtype: torch.dtype, steps: int = STEPS, sign: float = 1.0, max_norm: float = torch.inf, **options: Any
) -> Tensor:
    """Do what `train` does, in plain torch and in the dtype's own arithmetic."""
    o = OPTIONS | options
    params = [p.detach().to(dtype) for p in parameters(BF16)]
    averages = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        gradients(step, params, BF16)
        norm = torch.stack([p.grad.double().square().sum() for p in params if p.grad is not None]).sum().sqrt()
        factor = min(1.0, max_norm / (norm.item() + 1e-6)) * sign
        for p, m in zip(params, averages):
            if p.grad is not None:
                reference.lion(
                    p,
                    p.grad * factor,
                    m,
                    step=step + 1,
                    lr=o["lr"],
                    beta1=o["betas"][0],
                    beta2=o["betas"][1],
                    decay=o["lr"] * o["weight_decay"],
                )
    return values(params)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0, "betas": (0.0, 0.5)}, {"lr": torch.tensor(0.02)}])
def test_float32_is_as_close_to_float64_as_the_rule_in_float32(path: str, options: dict[str, Any]) -> None:
    _, params = train(**options)
    numbers = {name: v.item() if isinstance(v, Tensor) else v for name, v in options.items()}
    truth = by_the_rule(torch.float64, **numbers)
    assert (truth - values(parameters(BF16))).abs().median() > 0.01  # it went somewhere
    assert_no_worse(values(params), by_the_rule(F32, **numbers), truth, scale=2.0)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_low_precision_is_no_further_from_float64_than_the_rule_in_it(path: str, dtype: torch.dtype) -> None:
    _, params = train(dtype)
    assert_close_in_norm(values(params), by_the_rule(dtype), by_the_rule(torch.float64))


def test_float64(path: str) -> None:
    torch.testing.assert_close(values(train(torch.float64)[1]), by_the_rule(torch.float64), rtol=1e-13, atol=1e-13)


def test_maximize_climbs(path: str) -> None:
    _, params = train(maximize=True)
    torch.testing.assert_close(values(params).double(), by_the_rule(torch.float64, sign=-1.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"master_weights": "fp32"}, {"master_weights": "split16"}])
def test_master_weights_train_as_float32(path: str, options: dict[str, Any]) -> None:
    optimizer, params = train(BF16, state_dtype=F32, **options)
    exact = torch.cat([optimizer.master_value(p).flatten() for p in params])
    torch.testing.assert_close(exact.double(), by_the_rule(torch.float64), rtol=1e-6, atol=1e-6)
    assert torch.equal(exact.bfloat16(), values(params))


def test_weights_of_fewer_bits_are_closer_than_bfloat16(path: str) -> None:
    truth = by_the_rule(torch.float64)

    def error(**options: Any) -> float:
        optimizer, params = train(BF16, state_dtype=F32, **options)
        return float((torch.cat([optimizer.master_value(p).flatten() for p in params]).double() - truth).norm())

    plain = error()
    assert error(master_weights="split8") < 1e-2 * plain
    assert error(master_weights="kahan") < 1e-2 * plain


def test_an_average_of_8_bits_points_the_same_way(path: str) -> None:
    optimizer, params = train(state_dtype="8bit")
    assert all(optimizer.state[p]["exp_avg_code"].dtype == torch.int8 for p in params)
    start, truth = values(parameters(BF16)).double(), by_the_rule(torch.float64)
    cosine = torch.cosine_similarity(values(params).double() - start, truth - start, dim=0)
    assert cosine > 0.99


@pytest.mark.parametrize("formats", FORMATS)
def test_a_run_that_was_saved_goes_on_bit_for_bit(path: str, formats: dict[str, Any]) -> None:
    (one, ones), (two, twos) = train(BF16, **formats), train(BF16, reload_at=LATE + 1, **formats)
    assert torch.equal(values(ones), values(twos))
    for p, q in zip(ones, twos):
        assert one.state[p].keys() == two.state[q].keys()
        for name, t in one.state[p].items():
            assert torch.equal(t, two.state[q][name]), name


def test_the_average_of_another_lion_is_taken_over(path: str) -> None:
    """Load, for example, the state of the authors' code, which is this one tensor."""
    p = torch.ones(3, requires_grad=True)
    optimizer = FusedLion([p], lr=0.1)
    saved = optimizer.state_dict() | {"state": {0: {"exp_avg": torch.tensor([1.0, -1.0, 1.0])}}}
    optimizer.load_state_dict(saved)
    p.grad = torch.tensor([-1.0, -1.0, -20.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.9, 1.1, 1.1]))
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.tensor([0.98, -1.0, 0.79]))


def test_gradients_are_clipped_on_the_way(path: str) -> None:
    optimizer, params = train(max_grad_norm=0.5, betas=(0.5, 0.5))
    truth = by_the_rule(torch.float64, max_norm=0.5, betas=(0.5, 0.5))
    torch.testing.assert_close(values(params).double(), truth, rtol=1e-6, atol=1e-6)
    assert (truth - by_the_rule(torch.float64, betas=(0.5, 0.5))).abs().max() > 0.01  # or nothing would be tested
    before = values(params)
    for p in params:
        p.grad = torch.full_like(p, torch.inf)
    optimizer.step()
    assert optimizer.grad_norm == torch.inf
    assert torch.equal(values(params), before)


def test_a_skipped_step_changes_nothing(path: str) -> None:
    optimizer, params = train()
    before, average = values(params), optimizer.state[params[0]]["exp_avg"].clone()
    scaled(optimizer, 64.0, found_inf=1.0)
    gradients(STEPS, params)
    optimizer.step()
    assert torch.equal(values(params), before)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], average)


def test_nothing_hides_a_nan_and_no_gradient_is_no_direction(path: str) -> None:
    p = torch.ones(4, requires_grad=True)
    p.grad = torch.tensor([torch.nan, torch.inf, 0.0, -1e-30])
    FusedLion([p], lr=0.5).step()
    torch.testing.assert_close(p.detach(), torch.tensor([torch.nan, 0.5, 1.0, 1.5]), equal_nan=True)


@pytest.mark.parametrize("maximize", [False, True])
def test_complex_parameters_are_two_real_ones(path: str, maximize: bool) -> None:
    p = torch.ones(6, dtype=torch.complex64, requires_grad=True)
    q = torch.view_as_real(p.detach()).clone().requires_grad_()
    optimizers = [FusedLion([t], lr=0.1, weight_decay=0.1, maximize=maximize) for t in (p, q)]
    for _ in range(3):
        p.grad = torch.randn(6, dtype=torch.complex64)
        q.grad = torch.view_as_real(p.grad)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.view_as_real(p.detach()), q.detach())
    assert optimizers[0].state[p]["step"] == 3


def test_refuses_what_it_cannot_do(path: str) -> None:
    p = torch.ones(5, 2, requires_grad=True)
    for bad, message in (({"lr": -1.0}, "lr"), ({"betas": (0.9, 1.0)}, "betas"), ({"weight_decay": -0.1}, "decay")):
        with pytest.raises(ValueError, match=message):
            FusedLion([p], **bad)
    with pytest.raises(TypeError, match="eps"):
        FusedLion([p], eps=1e-8)  # type: ignore[call-arg]
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (5, 2), check_invariants=True)
    with pytest.raises(ValueError, match="sparse"):
        FusedLion([p]).step()


def test_arguments_have_the_ranges_and_defaults_of_the_authors_code() -> None:
    p = torch.ones(2)
    bad: dict[str, list[Any]] = {
        "lr": [-1e-9, torch.nan, torch.tensor(-1.0)],
        "betas": [(-0.1, 0.9), (0.9, -0.1), (1.0, 0.9), (0.9, 1.0), (torch.nan, 0.9)],
        "weight_decay": [-1e-9, torch.nan],
    }
    for name, values_of in bad.items():
        for value in values_of:
            with pytest.raises(ValueError, match=rf"^{name} must be .*; got "):
                FusedLion([p], **{name: value})
    FusedLion([p], lr=0.0, betas=(0.0, 0.0), weight_decay=0.0)
    defaults = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False}
    group = FusedLion([p]).param_groups[0]
    assert {name: group[name] for name in defaults} == defaults
    signature = inspect.signature(FusedLion).parameters
    assert {name: signature[name].default for name in defaults} == defaults


@pytest.mark.parametrize(("name", "wrong"), [("lr", "0.1"), ("betas", None), ("betas", 0.9), ("weight_decay", None)])
def test_a_number_of_another_kind_is_refused_by_its_name(name: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be (a number|a sequence of numbers).*; got "):
        FusedLion([torch.nn.Parameter(torch.ones(3))], **{name: wrong})
