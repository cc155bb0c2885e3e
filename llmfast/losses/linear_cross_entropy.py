"""Cross-entropy of `hidden @ weight.T`: the logits need never exist at once."""

# pyright: reportTypedDictNotRequiredAccess=false

from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast._checks import describe, expect
from llmfast._dispatch import autocasting, expect_data, has_no_data, takes_plain_torch
from llmfast.losses.autograd import adapter
from llmfast.losses.from_hidden import LinearCrossEntropy
from llmfast.losses.options import (
    Inputs,
    LinearOptions,
    LogprobOptions,
    are_probabilities,
    check,
    complete,
    defaults,
    expect_inputs,
    only,
    takes,
)
from llmfast.losses.parallel import local_weight, own_columns
from llmfast.losses.targets import SMALL, LossStats, Ready, finish, finish_logprobs, prepare, torch_cross_entropy
from llmfast.losses.valid_rows import ValidRows, valid_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

_DEFAULTS: LinearOptions = defaults(LinearOptions)
_LOGPROBS = cast(LinearOptions, {**_DEFAULTS, **defaults(LogprobOptions)})


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: "Unpack[LinearOptions]",
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_stats: Literal[True],
    **options: "Unpack[LinearOptions]",
) -> tuple[Tensor, LossStats]: ...
@takes(LinearOptions)
def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...) or (..., K); or (..., V) probabilities
    *,
    return_stats: bool = False,
    **options: "Unpack[LinearOptions]",
) -> Tensor | tuple[Tensor, LossStats]:
    """Compute the cross-entropy of the logits `hidden @ weight.T + bias`, without ever holding them all.

    All options of `cross_entropy` mean the same here; logits are softcap(logit_scale * (hidden @ weight.T + bias)).

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64; any leading dimensions.
        weight: (V, D), of the same dtype; under autocast both are cast once to autocast's dtype. A DTensor sharded on
            dim 0 is vocab-parallel if `hidden` is a DTensor replicated over its mesh, or `process_group` is given. With
            a plain `hidden` (FSDP2) it is gathered once, and its gradient averaged over the mesh and scattered.
        targets: (...), int64 or int32, in [0, V) or `ignore_index`; or (..., K), K targets for each token's logits; or
            (..., V) probabilities of all classes, as in `cross_entropy`, for which `grad_filter` is an error too.
        bias: (V,), any floating point dtype.
        num_valid: as in `cross_entropy`. With class indices, an int below the number of tokens also promises that at
            most that many tokens are valid: only that many rows enter the matrix products, without waiting for the
            device. If more are valid, the loss is NaN (ValueError on a CPU). For another divisor, use reduction="sum"
            and divide.
        process_group: `weight` and `bias` hold only this rank's classes, in rank order, split as by `torch.chunk`.
            `hidden` is the same on all ranks and so is its gradient, which takes one more all-reduce, of (N, D).
        memory_budget: bytes that the call may hold at any time beyond its inputs and the gradients that it returns or
            adds into. The fastest way within it is taken, and a smaller budget never holds more. "auto": on a CPU 64
            MiB; elsewhere 1 GiB, or the weight's gradient in float32 if that is larger, but at most a tenth of the
            device's memory. `LinearCrossEntropyPlan` shows what a budget leads to.
        slab_dtype: torch.float32 keeps the logits unrounded between the matrix product and the softmax: for low
            precision inputs with large logits, at 6 bytes per logit instead of 2.
        accumulate_into: a (V, D) float32 `main_grad` that the weight's gradient is added to in backward; `weight.grad`
            stays None. Not with `process_group` over DTensors. Without it, a weight with `grad_dtype=torch.float32`
            (torch 2.10) gets the float32 gradient as it is summed.
        accumulate_dtype: the weight's dtype rounds the sum of its gradient after every chunk of rows, instead of once
            at the end: the fewest products with nothing but a slab to hold, at a larger error. Default: float32.
        grad_filter: skip what 128 x 128 blocks of logits add to the gradients where none of their gradients (not yet
            divided by a count) reaches this, e.g. 2.4e-4. Deterministic, approximate, and wrong early in training: at
            initialisation all of them are 1 / V, below such a threshold, and nothing but targets would be learnt from.

    Returns:
        As `cross_entropy`. With nothing to average the mean is NaN and the gradients zero. Gradients of ignored tokens
        are zero, and so is what they add to the others, also where the upstream gradient is infinite or NaN.

    For mean and sum, gradients are made in the forward pass as far as `memory_budget` allows: only those that are
    needed, accumulated in float32. Losses per token, and gradients through `LossStats`, compute logits again in
    backward. Backward with `retain_graph=True` works: the second time, gradients are computed again. Inside
    `torch.compile` this is one operator; `process_group`, DTensors and `accumulate_into` break the graph instead.

    Raises:
        ValueError, TypeError: as `cross_entropy`, or `hidden` and `weight` do not fit together, or
            `memory_budget` is too small; the message says what the least is.
    """
    ready = made_ready(0, hidden, weight, targets, return_stats, options)
    found: Tensor | tuple[Tensor, LossStats] = ready.finished(ready.function(*ready.arguments))
    return found


