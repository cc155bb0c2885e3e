"""Distillation from a teacher, without ever holding all logits of either side."""

# pyright: reportTypedDictNotRequiredAccess=false

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from llmfast._checks import expect
from llmfast._dispatch import expect_data
from llmfast.losses.autograd import adapter
from llmfast.losses.from_teacher import LinearDistillation
from llmfast.losses.linear_cross_entropy import _check_matrices, _compute_dtype, _copied, _gradient_dtype
from llmfast.losses.options import (
    DistillationOptions,
    Inputs,
    LinearOptions,
    check,
    complete,
    declared,
    defaults,
    expect_inputs,
    takes,
)
from llmfast.losses.targets import Ready, prepare, restore
from llmfast.losses.teachers import (
    LEARNING,
    AnyTeacher,
    Taught,
    TeacherStates,
    TeacherTopK,
    expect_teacher,
    flattened,
    learning,
)
from llmfast_kernels.teaching import Divergence

if TYPE_CHECKING:
    from typing_extensions import Unpack

_DEFAULTS: DistillationOptions = defaults(DistillationOptions)
_OF_LOSSES: LinearOptions = defaults(LinearOptions)
_TABLE = declared(DistillationOptions)
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


@takes(DistillationOptions)
def linear_distillation(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    teacher: AnyTeacher,
    targets: Tensor | None = None,  # (...)
    **options: "Unpack[DistillationOptions]",
) -> Tensor:
    """Compute the divergence of a student's token probabilities from a teacher's, without ever holding all logits.

    With the logits x = softcap(logit_scale * (hidden @ weight.T + bias)), q = softmax(x / temperature) and the
    teacher's probabilities p, the loss of a token is

        token_weight * (soft_weight * divergence + hard_weight * CE(x, target))

    where the divergence is KL(p || q) for kind="forward_kl", KL(q || p) for "reverse_kl", and for "jsd", with
    m = beta p + (1 - beta) q, the generalised Jensen-Shannon divergence beta KL(p || m) + (1 - beta) KL(q || m)
    (Agarwal et al., arXiv:2306.13649, eq. 1). Here beta=0 stands for "forward_kl" and 1 for "reverse_kl", which are
    that divided by beta, and by 1 - beta, in the limit; TRL and Liger-Kernel do the same. As there, nothing is
    multiplied by temperature^2: pass soft_weight=temperature**2 for that (Hinton et al., arXiv:1503.02531).

    Args:
        hidden: (..., D) of the student, float32, bfloat16, float16 or float64; any leading dimensions.
        weight: (V, D) of the student, as in `linear_cross_entropy`.
        teacher: `TeacherStates`, `TeacherLogits`, `TeacherProbabilities` or `TeacherTopK`, of the same tokens and
            classes. Those of its tensors that require a gradient get one, made in backward after the student's; a
            probability of 0 gets none. Pass detached tensors of a teacher that should not learn.
        targets: (...), int64 or int32, in [0, V) or `ignore_index`. Tokens to be ignored have no loss at all. None
            ignores no token.
        kind: "forward_kl", "reverse_kl" or "jsd".
        beta: share of the teacher in the mixture of "jsd", in [0, 1]; by default 0.5.
        temperature: a positive number, or a tensor (...) of them, that divides the logits of student and teacher,
            without a gradient of its own; a teacher's probabilities are taken as they are.
        soft_weight: factor of the divergence.
        hard_weight: factor of the cross-entropy of `targets`, which takes the student's logits without temperature.
        token_weights: (...), factors of the tokens' losses.
        reduction: "mean", "sum", or "none" for one loss per token. The mean divides by the sum of `token_weights` of
            what is not ignored, which without weights is the number of those tokens.
        num_valid: what the mean divides by instead, as a number or a one-element tensor.
        bias, memory_budget, slab_dtype, accumulate_into, accumulate_dtype: as in `linear_cross_entropy`. There are two
            slabs of logits, the student's and the one that is made of a `TeacherStates`. `slab_dtype` is that of both;
            `accumulate_into` and `accumulate_dtype` are for the student's weight.
        ignore_index, softcap, logit_scale: as in `linear_cross_entropy`; `softcap` and `logit_scale` are the student's.

    Returns:
        A scalar, or (...) for "none", in float32 (float64 for float64 inputs). With nothing to average the mean is NaN
        and the gradients zero. Gradients of ignored tokens are zero, also where the upstream gradient is infinite or
        NaN. Inside `torch.compile` this is a break in the graph.

    Raises:
        ValueError, TypeError: as `linear_cross_entropy`, or the teacher does not fit, or the divergence is infinite
            whatever the student says: "reverse_kl" from a `TeacherTopK` that drops the tail.
    """
    ready = made_ready(hidden, weight, teacher, targets, options)
    found: Tensor = ready.finished(ready.function(*ready.arguments))
    return found


