"""The work before and after the loss of each row is computed: targets, terms, counts and statistics."""

# pyright: reportTypedDictNotRequiredAccess=false

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast._checks import describe
from llmfast.losses.options import TABLE, Inputs, LossOptions, Reduction, RowOptions, declared
from llmfast_kernels.terms import Rows, Targets, Terms

# Up to this many logits, torch's own loss is faster on a CPU: for logits that the caller passes ("logits"), and for
# logits that are computed from hidden states ("hidden").
SMALL = {"logits": 1 << 22, "hidden": 1 << 18}

_TERMS = [field.name for field in fields(Terms) if field.name in declared(RowOptions)]
_IDLE = {name: TABLE[name].idle for name in _TERMS if TABLE[name].idle is not None}


class LossStats(NamedTuple):
    """Statistics that `return_stats=True` adds to the loss.

    For a token without a valid target, argmax is -1, and token_loss, lse and entropy are 0.
    """

    token_loss: Tensor  # (...) float32, detached
    lse: Tensor  # (...) float32 logsumexp of the logits, differentiable
    entropy: Tensor  # (...) float32 entropy of the softmax, in nats, differentiable
    argmax: Tensor  # (...) int64: the most probable class; the first one if several are equal
    accuracy: Tensor  # () float32, or (K,) with K targets: share of valid targets that equal the argmax


class LogprobStats(NamedTuple):
    """Statistics that `return_stats=True` adds to log-probabilities. For a token without a valid id, argmax is -1."""

    lse: Tensor  # (...) float32 logsumexp of the logits, differentiable; 0 for a token without a valid id
    entropy: Tensor  # (...) float32 entropy of the softmax, in nats, differentiable; 0 likewise
    argmax: Tensor  # (...) int64: the most probable class; the first one if several are equal
    rank: Tensor | None  # like ids, int64: classes with a larger logit; -1 for ignored ids. None unless asked for


@dataclass(frozen=True)
class Ready:
    """A checked call, whose result is finished(function(*arguments)).

    The public function evaluates that itself, so that few functions lead to a kernel.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    finished: Callable[[Any], Any]


class RowStats(NamedTuple):
    """The statistics of `LossStats` per row, without the accuracy, and the places of `Rows`.

    All are (N,), places (N, K). `finish` and `finish_logprobs` give them the caller's shape.
    """

    token_loss: Tensor
    lse: Tensor
    entropy: Tensor
    argmax: Tensor
    places: Tensor | None

    @staticmethod
    def of(rows: Rows, lse: Tensor, loss: Tensor) -> "RowStats":
        """Take the statistics from `rows`. token_loss is never `loss` itself, because only `loss` is differentiable."""
        assert rows.entropy is not None and rows.argmax is not None
        token_loss = rows.loss.clone() if loss is rows.loss else rows.loss
        return RowStats(token_loss, lse, rows.entropy, rows.argmax, rows.places)


NO_STATS = (None,) * len(RowStats._fields)


def torch_cross_entropy(logits: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    """Compute the loss with torch's own function, for options that it has."""
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        targets.reshape(-1).long(),
        ignore_index=options["ignore_index"],
        reduction=options["reduction"],
    )
    return restore(loss, targets.shape)


def prepare(options: LossOptions, inputs: Inputs, columns: slice, dtype: torch.dtype, *, stats: bool) -> dict[str, Any]:
    """Return the fields of `Loss` as keyword arguments. Logits have `dtype`, and this rank holds their `columns`."""
    wide = torch.promote_types(dtype, torch.float32)
    make = dense_targets if inputs.dense else make_targets
    targets = make(options, inputs.targets, inputs.rows.shape[:-1], wide)
    terms = make_terms(options, inputs.V, columns, wide)
    count = None
    if options["reduction"] == "mean":  # the number of tokens where targets are probabilities, as in torch
        counting = replace(terms, class_weights=None) if inputs.dense else terms
        count = count_of(options["num_valid"], targets, counting, wide)
    return {
        "targets": targets,
        "terms": terms,
        "count": count,
        "reduction": options["reduction"],
        "stats": stats,
        "dtype": dtype,
        "group": options.get("process_group"),
        "places": options.get("return_rank", False),
    }


