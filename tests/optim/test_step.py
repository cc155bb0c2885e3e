"""The update kernel over several chunks, wherever its tensors lie: against plain torch, and against itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.optim import FusedAdam, FusedAdamW, FusedLion, FusedOptimizer, FusedRMSprop, FusedSGD
from support import devices
from support.pairs import covering
from support.training import scaled

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# A chunk of whole tiles; whole tiles and a rest of whole groups of 128; a rest that ends within a group; single groups.
SIZES = [4096 + 2048 + 3 * 128, 2 * 4096 + 1024 + 129, 128, 127, 1]
RULES: list[tuple[type[FusedOptimizer], dict[str, Any]]] = [
    (FusedAdamW, {"lr": 0.05, "amsgrad": True, "weight_decay": 0.1}),
    (FusedAdam, {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    (FusedSGD, {"lr": 0.05, "momentum": 0.9}),
    (FusedRMSprop, {"lr": 0.05, "momentum": 0.9}),
    (FusedLion, {"lr": 0.05}),
]
SETTINGS: dict[str, list[Any]] = {
    "rule": RULES,
    "master_weights": ["split8", "split16", "fp32", "kahan", "stochastic", None],
    "state_dtype": ["8bit", F32, BF16, None],
    "dtype": [BF16, F16, F32],
    "ema_decay": [None, 0.5],
    "scale": [None, 8.0],
    "zero_grads": [False, True],
}


def possible(case: dict[str, Any]) -> bool:
    """Return False for formats that a dtype does not have."""
    master, dtype = case.get("master_weights"), case.get("dtype")
    return not (dtype == F16 and master in ("split8", "split16", "stochastic")) and not (dtype == F32 and master)


def stepped(case: dict[str, Any], steps: int = 2) -> tuple[FusedOptimizer, list[Tensor]]:
    """Take steps with parameters of several chunks, and return the optimizer and its parameters."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator).to(case["dtype"]).requires_grad_() for n in SIZES]
    cls, given = case["rule"]
    options = {name: case[name] for name in ("master_weights", "state_dtype", "ema_decay", "zero_grads")}
    optimizer: FusedOptimizer = cls(params, seed=(1 << 40) + 3, **given, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if case["scale"] is not None:
            scaled(optimizer, case["scale"])
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("case", covering(SETTINGS, possible), ids=str)
def test_every_chunk_is_stepped_as_in_plain_torch(case: dict[str, Any]) -> None:
    """Compare values within rounding, and codes and rounded weights by how many differ."""
    plain, expected = stepped(case)
    with devices.kernels():
        ours, params = stepped(case)
    for n, p, q in zip(SIZES, params, expected, strict=True):
        coarse = max(2**-16, torch.finfo(case["dtype"]).eps * 2 if case["master_weights"] is None else 0.0)
        noisy = case["master_weights"] == "stochastic"
        if noisy or case["state_dtype"] in ("8bit", BF16):
            coarse = 0.02
        torch.testing.assert_close(ours.master_value(p), plain.master_value(q), rtol=coarse, atol=coarse)
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-3, atol=1e-6)
        mine, theirs = ours.state[p], plain.state[q]
        same = torch.isclose(p, q, rtol=1e-5 if case["dtype"] == F32 else 0.0, atol=0.0)
        assert mine.keys() == theirs.keys() and (~same).double().mean() < 0.02 + 1 / n
        for name in mine:
            if name.endswith("_code"):
                assert (mine[name] != theirs[name]).double().mean() < 0.02 + 1 / n, (name, n)
            elif name not in ("low_bits", "kahan_comp"):  # which are parts of the value
                torch.testing.assert_close(mine[name].double(), theirs[name].double(), rtol=0.01, atol=coarse)


PLACES: list[tuple[str, dict[str, Any]]] = [
    *(("param", {"dtype": dtype}) for dtype in (F32, BF16)),
    *((name, {"dtype": F32}) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema_param")),
    *((f"{name}_code", {"state_dtype": "8bit"}) for name in ("exp_avg", "exp_avg_sq")),
    ("master_param", {"master_weights": "fp32"}),
    *(("low_bits", {"master_weights": master}) for master in ("split8", "split16")),
    ("kahan_comp", {"master_weights": "kahan"}),
]


def moved(t: Tensor, by: int) -> Tensor:
    """Copy `t` to an address that lies so many bytes behind a multiple of 16."""
    more = by // t.element_size()
    memory = torch.zeros(more + len(t) + 16, dtype=t.dtype)
    memory[more : more + len(t)] = t
    found = memory[more : more + len(t)]
    assert found.data_ptr() % 16 == by
    return found


@pytest.mark.parametrize("by", [4, 8])
@pytest.mark.parametrize(("name", "options"), PLACES, ids=str)
def test_any_tensor_may_lie_anywhere(kernels: None, name: str, options: dict[str, Any], by: int) -> None:
    """Move each of a parameter's tensors alone: a step with it has the same bits."""

    def step(by: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        dtype = options.get("dtype", BF16)
        start = torch.randn(4096 + 2048 + 5, generator=generator).to(dtype)
        p = (moved(start, by) if name == "param" else start).requires_grad_()
        formats = {key: value for key, value in options.items() if key != "dtype"}
        optimizer = FusedAdamW([p], lr=0.1, amsgrad=True, ema_decay=0.5, seed=3, **formats)
        for _ in range(2):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()
            if name != "param":
                optimizer.state[p][name] = moved(optimizer.state[p][name], by)
        return [p.detach(), *(t for t in optimizer.state[p].values() if isinstance(t, Tensor))]

    for a, b in zip(step(by), step(0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_where_there_is_no_gradient_nothing_is_zeroed_or_moved(kernels: None, found_inf: float) -> None:
    params = [torch.ones(n, requires_grad=True) for n in (5000, 3)]
    optimizer = FusedSGD(params, lr=0.5, momentum=0.9, zero_grads=True)
    for missing in (None, 0, 1):
        before = [p.detach().clone() for p in params]
        for i, p in enumerate(params):
            p.grad = None if i == missing else torch.ones_like(p)
        scaled(optimizer, None, found_inf=found_inf)
        optimizer.step()
        for i, (p, old) in enumerate(zip(params, before, strict=True)):
            assert (p.grad is None) == (i == missing) and (p.grad is None or not p.grad.any())
            assert torch.equal(p, old) == (i == missing or found_inf == 1.0)
