"""The loss of several heads that predict further tokens ahead, over one vocabulary.

Heads are rows: their hidden states, one after the other, go through `linear_cross_entropy` once, so that there is one
buffer of logits, one float32 gradient of the unembedding, and the unembedding is read as often as one long batch would
have it read. Heads on one hidden state are several targets of a row, and cost no more than one.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from llmfast._checks import describe, expect
from llmfast.losses.linear_cross_entropy import linear_cross_entropy
from llmfast.losses.parallel import ProcessGroup
from llmfast.losses.targets import numbers, on_device

if TYPE_CHECKING:
    from typing_extensions import Unpack

Numbers = Tensor | Sequence[float]
# A head of weight 0 still has its loss measured: it is weighted by this, which changes no sum in float32.
NOTHING = 1e-20


class MTPStats(NamedTuple):
    """Of each head, detached and on the device. NaN where a head has no valid token."""

    head_loss: Tensor  # (K,) float32: mean loss of its tokens; with shared logits of -log p alone
    accuracy: Tensor  # (K,) float32: share of its targets that are the most probable token
    num_valid: Tensor  # (K,) int64


class MTPOptions(TypedDict, total=False):
    """Those of `linear_cross_entropy` that mean something here, for type checkers."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float | None
    class_weights: Tensor | None
    token_weights: Tensor | None
    process_group: "ProcessGroup | None"
    vocab_size: int | None
    bias: Tensor | None
    memory_budget: int | Literal["auto"]
    slab_dtype: torch.dtype | None
    accumulate_into: Tensor | None
    grad_filter: float | None


_NOT_HERE = ("reduction", "shift", "target_weights")


@overload
def mtp_cross_entropy(
    hiddens: Tensor | Sequence[Tensor],
    weight: Tensor,
    labels: Tensor,
    *,
    document_ids: Tensor | None = None,
    head_weights: Numbers | None = None,
    num_valid: Numbers | None = None,
    detach_unembedding: bool | Sequence[bool] = False,
    return_stats: Literal[False] = False,
    **options: "Unpack[MTPOptions]",
) -> Tensor: ...
@overload
def mtp_cross_entropy(
    hiddens: Tensor | Sequence[Tensor],
    weight: Tensor,
    labels: Tensor,
    *,
    document_ids: Tensor | None = None,
    head_weights: Numbers | None = None,
    num_valid: Numbers | None = None,
    detach_unembedding: bool | Sequence[bool] = False,
    return_stats: Literal[True],
    **options: "Unpack[MTPOptions]",
) -> tuple[Tensor, MTPStats]: ...
def mtp_cross_entropy(
    hiddens: Tensor | Sequence[Tensor],  # (K, ..., T, D), K of (..., T, D), or (..., T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (..., T)
    *,
    document_ids: Tensor | None = None,  # (..., T)
    head_weights: Numbers | None = None,  # (K,)
    num_valid: Numbers | None = None,  # (K,)
    detach_unembedding: bool | Sequence[bool] = False,
    return_stats: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, MTPStats]:
    """Multi-token prediction: head k at row t predicts `labels[t + k]`; the sum of the heads' weighted mean losses.

    This is the loss of parallel heads (Gloeckle et al. 2024, arXiv:2404.19737), of DeepSeek-V3's sequential depths
    (arXiv:2412.19437), and, with one hidden state for all heads, of several targets on the same logits.

    Args:
        hiddens: (K, ..., T, D) hidden states of K heads, or a list of them, which is copied into one tensor; or one
            (..., T, D) for logits that all heads share, where `head_weights` says how many heads there are.
        weight: (V, D), the unembedding of all heads.
        labels: (..., T): the next token of each row, or `ignore_index`. Head k's target at row t is `labels[t + k]`,
            ignored past the end of its sequence or document: so what is masked as a label is nobody's target.
        document_ids: (..., T) integers: a head predicts within its row's document alone.
        head_weights: (K,), default 1 each. A tensor may change from step to step, without a wait or a recompilation.
        num_valid: (K,), what each head's sum is divided by: over several ranks or micro-batches, the number of its
            valid tokens in all of them (`mtp_valid_counts`). Default: the number here.
        detach_unembedding: of these heads, or of all, no gradient reaches `weight` and `bias`.
        return_stats: also return `MTPStats`.
        options: `ignore_index`, `label_smoothing`, `z_loss`, `softcap`, `logit_scale`, `bias`, `class_weights`,
            `token_weights` (of labels: they move with them), `process_group`, `vocab_size`, `memory_budget`,
            `slab_dtype`, `accumulate_into` and `grad_filter`, as in `linear_cross_entropy`.

    Returns:
        The loss, float32, is the sum over k of head_weights[k] / num_valid[k] * (sum of head k's token losses). A head
        without a valid token adds nothing; if none has any, NaN, with gradients of zero.

    Raises:
        ValueError, TypeError: as `linear_cross_entropy`, or the heads do not fit each other.
    """
    for name in _NOT_HERE:
        expect(
            name not in options, f"{name} is not an option here: heads have a mean, a shift and weights of their own"
        )
    shared = isinstance(hiddens, Tensor) and hiddens.shape[:-1] == labels.shape
    if not isinstance(hiddens, Tensor):
        hiddens = _stacked(hiddens, labels)
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
    ignore_index = options.get("ignore_index", -100)
    weights = _numbers("head_weights", head_weights, K, labels.device)
    divisors = _numbers("num_valid", num_valid, K, labels.device)
    detached = [detach_unembedding] * K if isinstance(detach_unembedding, bool) else list(detach_unembedding)
    expect(len(detached) == K, f"detach_unembedding must be a bool or {K} of them; got {len(detached)}")
    if document_ids is not None:
        expect(
            document_ids.shape == labels.shape and not document_ids.is_floating_point(),
            f"document_ids must be {tuple(labels.shape)} integers; got {describe(document_ids)}",
        )
    if K == 1 and weights is None and not shared and not any(detached):  # nothing but that, bit for bit
        return _alone(hiddens[0], weight, labels, None if divisors is None else divisors[0], return_stats, options)
    targets = head_targets(labels, K, document_ids, ignore_index)  # (K, ..., T)
    valid = targets != ignore_index
    counts = valid.flatten(1).sum(1)
    wide = torch.promote_types(hiddens.dtype, torch.float32)
    token_weights: Tensor | None = options.pop("token_weights", None)
    moved = None if token_weights is None else head_targets(token_weights, K, None, 0)
    if divisors is None:
        divisors = _weights_of(targets, valid, moved, options.get("class_weights"), wide).flatten(1).sum(1)
    # Within the buffer of logits gradients stay near their own size: what all heads have in common is divided by later.
    common = divisors.max().to(wide)
    factors = torch.ones(K, dtype=wide, device=labels.device) if weights is None else weights.to(wide)
    factors = torch.where(factors == 0, NOTHING, factors) * torch.where(divisors > 0, common / divisors, 0.0).to(wide)

    call = _shared if shared else _heads
    loss, head_loss, hits = call(
        hiddens, weight, targets, valid, factors, common, moved, detached, return_stats, options
    )
    if not return_stats:
        return loss
    return loss, MTPStats(head_loss / divisors, hits / counts, counts)


