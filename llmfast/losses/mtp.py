"""The loss of several heads that predict further tokens ahead, over one vocabulary.

Heads are rows: their hidden states, one after the other, go through `linear_cross_entropy` once. So there is one buffer
of logits and one float32 gradient of the unembedding, and the unembedding is read as often as for one long batch. Heads
that share a hidden state are several targets of a row, and cost no more than one.
"""

# pyright: reportTypedDictNotRequiredAccess=false

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from llmfast._checks import describe, expect
from llmfast._kinds import expect_kind, expect_kinds, kind_of, kinds_of
from llmfast.losses.linear_cross_entropy import linear_cross_entropy, made_ready
from llmfast.losses.options import (
    TABLE,
    Inputs,
    LinearOptions,
    MTPOptions,
    Numbers,
    check_targets,
    complete,
    defaults,
    expect_inputs,
    takes,
)
from llmfast.losses.plain import final_logits
from llmfast.losses.plan import BudgetError
from llmfast.losses.targets import LossStats, make_terms, numbers, on_device, weights_that_count

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Stands for a head weight of 0: too small to change a sum in float32, while the head's loss can still be measured by
# dividing by it.
NEGLIGIBLE = 1e-20
_DEFAULTS: MTPOptions = defaults(MTPOptions)
_KINDS = kinds_of(MTPOptions)
HIDDENS = kind_of(Tensor | Sequence[Tensor])


class MTPStats(NamedTuple):
    """Statistics of each head, detached and on the device.

    NaN where a head has no valid token, except that `head_loss` is zero there if `num_valid` is given. What is float32
    is float64 for hidden states in float64.
    """

    head_loss: Tensor  # (K,) float32: mean loss of its tokens; with shared logits, mean of -log p alone
    accuracy: Tensor  # (K,) float32: share of its targets that are the most probable token
    num_valid: Tensor  # (K,) int64


_OWN = ("document_ids", "head_weights", "num_valid", "detach_unembedding")
_NOT_HERE = ("reduction", "shift", "target_weights")


