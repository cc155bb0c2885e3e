"""Training runs of every optimizer with every flag: no further from float64 than torch's own."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from llmfast.optim import FusedAdam, FusedSGD
from support.numerics import assert_close_in_norm, assert_no_worse
from support.training import CASES, FULL, LATE, Case, gradients, groups, parameters, through_a_file, values

STEPS = 25
RELOADED = (4, 21)  # at the first, a parameter has had no gradient yet

# Of two optimizers with the same rule, one.
RULES = [case for case in FULL if case.ours is not FusedAdam]


def train(case: Case, *turns: str, dtype: torch.dtype = torch.float32, steps: int = STEPS) -> Tensor:
    """Return parameters after a run in which these optimizers alternate: "ours", "torchs", or "exact" in float64."""
    params = parameters(dtype)
    if "exact" in turns:
        params = [p.detach().double().requires_grad_() for p in params]

    def make(whose: str) -> tuple[Any, CosineAnnealingLR]:
        maker = {"ours": case.make_ours, "torchs": case.make_torchs, "exact": case.make_exact}[whose]
        optimizer = maker(groups(params, case.options))
        return optimizer, CosineAnnealingLR(optimizer, 40)

    optimizer, schedule = make(turns[0])
    for step in range(steps):
        if len(turns) > 1 and step in RELOADED:
            saved = through_a_file({"schedule": schedule.state_dict(), "optimizer": optimizer.state_dict()})
            optimizer, schedule = make(turns[1 + RELOADED.index(step)])
            schedule.load_state_dict(saved["schedule"])
            optimizer.load_state_dict(saved["optimizer"])
        gradients(step, params, dtype)
        optimizer.step()
        schedule.step()
    return values(params)


def check(case: Case, *turns: str) -> None:
    ours, theirs, truth = train(case, *turns), train(case, "torchs"), train(case, "exact")
    assert_no_worse(ours, theirs, truth, scale=2.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_begins_and_ends_with_ours(path: str, case: Case) -> None:
    check(case, "ours", "torchs", "ours")


@pytest.mark.parametrize("case", RULES, ids=str)
def test_training_begins_and_ends_with_torchs(path: str, case: Case) -> None:
    check(case, "torchs", "ours", "torchs")


@pytest.mark.parametrize("case", RULES, ids=str)
def test_training_with_ours_alone(path: str, case: Case) -> None:
    check(case, "ours")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", RULES, ids=str)
def test_training_in_low_precision(path: str, case: Case, dtype: torch.dtype) -> None:
    if case.ours is not FusedSGD:
        # Second moments underflow in float16: with a tiny eps one element of them would be all of the error.
        case = case._replace(options=case.options | {"eps": 1e-3})
    runs = [train(case, whose, dtype=dtype, steps=LATE + 1) for whose in ("ours", "torchs", "exact")]
    assert_close_in_norm(*runs)
