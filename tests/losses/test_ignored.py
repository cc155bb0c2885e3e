"""Ignored tokens have gradients of zero, whatever comes from upstream.

A step whose labels are all ignored sends the upstream gradient 1 / 0, and a mean over an empty sequence sends 0 / 0.
In float64 torch's gradients are exactly zero then: one NaN in the unembedding's would destroy the model.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.losses import LinearCrossEntropyPlan, cross_entropy, linear_cross_entropy, mtp_cross_entropy, reference

B, T, D, V = 2, 6, 8, 300
CHUNKED = 10_000
UPSTREAM = [torch.inf, -torch.inf, torch.nan]

Loss = Callable[..., Any]
# Ways from hidden states, an unembedding and labels to a loss.
WAYS: dict[str, Loss] = {
    "logits": lambda h, w, y, **o: cross_entropy(h @ w.T, y, **o),
    "logits in place": lambda h, w, y, **o: cross_entropy(h @ w.T, y, inplace=True, **o),
    "logits with terms": lambda h, w, y, **o: cross_entropy(
        h @ w.T, y, z_loss=1e-3, label_smoothing=0.1, softcap=5.0, class_weights=torch.ones(V), **o
    ),
    "logits with statistics": lambda h, w, y, **o: cross_entropy(h @ w.T, y, return_stats=True, **o)[0],
    "linear": lambda h, w, y, **o: linear_cross_entropy(h, w, y, **o),
    "linear in chunks": lambda h, w, y, **o: linear_cross_entropy(h, w, y, memory_budget=CHUNKED, **o),
    "linear with statistics": lambda h, w, y, **o: linear_cross_entropy(
        h, w, y, memory_budget=CHUNKED, return_stats=True, **o
    )[0],
    "linear with terms": lambda h, w, y, **o: linear_cross_entropy(
        h, w, y, memory_budget=CHUNKED, z_loss=1e-3, label_smoothing=0.1, class_weights=torch.ones(V), **o
    ),
}
SUMMED: dict[str, Loss] = {
    "filtered": lambda h, w, y, **o: linear_cross_entropy(h, w, y, memory_budget=CHUNKED, grad_filter=1e-9, **o),
    "heads": lambda h, w, y, **o: mtp_cross_entropy(torch.stack([h, h]), w, y, num_valid=[1, 1]),
    "shared heads": lambda h, w, y, **o: mtp_cross_entropy(h, w, y, head_weights=[1, 0.5], num_valid=[1, 1]),
}


def leaves() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(B, T, D, generator=generator).requires_grad_(),
        torch.randn(V, D, generator=generator).requires_grad_(),
    )


@pytest.mark.parametrize("upstream", UPSTREAM, ids=str)
@pytest.mark.parametrize(
    ("way", "reduction"),
    [(way, reduction) for way in WAYS for reduction in ("mean", "sum", "none")] + [(way, "mean") for way in SUMMED],
)
def test_nothing_but_ignored_tokens(path: str, way: str, reduction: str, upstream: float) -> None:
    hidden, weight = leaves()
    loss = (WAYS | SUMMED)[way](hidden, weight, torch.full((B, T), -100), reduction=reduction)
    loss.backward(torch.full_like(loss, upstream))
    assert hidden.grad is not None and hidden.grad.eq(0).all()
    assert weight.grad is not None and weight.grad.eq(0).all()


@pytest.mark.parametrize("upstream", UPSTREAM, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("way", ["linear", "linear in chunks", "linear with statistics", "linear with terms"])
def test_a_bias_learns_nothing_of_ignored_tokens(path: str, way: str, reduction: str, upstream: float) -> None:
    hidden, weight = leaves()
    bias = torch.randn(V).requires_grad_()
    loss = WAYS[way](hidden, weight, torch.full((B, T), -100), reduction=reduction, bias=bias)
    loss.backward(torch.full_like(loss, upstream))
    assert bias.grad is not None and bias.grad.eq(0).all()


@pytest.mark.parametrize("upstream", UPSTREAM, ids=str)
@pytest.mark.parametrize("way", ["linear", "linear in chunks"])
def test_what_is_accumulated_into_stays_as_it_was(path: str, way: str, upstream: float) -> None:
    hidden, weight = leaves()
    main = torch.randn(V, D)
    before = main.clone()
    loss = WAYS[way](hidden, weight, torch.full((B, T), -100), reduction="sum", accumulate_into=main)
    loss.backward(torch.full_like(loss, upstream))
    assert torch.equal(main, before)


@pytest.mark.parametrize("upstream", UPSTREAM, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_ignored_tokens_beside_others(path: str, way: str, upstream: float) -> None:
    """Tokens that count get the same gradients as if the ignored ones had an upstream gradient of 0."""
    labels = torch.randint(0, V, (B, T))
    labels[0] = -100
    finite = torch.randn(B, T)
    sent = torch.where(labels == -100, upstream, finite)
    gradients = []
    for given in (sent, torch.where(labels == -100, 0.0, finite)):
        hidden, weight = leaves()
        WAYS[way](hidden, weight, labels, reduction="none").backward(given)
        gradients.append((hidden.grad, weight.grad))
    for got, want in zip(*gradients):
        assert torch.equal(got, want)


@pytest.mark.parametrize("upstream", UPSTREAM, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_sum_over_some_ignored_tokens(path: str, way: str, upstream: float) -> None:
    """An upstream gradient of the sum that is not finite reaches the tokens that count; the others get 0."""
    labels = torch.randint(0, V, (B, T))
    labels[0] = -100
    hidden, weight = leaves()
    loss = WAYS[way](hidden, weight, labels, reduction="sum")
    loss.backward(torch.full_like(loss, upstream))
    assert hidden.grad is not None and hidden.grad[0].eq(0).all()
    assert not hidden.grad[1].isfinite().any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_ignored_tokens_may_be_nan(path: str, way: str, reduction: str) -> None:
    """Compute mask / mask.sum() of a sequence without labels, which is 0 / 0."""
    labels = torch.randint(0, V, (B, T))
    labels[0] = -100
    weights = (labels != -100) / (labels != -100).sum(1, keepdim=True)
    assert weights[0].isnan().all()
    results = []
    for given in (weights, weights.nan_to_num(0.0)):
        hidden, weight = leaves()
        loss = WAYS[way](hidden, weight, labels, reduction=reduction, token_weights=given)
        loss.sum().backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for got, want in zip(*results):
        assert torch.equal(got, want)
    truth = reference.linear_cross_entropy(*leaves(), labels, token_weights=weights, reduction=reduction)
    assert torch.as_tensor(truth).isfinite().all()


def test_target_weights_of_ignored_targets_may_be_nan(path: str) -> None:
    targets = torch.randint(0, V, (B, T, 3))
    targets[:, :, 1] = -100
    weights = torch.rand(B, T, 3)
    weights[:, :, 1] = torch.nan
    hidden, weight = leaves()
    loss = linear_cross_entropy(hidden, weight, targets, target_weights=weights)
    truth = linear_cross_entropy(hidden, weight, targets, target_weights=weights.nan_to_num(0.0))
    assert torch.equal(loss, truth) and loss.isfinite()
    assert reference.linear_cross_entropy(hidden, weight, targets, target_weights=weights).isfinite()  # type: ignore[union-attr]


@pytest.mark.parametrize("way", ["logits", "linear", "linear in chunks", "linear with statistics"])
def test_compiled(path: str, way: str) -> None:
    step = torch.compile(lambda h, w, y: WAYS[way](h, w, y, reduction="sum") / 0, backend="aot_eager", fullgraph=True)
    hidden, weight = leaves()
    step(hidden, weight, torch.full((B, T), -100)).backward()
    assert hidden.grad is not None and hidden.grad.eq(0).all()
    assert weight.grad is not None and weight.grad.eq(0).all()


def test_every_mode_is_tried() -> None:
    def mode(**options: Any) -> str:
        return LinearCrossEntropyPlan.make(B * T, D, V, dtype=torch.float32, device="cpu", **options).mode

    assert mode() == "materialise"
    assert mode(memory_budget=CHUNKED) == "chunk"
    assert mode(memory_budget=CHUNKED, reduction="none") == "recompute"


@pytest.mark.parametrize("ignore_index", [-1, -100, 0, V - 1, V])
@pytest.mark.parametrize("linear", [False, True])
def test_an_ignored_token_is_no_hit(path: str, linear: bool, ignore_index: int) -> None:
    """Test it also where its target is what stands for no argmax, or the argmax itself."""
    hidden, weight = torch.eye(V)[[0, 1, V - 1]], torch.eye(V)
    targets = torch.tensor([ignore_index, 1, ignore_index])
    call = linear_cross_entropy if linear else lambda h, w, y, **o: cross_entropy(h @ w.T, y, **o)
    _, stats = call(hidden, weight, targets, ignore_index=ignore_index, return_stats=True)
    assert stats.accuracy == 1.0