def make_targets(options: LossOptions, targets: Tensor, shape: torch.Size, dtype: torch.dtype) -> Targets:
    """Shift the targets, flatten them to one row per token, and convert their weights to `dtype`."""
    if options["shift"]:
        targets = shifted(
            targets, options["shift"], options["document_ids"], options["ignore_index"], axis=len(shape) - 1
        )
    K = targets.shape[-1] if targets.dim() > len(shape) else 1
    weights, rows = options["target_weights"], (options["token_weights"], options.get("temperature"))
    return Targets(
        targets.reshape(-1, K).contiguous(),
        None if weights is None else weights.to(dtype).reshape(-1, K).contiguous(),
        *(t.to(dtype).reshape(-1).contiguous() if isinstance(t, Tensor) else None for t in rows),
    )


def dense_targets(options: LossOptions, targets: Tensor, shape: torch.Size, dtype: torch.dtype) -> Targets:
    """Flatten probabilities of all classes to one row per token, in their own memory where that is possible."""
    N, V = shape.numel(), targets.shape[-1]
    rows = targets.detach().reshape(N, V)
    none = torch.zeros((N, 1), dtype=torch.int64, device=targets.device)
    weights = options["token_weights"]
    return Targets(
        none,
        token_weights=None if weights is None else weights.to(dtype).reshape(-1).contiguous(),
        probabilities=rows if rows.stride(1) == 1 else rows.contiguous(),
    )


def make_terms(options: RowOptions, V: int, columns: slice, dtype: torch.dtype) -> Terms:
    """Return the terms of rows over `V` classes, of which this rank holds `columns`."""
    values = {name: options[name] for name in _TERMS}  # type: ignore[literal-required]
    for name, idle in _IDLE.items():
        if values[name] == idle:
            values[name] = None
    weights = options["class_weights"]
    if weights is None:
        return Terms(V=V, v_start=columns.start, **values)
    values["class_weights"] = weights = weights.to(dtype).contiguous()
    sums = torch.stack([weights[columns].sum(), weights.sum()]) if options["label_smoothing"] else None
    return Terms(V=V, v_start=columns.start, class_weight_sums=sums, **values)


def shifted(targets: Tensor, shift: int, document_ids: Tensor | None, ignore_index: int, axis: int) -> Tensor:
    """Move the target of token t + shift to token t.

    If token t + shift is outside the sequence or in another document, token t gets `ignore_index`.
    """
    length = targets.shape[axis]
    keep = max(0, length - shift)
    moved = targets.narrow(axis, length - keep, keep)
    if document_ids is not None:
        same = document_ids.narrow(axis, 0, keep) == document_ids.narrow(axis, length - keep, keep)
        moved = torch.where(same if moved.dim() == same.dim() else same[..., None], moved, ignore_index)
    tail = targets.new_full((*targets.shape[:axis], length - keep, *targets.shape[axis + 1 :]), ignore_index)
    return torch.cat([moved, tail], dim=axis)


def count_of(num_valid: float | Tensor | None, targets: Targets, terms: Terms, dtype: torch.dtype) -> Tensor:
    """Return the divisor of a mean, () on the targets' device: `num_valid`, or the sum of valid targets' weights."""
    classes = targets.classes
    if isinstance(num_valid, Tensor):
        return on_device("num_valid", num_valid.detach(), classes.device).to(dtype).reshape(())
    if num_valid is not None:
        return torch.full((), num_valid, dtype=dtype, device=classes.device)
    counts = classes != terms.ignore_index
    weights = weights_that_count(counts, classes, terms.class_weights)
    for given in (targets.weights, None if targets.token_weights is None else targets.token_weights[:, None]):
        if given is not None:
            weights = torch.where(counts, weights * given, 0.0)  # an ignored target's weight may be NaN
    return weights.sum().to(dtype)


