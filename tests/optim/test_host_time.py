"""Compare the host time of a step of hundreds of small tensors with torch's fused AdamW."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmfast._dispatch import kernels_on_cpu
from llmfast.optim import FusedAdamW
from llmfast_kernels import optimizer as kernels

pytestmark = pytest.mark.cpu("compares steps on CPU tensors, without their launches")


def optimizer(cls: Any, **options: Any) -> torch.optim.Optimizer:
    params = [torch.zeros(8, 8, requires_grad=True) for _ in range(300)]
    for p in params:
        p.grad = torch.zeros_like(p)
    made: torch.optim.Optimizer = cls(params, **options)
    made.step()
    return made


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def test_host_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare both without launches."""
    with kernels_on_cpu():
        ours, theirs = optimizer(FusedAdamW), optimizer(torch.optim.AdamW, fused=True)
        for module, name in ((kernels, "prepare"), (kernels, "update"), (torch, "_fused_adamw_")):
            monkeypatch.setattr(module, name, lambda *args, **kwargs: None)
        best = {"ours": 1.0, "torch": 1.0, "torch without step counters": 1.0}
        for _ in range(30):  # in turn, until a quiet moment
            best["ours"] = min(best["ours"], *(seconds(ours.step) for _ in range(5)))
            best["torch"] = min(best["torch"], *(seconds(theirs.step) for _ in range(5)))
            with monkeypatch.context() as patch:
                # On a GPU they are there, and counting them is a launch.
                patch.setattr(torch, "_foreach_add_", lambda *args, **kwargs: None)
                alone = min(seconds(theirs.step) for _ in range(5))
            best["torch without step counters"] = min(best["torch without step counters"], alone)
            if best["ours"] < best["torch"] / 2 and best["ours"] < 0.9 * best["torch without step counters"]:
                break
    # On a quiet machine 0.27 and 0.58; with other processes running the second comes to 0.75.
    assert best["ours"] < best["torch"] / 2, best
    assert best["ours"] < 0.9 * best["torch without step counters"], best


def test_time_on_a_cpu() -> None:
    """Compare both with the same kernel of torch: what is prepared makes up for checks of what has changed."""
    ours, theirs = optimizer(FusedAdamW), optimizer(torch.optim.AdamW, fused=True)
    best = {"ours": 1.0, "torch": 1.0}
    for _ in range(30):
        best["ours"] = min(best["ours"], *(seconds(ours.step) for _ in range(5)))
        best["torch"] = min(best["torch"], *(seconds(theirs.step) for _ in range(5)))
        if best["ours"] < best["torch"]:
            break
    assert best["ours"] < 1.2 * best["torch"], best  # 0.93 on a quiet machine, up to 1.1 on a busy one
