"""Cross-entropy of logits that exist."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from llmfast.losses.loss import Found, Loss, Returned, Tensors
from llmfast_kernels.terms import Softmax


@dataclass
class HeldGradient:
    """A sign that the logits hold their own gradient, which can be used once."""

    used: bool = False


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Cross-entropy of logits, (N, V) with stride 1 along V: the only input."""

    inplace: bool = False

    def forward(self, inputs: Tensors, wants: tuple[bool, ...]) -> Found:
        logits = cast(Tensor, inputs[0])
        ops, stats = self.ops(logits), self.stats
        if self.inplace and wants[0] and self.reduction != "none" and not stats and self.group is None:
            scale = self.early_factor
            rows = ops.cross_entropy(logits, self.targets, self.terms, d_logits=logits, grad_scale=scale)
            increment_version(logits)
            return Found(rows, None, HeldGradient())
        more = {"stats": stats, "logprobs": self.logprobs}
        rows = ops.cross_entropy(logits, self.targets, self.terms, V=logits.shape[1], **more)
        if self.places:
            rows = rows._replace(places=ops.places(logits, self.targets, self.terms, V=logits.shape[1]))
        return Found(rows, rows.lse if stats else None)

    def backward(
        self,
        inputs: Tensors,
        wants: tuple[bool, ...],
        softmax: Softmax,
        returned: Returned,
        kept: HeldGradient | None,
    ) -> Tensors:
        logits = cast(Tensor, inputs[0])
        ops = self.ops(logits)
        if kept is not None:
            if kept.used:
                raise RuntimeError("cross_entropy(inplace=True): backward ran already and its gradient is used up")
            kept.used = True
            assert returned.loss is not None  # or backward would not run
            return (ops.scale(logits.detach(), self.late_factor(returned.loss)),)
        if logits.numel() == 0:
            return (torch.zeros_like(logits),)
        d_logits = logits.detach() if self.inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        upstream = returned.per_row(self.count, softmax.peak)
        ops.cross_entropy_backward(logits, self.targets, self.terms, softmax, upstream, d_logits=d_logits)
        if self.inplace:
            increment_version(logits)
        return (d_logits,)
