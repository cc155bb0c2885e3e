"""The share by which a step shrinks a parameter, by mode."""

from typing import Any

import pytest
import torch

from llmfast.optim import FusedAdamW, FusedLion

RATES = {
    "lr": lambda lr, most: lr,
    "independent": lambda lr, most: float(lr != 0),
    "relative": lambda lr, most: lr / most,
}


@pytest.mark.parametrize("kind", [FusedAdamW, FusedLion])
@pytest.mark.parametrize("mode", RATES)
def test_a_step_without_a_gradient_shrinks_by_the_share(path: str, kind: Any, mode: str) -> None:
    """Two groups whose rates begin unlike, and change."""
    params = [torch.nn.Parameter(torch.full((3,), 2.0)) for _ in range(2)]
    groups = [{"params": params[:1], "lr": 0.25}, {"params": params[1:], "weight_decay": 0.125}]
    optimizer = kind(groups, lr=0.5, weight_decay=0.5, decay=mode)
    highest = [0.25, 0.5]
    assert [group.get("lr_max") for group in optimizer.param_groups] == (highest if mode == "relative" else [None] * 2)
    wanted = [2.0, 2.0]
    for rates in ((0.25, 0.5), (0.0, 0.25), (0.125, 0.0), (0.375, 0.125)):  # nothing moves where the rate is 0
        for i, (group, lr) in enumerate(zip(optimizer.param_groups, rates)):
            group["lr"], params[i].grad = lr, torch.zeros(3)
            wanted[i] *= 1 - (0.5, 0.125)[i] * RATES[mode](lr, highest[i])
        optimizer.step()
        for p, want in zip(params, wanted):
            torch.testing.assert_close(p.detach(), torch.full((3,), want), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [FusedAdamW, FusedLion])
def test_the_highest_rate_is_given_or_the_first_and_never_zero(kind: Any) -> None:
    p = torch.zeros(1)
    given = kind([{"params": [p], "lr_max": 2.0}], lr=0.5, decay="relative")
    assert given.param_groups[0]["lr_max"] == 2.0
    first = kind([p], lr=torch.tensor(0.5), decay="relative")
    assert type(first.param_groups[0]["lr_max"]) is float and first.param_groups[0]["lr_max"] == 0.5
    with pytest.raises(ValueError, match=r"^decay='relative' needs a group's lr, or lr_max, above 0; got 0.0$"):
        kind([p], lr=0.0, decay="relative")
    for most in (0.0, -1.0):  # the one would divide by zero in the first step, the other let parameters grow
        with pytest.raises(ValueError, match=rf"^decay='relative' needs a group's lr, or lr_max, above 0; got {most}$"):
            kind([{"params": [p], "lr_max": most}], lr=0.5, decay="relative")
    for mode in ("lr", "independent"):
        assert "lr_max" not in kind([p], lr=0.0, decay=mode).param_groups[0]
    with pytest.raises(ValueError, match=r"^decay must be one of \('lr', 'independent', 'relative'\); got 'cosine'$"):
        kind([p], decay="cosine")
    assert kind([p]).decay == "lr"


@pytest.mark.parametrize("kind", [FusedAdamW, FusedLion])
def test_the_highest_rate_of_a_run_goes_on(kind: Any) -> None:
    """A run that is resumed in the midst of its schedule begins with another rate."""
    p = torch.nn.Parameter(torch.ones(3))
    saved, resumed = (kind([p], lr=lr, decay="relative", weight_decay=0.5) for lr in (0.5, 0.125))
    resumed.load_state_dict(saved.state_dict())
    assert resumed.param_groups[0]["lr_max"] == 0.5
    torchs = torch.optim.AdamW([p]).state_dict()  # which says nothing of it
    if kind is FusedAdamW:
        resumed.load_state_dict(torchs)
        assert resumed.param_groups[0]["lr_max"] == 0.5


@pytest.mark.parametrize("kind", [FusedAdamW, FusedLion])
@pytest.mark.parametrize("mode", RATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_rate_in_a_tensor_shrinks_as_a_number_does(path: str, kind: Any, mode: Any, dtype: torch.dtype) -> None:
    """Nothing moves where the rate in it is 0, whatever the share is."""
    p, rate = torch.nn.Parameter(torch.full((3,), 2.0, dtype=dtype)), torch.tensor(0.5)
    optimizer = kind([p], lr=rate, weight_decay=0.5, decay=mode)
    wanted = 2.0
    for lr in (0.5, 0.0, 0.25):
        rate.fill_(lr)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        wanted *= 1 - 0.5 * RATES[mode](lr, 0.5)
        torch.testing.assert_close(p.detach(), torch.full_like(p, wanted), rtol=2.0**-8, atol=0)