@overload
def mtp_cross_entropy(
    hiddens: Tensor | Sequence[Tensor],
    weight: Tensor,
    labels: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: "Unpack[MTPOptions]",
) -> Tensor: ...
@overload
def mtp_cross_entropy(
    hiddens: Tensor | Sequence[Tensor],
    weight: Tensor,
    labels: Tensor,
    *,
    return_stats: Literal[True],
    **options: "Unpack[MTPOptions]",
) -> tuple[Tensor, MTPStats]: ...
@takes(MTPOptions)
def mtp_cross_entropy(
    hiddens: Tensor | Sequence[Tensor],  # (K, ..., T, D), K of (..., T, D), or (..., T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (..., T)
    *,
    return_stats: bool = False,
    **options: "Unpack[MTPOptions]",
) -> Tensor | tuple[Tensor, MTPStats]:
    """Sum the weighted mean losses of multi-token prediction, in which head k at row t predicts `labels[t + k]`.

    This is the loss of parallel heads (Gloeckle et al. 2024, arXiv:2404.19737), of DeepSeek-V3's sequential depths
    (arXiv:2412.19437), and, with one hidden state for all heads, of several targets on the same logits.

    Args:
        hiddens: (K, ..., T, D) hidden states of K heads, or a list of them, which is copied into one tensor; or one
            (..., T, D) for logits that all heads share, where `head_weights` says how many heads there are.
        weight: (V, D), the unembedding of all heads.
        labels: (..., T): the next token of each row, or `ignore_index`. Head k's target at row t is `labels[t + k]`,
            ignored past the end of its sequence or document. A masked label is thus masked for all heads.
        document_ids: (..., T) integers: a head predicts within its row's document alone.
        head_weights: (K,), default 1 each. A tensor may change from step to step, without a wait or a recompilation.
        num_valid: (K,), what each head's sum is divided by: over several ranks or micro-batches, the number of its
            valid tokens in all of them (`mtp_valid_counts`). Default: the number here.
        detach_unembedding: one bool, or one per head: from these heads no gradient reaches `weight` and `bias`.
        return_stats: also return `MTPStats`.
        options: the others are as in `linear_cross_entropy`. `token_weights` are the labels' and move with them.
            A list's copy counts towards `memory_budget`. If only some heads are detached, the two kinds take half each.

    Returns:
        The loss, float32, is the sum over k of head_weights[k] / num_valid[k] * (sum of head k's token losses). A head
        without a valid token adds nothing; if none has any, NaN, with gradients of zero.

    Raises:
        ValueError, TypeError: as `linear_cross_entropy`, or the heads do not fit each other.
    """
    expect_inputs("mtp_cross_entropy", weight=weight, labels=labels)
    expect_kind("hiddens", hiddens, HIDDENS)
    for name in _NOT_HERE:
        expect(
            name not in options,
            f"{name} must be left out: each head has a mean, its own shift and one target per token",
        )
    rest: Any = complete("mtp_cross_entropy", _DEFAULTS, options, _KINDS)
    document_ids, head_weights, num_valid, detach_unembedding = (rest.pop(name) for name in _OWN)
    shared = isinstance(hiddens, Tensor) and hiddens.shape[:-1] == labels.shape
    copied = 0
    if not isinstance(hiddens, Tensor):
        hiddens = stacked(hiddens, labels)
        copied = hiddens.nbytes if len(hiddens) > 1 else 0
    if shared:
        expect(head_weights is not None, "head_weights must say how many heads share these hidden states")
        K = len(head_weights) if head_weights is not None else 0
    else:
        expect(
            hiddens.dim() >= 2 and hiddens.shape[1:-1] == labels.shape and hiddens.shape[0] > 0,
            f"hiddens must be (K, *{tuple(labels.shape)}, D), or the same without K; got {describe(hiddens)}",
        )
        K = hiddens.shape[0]
    expect(labels.dim() > 0, "labels must have a token axis")
    weights = _numbers("head_weights", head_weights, K, labels.device)
    divisors = _numbers("num_valid", num_valid, K, labels.device)
    detached = [detach_unembedding] * K if isinstance(detach_unembedding, bool) else list(detach_unembedding)
    expect(len(detached) == K, f"detach_unembedding must be a bool or {K} of them; got {len(detached)}")
    expect_labels(labels, document_ids, hiddens if shared else hiddens[0], weight, rest)
    _expect_weights(hiddens if shared else hiddens[0], labels, rest)
    if K == 1 and weights is None and not shared and not any(detached):  # an ordinary loss, bit for bit
        rest["num_valid"] = None if divisors is None else divisors[0]
        return _one_head(hiddens[0], weight, labels, return_stats, rest)
    wide = torch.promote_types(hiddens.dtype, torch.float32)
    targets = head_targets(labels, K, document_ids, rest["ignore_index"])
    heads, divisors = _heads(targets, weights, divisors, rest, wide)
    heads = replace(heads, copied=copied)
    compute = _shared if shared else _separate
    loss, head_loss, hits = compute(hiddens, weight, heads, detached, return_stats, rest)
    if not return_stats:
        return loss
    counts = heads.valid.flatten(1).sum(1)
    return loss, MTPStats((head_loss / divisors).to(wide), hits / counts, counts)


def mtp_valid_counts(
    labels: Tensor, heads: int, document_ids: Tensor | None = None, *, ignore_index: int = -100
) -> Tensor:
    """Count the valid tokens of each head, (heads,) int64 on the labels' device.

    Counted on the CPU batch, summed over the micro-batches of a step, and over ranks by one all-reduce, they are the
    `num_valid` by which every micro-batch on every rank divides, so that the sum of all gradients is that of one batch.
    (DistributedDataParallel takes the mean over ranks: multiply by their number.)

    Args:
        labels, document_ids: (..., T), as for `mtp_cross_entropy`.
        heads: K.

    Raises:
        ValueError: `heads` is not positive, or the document ids do not fit the labels.
    """
    given = {"labels": labels, "heads": heads, "document_ids": document_ids, "ignore_index": ignore_index}
    expect_kinds(_COUNTED, given)
    expect(heads > 0, f"heads must be positive; got {heads}")
    expect_documents(document_ids, labels)
    return (head_targets(labels, heads, document_ids, ignore_index) != ignore_index).flatten(1).sum(1)


