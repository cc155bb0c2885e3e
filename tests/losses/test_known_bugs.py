"""Bugs that others had, each as a test by its number. Those of in-place writes, compilers and ranks are elsewhere."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast.losses import cross_entropy, linear_cross_entropy, reference
from support.numerics import assert_close_in_norm
from support.plans import SIZES, forced


def gradients(loss: Any, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def leaves(N: int, V: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(N, D).to(dtype).requires_grad_(), torch.randn(V, D).to(dtype).requires_grad_()


@pytest.mark.parametrize("N", [0, 1, 129])
@pytest.mark.parametrize("V", [1, 2, 127, 128, 1000, 50257])
def test_sizes_that_tiles_do_not_divide(path: str, N: int, V: int) -> None:
    """verl#2656, #2899: wrong log-probabilities where V is no multiple of the tile; unsloth#19: V above 65536."""
    hidden, weight = leaves(N, V, 4)
    targets = torch.randint(0, V, (N,))
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum", memory_budget=64 * (V + 64) * 4)
    want = reference.linear_cross_entropy(hidden, weight, targets, reduction="sum")
    torch.testing.assert_close(loss, want)
    for a, b in zip(gradients(loss, hidden, weight), gradients(want, hidden, weight)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_vocabulary_above_65536(path: str) -> None:
    """unsloth#19, flash-attention#714."""
    logits = torch.randn(2, 129920, requires_grad=True)
    targets = torch.tensor([129919, 65536])
    loss, want = cross_entropy(logits, targets), F.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradients(loss, logits), gradients(want, logits), rtol=1e-4, atol=1e-9)


def test_float16_does_not_underflow_over_many_rows(path: str) -> None:
    """Liger-Kernel#512: gradients of a mean over 65536 rows, divided before they are summed, are lost in float16."""
    hidden, weight = leaves(64, 200, 8, torch.float16)
    targets = torch.randint(0, 200, (64,))
    scale, N = 65536.0, 65536
    for way in (nullcontext(), forced("chunk", rows=16), forced("two-stage", rows=16)):
        with way:
            loss = linear_cross_entropy(hidden, weight, targets, num_valid=N)
            got = gradients(loss * scale, hidden, weight)
        h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        truth = gradients(F.cross_entropy(h @ w.T, targets, reduction="sum") / N * scale, h, w)
        plain = gradients(F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum"), hidden, weight)
        for a, b, c in zip(got, plain, truth):
            assert_close_in_norm(a, b, c, factor=1.5)


def test_every_token_has_its_own_upstream_gradient(path: str) -> None:
    """Liger-Kernel#968, #678: with reduction="none" the first token's was used for all."""
    hidden, weight = leaves(6, 40, 8)
    targets = torch.randint(0, 40, (6,))
    upstream = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0, 0.0])
    for size in SIZES:
        with forced(None, size):
            losses = linear_cross_entropy(hidden, weight, targets, reduction="none", memory_budget=1 << 30)
            got = torch.autograd.grad(losses, (hidden, weight), upstream)
        want = reference.linear_cross_entropy(hidden, weight, targets, reduction="none")
        torch.testing.assert_close(
            got,
            torch.autograd.grad(want, (hidden, weight), upstream),
            rtol=1e-4,
            atol=1e-5,  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("D", [128, 512, 768])
def test_the_bias_counts_once_however_wide_hidden_is(path: str, D: int) -> None:
    """cut-cross-entropy#52: once for each block of 256."""
    hidden, weight = leaves(5, 60, D)
    bias, targets = torch.randn(60, requires_grad=True), torch.randint(0, 60, (5,))
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias)
    want = F.cross_entropy(hidden @ weight.T + bias, targets)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradients(loss, bias), gradients(want, bias), rtol=1e-4, atol=1e-6)


def test_a_mean_leaves_ignored_tokens_out_of_its_count(path: str) -> None:
    """TransformerEngine#2476."""
    logits, targets = torch.randn(8, 30), torch.randint(0, 30, (8,))
    targets[::2] = -100
    torch.testing.assert_close(cross_entropy(logits, targets), F.cross_entropy(logits, targets))


def test_accumulated_micro_batches_add_up_to_the_whole_batch(path: str) -> None:
    """Liger-Kernel#802, Megatron-LM#7452: a mean of means is not the mean."""
    hidden, weight = leaves(12, 30, 8)
    targets = torch.randint(0, 30, (12,))
    targets[:5] = -100
    whole = linear_cross_entropy(hidden, weight, targets)
    count = (targets != -100).sum()
    parts = [
        linear_cross_entropy(hidden[rows], weight, targets[rows], num_valid=count)
        for rows in (slice(0, 6), slice(6, 8), slice(8, 12))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_losses_leave_their_inputs_alone(path: str) -> None:
    """Liger-Kernel#272, #343, unsloth#5002: gradients written over logits that others still needed."""
    logits, targets = torch.randn(4, 30, requires_grad=True), torch.randint(0, 30, (4,))
    before, version = logits.detach().clone(), logits._version
    loss = cross_entropy(logits, targets) + logits.square().sum()
    loss.backward()
    assert torch.equal(logits, before) and logits._version == version
    want = logits.detach().clone().requires_grad_()
    (F.cross_entropy(want, targets) + want.square().sum()).backward()
    torch.testing.assert_close(logits.grad, want.grad)


def test_one_loss_used_twice(path: str) -> None:
    hidden, weight = leaves(6, 40, 8)
    targets = torch.randint(0, 40, (6,))
    loss = linear_cross_entropy(hidden, weight, targets, memory_budget=1 << 12)
    want = reference.linear_cross_entropy(hidden, weight, targets)
    assert isinstance(want, Tensor)
    torch.testing.assert_close(
        gradients(loss * loss + loss, hidden, weight),
        gradients(want * want + want, hidden, weight),
        rtol=1e-4,
        atol=1e-6,
    )


def test_inputs_of_any_strides(path: str) -> None:
    hidden, weight = torch.randn(8, 2, 5).transpose(0, 2), torch.randn(8, 40).T
    targets = torch.randint(0, 40, (2, 5)).T
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, targets, memory_budget=1 << 14),
        reference.linear_cross_entropy(hidden, weight, targets),
    )


def test_a_bias_of_float64_with_weighted_targets(path: str) -> None:
    """Found here: scatter(): Expected self.dtype to be equal to src.dtype."""
    (hidden, weight), bias = leaves(6, 40, 8), torch.randn(40, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, 40, (6, 2)), torch.rand(6, 2)
    loss, want = (
        function(hidden, weight, targets, bias=bias, target_weights=weights)
        for function in (linear_cross_entropy, reference.linear_cross_entropy)
    )
    found, wanted = (gradients(x, hidden, weight, bias) for x in (loss, want))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert found[2].dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "ours"), [("weight", "class_weights"), ("lse_square_scale", "z_loss"), ("filter_eps", "grad_filter")]
)
def test_names_of_other_libraries_are_told_ours(name: str, ours: str) -> None:
    """pytorch#69339, Liger-Kernel#198: torch's `weight` was said to be `token_weights`, which weighs rows."""
    logits, targets = torch.randn(4, 4), torch.arange(4)
    call: Any = partial(linear_cross_entropy, logits) if ours == "grad_filter" else cross_entropy
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'. Did you mean '{ours}'"):
        call(logits, targets, **{name: torch.ones(4)})
