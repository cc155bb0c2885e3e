"""Numbers of the losses that are no cross-entropy of class indices: a part of the section `numerics`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmfast.checkup.comparing import Inputs, Sizes, compare
from llmfast.checkup.record import Case, Finding
from llmfast.losses import TeacherStates, cross_entropy, linear_distillation, logprobs, reference


def cases(device: torch.device, sizes: Sizes) -> list[Case]:
    """Return the cases of these losses."""
    return [
        Case("cross_entropy, probabilities", partial(of_probabilities, device, sizes), 5.0, 4 << 30),
        Case("logprobs", partial(of_ids, device, sizes), 5.0, 4 << 30),
        *(
            Case(f"linear_distillation, {kind}", partial(distilled, kind, device, sizes), 6.0, 4 << 30)
            for kind in ("forward_kl", "reverse_kl", "jsd")
        ),
    ]


def of_probabilities(device: torch.device, sizes: Sizes) -> Iterator[Finding]:
    """Compare the loss of class probabilities."""
    inputs = Inputs(device)
    logits = inputs.normal(sizes.N, sizes.V, dtype=torch.bfloat16, scale=3.0)
    p, weights = inputs.normal(sizes.N, sizes.V).softmax(-1), inputs.positive(sizes.V)
    options: dict[str, Any] = {"label_smoothing": 0.1, "softcap": 20.0}
    yield from compare(
        lambda x: cross_entropy(x, p, class_weights=weights, **options),
        lambda x: reference.cross_entropy(x, p.to(x.dtype), class_weights=weights, **options),
        {"logits": logits},
        sizes.repeats,
        in_norm=True,
    )


def of_ids(device: torch.device, sizes: Sizes) -> Iterator[Finding]:
    """Compare log-probabilities of several ids per row with their statistics, and their ranks."""
    inputs = Inputs(device)
    logits = inputs.normal(sizes.N, sizes.V, dtype=torch.bfloat16, scale=3.0)
    ids = inputs.classes(sizes.V, sizes.N, 3)
    options: dict[str, Any] = {"temperature": 0.7}
    yield from compare(
        lambda x: logprobs(x, ids, return_stats=True, **options),
        lambda x: reference.logprobs(x, ids, return_stats=True, **options),
        {"logits": logits},
        sizes.repeats,
        in_norm=True,
    )
    _, stats = logprobs(logits, ids, return_stats=True, return_rank=True, **options)
    known = ids >= 0
    chosen = logits.gather(1, ids.clamp(min=0))
    wanted = torch.stack([(logits > one[:, None]).sum(1) for one in chosen.unbind(1)], 1)
    assert stats.rank is not None
    wrong = int((stats.rank.ne(wanted) & known).sum())
    yield Finding("ranks", wrong == 0, {"elements_that_differ": wrong})


def distilled(kind: Any, device: torch.device, sizes: Sizes) -> Iterator[Finding]:
    """Compare the divergence from a teacher, which is given by its hidden states and output layer."""
    inputs = Inputs(device)
    tensors = {
        "hidden": inputs.normal(sizes.N, sizes.D, dtype=torch.bfloat16),
        "weight": inputs.normal(sizes.V, sizes.D, dtype=torch.bfloat16, scale=0.3),
    }
    states = inputs.normal(sizes.N, sizes.D, dtype=torch.bfloat16)
    weight = inputs.normal(sizes.V, sizes.D, dtype=torch.bfloat16, scale=0.3)
    options: dict[str, Any] = {"kind": kind, "temperature": 2.0, "hard_weight": 0.5}
    targets = inputs.classes(sizes.V, sizes.N)

    def plain(h: Tensor, w: Tensor) -> Tensor:
        teacher = TeacherStates(states.to(h.dtype), weight.to(h.dtype))
        return reference.linear_distillation(h, w, teacher, targets, **options)

    teacher = TeacherStates(states, weight)
    yield from compare(
        lambda h, w: linear_distillation(h, w, teacher, targets, **options),
        plain,
        tensors,
        sizes.repeats,
        in_norm=True,
    )
