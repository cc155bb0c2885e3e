"""What both losses do with targets, options, reductions and counts, before and after the rows."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast._checks import describe, expect
from llmfast._dispatch import has_no_data
from llmfast.losses.parallel import ProcessGroup
from llmfast_kernels.terms import Rows, Targets, Terms

Reduction = Literal["mean", "sum", "none"]


# Up to so many logits in all, given or made of hidden states, torch's own loss is the faster on a CPU.
SMALL = {"logits": 1 << 22, "hidden": 1 << 18}


class LossStats(NamedTuple):
    """What `return_stats=True` adds to the loss. Where a token's targets are all ignored: 0, and an argmax of -1."""

    token_loss: Tensor  # (...) float32, detached
    lse: Tensor  # (...) float32 logsumexp of the logits, differentiable
    entropy: Tensor  # (...) float32 of the softmax, in nats, differentiable
    argmax: Tensor  # (...) int64: the most probable class, the first of equals
    accuracy: Tensor  # () float32, or (K,) with K targets: share of valid targets that are the argmax


class RowStats(NamedTuple):
    """The same statistics of N rows, all (N,), on their way to the user."""

    token_loss: Tensor
    lse: Tensor
    entropy: Tensor
    argmax: Tensor

    @staticmethod
    def of(rows: Rows, lse: Tensor, loss: Tensor) -> "RowStats":
        """Take them from `rows`, with a token_loss that is not the returned `loss` itself."""
        assert rows.entropy is not None and rows.argmax is not None
        return RowStats(rows.loss.clone() if loss is rows.loss else rows.loss, lse, rows.entropy, rows.argmax)


NO_STATS = (None,) * len(RowStats._fields)


class OptionsGiven(TypedDict, total=False):
    """Keyword arguments that both losses take, for type checkers; `Options` has them checked."""

    ignore_index: int
    reduction: Reduction
    num_valid: int | Tensor | None
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float | None
    class_weights: Tensor | None
    token_weights: Tensor | None
    target_weights: Tensor | None
    shift: int
    document_ids: Tensor | None
    process_group: "ProcessGroup | None"
    vocab_size: int | None


class Options(NamedTuple):
    """The options that both losses share, as the user gave them."""

    ignore_index: int = -100
    reduction: Reduction = "mean"
    num_valid: int | Tensor | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float | None = None
    class_weights: Tensor | None = None  # (V,)
    token_weights: Tensor | None = None  # (...)
    target_weights: Tensor | None = None  # (K,) or (..., K)
    shift: int = 0
    document_ids: Tensor | None = None  # (...)

    def check(self, targets: Tensor, shape: torch.Size, V: int, device: torch.device) -> None:
        """Raise ValueError or TypeError unless everything fits rows of shape `shape` over `V` classes."""
        check_targets(targets, shape, V, device, self.ignore_index)
        check_reduction(self.reduction, self.num_valid)
        # Numbers may be symbols to torch.compile, which makes no messages of those.
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1]; got {self.label_smoothing}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive; got {self.softcap}")
        if self.shift < 0:
            raise ValueError(f"shift must not be negative; got {self.shift}")
        expect(self.shift == 0 or len(shape) > 0, "shift needs a token axis; logits of one token have none")
        expect(self.document_ids is None or self.shift > 0, "document_ids bound a shift; shift is 0")
        K = targets.shape[-1] if targets.dim() > len(shape) else None
        expect(self.target_weights is None or K is not None, "target_weights need targets of shape (..., K)")
        _check_like("class_weights", self.class_weights, [(V,)], device)
        _check_like("token_weights", self.token_weights, [tuple(shape)], device)
        _check_like("target_weights", self.target_weights, [(K or 1,), (*shape, K or 1)], device)
        _check_like("document_ids", self.document_ids, [tuple(shape)], device, floating=False)

    def are_torchs(self, targets: Tensor, shape: torch.Size) -> bool:
        """Whether they are no more than what `torch.nn.functional.cross_entropy` does as fast."""
        return targets.dim() == len(shape) and self == Options(self.ignore_index, self.reduction)

    def torch_cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        flat = logits.reshape(-1, logits.shape[-1])
        loss = F.cross_entropy(
            flat, targets.reshape(-1).long(), ignore_index=self.ignore_index, reduction=self.reduction
        )
        return restore(loss, targets.shape)

    def resolve(self, targets: Tensor, shape: torch.Size, dtype: torch.dtype) -> Targets:
        """Targets of the flattened rows, shifted, with their weights in `dtype`."""
        if self.shift:
            targets = shifted(targets, self.shift, self.document_ids, self.ignore_index, axis=len(shape) - 1)
        K = targets.shape[-1] if targets.dim() > len(shape) else 1
        weights, tokens = self.target_weights, self.token_weights
        return Targets(
            targets.reshape(-1, K).contiguous(),
            None if weights is None else weights.to(dtype).reshape(-1, K).contiguous(),
            None if tokens is None else tokens.to(dtype).reshape(-1).contiguous(),
        )

    def terms(self, V: int, columns: slice, dtype: torch.dtype) -> Terms:
        """For rows over `V` classes, of which this rank holds `columns`."""
        weights = None if self.class_weights is None else self.class_weights.to(dtype).contiguous()
        sums = None
        if weights is not None and self.label_smoothing:
            sums = torch.stack([weights[columns].sum(), weights.sum()])
        return Terms(
            V, self.ignore_index, columns.start, None, weights, sums, self.label_smoothing or None, self.z_loss or None,
            None if self.logit_scale == 1.0 else self.logit_scale, self.softcap,
        )  # fmt: skip