def mtp_valid_counts(
    labels: Tensor, heads: int, document_ids: Tensor | None = None, *, ignore_index: int = -100
) -> Tensor:
    """How many valid tokens each head has, (heads,) int64 on the labels' device.

    Counted on the CPU batch, summed over the micro-batches of a step, and over ranks by one all-reduce, they are the
    `num_valid` by which every micro-batch on every rank divides, so that the sum of all gradients is that of one batch.
    (DistributedDataParallel takes the mean over ranks: multiply by their number.)

    Args:
        labels, document_ids: (..., T), as for `mtp_cross_entropy`.
        heads: K.
    """
    expect(heads > 0, f"heads must be positive; got {heads}")
    return (head_targets(labels, heads, document_ids, ignore_index) != ignore_index).flatten(1).sum(1)


def head_targets(labels: Tensor, K: int, document_ids: Tensor | None, empty: float) -> Tensor:
    """(..., T) -> (K, ..., T): the labels k tokens on, `empty` past the end of the sequence or of the document."""
    T = labels.shape[-1]
    heads, places = (torch.arange(n, dtype=torch.int64, device=labels.device) for n in (K, T))
    at = heads[:, None] + places  # (K, T)
    inside = at < T
    at = at.clamp(max=max(T - 1, 0))
    if document_ids is not None:
        inside = inside & (document_ids[..., at] == document_ids[..., None, :])
    return torch.where(inside, labels[..., at], empty).movedim(-2, 0).contiguous()


def _stacked(hiddens: Sequence[Tensor], labels: Tensor) -> Tensor:
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
        expect(len(given) == K, f"{name} must be {K} numbers, one per head; got {len(given)}")
        given = numbers(given, device)
    expect(given.shape == (K,), f"{name} must be ({K},), one number per head; got {describe(given)}")
    expect(not given.requires_grad, f"{name} gets no gradient here; detach it")
    return on_device(name, given, device)


