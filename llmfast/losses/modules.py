"""The losses as modules, with the constructor arguments of torch's, for code that swaps one for the other."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from llmfast._checks import describe, expect
from llmfast._kinds import expect_kind, expect_kinds, expect_tensors, kind_of
from llmfast.losses.cross_entropy import cross_entropy
from llmfast.losses.linear_cross_entropy import linear_cross_entropy
from llmfast.losses.options import KINDS, Reduction
from llmfast.losses.targets import weights_that_count

# Further keywords that mean nothing where a token has a target for each place of `out_features`.
_NOT_OF_PLACES = ("token_weights", "target_weights", "shift", "document_ids", "return_stats")


_SIZES = {"in_features": kind_of(int), "num_classes": kind_of(int)}


def _expect_kinds(weight: Any, ignore_index: Any, label_smoothing: Any, options: dict[str, Any]) -> None:
    """Raise TypeError for an option that is of another kind than the functions declare."""
    expect_kind("weight", weight, KINDS["class_weights"])
    expect_kinds(KINDS, {"ignore_index": ignore_index, "label_smoothing": label_smoothing, **options})


def _refuse_one_hot(target: Tensor, shape: torch.Size) -> None:
    """Raise for integers of the logits' shape, which torch's modules refuse and our functions read as K targets."""
    if target.shape == shape and not target.is_floating_point():
        raise TypeError(
            f"target must be floating point probabilities where it has the shape of the logits; got {describe(target)} "
            "(for one-hot targets pass target.argmax(...), or target.float())"
        )


class CrossEntropyLoss(nn.Module):
    """`torch.nn.CrossEntropyLoss`, on logits (N, V, ...) or (V,); further keywords as `cross_entropy`.

    Targets are class indices, or floating point probabilities of all classes, which get no gradient.
    """

    weight: Tensor | None
    reduction: Reduction

    def __init__(
        self,
        weight: Tensor | None = None,  # (V,)
        size_average: None = None,  # torch's, deprecated there and refused here
        ignore_index: int = -100,
        reduce: None = None,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        expect(size_average is None and reduce is None, "size_average and reduce must be None; pass reduction")
        _expect_kinds(weight, ignore_index, label_smoothing, options)
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.options = options

    def forward(self, input: Tensor, target: Tensor) -> Any:
        expect_tensors(input=input, target=target)
        _refuse_one_hot(target, input.shape)
        if input.dim() > 2:
            # torch has classes on dimension 1: (N, V, d1, ...) with targets (N, d1, ...), or probabilities like input.
            target = target.movedim(1, -1) if target.shape == input.shape else target
            input = input.movedim(1, -1)
        return cross_entropy(
            input,
            target,
            class_weights=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **self.options,
        )


class LinearCrossEntropyLoss(nn.Module):
    """`torch.nn.LinearCrossEntropyLoss` (torch 2.13): a linear layer and the loss of its logits, which never exist.

    It owns `linear`, an `nn.Linear` to num_classes logits; further keywords as `linear_cross_entropy`. With
    `out_features`, a shape, each token has that many targets, and each place of the shape has num_classes logits of its
    own. Places are computed one after another, each within `memory_budget`. Beyond that, autograd holds one more
    gradient of `linear` while it joins those of the places.
    """

    weight: Tensor | None
    reduction: Reduction
    out_features: tuple[int, ...]

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: Reduction = "mean",
        weight: Tensor | None = None,  # (num_classes,)
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: None = None,  # torch's, about chunks; memory_budget takes their place
        **more: Any,
    ) -> None:
        super().__init__()
        expect(
            options is None, "options must be None: those of torch's module do not apply; pass memory_budget instead"
        )
        given = [name for name in _NOT_OF_PLACES if name in more]
        expect(not (given and out_features), f"out_features must be () with {', '.join(given)}; got {out_features}")
        expect_kinds(_SIZES, {"in_features": in_features, "num_classes": num_classes})
        _expect_kinds(weight, -100 if ignore_index is None else ignore_index, label_smoothing, more)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.linear = nn.Linear(
            in_features, math.prod(out_features, start=num_classes), bias=bias, device=device, dtype=dtype
        )
        self.register_buffer("weight", weight)
        self.ignore_index = -100 if ignore_index is None else ignore_index
        self.reduction, self.label_smoothing, self.options = reduction, label_smoothing, more

    def forward(self, input: Tensor, target: Tensor) -> Any:
        expect_tensors(input=input, target=target)
        _refuse_one_hot(target, torch.Size((*input.shape[:-1], self.num_classes, *self.out_features)))
        if not self.out_features:
            return self._loss(input, self.linear.weight, self.linear.bias, target, {})
        return self._loss_of_places(input, target)

    def _loss_of_places(self, input: Tensor, target: Tensor) -> Tensor:
        tokens, places = input.shape[:-1], self.out_features
        dense = target.shape == (*tokens, self.num_classes, *places)
        expect(
            len(tokens) == 1 and (dense or target.shape == (*tokens, *places)),
            f"target must be (N, {', '.join(map(str, places))}), or probabilities (N, num_classes, ...), with input "
            f"(N, in_features); got {describe(target)} with input {describe(input)}",
        )
        more: dict[str, Any] = {}
        if self.reduction == "mean" and self.options.get("num_valid") is None:
            counts = weights_that_count(target != self.ignore_index, target, None if dense else self.weight)
            more = {"num_valid": target[:, 0].numel() if dense else counts.sum()}
        # All places are split off at once, so that autograd joins their gradients at once.
        parts = self.linear.weight.unflatten(0, (self.num_classes, -1)).unbind(1)
        biases = [None] * len(parts) if self.linear.bias is None else self.linear.bias.view(-1, len(parts)).unbind(1)
        losses = [
            self._loss(input, *given, more)
            for given in zip(parts, biases, target.flatten(2 if dense else 1).unbind(-1))
        ]
        if self.reduction != "none":
            return torch.stack(losses).sum()
        return torch.stack(losses, 1).view(*tokens, *places)

    def _loss(self, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, more: dict[str, Any]) -> Any:
        return linear_cross_entropy(
            input,
            weight,
            target,
            bias=bias,
            class_weights=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **{**self.options, **more},
        )