def check_targets(targets: Tensor, shape: torch.Size, V: int, device: torch.device, ignore_index: int) -> None:
    """Raise ValueError or TypeError unless `targets` are class indices for rows of shape `shape`."""
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32 class indices; got {describe(targets)}")
    expect(
        targets.shape == shape or (targets.shape[:-1] == shape and targets.dim() > 0 and targets.shape[-1] > 0),
        f"targets must have shape {tuple(shape)}, or one axis more for K of them; got {describe(targets)}",
    )
    expect(targets.device == device, f"targets must be on {device}; got {describe(targets)}")
    if targets.device.type == "cpu" and not has_no_data(targets):  # elsewhere looking would be a host sync
        wrong = (targets != ignore_index) & ((targets < 0) | (targets >= V))
        if wrong.any():
            value = targets[wrong][0].item()
            raise ValueError(f"targets must be in [0, {V}) or ignore_index={ignore_index}; found {value}")


def check_reduction(reduction: str, num_valid: int | Tensor | None) -> None:
    expect(reduction in ("mean", "sum", "none"), f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")
    expect(num_valid is None or reduction == "mean", f"num_valid divides a mean; reduction is {reduction!r}")
    if isinstance(num_valid, Tensor):
        expect(num_valid.numel() == 1, f"num_valid must hold one number; got {describe(num_valid)}")
    elif num_valid is not None and not num_valid >= 0:
        raise ValueError(f"num_valid must not be negative; got {num_valid}")


def _check_like(
    name: str, t: Tensor | None, shapes: list[tuple[int, ...]], device: torch.device, *, floating: bool = True
) -> None:
    if t is None:
        return
    wanted = " or ".join(str(shape) for shape in shapes)
    expect(tuple(t.shape) in shapes and t.device == device, f"{name} must be {wanted} on {device}; got {describe(t)}")
    if t.is_floating_point() != floating:
        raise TypeError(f"{name} must be {'floating point' if floating else 'integers'}; got {describe(t)}")
    expect(
        not (t.requires_grad and torch.is_grad_enabled()),
        f"{name} gets no gradient here; detach it, or weigh the losses of reduction='none'",
    )


def shifted(targets: Tensor, shift: int, document_ids: Tensor | None, ignore_index: int, axis: int) -> Tensor:
    """Each token's target is the one `shift` tokens on; ignored past the end of its sequence or document."""
    length = targets.shape[axis]
    keep = max(0, length - shift)
    moved = targets.narrow(axis, length - keep, keep)
    if document_ids is not None:
        same = document_ids.narrow(axis, 0, keep) == document_ids.narrow(axis, length - keep, keep)
        moved = torch.where(same if moved.dim() == same.dim() else same[..., None], moved, ignore_index)
    tail = targets.new_full((*targets.shape[:axis], length - keep, *targets.shape[axis + 1 :]), ignore_index)
    return torch.cat([moved, tail], dim=axis)


def denominator(targets: Targets, terms: Terms, num_valid: int | Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a mean divides by, a 0-d tensor beside the targets: the sum of all weights that count, on the device."""
    classes = targets.classes
    if isinstance(num_valid, Tensor):
        return on_device("num_valid", num_valid.detach(), classes.device).to(dtype).reshape(())
    if num_valid is not None:
        return torch.full((), num_valid, dtype=dtype, device=classes.device)
    counts = classes != terms.ignore_index
    weights: Tensor = counts
    if terms.class_weights is not None:
        known = counts & (classes >= 0) & (classes < terms.V)
        weights = torch.where(known, terms.class_weights[torch.where(known, classes, 0).long()], 0.0)
    for given in (targets.weights, None if targets.token_weights is None else targets.token_weights[:, None]):
        if given is not None:
            weights = torch.where(counts, weights * given, 0.0)  # what an ignored target weighs may be NaN
    return weights.sum().to(dtype)


def numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """Make a float64 tensor of a few numbers, written by the device itself.

    A copy from the host's memory would be a wait, and a CUDA graph cannot hold one.
    """
    return torch.stack([torch.full((), value, dtype=torch.float64, device=device) for value in values])


def on_device(name: str, t: Tensor, device: torch.device) -> Tensor:
    """Return a small tensor on `device`, without a wait.

    Raises:
        ValueError: `t` lies elsewhere while a CUDA graph is captured, which cannot copy from the host's memory.
    """
    if t.device == device:
        return t
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(f"{name} must be on {device} while a CUDA graph is captured; got {describe(t)}")
    return t.to(device, non_blocking=device.type != "cpu")  # a copy to the host would be read before it has arrived


def reciprocal(count: Tensor) -> Tensor:
    """1 / count for gradients, which are zero and not NaN when nothing counts."""
    return torch.where(count != 0, 1.0 / count, 0.0)


def reduced(loss: Tensor, reduction: Reduction, count: Tensor | None) -> Tensor:
    """The losses of all rows, (N,), as the caller asked for them."""
    if reduction == "none":
        return loss
    return loss.sum() if count is None else loss.sum() / count


def accuracy(argmax: Tensor, targets: Targets, ignore_index: int) -> Tensor:
    """Share of the valid targets that are their row's argmax: (K,) for (N, K) targets. NaN where none is valid."""
    valid = targets.classes != ignore_index
    return (valid & (targets.classes == argmax[:, None])).sum(0).float() / valid.sum(0)


def refuse_second_derivative() -> None:
    """Called in a backward: the gradients made there are no functions that autograd could differentiate again."""
    if torch.is_grad_enabled():  # only under create_graph=True
        raise RuntimeError("this loss cannot be differentiated twice; use torch.nn.functional.cross_entropy for that")


def per_row(d_loss: Tensor | None, factor: Tensor | None, like: Tensor) -> Tensor:
    """The upstream gradient of every row's loss, (N,), from that of the reduced loss."""
    if d_loss is None:
        return torch.zeros_like(like)
    return (d_loss if factor is None else d_loss * factor).to(like.dtype).expand_as(like).contiguous()


def restore(t: Tensor, shape: torch.Size) -> Tensor:
    """(N,) to the user's leading dimensions; scalars stay."""
    return t.view(shape) if t.dim() else t