_COUNTED = kinds_of(mtp_valid_counts)


def expect_labels(
    labels: Tensor, document_ids: Tensor | None, hidden: Tensor, weight: Tensor, options: Mapping[str, Any]
) -> None:
    """Raise an error for labels or document ids that do not fit one head's hidden states, or the weight."""
    expect_documents(document_ids, labels)
    alone, V = options["process_group"] is None, options["vocab_size"]
    if alone == (V is None) and weight.dim() == 2 and len(weight) > 0:  # what does not fit is refused later
        V = len(weight) if alone else V
        check_targets(Inputs(hidden, labels, V, name="labels"), options["ignore_index"])


def expect_documents(document_ids: Tensor | None, labels: Tensor) -> None:
    """Raise ValueError unless there is an integer for each label."""
    if document_ids is not None:
        fits = document_ids.shape == labels.shape and document_ids.device == labels.device
        expect(
            fits and not document_ids.is_floating_point(),
            f"document_ids must be {tuple(labels.shape)} integers on {labels.device}; got {describe(document_ids)}",
        )


def head_targets(labels: Tensor, K: int, document_ids: Tensor | None, empty: float) -> Tensor:
    """Return the labels k tokens on, (..., T) to (K, ..., T); `empty` past the end of the sequence or document."""
    T = labels.shape[-1]
    heads, places = (torch.arange(n, dtype=torch.int64, device=labels.device) for n in (K, T))
    at = heads[:, None] + places  # (K, T)
    inside = at < T
    at = at.clamp(max=max(T - 1, 0))
    if document_ids is not None:
        inside = inside & (document_ids[..., at] == document_ids[..., None, :])
    return torch.where(inside, labels[..., at], empty).movedim(-2, 0).contiguous()


