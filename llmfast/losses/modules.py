"""The losses as modules, with the constructor arguments of torch's, for code that swaps one for the other."""

from typing import Any

import torch
from torch import Tensor, nn

from llmfast._checks import describe, expect
from llmfast.losses.cross_entropy import cross_entropy
from llmfast.losses.linear_cross_entropy import linear_cross_entropy
from llmfast.losses.options import Reduction


def _expect_probabilities(target: Tensor, shape: torch.Size) -> None:
    """Raise for integers in the shape of the logits, of which torch's modules make nothing, and functions K targets."""
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
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.options = options

    def forward(self, input: Tensor, target: Tensor) -> Any:
        _expect_probabilities(target, input.shape)
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

    It owns `linear`, an `nn.Linear(in_features, num_classes)`; further keywords as `linear_cross_entropy`.
    """

    weight: Tensor | None
    reduction: Reduction

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
        options: None = None,  # torch's, on chunks; here it is memory_budget
        **more: Any,
    ) -> None:
        super().__init__()
        expect(out_features == (), f"out_features must be (), for one class per token; got {out_features}")
        expect(
            options is None, "options must be None: those of torch's module do not apply; pass memory_budget instead"
        )
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.ignore_index = -100 if ignore_index is None else ignore_index
        self.reduction, self.label_smoothing, self.options = reduction, label_smoothing, more

    def forward(self, input: Tensor, target: Tensor) -> Any:
        _expect_probabilities(target, torch.Size((*input.shape[:-1], self.linear.out_features)))
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            bias=self.linear.bias,
            class_weights=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **self.options,
        )
