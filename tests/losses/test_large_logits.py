"""Every loss at logits of sizes up to 1e30, as a large offset or as large differences, on both paths."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import llmfast.losses
from llmfast.losses import TeacherLogits, reference

SIZES = torch.tensor([1e3, 1e6, 1e9, 1e12, 1e20, 1e30, -1e6, -1e9, -1e30])[:, None]  # one for each row
N, V = len(SIZES), 1100
CLASSES = torch.arange(3, 3 + N)
IDS = torch.stack([CLASSES, CLASSES * 5, CLASSES * 0], -1)

Loss = Callable[[Any, Tensor, Tensor], Tensor]  # of a module, of large logits (N, V), and of others


def per_token(module: Any, large: Tensor, _: Tensor, **options: Any) -> Tensor:
    loss: Tensor = module.cross_entropy(large, CLASSES, reduction="none", **options)
    return loss


def several_targets(module: Any, large: Tensor, _: Tensor) -> Tensor:
    loss: Tensor = module.cross_entropy(large, IDS, reduction="none")
    return loss


def with_entropy(module: Any, large: Tensor, _: Tensor) -> Tensor:
    loss, stats = module.cross_entropy(large, CLASSES, reduction="none", return_stats=True)
    return torch.stack([loss, stats.entropy], 1)


def of_probabilities(module: Any, large: Tensor, other: Tensor) -> Tensor:
    loss: Tensor = module.cross_entropy(large, other.detach().softmax(1), reduction="none")
    return loss


def of_hidden_states(module: Any, large: Tensor, _: Tensor) -> Tensor:
    loss: Tensor = module.linear_cross_entropy(large, torch.eye(V, dtype=large.dtype), CLASSES, reduction="sum")
    return loss


def log_probabilities(module: Any, large: Tensor, _: Tensor) -> Tensor:
    found: Tensor = module.logprobs(large, IDS)
    return found


def distilled(module: Any, large: Tensor, other: Tensor, *, from_large: bool, **options: Any) -> Tensor:
    student, teacher = (other, large) if from_large else (large, other)
    head = torch.eye(V, dtype=student.dtype)
    loss: Tensor = module.linear_distillation(
        student, head, TeacherLogits(teacher), CLASSES, reduction="none", **options
    )
    return loss


# Gradients of a Kullback-Leibler divergence are differences of logits, as large as the logits; those of others are not.
LOSSES: dict[str, Loss] = {
    "cross_entropy": per_token,
    "smoothed": partial(per_token, label_smoothing=0.1),
    "capped": partial(per_token, softcap=9.0),
    "entropy": with_entropy,
    "several targets": several_targets,
    "probabilities": of_probabilities,
    "linear": of_hidden_states,
    "logprobs": log_probabilities,
} | {
    f"{kind} {'from' if from_large else 'to'} large": partial(
        distilled, kind=kind, temperature=0.6, hard_weight=0.5, from_large=from_large
    )
    for kind, from_large in product(["forward_kl", "reverse_kl", "jsd"], [False, True])
}


def outcome(loss: Loss, module: Any, logits: Tensor, other: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (logits, other)]
    found = loss(module, *leaves)
    gradients = torch.autograd.grad(found.sum(), leaves, allow_unused=True)
    return [found.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("spread", [False, True], ids=["offset", "spread"])
@pytest.mark.parametrize("name", LOSSES)
def test_logits_of_any_size(path: str, name: str, spread: bool) -> None:
    logits = torch.randn(N, V) * 2 * SIZES if spread else torch.randn(N, V) * 2 + SIZES
    other, exact = torch.randn(N, V), logits.double()
    if name != "capped":  # changes no probability, and lets the reference subtract logsumexp from logits
        exact -= exact.amax(1, keepdim=True)
    ours = outcome(LOSSES[name], llmfast.losses, logits, other)
    truth = outcome(LOSSES[name], reference, exact, other.double())
    sizes = SIZES.abs().double()
    of_loss = sizes if name == "smoothed" else torch.ones(N, 1)  # a sum of logits rounds at their size
    of_gradient = sizes / 100 if spread and "kl" in name else torch.ones(N, 1)
    for a, b, scale in zip(ours, truth, [of_loss, of_gradient, of_gradient]):
        assert a.isfinite().all()
        if a.dim() == 0:
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-5)
        else:
            error, allowed = (a.double() - b).view(N, -1).abs(), 1e-5 * scale + 2e-5 * b.view(N, -1).abs()
            assert (error <= allowed).all()