def stacked(hiddens: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the hidden states of several heads as one tensor, (K, ..., T, D); of one head without a copy."""
    expect(len(hiddens) > 0, "hiddens must hold at least one head's hidden states")
    for k, hidden in enumerate(hiddens):
        expect(
            hidden.dim() > 0 and hidden.shape[:-1] == labels.shape and hidden.shape == hiddens[0].shape,
            f"hiddens[{k}] must be (*{tuple(labels.shape)}, D), D the same for all; got {describe(hidden)}",
        )
    return hiddens[0][None] if len(hiddens) == 1 else torch.stack(list(hiddens))


def _numbers(name: str, given: Numbers | None, K: int, device: torch.device) -> Tensor | None:
    if given is None:
        return None
    if not isinstance(given, Tensor):
        count = len(given) if isinstance(given, Sequence) else given
        expect(count == K and isinstance(given, Sequence), f"{name} must be {K} numbers, one per head; got {count}")
        given = numbers(given, device)
    expect(given.shape == (K,), f"{name} must be ({K},), one number per head; got {describe(given)}")
    expect(not given.requires_grad, f"{name} gets no gradient here; detach it")
    return on_device(name, given, device)


def _expect_weights(hidden: Tensor, labels: Tensor, options: LinearOptions) -> None:
    """Raise an error for weights that do not fit the labels, before the divisors are counted from them."""
    for name, weights in (("class_weights", options["class_weights"]), ("token_weights", options["token_weights"])):
        if weights is not None:  # the number of classes is checked later
            for check in TABLE[name].checks:
                check(name, weights, Inputs(hidden, labels, weights.numel()), options)


@dataclass(frozen=True)
class _Heads:
    """The targets of K heads, and the weight of each target."""

    targets: Tensor  # (K, ..., T)
    valid: Tensor  # (K, ..., T) bool
    factors: Tensor  # (K,) factor of each head's sum, times `common`
    common: Tensor  # () what all heads are divided by in the end
    token_weights: Tensor | None  # (K, ..., T)
    copied: int = 0  # bytes of a copy of their hidden states

    def chosen(self, heads: list[int]) -> "_Heads":
        """Return some of the heads."""
        targets, valid, factors = (_chosen(t, heads) for t in (self.targets, self.valid, self.factors))
        weights = None if self.token_weights is None else _chosen(self.token_weights, heads)
        return _Heads(targets, valid, factors, self.common, weights)

    @property
    def held(self) -> int:
        """Bytes that the heads take beyond what the caller gave."""
        weights = 0 if self.token_weights is None else self.token_weights.nbytes
        return self.copied + self.targets.nbytes + self.valid.nbytes + weights

    def hits(self, stats: LossStats) -> Tensor:
        """Return how many valid targets of each head are the argmax, (K,)."""
        return (self.valid & (stats.argmax == self.targets)).flatten(1).sum(1).to(self.factors.dtype)


def _heads(
    targets: Tensor,  # (K, ..., T)
    weights: Tensor | None,  # (K,)
    divisors: Tensor | None,  # (K,)
    options: LinearOptions,
    wide: torch.dtype,
) -> tuple[_Heads, Tensor]:
    """Return the heads, and what each head's sum is divided by, (K,)."""
    K = len(targets)
    valid = targets != options["ignore_index"]
    given = options["token_weights"]
    moved = None if given is None else head_targets(given, K, None, 0)
    if divisors is None:
        class_weights = options["class_weights"]
        counting = weights_that_count(valid, targets, None if class_weights is None else class_weights.to(wide))
        if moved is not None:
            counting = torch.where(valid, counting * moved.to(wide), 0.0)  # the weight of an ignored label may be NaN
        divisors = counting.flatten(1).sum(1)
    # In the buffer of logits, gradients stay near their own size: the divisor that all heads share comes later.
    common = divisors.max().to(wide)
    factors = torch.ones(K, dtype=wide, device=targets.device) if weights is None else weights.to(wide)
    factors = torch.where(factors == 0, NEGLIGIBLE, factors)
    factors = factors * torch.where(divisors > 0, common / divisors, 0.0).to(wide)
    return _Heads(targets, valid, factors, common, moved), divisors


def _one_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, stats: bool, options: LinearOptions
) -> Tensor | tuple[Tensor, MTPStats]:
    if not stats:
        return linear_cross_entropy(hidden, weight, labels, **options)
    loss, found = linear_cross_entropy(hidden, weight, labels, return_stats=True, **options)
    count = (labels != options["ignore_index"]).sum()
    return loss, MTPStats(loss.detach()[None], found.accuracy.reshape(1), count[None])


Result = tuple[Tensor, Tensor, Tensor]  # loss (), sums of each head's losses (K,) and hits (K,)


