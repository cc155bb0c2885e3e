"""Only copies to an accelerator may be asynchronous: the host could read one from it before it is complete."""

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from llmfast.losses import linear_cross_entropy, mtp_cross_entropy
from llmfast.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedLion, FusedRMSprop, FusedSGD
from llmfast.train.batch import on_device
from support.sources import tree_of

ROOT = Path(__file__).parent.parent


def test_only_copies_to_an_accelerator_are_not_waited_for() -> None:
    """Each such call asks for the device that the copy goes to."""
    asked = 0
    for path in sorted([*(ROOT / "llmfast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        for node in ast.walk(tree_of(path)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            method, where = node.func.attr, f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
            assert method not in ("cuda", "cpu") or not [k for k in node.keywords if k.arg == "non_blocking"], where
            assert not (method == "to" and len(node.args) > 2) and not (method == "copy_" and len(node.args) > 1), where
            for keyword in node.keywords:
                if keyword.arg == "non_blocking":
                    target = ast.unparse(node.func.value).partition("[")[0]
                    to = f"{target}.device" if method == "copy_" else ast.unparse(node.args[0])
                    assert ast.unparse(keyword.value) == f"{to}.type != 'cpu'", where
                    asked += 1
    assert asked > 3


@contextmanager
def copies_that_do_not_wait() -> Iterator[list[str]]:
    """Yield copies to the CPU that the library requests; tensors already on the CPU cannot be told apart."""
    found: list[str] = []

    def watched(name: str) -> Callable[..., Tensor]:
        original: Callable[..., Tensor] = getattr(Tensor, name)

        def run(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            made = original(self, *args, **kwargs)
            ours = sys._getframe(1).f_globals["__name__"].startswith("llmfast")
            if ours and kwargs.get("non_blocking") and made.device.type == "cpu":
                found.append(f"{name}{args}")
            return made

        return run

    with mock.patch.object(Tensor, "to", watched("to")), mock.patch.object(Tensor, "copy_", watched("copy_")):
        yield found


@pytest.mark.parametrize("make", [FusedAdamW, FusedAdam, FusedRMSprop])
def test_an_optimizer_waits_for_what_comes_to_the_cpu(make: Any, path: str) -> None:
    """Norm, scale and overflow may come from another device, and decide here whether there is a step."""
    params = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))]
    optimizer = make(params, max_grad_norm=1.0, lr=torch.tensor(0.1))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with copies_that_do_not_wait() as found:
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert not found


_to = Tensor.to


def arriving(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replace `Tensor.to` so that a copy from the meta device is 0.1 on an accelerator."""
    if not self.is_meta:
        return _to(self, *args, **kwargs)
    assert args[0] == torch.device("cpu") and not kwargs.get("non_blocking")
    return torch.tensor(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [FusedAdamW, FusedSGD, FusedRMSprop, FusedAdagrad])
def test_a_learning_rate_on_another_device_is_waited_for(make: Any, dtype: torch.dtype) -> None:
    """Only torch's own updates do not wait for the copy."""
    params = [torch.nn.Parameter(torch.ones(3, 4, dtype=dtype)) for _ in range(2)]
    for p, lr in zip(params, (0.1, torch.empty((), device="meta"))):
        optimizer = make([p])
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.ones_like(p)
        with mock.patch.object(Tensor, "to", arriving):
            optimizer.step()
    torch.testing.assert_close(params[1], params[0])


@pytest.mark.parametrize("make", [FusedAdamW, FusedLion])
def test_betas_on_another_device_are_waited_for(make: Any) -> None:
    params = [torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    for p, beta in zip(params, (0.1, torch.empty((), device="meta"))):
        optimizer = make([p])
        optimizer.param_groups[0]["betas"] = (beta, beta)
        with mock.patch.object(Tensor, "to", arriving):
            for sign in (1.0, -1.0):
                p.grad = torch.full_like(p, sign)
                optimizer.step()
    torch.testing.assert_close(params[1], params[0])


def test_losses_and_batches_wait_for_what_comes_to_the_cpu(path: str) -> None:
    hiddens, weight, labels = torch.randn(2, 6, 8), torch.randn(50, 8), torch.randint(0, 50, (6,))
    numbers = {"head_weights": torch.tensor([1.0, 0.5]), "num_valid": torch.tensor([6, 5])}
    with copies_that_do_not_wait() as found:
        linear_cross_entropy(hiddens[0], weight, labels, num_valid=torch.tensor(6))
        mtp_cross_entropy(hiddens, weight, labels, **numbers)
        on_device({"labels": labels}, torch.device("cpu"))
    assert not found
