"""Log-probabilities of tokens, each with an upstream gradient of its own, for losses that the caller writes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from torch import Tensor

from llmfast._checks import describe, expect
from llmfast._kinds import expect_kind
from llmfast.losses.cross_entropy import made_ready as ready_from_logits
from llmfast.losses.linear_cross_entropy import made_ready as ready_from_hidden
from llmfast.losses.mtp import HIDDENS, expect_labels, head_targets, stacked
from llmfast.losses.options import (
    TABLE,
    LinearLogprobOptions,
    MTPLogprobOptions,
    RankedLogprobOptions,
    complete,
    defaults,
    expect_inputs,
    takes,
)
from llmfast.losses.targets import LogprobStats

if TYPE_CHECKING:
    from typing_extensions import Unpack

_FROM_LOGITS: RankedLogprobOptions = defaults(RankedLogprobOptions)
_FROM_HIDDEN: LinearLogprobOptions = defaults(LinearLogprobOptions)
_FROM_HEADS: MTPLogprobOptions = defaults(MTPLogprobOptions)


@overload
def logprobs(
    logits: Tensor, ids: Tensor, *, return_stats: Literal[False] = False, **options: "Unpack[RankedLogprobOptions]"
) -> Tensor: ...
@overload
def logprobs(
    logits: Tensor, ids: Tensor, *, return_stats: Literal[True], **options: "Unpack[RankedLogprobOptions]"
) -> tuple[Tensor, LogprobStats]: ...
@takes(RankedLogprobOptions)
def logprobs(
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (...) or (..., K)
    *,
    return_stats: bool = False,
    **options: "Unpack[RankedLogprobOptions]",
) -> Tensor | tuple[Tensor, LogprobStats]:
    """Compute the log-probabilities of `ids` under the softmax of each token's logits, and no others.

    They are those of `log_softmax(x).gather(-1, ids)` for x = softcap * tanh(logit_scale * logits / softcap) /
    temperature. There is no copy of the logits: one pass reads them, and backward writes their gradient.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64; any leading dimensions. `-inf` entries are legal.
        ids: (...), int64 or int32, in [0, V) or `ignore_index`; or (..., K), of which some may be equal or ignored.
        ignore_index: id whose log-probability is 0, without a gradient.
        softcap: bounds logits to (-softcap, softcap), before the temperature.
        logit_scale: factor on the logits, before softcap.
        temperature: divides the logits after softcap, as a sampler does: one number for all tokens, or (...), one for
            each. It gets no gradient. On a GPU a tensor's numbers are not checked to be positive.
        return_stats: also return `LogprobStats`: lse, entropy and argmax of each token.
        return_rank: with `return_stats`, the statistics have each id's rank: how many classes have a larger logit. An
            equal logit does not count, so that the most probable class has rank 0. It takes one more pass over the
            logits, which are compared before softcap rounds them.
        process_group, vocab_size: as in `cross_entropy`.

    Returns:
        The shape of `ids`, in float32 (float64 for float64 logits), each with its own upstream gradient; with
        `return_stats` a pair of that and `LogprobStats`. Gradients of ignored ids are zero, also where the upstream
        gradient is infinite or NaN.

    Raises:
        ValueError, TypeError: as `cross_entropy`. On a GPU, an id out of range gets a log-probability of NaN, and its
            token a gradient of NaN.
    """
    given = _as_loss("logprobs", _FROM_LOGITS, options, return_stats)
    ready = ready_from_logits(logits, ids, return_stats, given, logprobs=True)
    found: Tensor | tuple[Tensor, LogprobStats] = ready.finished(ready.function(*ready.arguments))
    return found


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: "Unpack[LinearLogprobOptions]",
) -> Tensor: ...
@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    return_stats: Literal[True],
    **options: "Unpack[LinearLogprobOptions]",
) -> tuple[Tensor, LogprobStats]: ...
@takes(LinearLogprobOptions)
def linear_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (...) or (..., K)
    *,
    return_stats: bool = False,
    **options: "Unpack[LinearLogprobOptions]",
) -> Tensor | tuple[Tensor, LogprobStats]:
    """Compute `logprobs` of the logits `hidden @ weight.T + bias`, without ever holding them all.

    Backward makes the logits again, or reads those that were kept, as far as `memory_budget` allows.

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64; any leading dimensions.
        weight: (V, D), as in `linear_cross_entropy`.
        ids: (...), int64 or int32, in [0, V) or `ignore_index`; or (..., K), of which some may be equal or ignored.
        ignore_index, softcap, logit_scale, temperature, return_stats, return_rank: as in `logprobs`.
        bias, process_group, vocab_size, memory_budget, accumulate_into, accumulate_dtype: as in `linear_cross_entropy`.
        slab_dtype: torch.float32 keeps the logits of low-precision inputs unrounded, so that log-probabilities are as
            exact as those of a float32 output layer.

    Returns:
        As `logprobs`.

    Raises:
        ValueError, TypeError: as `linear_cross_entropy`.
    """
    given = _as_loss("linear_logprobs", _FROM_HIDDEN, options, return_stats)
    return _of_hidden(0, hidden, weight, ids, return_stats, given)


@overload
def mtp_logprobs(
    hiddens: Tensor | Sequence[Tensor],
    weight: Tensor,
    labels: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: "Unpack[MTPLogprobOptions]",
) -> Tensor: ...
@overload
def mtp_logprobs(
    hiddens: Tensor | Sequence[Tensor],
    weight: Tensor,
    labels: Tensor,
    *,
    return_stats: Literal[True],
    **options: "Unpack[MTPLogprobOptions]",
) -> tuple[Tensor, LogprobStats]: ...
@takes(MTPLogprobOptions)
def mtp_logprobs(
    hiddens: Tensor | Sequence[Tensor],  # (K, ..., T, D), K of (..., T, D), or (..., T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (..., T)
    *,
    return_stats: bool = False,
    **options: "Unpack[MTPLogprobOptions]",
) -> Tensor | tuple[Tensor, LogprobStats]:
    """Compute the log-probability that head k gives `labels[t + k]` at row t, as `mtp_cross_entropy` counts.

    Args:
        hiddens: hidden states of K heads, as in `mtp_cross_entropy`; or one (..., T, D) that `heads` share.
        weight: (V, D), the unembedding of all heads.
        labels: (..., T): the next token of each row, or `ignore_index`.
        heads: K, for hidden states that heads share.
        document_ids: (..., T) integers: a head predicts within its row's document alone.
        return_stats: also return `LogprobStats`, one per row of hidden states.
        options: the others are as in `linear_logprobs`; a temperature per token has the leading dimensions of the
            hidden states. A list's copy counts towards `memory_budget`.

    Returns:
        (K, ..., T), 0 past the end of a sequence or document; with `return_stats` a pair of that and `LogprobStats`.

    Raises:
        ValueError, TypeError: as `linear_logprobs`, or the heads do not fit each other.
    """
    expect_inputs("mtp_logprobs", weight=weight, labels=labels)
    expect_kind("hiddens", hiddens, HIDDENS)
    rest: Any = complete("mtp_logprobs", _FROM_HEADS, options)
    heads, document_ids = rest.pop("heads"), rest.pop("document_ids")
    copied = 0
    if not isinstance(hiddens, Tensor):
        hiddens = stacked(hiddens, labels)
        copied = hiddens.nbytes if len(hiddens) > 1 else 0
    shared = hiddens.shape[:-1] == labels.shape
    expect(labels.dim() > 0, "labels must have a token axis")
    expect(
        shared or (hiddens.dim() >= 2 and hiddens.shape[1:-1] == labels.shape and hiddens.shape[0] > 0),
        f"hiddens must be (K, *{tuple(labels.shape)}, D), or the same without K; got {describe(hiddens)}",
    )
    expect(shared == (heads is not None), f"heads must be given if hidden states are shared, only then; got {heads}")
    expect(heads is None or heads > 0, f"heads must be positive; got {heads}")
    expect_labels(labels, document_ids, hiddens if shared else hiddens[0], weight, rest)
    ids = head_targets(labels, heads or hiddens.shape[0], document_ids, rest["ignore_index"])
    ids = ids.movedim(0, -1).contiguous() if shared else ids
    given = _as_loss("linear_logprobs", _FROM_HIDDEN, rest, return_stats)
    found = _of_hidden(copied + ids.nbytes, hiddens, weight, ids, return_stats, given)
    if not shared:
        return found
    if isinstance(found, Tensor):
        return found.movedim(-1, 0)
    values, stats = found
    rank = None if stats.rank is None else stats.rank.movedim(-1, 0)
    return values.movedim(-1, 0), stats._replace(rank=rank)


def _of_hidden(
    held: int, hidden: Tensor, weight: Tensor, ids: Tensor, return_stats: bool, options: Any
) -> Tensor | tuple[Tensor, LogprobStats]:
    """Compute `linear_logprobs` for a caller that has taken `held` bytes of the budget."""
    ready = ready_from_hidden(held, hidden, weight, ids, return_stats, options, logprobs=True)
    found: Tensor | tuple[Tensor, LogprobStats] = ready.finished(ready.function(*ready.arguments))
    return found


def _as_loss(function: str, known: Any, given: Mapping[str, Any], return_stats: bool) -> Any:
    """Return the options of a loss per token with the same softmax; it has no temperature.

    cap * tanh(x / cap) / temperature is another softcap, with both `cap` and `x` divided by the temperature. A tensor
    of temperatures is applied where each row is read.
    """
    complete(function, known, cast(Any, given))
    wanted = given.get("return_rank", False)
    expect(return_stats or not wanted, f"return_rank needs return_stats=True, which return it; got {wanted}")
    options = {**given, "reduction": "none"}
    if isinstance(options.get("temperature"), Tensor):
        return options
    for name in ("temperature", "softcap"):  # before one changes the other
        if options.get(name) is not None:
            for test in TABLE[name].checks:
                test(name, options[name], cast(Any, None), cast(Any, options))
    temperature = options.pop("temperature", 1.0)
    if temperature != 1.0:
        scale, softcap = options.get("logit_scale"), options.get("softcap")
        options["logit_scale"] = (1.0 if scale is None else scale) / temperature
        options["softcap"] = None if softcap is None else softcap / temperature
    return options
