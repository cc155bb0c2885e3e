"""Cross-entropy from logits."""

# pyright: reportTypedDictNotRequiredAccess=false

from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor

from llmfast._checks import describe, expect
from llmfast._dispatch import expect_data, takes_plain_torch
from llmfast.losses.autograd import adapter
from llmfast.losses.from_logits import CrossEntropy
from llmfast.losses.options import (
    CrossEntropyOptions,
    Inputs,
    LogprobOptions,
    are_probabilities,
    check,
    complete,
    defaults,
    expect_inputs,
    only,
    takes,
)
from llmfast.losses.parallel import own_columns
from llmfast.losses.targets import SMALL, LossStats, Ready, finish, finish_logprobs, prepare, torch_cross_entropy

if TYPE_CHECKING:
    from typing_extensions import Unpack

_DEFAULTS: CrossEntropyOptions = defaults(CrossEntropyOptions)
_LOGPROBS = cast(CrossEntropyOptions, {**_DEFAULTS, **defaults(LogprobOptions)})


@overload
def cross_entropy(
    logits: Tensor, targets: Tensor, *, return_stats: Literal[False] = False, **options: "Unpack[CrossEntropyOptions]"
) -> Tensor: ...
@overload
def cross_entropy(
    logits: Tensor, targets: Tensor, *, return_stats: Literal[True], **options: "Unpack[CrossEntropyOptions]"
) -> tuple[Tensor, LossStats]: ...
@takes(CrossEntropyOptions)
def cross_entropy(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...) or (..., K); or (..., V) probabilities
    *,
    return_stats: bool = False,
    **options: "Unpack[CrossEntropyOptions]",
) -> Tensor | tuple[Tensor, LossStats]:
    """Compute the cross-entropy of `logits` against class indices or probabilities `targets`.

    The loss of a token with logits z is, with x = softcap * tanh(logit_scale * z / softcap),

        token_weight * (sum_k target_weight_k * CE(x, target_k) + z_loss * logsumexp(x)^2)

    where CE has torch's class weights and label smoothing. The mean divides by the sum of all weights of what is not
    ignored (class x target x token), which is the number of valid targets where nothing is weighted. Where targets are
    probabilities, it divides by the sum of the token weights, which is the number of tokens without them.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64; any leading dimensions. `-inf` entries are legal.
        targets: (...), int64 or int32, in [0, V) or `ignore_index`; or (..., K), K targets for each token's logits; or
            (..., V) probabilities of all classes, in any floating point dtype, as torch takes them. They get no
            gradient, and options that need class indices are errors: `shift`, `document_ids`, `target_weights`,
            `return_stats`, and an `ignore_index` that is not negative.
        ignore_index: target value that counts in neither the sum nor the mean.
        reduction: "mean", "sum", or "none" for one loss per token.
        num_valid: what the mean divides by instead, as a number or a one-element tensor: the number of valid tokens
            of the whole step under gradient accumulation or data parallelism.
        label_smoothing: share of each target spread evenly over the classes, in [0, 1].
        z_loss: coefficient of logsumexp^2, which keeps logits from drifting (PaLM, arXiv:2204.02311, section 5).
            It is added once per token that has a valid target, and is not scaled by class or target weights. A mean
            divides it by the same number as all else, the sum of weights (Liger-Kernel divides by the count of tokens).
        softcap: bounds logits to (-softcap, softcap) (Gemma 2, arXiv:2408.00118, section 2.1).
        logit_scale: factor on the logits, before softcap: 1 / temperature.
        class_weights: (V,), like `weight` of torch's function.
        token_weights: (...), factors of the tokens' losses.
        target_weights: (K,) or (..., K), with K targets: sparse soft labels, or the weights of several heads.
        shift: the target of token t is `targets[..., t + shift]` of the same sequence (the last leading dimension);
            the last `shift` tokens are ignored. With shift=1, labels may be the input tokens themselves.
        document_ids: (...), integers; with `shift`, tokens whose target lies in another document are ignored.
        return_stats: also return `LossStats`: per-token loss, lse, entropy, argmax and accuracy.
        process_group: logits hold only this rank's classes, in rank order, split as by `torch.chunk` (vocab-parallel);
            everything else is the same on all ranks, and so is what comes back. It takes two all-reduces of a few
            numbers per token, three with `return_stats`. `class_weights`, and `targets` that are probabilities, are
            those of all classes.
        vocab_size: with `process_group`, the number of all classes, if it does not divide evenly.
        inplace: write the gradient over `logits` in the forward pass: one read and one write of them in all, and no
            second buffer. Their values are gone afterwards, their version counter says so, and whatever shares their
            memory must be left alone until backward, which runs once. Inside `torch.compile`, which plans memory
            itself, and for tensors without data it does nothing.

    Returns:
        A scalar, or (...) for "none", in float32 (float64 for float64 logits); with `return_stats` a pair of that and
        `LossStats`. With nothing to average the mean is NaN and the gradient zero, as in
        `torch.nn.functional.cross_entropy`. Gradients of ignored tokens are zero, also where the upstream gradient is
        infinite or NaN. Meta and fake tensors give meta and fake results.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or (CPU tensors) a target is out of range. On a
            GPU looking at targets would stall the device: an out-of-range target makes that token's loss and
            gradient NaN, and with `TRITON_DEBUG=1` in the environment it is a device-side assert.
    """
    ready = made_ready(logits, targets, return_stats, options)
    found: Tensor | tuple[Tensor, LossStats] = ready.finished(ready.function(*ready.arguments))
    return found