def made_ready(
    held: int,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    return_stats: bool,
    options: LinearOptions,
    *,
    logprobs: bool = False,
) -> Ready:
    """Prepare `linear_cross_entropy`, or `linear_logprobs`, for a caller that has taken `held` bytes of the budget."""
    if logprobs:
        expect_inputs("linear_logprobs", hidden=hidden, weight=weight, ids=targets)
    else:
        expect_inputs("linear_cross_entropy", hidden=hidden, weight=weight, targets=targets)
    _check_matrices(hidden, weight, split=options.get("process_group") is not None)
    hidden, weight, given = local_weight(hidden, weight, options)
    options = complete("linear_cross_entropy", _LOGPROBS if logprobs else _DEFAULTS, given)
    group, bias, shape, own = options["process_group"], options["bias"], hidden.shape[:-1], weight.shape[0]
    V, columns = own, slice(0, own)
    if group is not None:
        expect_data(hidden, "process_group")
        V, columns = own_columns(group, own, options["vocab_size"])
    dtype = _compute_dtype(hidden, weight)
    wide = torch.promote_types(dtype, torch.float32)
    dense = not logprobs and are_probabilities(targets, shape, V)
    inputs = Inputs(hidden, targets, V, weight, dtype, "ids" if logprobs else "targets", dense)
    check(given, options, inputs)
    expect(not (dense and return_stats), "return_stats needs class indices as targets; got probabilities")
    if options["accumulate_into"] is not None:
        expect_data(hidden, "accumulate_into")

    single = targets.dim() == len(shape)
    torchs = single and not (return_stats or logprobs) and only(("ignore_index", "reduction", "bias"), given)
    if torchs and dtype == torch.float32 and takes_plain_torch(hidden) and targets.numel() * V <= SMALL["hidden"]:
        return Ready(torch_cross_entropy, (F.linear(hidden, weight, bias), targets, options), lambda loss: loss)
    fields = prepare(options, inputs, columns, dtype, stats=return_stats)
    every, rows = hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1]), fields["targets"]
    budget = None if options["memory_budget"] == "auto" else options["memory_budget"]

    def of_rows(valid: "ValidRows | None") -> "tuple[LinearCrossEntropy, tuple[Tensor, Tensor, Tensor | None]]":
        flat, own = (every, rows) if valid is None else valid.gather(every, rows)
        # Gathered rows have a gradient of their own, from which that of all rows is made.
        copied = _copied(hidden, flat) * (1 if valid is None else 2) + _copied(targets, own.classes)
        copied += _copied(options["token_weights"], own.token_weights) + _copied(targets, own.probabilities)
        copied += _copied(options["target_weights"], own.weights)
        copied += _copied(options.get("temperature"), own.temperatures)
        if valid is not None and logprobs:  # those of the rows, and of all rows
            copied += valid.N * own.classes.shape[1] * wide.itemsize
        copied += _copied(options["class_weights"], fields["terms"].class_weights)
        loss = LinearCrossEntropy(
            **{**fields, "targets": own},
            logprobs=logprobs,
            budget=budget,
            held=held + copied,
            slab_dtype=options["slab_dtype"] or dtype,
            weight_dtype=_gradient_dtype(weight, wide),
            accumulate_dtype=options["accumulate_dtype"] or wide,
            grad_filter=options["grad_filter"],
            accumulate_into=options["accumulate_into"],
        )
        return loss, (flat, weight, bias)

    valid = None if dense else valid_rows(every, rows, options["ignore_index"], options["num_valid"], budget)
    loss, tensors = of_rows(valid)
    planned = budget is not None and not has_no_data(every)  # torch.compile leaves plans to its operators
    if valid is not None and planned and not loss.fits(tensors):
        valid = None  # the copy of these rows takes more than it saves
        loss, tensors = of_rows(None)

    def finished(found: "tuple[Tensor | None, ...]") -> Any:
        found = found if valid is None else valid.spread(found)
        if logprobs:
            return finish_logprobs(found, targets, shape)
        return finish(found, rows, options["ignore_index"], shape, squeeze=single)

    return Ready(adapter(loss, tensors[0]), (loss, torch.is_grad_enabled(), *tensors), finished)


def _check_matrices(hidden: Tensor, weight: Tensor, *, split: bool) -> None:
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must be (..., D) with D > 0; got {describe(hidden)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or (weight.shape[0] == 0 and not split):
        raise ValueError(f"weight must be (V, {hidden.shape[-1]}) with V > 0; got {describe(weight)}")
    if weight.device != hidden.device:
        raise ValueError(f"weight must be on {hidden.device}; got {describe(weight)}")


def _copied(given: Any, used: Tensor | None) -> int:
    """Return the bytes of `used` if it is a copy of `given`, else 0."""
    if given is None or used is None or used is given or has_no_data(used) or used.data_ptr() == given.data_ptr():
        return 0
    return used.nbytes


def _gradient_dtype(weight: Tensor, wide: torch.dtype) -> torch.dtype:
    """Return the dtype of the weight's gradient: `wide` if `weight.grad_dtype` says so, else the weight's own."""
    if has_no_data(weight) or not (weight.is_leaf and weight.requires_grad):
        return weight.dtype
    return wide if getattr(weight, "grad_dtype", None) == wide else weight.dtype


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return autocast's dtype inside autocast, else the one that the inputs share."""
    for name, t in (("hidden", hidden), ("weight", weight)):
        if not t.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {describe(t)}")
    if autocasting(hidden.device):
        return torch.get_autocast_dtype(hidden.device.type)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden and weight must share a dtype; got {describe(hidden)} and {describe(weight)}")
    return hidden.dtype