def _separate(
    hiddens: Tensor, weight: Tensor, heads: _Heads, detached: list[bool], stats: bool, options: LinearOptions
) -> Result:
    """Compute heads with hidden states of their own, as rows of one call."""
    factors = heads.factors
    if any(detached) and not all(detached):  # each kind in a call of its own, with half of the budget
        budget = options["memory_budget"]
        if budget != "auto":
            options = {**options, "memory_budget": max(1, budget // 2)}
        losses: list[Tensor] = []
        head_loss, head_hits = [factors] * len(detached), [factors] * len(detached)
        joined = hiddens.nbytes if hiddens.requires_grad else 0  # autograd joins both kinds' gradients in it
        for kind in (False, True):
            these = [k for k, is_detached in enumerate(detached) if is_detached == kind]
            part, kinds = heads.chosen(these), [kind] * len(these)
            own = _chosen(hiddens, these)
            taken = heads.copied // 2 + joined + (0 if _follow_each_other(these) else own.nbytes)
            mine: LinearOptions = {**options, "accumulate_into": None} if kind else options
            try:
                loss, *sums = _separate(own, weight, replace(part, copied=taken), kinds, stats, mine)
            except BudgetError as e:
                raise BudgetError(2 * e.least, e.call, budget) from None
            losses.append(loss)
            for k, one_loss, one_hits in zip(these, *sums):
                head_loss[k], head_hits[k] = one_loss, one_hits
        return losses[0] + losses[1], torch.stack(head_loss), torch.stack(head_hits)
    weight, options = _detached(weight, options) if all(detached) else (weight, options)
    rows = factors.view(-1, *[1] * (heads.targets.dim() - 1)).expand(heads.targets.shape)
    rows = rows if heads.token_weights is None else rows * heads.token_weights.to(rows.dtype)
    given: Any = {**options, "token_weights": rows, "num_valid": heads.common}
    ready = made_ready(heads.held, hiddens, weight, heads.targets, stats, given)
    found: Any = ready.finished(ready.function(*ready.arguments))
    if not stats:
        return found, factors, factors
    loss, found = found
    safe = torch.where(factors == 0, 1, factors)
    return loss, found.token_loss.flatten(1).sum(1) / safe, heads.hits(found)


def _shared(
    hidden: Tensor, weight: Tensor, heads: _Heads, detached: list[bool], stats: bool, options: LinearOptions
) -> Result:
    """Compute heads that share their logits, as K targets of each row."""
    expect(all(detached) or not any(detached), "detach_unembedding must be the same for heads that share their logits")
    expect(
        not stats or options["process_group"] is None,
        "return_stats of shared logits needs every class's unembedding; process_group splits it",
    )
    weight, options = _detached(weight, options) if all(detached) else (weight, options)
    by_row = heads.targets.movedim(0, -1).contiguous()  # (..., T, K)
    factors, moved = heads.factors, heads.token_weights
    rows = factors if moved is None else factors * moved.movedim(0, -1).to(factors.dtype)
    given: Any = {**options, "token_weights": None, "target_weights": rows, "num_valid": heads.common}
    ready = made_ready(heads.held + by_row.nbytes, hidden, weight, by_row, stats, given)
    result: Any = ready.finished(ready.function(*ready.arguments))
    if not stats:
        return result, factors, factors
    loss, found = result
    bias = options["bias"]
    sums = []
    with torch.no_grad():
        terms = make_terms(options, len(weight), slice(0, len(weight)), factors.dtype)
        for k, valid in enumerate(heads.valid):
            y = torch.where(valid, heads.targets[k], 0).long()
            x = (hidden * weight[y].to(hidden.dtype)).sum(-1, dtype=factors.dtype)
            x = final_logits(x, None if bias is None else bias[y], terms)
            token_loss = found.lse.detach() - x
            if terms.class_weights is not None:  # the mean divides by them
                token_loss = token_loss * terms.class_weights[y]
            token_loss = token_loss if moved is None else token_loss * moved[k]
            sums.append(torch.where(valid, token_loss, 0.0).sum())  # the weight of an ignored label may be NaN
    return loss, torch.stack(sums), heads.hits(found)


def _detached(weight: Tensor, options: LinearOptions) -> tuple[Tensor, LinearOptions]:
    bias = options["bias"]
    return weight.detach(), {**options, "bias": None if bias is None else bias.detach()}


def _follow_each_other(heads: list[int]) -> bool:
    return heads == list(range(heads[0], heads[-1] + 1))


def _chosen(t: Tensor, heads: list[int]) -> Tensor:
    """Return some heads of (K, ...): a view if they follow on each other."""
    if _follow_each_other(heads):
        return t[heads[0] : heads[-1] + 1]
    return torch.stack([t[k] for k in heads])