def made_ready(
    logits: Tensor, targets: Tensor, return_stats: bool, given: CrossEntropyOptions, *, logprobs: bool = False
) -> Ready:
    """Prepare `cross_entropy`, or `logprobs`."""
    if logprobs:
        expect_inputs("logprobs", logits=logits, ids=targets)
    else:
        expect_inputs("cross_entropy", logits=logits, targets=targets)
    options = complete("cross_entropy", _LOGPROBS if logprobs else _DEFAULTS, given)
    group, shape = options["process_group"], logits.shape[:-1]
    if logits.dim() == 0 or (logits.shape[-1] == 0 and group is None):
        raise ValueError(f"logits must be (..., V) with V > 0; got {describe(logits)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point; got {describe(logits)}")
    V, columns = logits.shape[-1], slice(0, logits.shape[-1])
    if group is not None:
        expect_data(logits, "process_group")
        V, columns = own_columns(group, V, options["vocab_size"])
    dense = not logprobs and are_probabilities(targets, shape, V)
    inputs = Inputs(logits, targets, V, name="ids" if logprobs else "targets", dense=dense)
    check(given, options, inputs)
    expect(not (dense and return_stats), "return_stats needs class indices as targets; got probabilities")

    single = targets.dim() == len(shape)
    torchs = single and not (return_stats or logprobs) and only(("ignore_index", "reduction"), given)
    if torchs and logits.dtype == torch.float32 and takes_plain_torch(logits) and logits.numel() <= SMALL["logits"]:
        return Ready(torch_cross_entropy, (logits, targets, options), lambda loss: loss)
    fields = prepare(options, inputs, columns, logits.dtype, stats=return_stats)
    loss = CrossEntropy(**fields, logprobs=logprobs, inplace=options["inplace"])
    flat = logits if len(shape) == 1 else logits.reshape(shape.numel(), logits.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()

    def finished(found: "tuple[Tensor | None, ...]") -> Any:
        if logprobs:
            return finish_logprobs(found, targets, shape)
        return finish(found, loss.targets, options["ignore_index"], shape, squeeze=single)

    return Ready(adapter(loss, flat), (loss, torch.is_grad_enabled(), flat), finished)