def _weights_of(
    targets: Tensor, valid: Tensor, moved: Tensor | None, class_weights: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return what each target counts in a mean, (K, ..., T), in `dtype` where anything is weighted."""
    weights: Tensor = valid
    if class_weights is not None:
        weights = torch.where(valid, class_weights.to(dtype)[torch.where(valid, targets, 0).long()], 0.0)
    if moved is not None:
        weights = torch.where(valid, weights * moved.to(dtype), 0.0)  # what is ignored may weigh NaN
    return weights


def _alone(
    hidden: Tensor, weight: Tensor, labels: Tensor, num_valid: Tensor | None, stats: bool, options: dict[str, Any]
) -> Tensor | tuple[Tensor, MTPStats]:
    given: dict[str, Any] = {**options, "num_valid": num_valid}
    if not stats:
        alone: Tensor = linear_cross_entropy(hidden, weight, labels, **given)
        return alone
    loss, found = linear_cross_entropy(hidden, weight, labels, return_stats=True, **given)
    count = (labels != options.get("ignore_index", -100)).sum()
    return loss, MTPStats(loss.detach()[None], found.accuracy.reshape(1), count[None])


Result = tuple[Tensor, Tensor, Tensor]


def _heads(
    hiddens: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, factors: Tensor, common: Tensor,
    moved: Tensor | None, detached: list[bool], stats: bool, options: dict[str, Any],
) -> Result:  # fmt: skip
    """Heads with hidden states of their own; the loss, and sums of each head's losses and hits."""
    K = len(detached)
    if any(detached) and not all(detached):  # each kind in a call of its own
        total: list[Tensor] = []
        each_loss, each_hits = ({k: factors[k] for k in range(K)} for _ in range(2))
        for kind in (False, True):
            heads = [k for k in range(K) if detached[k] == kind]
            h, y, v, f = (_chosen(t, heads) for t in (hiddens, targets, valid, factors))
            m = None if moved is None else _chosen(moved, heads)
            loss, some_losses, some_hits = _heads(h, weight, y, v, f, common, m, [kind] * len(heads), stats, options)
            total.append(loss)
            each_loss.update(zip(heads, some_losses))
            each_hits.update(zip(heads, some_hits))
        return total[0] + total[1], torch.stack([*each_loss.values()]), torch.stack([*each_hits.values()])
    if all(detached):
        bias = options.get("bias")
        weight, options = weight.detach(), {**options, "bias": None if bias is None else bias.detach()}
    rows = factors.view(-1, *[1] * (targets.dim() - 1)).expand(targets.shape)
    rows = rows if moved is None else rows * moved.to(rows.dtype)
    given: dict[str, Any] = {**options, "token_weights": rows, "num_valid": common}
    if not stats:
        return linear_cross_entropy(hiddens, weight, targets, **given), factors, factors
    loss, found = linear_cross_entropy(hiddens, weight, targets, return_stats=True, **given)
    hits = (valid & (found.argmax == targets)).flatten(1).sum(1).to(factors.dtype)
    safe = torch.where(factors == 0, 1, factors)
    return loss, found.token_loss.flatten(1).sum(1) / safe, hits


def _chosen(t: Tensor, heads: list[int]) -> Tensor:
    """Of some heads; a view where they follow on each other."""
    if heads == list(range(heads[0], heads[-1] + 1)):
        return t[heads[0] : heads[-1] + 1]
    return torch.stack([t[k] for k in heads])


def _shared(
    hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, factors: Tensor, common: Tensor,
    moved: Tensor | None, detached: list[bool], stats: bool, options: dict[str, Any],
) -> Result:  # fmt: skip
    """Heads on the same logits: K targets a row."""
    expect(all(detached) or not any(detached), "detach_unembedding must be the same for heads that share their logits")
    expect(
        not stats or options.get("process_group") is None,
        "return_stats of shared logits needs every class's unembedding; process_group splits it",
    )
    bias = options.get("bias")
    if all(detached):
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    by_row = targets.movedim(0, -1).contiguous()  # (..., T, K)
    rows = factors if moved is None else factors * moved.movedim(0, -1).to(factors.dtype)
    given: dict[str, Any] = {**options, "bias": bias, "target_weights": rows, "num_valid": common}
    if not stats:
        return linear_cross_entropy(hidden, weight, by_row, **given), factors, factors
    loss, found = linear_cross_entropy(hidden, weight, by_row, return_stats=True, **given)
    hits = (valid & (found.argmax == targets)).flatten(1).sum(1).to(factors.dtype)
    with torch.no_grad():
        sums = []
        for k in range(len(factors)):
            y = torch.where(valid[k], targets[k], 0).long()
            z = (hidden * weight[y].to(hidden.dtype)).sum(-1, dtype=factors.dtype)
            z = z if bias is None else z + bias[y]
            z = z if options.get("logit_scale") is None else z * options["logit_scale"]
            cap = options.get("softcap")
            z = z if cap is None else cap * torch.tanh(z / cap)
            token_loss = torch.where(valid[k], found.lse.detach() - z, 0.0)
            sums.append((token_loss if moved is None else token_loss * moved[k]).sum())
    return loss, torch.stack(sums), hits