def weights_that_count(counts: Tensor, classes: Tensor, class_weights: Tensor | None) -> Tensor:
    """Return each target's class weight, or 0 if `counts` is False. Without class weights, return `counts` itself."""
    if class_weights is None:
        return counts
    known = counts & (classes >= 0) & (classes < len(class_weights))
    return torch.where(known, class_weights[torch.where(known, classes, 0).long()], 0.0)


def numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """Make a float64 tensor of a few numbers that the device itself writes.

    A copy from host memory would make the host wait, and a CUDA graph cannot capture such a copy.
    """
    return torch.stack([torch.full((), value, dtype=torch.float64, device=device) for value in values])


def on_device(name: str, t: Tensor, device: torch.device) -> Tensor:
    """Return a small tensor on `device`; the host does not wait for a copy to a GPU.

    Raises:
        ValueError: `t` is on another device while a CUDA graph is captured. A graph cannot copy from host memory.
    """
    if t.device == device:
        return t
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(f"{name} must be on {device} while a CUDA graph is captured; got {describe(t)}")
    return t.to(device, non_blocking=device.type != "cpu")  # the CPU could read a copy before it is complete


def reciprocal(count: Tensor) -> Tensor:
    """Return 1 / count, or 0 if the count is 0: gradients are then zero, not NaN."""
    return torch.where(count != 0, count.reciprocal(), 0.0)


def divided(d_loss: Tensor, count: Tensor | None) -> Tensor:
    """Return the factor for the gradient of the sum of all losses: `d_loss`, divided by a mean's `count`.

    `d_loss` is the gradient that autograd passes for the reduced loss: (), or (N,) for losses per row.
    """
    return d_loss if count is None else d_loss * reciprocal(count)


def reduced(loss: Tensor, reduction: Reduction, count: Tensor | None) -> Tensor:
    """Reduce the losses of all rows, (N,), to (); "none" returns them unchanged."""
    if reduction == "none":
        return loss
    return loss.sum() if count is None else loss.sum() / count


def restore(t: Tensor, shape: torch.Size) -> Tensor:
    """Reshape (N,) to the caller's leading dimensions `shape`; return a scalar unchanged."""
    return t if t.dim() == 0 or len(shape) == 1 else t.view(shape)


def finish(
    found: Sequence[Tensor | None], targets: Targets, ignore_index: int, shape: torch.Size, *, squeeze: bool
) -> Tensor | tuple[Tensor, LossStats]:
    """Give results the caller's shape. `found` is a loss, followed by its `RowStats` or by `NO_STATS`.

    Returns the loss, with `LossStats` if there are statistics. `squeeze` makes the accuracy a scalar.
    """
    loss, *stats = found
    assert loss is not None
    loss = restore(loss, shape)
    if stats[0] is None:
        return loss
    token_loss, lse, entropy, argmax = (t.view(shape) for t in stats if t is not None)
    hits = accuracy(argmax.reshape(-1), targets, ignore_index)
    return loss, LossStats(token_loss, lse, entropy, argmax, hits[0] if squeeze else hits)


def finish_logprobs(
    found: Sequence[Tensor | None], ids: Tensor, shape: torch.Size
) -> Tensor | tuple[Tensor, LogprobStats]:
    """Give results the caller's shape. `found` is (N, K) log-probabilities, followed as in `finish`."""
    value, _, *stats, places = found
    assert value is not None
    each = value.view(ids.shape)
    if stats[0] is None:
        return each
    lse, entropy, argmax = (t.view(shape) for t in stats if t is not None)
    return each, LogprobStats(lse, entropy, argmax, None if places is None else places.view(ids.shape))


def accuracy(argmax: Tensor, targets: Targets, ignore_index: int) -> Tensor:
    """Return the share of valid targets that are their row's argmax: (K,) for targets (N, K). NaN if none is valid."""
    valid = targets.classes != ignore_index
    return (valid & (targets.classes == argmax[:, None])).sum(0).float() / valid.sum(0)
