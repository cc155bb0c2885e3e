"""Definitions of the losses in as little torch as possible. Slow, and right: the tests hold every path to these.

Names and arguments are those of `llmfast.losses`, without those that only say how to compute. Arithmetic is at least
float32; float64 stays float64.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmfast._kinds import expect_kind, expect_tensors
from llmfast.losses.options import KINDS, DistillationOptions, LogprobOptions, LossOptions, complete, defaults, takes
from llmfast.losses.targets import LogprobStats, LossStats
from llmfast.losses.teachers import AnyTeacher, TeacherLogits, TeacherProbabilities, TeacherStates, expect_teacher

if TYPE_CHECKING:
    from typing_extensions import Unpack

_DEFAULTS: LossOptions = defaults(LossOptions)
_LOGPROBS: LogprobOptions = defaults(LogprobOptions)
_DISTILLATION: DistillationOptions = defaults(DistillationOptions)


@takes(LossOptions)
def cross_entropy(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...) or (..., K); or (..., V) probabilities
    *,
    return_stats: bool = False,
    **options: "Unpack[LossOptions]",
) -> Tensor | tuple[Tensor, LossStats]:
    """Compute what `llmfast.losses.cross_entropy` means."""
    expect_tensors(logits=logits, targets=targets)
    o: dict[str, Any] = {**complete("cross_entropy", _DEFAULTS, options)}
    x = _final(logits, o)
    V, shape = x.shape[-1], x.shape[:-1]
    if targets.is_floating_point():
        return _of_probabilities(x, targets, o)
    y = targets if targets.dim() > len(shape) else targets[..., None]
    if o["shift"]:
        y = _shifted(y, o["shift"], o["document_ids"], o["ignore_index"])
    c = torch.ones(V, dtype=x.dtype, device=x.device) if o["class_weights"] is None else o["class_weights"].to(x.dtype)
    keep = y != o["ignore_index"]
    y = y.masked_fill(~keep, 0).long()
    w = keep.to(x.dtype) if o["target_weights"] is None else torch.where(keep, o["target_weights"].to(x.dtype), 0.0)
    t = torch.ones(shape, dtype=x.dtype, device=x.device)
    if o["token_weights"] is not None:
        t = o["token_weights"].to(x.dtype)

    lse = x.logsumexp(-1)
    surprise = lse[..., None] - x
    smoothing = o["label_smoothing"]
    losses = (1 - smoothing) * c[y] * surprise.gather(-1, y)
    if smoothing:
        losses = losses + smoothing / V * (c * surprise).sum(-1, keepdim=True)
    loss = _add_terms_of_lse(torch.where(keep, w * losses, 0.0).sum(-1), lse, o)
    valid = keep.any(-1)
    loss = torch.where(valid, t * loss, 0.0)
    total = torch.where(keep, t[..., None] * w * c[y], 0.0).sum() if o["num_valid"] is None else o["num_valid"]
    total = total.reshape(()) if isinstance(total, Tensor) else total
    result = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / total}[o["reduction"]]
    if not return_stats:
        return result
    stats = _statistics(x, valid)
    argmax = stats[2]
    by_token, right = (known.reshape(-1, y.shape[-1]) for known in (keep, keep & (y == argmax[..., None])))
    hits = right.sum(0).float() / by_token.sum(0)
    accuracy = hits if targets.dim() > len(shape) else hits[0]
    return result, LossStats(loss.detach(), *stats, accuracy)


def _add_terms_of_lse(loss: Tensor, lse: Tensor, o: dict[str, Any]) -> Tensor:
    return loss + o["z_loss"] * lse**2 if o["z_loss"] else loss


def _of_probabilities(x: Tensor, targets: Tensor, o: dict[str, Any]) -> Tensor:
    """Compute the cross-entropy of final logits against probabilities of all classes."""
    smoothing, lse = o["label_smoothing"], x.logsumexp(-1)
    p = (1 - smoothing) * targets.to(x.dtype) + smoothing / x.shape[-1]
    if o["class_weights"] is not None:
        p = p * o["class_weights"].to(x.dtype)
    loss = torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, lse[..., None] - x)).sum(-1)
    loss = _add_terms_of_lse(loss, lse, o)
    t = torch.ones_like(lse) if o["token_weights"] is None else o["token_weights"].to(x.dtype)
    loss = t * loss
    total = t.sum() if o["num_valid"] is None else o["num_valid"]
    found: Tensor = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / total}[o["reduction"]]
    return found.reshape(loss.shape if o["reduction"] == "none" else ())


@takes(LossOptions)
def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...) or (..., K); or (..., V) probabilities
    *,
    bias: Tensor | None = None,  # (V,)
    return_stats: bool = False,
    **options: "Unpack[LossOptions]",
) -> Tensor | tuple[Tensor, LossStats]:
    """Compute what `llmfast.losses.linear_cross_entropy` means."""
    logits = _product(hidden, weight, bias)
    return cross_entropy(logits, targets, return_stats=return_stats, **options)


@takes(LogprobOptions)
def logprobs(
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (...) or (..., K)
    *,
    return_stats: bool = False,
    **options: "Unpack[LogprobOptions]",
) -> Tensor | tuple[Tensor, LogprobStats]:
    """Compute what `llmfast.losses.logprobs` means."""
    expect_tensors(logits=logits, ids=ids)
    o: dict[str, Any] = {**complete("logprobs", _LOGPROBS, options)}
    x, temperature = _final(logits, o), o["temperature"]
    x = x / (temperature.to(x.dtype)[..., None] if isinstance(temperature, Tensor) else temperature)
    y = ids if ids.dim() == x.dim() else ids[..., None]
    keep = y != o["ignore_index"]
    each = x.log_softmax(-1).gather(-1, y.masked_fill(~keep, 0).long())
    each = torch.where(keep, each, 0.0).view(ids.shape)
    if not return_stats:
        return each
    rank = None
    if o["return_rank"]:
        order = _final(logits, {**o, "softcap": None})  # a softcap makes some equal by rounding
        own = order.gather(-1, y.masked_fill(~keep, 0).long())
        above = torch.stack([(order > logit).sum(-1) for logit in own.split(1, -1)], -1)
        rank = torch.where(keep, above, -1).view(ids.shape)
    return each, LogprobStats(*_statistics(x, keep.any(-1)), rank)


@takes(LogprobOptions)
def linear_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (...) or (..., K)
    *,
    bias: Tensor | None = None,  # (V,)
    return_stats: bool = False,
    **options: "Unpack[LogprobOptions]",
) -> Tensor | tuple[Tensor, LogprobStats]:
    """Compute what `llmfast.losses.linear_logprobs` means."""
    logits = _product(hidden, weight, bias)
    return logprobs(logits, ids, return_stats=return_stats, **options)


@takes(DistillationOptions)
def linear_distillation(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    teacher: AnyTeacher,
    targets: Tensor | None = None,  # (...)
    **options: "Unpack[DistillationOptions]",
) -> Tensor:
    """Compute what `llmfast.losses.linear_distillation` means; options on how to compute change nothing."""
    expect_tensors(hidden=hidden, weight=weight, **({} if targets is None else {"targets": targets}))
    expect_teacher(teacher)
    o: dict[str, Any] = {**complete("linear_distillation", _DISTILLATION, options)}
    x = _final(_product(hidden, weight, o["bias"]), o)
    if isinstance(o["temperature"], Tensor):
        o["temperature"] = o["temperature"].to(x.dtype)[..., None]
    q = (x / o["temperature"]).log_softmax(-1)
    q, p = _classes(teacher, q, o)
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[o["kind"]] if o["beta"] is None else o["beta"]
    if beta == 0:
        soft = _kl(p, q)
    elif beta == 1:
        soft = _kl(q, p)
    else:
        m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
        soft = beta * _kl(p, m) + (1 - beta) * _kl(q, m)
    loss, valid = o["soft_weight"] * soft, torch.ones_like(soft, dtype=torch.bool)
    if targets is not None:
        valid = targets != o["ignore_index"]
        y = targets.masked_fill(~valid, 0).long()
        loss = loss - o["hard_weight"] * x.log_softmax(-1).gather(-1, y[..., None])[..., 0]
    t = torch.ones_like(soft) if o["token_weights"] is None else o["token_weights"].to(x.dtype)
    loss = torch.where(valid, t * loss, 0.0)
    total = torch.where(valid, t, 0.0).sum() if o["num_valid"] is None else o["num_valid"]
    found: Tensor = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / total}[o["reduction"]]
    return found


def _classes(teacher: AnyTeacher, q: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the student and a teacher, of all classes or of K and the others as one."""
    if isinstance(teacher, TeacherStates):
        logits = teacher.hidden @ teacher.weight.T
        if teacher.bias is not None:
            logits = logits + teacher.bias
        x = _final(logits, {"softcap": teacher.softcap, "logit_scale": teacher.logit_scale})
        return q, (x.to(q.dtype) / o["temperature"]).log_softmax(-1)
    if isinstance(teacher, TeacherLogits):
        return q, (teacher.logits.to(q.dtype) / o["temperature"]).log_softmax(-1)
    if isinstance(teacher, TeacherProbabilities):
        return q, teacher.probabilities.to(q.dtype).log()
    given = teacher.ids != o["ignore_index"]
    ids = torch.where(given, teacher.ids, q.shape[-1]).long()
    p = teacher.logprobs.to(q.dtype).masked_fill(~given, -torch.inf)
    if teacher.tail == "drop":
        p = p - p.logsumexp(-1, keepdim=True)
        dense = q.new_full((*q.shape[:-1], q.shape[-1] + 1), -torch.inf)
        return q, dense.scatter(-1, ids, p)[..., :-1]
    wider = torch.cat([q, q.new_full((*q.shape[:-1], 1), -torch.inf)], -1)
    rest = wider.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    left = -torch.expm1(p.logsumexp(-1, keepdim=True).clamp(max=0.0))
    p_rest = torch.where(left > 0, torch.where(left > 0, left, 1.0).log(), -torch.inf)  # no NaN in its gradient
    return torch.cat([wider.gather(-1, ids), rest], -1), torch.cat([p, p_rest], -1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of log-probabilities on the last axis."""
    none = p == -torch.inf
    return torch.where(none, 0.0, p.exp() * torch.where(none, 0.0, p - q)).sum(-1)


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    expect_tensors(hidden=hidden, weight=weight)
    expect_kind("bias", bias, KINDS["bias"])
    logits = hidden @ weight.T
    return logits if bias is None else logits + bias


def _final(logits: Tensor, o: dict[str, Any]) -> Tensor:
    """Return the logits that are normalised, in float32 or float64."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if o["logit_scale"] is not None:
        x = x * o["logit_scale"]
    return x if o["softcap"] is None else o["softcap"] * torch.tanh(x / o["softcap"])


def _statistics(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return lse, entropy and argmax of rows, of which some are not `valid`."""
    p, lse = x.softmax(-1), x.logsumexp(-1)
    entropy = lse - (p * torch.where(p > 0, x, 0.0)).sum(-1)
    lse, entropy = (torch.where(valid, t, 0.0) for t in (lse, entropy))
    return lse, entropy, torch.where(valid, x.argmax(-1), -1)


def _shifted(targets: Tensor, shift: int, document_ids: Tensor | None, ignore_index: int) -> Tensor:
    """Return (..., T, K) targets `shift` tokens on, one token at a time."""
    moved = torch.full_like(targets, ignore_index)
    T = targets.shape[-2]
    for t in range(T - shift):
        target = targets[..., t + shift, :]
        if document_ids is not None:
            same = document_ids[..., t] == document_ids[..., t + shift]
            target = torch.where(same[..., None], target, ignore_index)
        moved[..., t, :] = target
    return moved
