"""Plans of the linear loss that tests choose themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast
from unittest import mock

import numpy as np
import torch

from llmfast.losses import LinearCrossEntropyPlan, from_hidden
from llmfast.losses.plan import planned
from llmfast.losses.ways import Call, Mode, Way

SIZES = {"least": 0.0, "small": 0.3, "middle": 0.5, "most": 1.0}  # share of the ways that hold less


def way_of(call: Call, mode: str | None, size: str) -> Way | None:
    """Return a way of a mode, by what it holds, or None if the mode cannot compute the call."""
    ways = call.ways(cast(Mode | None, mode))
    if len(ways.rows) == 0:
        return None
    order = np.argsort(call.held_bytes(ways), kind="stable")
    return ways.at(int(order[round(SIZES[size] * (len(order) - 1))]))


@contextmanager
def forced(mode: str | None, size: str = "middle", **changes: Any) -> Iterator[list[LinearCrossEntropyPlan]]:
    """Make every linear loss take a way of this mode, with `changes` to it, whatever its budget is; list the plans.

    Backward passes that have to plan again, for which the mode is impossible, take what they would otherwise.
    """
    plans: list[LinearCrossEntropyPlan] = []

    def plan(call: Call, memory_budget: Any, device: torch.device, **options: Any) -> LinearCrossEntropyPlan:
        way = way_of(call, mode, size)
        if way is None or (call.per_token and not call.keeps):
            plans.append(planned(call, "auto", device, **options))
        else:
            found = planned(call, "auto", device, **options)
            plans.append(replace(found, way=way._replace(**changes), budget=1 << 60))
        return plans[-1]

    with mock.patch.object(from_hidden, "planned", plan):
        yield plans


@contextmanager
def chosen() -> Iterator[list[LinearCrossEntropyPlan]]:
    """List the plans that linear losses choose themselves."""
    plans: list[LinearCrossEntropyPlan] = []

    def plan(*arguments: Any, **options: Any) -> LinearCrossEntropyPlan:
        plans.append(planned(*arguments, **options))
        return plans[-1]

    with mock.patch.object(from_hidden, "planned", plan):
        yield plans


def least_budget(N: int, D: int, V: int, **options: Any) -> int:
    """Return the smallest budget that a plan keeps to."""
    return LinearCrossEntropyPlan.make(N, D, V, **options).curve[0].held_bytes