def made_ready(
    hidden: Tensor, weight: Tensor, teacher: AnyTeacher, targets: Tensor | None, given: DistillationOptions
) -> Ready:
    """Prepare `linear_distillation`."""
    given_targets = {} if targets is None else {"targets": targets}
    expect_inputs("linear_distillation", hidden=hidden, weight=weight, **given_targets)
    expect_teacher(teacher)
    _check_matrices(hidden, weight, split=False)
    options = complete("linear_distillation", _DEFAULTS, given)
    V, shape, dtype = weight.shape[0], hidden.shape[:-1], _compute_dtype(hidden, weight)
    expect(targets is not None or options["hard_weight"] == 0, "hard_weight needs targets; got targets=None")
    classes = targets
    if classes is None:
        classes = torch.full(shape, 0 if options["ignore_index"] else 1, dtype=torch.int64, device=hidden.device)
    inputs = Inputs(hidden, classes, V, weight, dtype)
    expect(classes.dim() == len(shape), f"targets must be {tuple(shape)}; got {tuple(classes.shape)}")
    check(given, cast(Any, options), inputs, _TABLE)
    if options["accumulate_into"] is not None:
        expect_data(hidden, "accumulate_into")
    divergence = _divergence(options, teacher)

    shared = {**_OF_LOSSES, **{name: value for name, value in options.items() if name in {*_OF_LOSSES, "temperature"}}}
    fields = prepare(cast(Any, shared), inputs, slice(0, V), dtype, stats=False)
    flat, own, rows = (
        hidden.reshape(-1, hidden.shape[-1]),
        fields["targets"],
        flattened(teacher, hidden, V, options["ignore_index"]),
    )
    fields["targets"] = Taught(own.classes, own.weights, own.token_weights, own.temperatures, teacher=rows)
    held = _copied(hidden, flat) + _copied(options["token_weights"], own.token_weights)
    held += _copied(options["temperature"], own.temperatures)
    held += own.classes.nbytes if targets is None else _copied(targets, own.classes)
    held += sum(_copied(getattr(teacher, name, None), getattr(rows, name)) for name in _SHARED)
    theirs = learning(teacher)
    held += sum(_copied(getattr(teacher, name, None), t) for name, t in zip(LEARNING, theirs))
    budget = options["memory_budget"]
    wide = torch.promote_types(dtype, torch.float32)
    loss = LinearDistillation(
        **fields,
        divergence=divergence,
        budget=None if budget == "auto" else budget,
        held=held,
        slab_dtype=options["slab_dtype"] or dtype,
        teacher_dtype=options["slab_dtype"],
        weight_dtype=_gradient_dtype(weight, wide),
        accumulate_dtype=options["accumulate_dtype"] or wide,
        by_kernels=rows.ids is None,
        teachers_weight_dtype=_gradient_dtype(teacher.weight, wide) if isinstance(teacher, TeacherStates) else None,
        grad_filter=None,
        accumulate_into=options["accumulate_into"],
    )
    arguments = loss, torch.is_grad_enabled(), flat, weight, options["bias"], *theirs
    return Ready(adapter(loss, flat), arguments, lambda found: restore(found[0], shape))


_SHARED = ("hidden", "weight", "bias", "logits", "probabilities", "ids", "logprobs")  # fields of teachers


def _divergence(options: DistillationOptions, teacher: AnyTeacher) -> Divergence:
    beta = BETA[options["kind"]] if options["beta"] is None else float(options["beta"])
    dropped = isinstance(teacher, TeacherTopK) and teacher.tail == "drop"
    expect(
        not (beta == 1 and dropped),
        "teacher.tail must be 'bucket' for reverse_kl, which is infinite where a teacher has probability 0; got 'drop'",
    )
    temperature = options["temperature"]
    same = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    return Divergence(beta, same, float(options["soft_weight"]), options["hard_weight"] or None)
