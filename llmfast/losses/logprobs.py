"""Log-probabilities of tokens, each with an upstream gradient of its own, for losses that the caller writes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from torch import Tensor

from llmfast.losses.cross_entropy import made_ready as ready_from_logits
from llmfast.losses.linear_cross_entropy import made_ready as ready_from_hidden
from llmfast.losses.options import TABLE, LinearLogprobOptions, RankedLogprobOptions, complete, defaults, takes
from llmfast.losses.targets import LogprobStats

if TYPE_CHECKING:
    from typing_extensions import Unpack

_FROM_LOGITS: RankedLogprobOptions = defaults(RankedLogprobOptions)
_FROM_HIDDEN: LinearLogprobOptions = defaults(LinearLogprobOptions)


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
        temperature: divides the logits after softcap, as a sampler does; one number for all tokens.
        return_stats: also return `LogprobStats`: lse, entropy and argmax of each token.
        process_group, vocab_size: as in `cross_entropy`.

    Returns:
        The shape of `ids`, in float32 (float64 for float64 logits), each with its own upstream gradient; with
        `return_stats` a pair of that and `LogprobStats`. Gradients of ignored ids are zero, also where the upstream
        gradient is infinite or NaN.

    Raises:
        ValueError, TypeError: as `cross_entropy`. On a GPU, an id out of range gets a log-probability of NaN, and its
            token a gradient of NaN.
    """
    given = _as_loss("logprobs", _FROM_LOGITS, options)
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
        ignore_index, softcap, logit_scale, temperature, return_stats: as in `logprobs`.
        bias, process_group, vocab_size, memory_budget, accumulate_into, accumulate_dtype: as in `linear_cross_entropy`.
        slab_dtype: torch.float32 keeps the logits of low-precision inputs unrounded, so that log-probabilities are as
            exact as those of a float32 output layer.

    Returns:
        As `logprobs`.

    Raises:
        ValueError, TypeError: as `linear_cross_entropy`.
    """
    given = _as_loss("linear_logprobs", _FROM_HIDDEN, options)
    ready = ready_from_hidden(0, hidden, weight, ids, return_stats, given, logprobs=True)
    found: Tensor | tuple[Tensor, LogprobStats] = ready.finished(ready.function(*ready.arguments))
    return found


def _as_loss(function: str, known: Any, given: Mapping[str, Any]) -> Any:
    """Return the options of a loss per token with the same softmax; it has no temperature.

    cap * tanh(x / cap) / temperature has the form of another cap, of which both `cap` and `x` are divided.
    """
    complete(function, known, cast(Any, given))
    options = {**given, "reduction": "none"}
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
