"""Teachers to learn from: their hidden states, logits, probabilities, or most probable tokens."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from llmfast._checks import describe, expect
from llmfast._dispatch import autocasting, has_no_data
from llmfast._kinds import expect_kind, kinds_of, what
from llmfast.losses.products import Products
from llmfast_kernels.teaching import TeacherRows
from llmfast_kernels.terms import Targets, Terms


@dataclass(frozen=True)
class TeacherStates:
    """A teacher's last hidden states and output layer; its logits are made a slab at a time.

    They are softcap(logit_scale * (hidden @ weight.T + bias)).
    """

    hidden: Tensor  # (..., D) of a width of its own
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    logit_scale: float | None = None


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher's logits, as they enter its softmax but for the temperature."""

    logits: Tensor  # (..., V)


@dataclass(frozen=True)
class TeacherProbabilities:
    """A teacher's probabilities of all classes, at the temperature of the loss."""

    probabilities: Tensor  # (..., V)


@dataclass(frozen=True)
class TeacherTopK:
    """Log-probabilities of a teacher's K most probable classes, at the temperature of the loss.

    `tail` says what becomes of the other classes. "drop": they have probability 0, and those of the K are divided by
    their sum. "bucket": they count as one class, for teacher and student, whose probability is what is left of 1.
    """

    ids: Tensor  # (..., K) int64 or int32, different within a token; `ignore_index` for none
    logprobs: Tensor  # (..., K)
    tail: Literal["drop", "bucket"] = "drop"


AnyTeacher = TeacherStates | TeacherLogits | TeacherProbabilities | TeacherTopK


@dataclass(frozen=True)
class Teacher:
    """Any of these teachers, checked, with one row per token. What it does not have is None."""

    hidden: Tensor | None = None  # (N, D)
    weight: Tensor | None = None  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    logit_scale: float | None = None
    logits: Tensor | None = None  # (N, V)
    probabilities: Tensor | None = None  # (N, V)
    ids: Tensor | None = None  # (N, K)
    logprobs: Tensor | None = None  # (N, K)
    bucket: bool = False

    def __getitem__(self, rows: "slice | Tensor") -> "Teacher":
        names = ("hidden", "logits", "probabilities", "ids", "logprobs")
        given = {name: t for name in names if (t := getattr(self, name)) is not None}
        return replace(self, **{name: t[rows] for name, t in given.items()})

    def slab(self, columns: slice, width: int, dtype: torch.dtype | None, products: Products) -> TeacherRows:
        """Return what the teacher says about `columns`. Logits it makes have `width` columns, and `dtype` if given."""
        bias = None if self.bias is None else self.bias[columns]
        V = columns.stop - columns.start
        terms = Terms(V, bias=bias, softcap=self.softcap, logit_scale=self.logit_scale)
        if self.hidden is not None and self.weight is not None:
            logits = self.hidden.new_empty(len(self.hidden), width, dtype=dtype or self.hidden.dtype)
            products.logits(self.hidden, self.weight[columns], out=logits[:, :V])
            return TeacherRows(terms, logits)
        if self.logits is not None:
            return TeacherRows(terms, self.logits[:, columns])
        if self.probabilities is not None:
            return TeacherRows(terms, probabilities=self.probabilities[:, columns])
        return TeacherRows(terms, ids=self.ids, logprobs=self.logprobs, bucket=self.bucket)


# Tensors of teachers that may get gradients, in the order of the loss's inputs after the student's.
LEARNING = ("hidden", "weight", "bias", "logits", "probabilities", "logprobs")
_OF_TOKENS = {"hidden", "logits", "probabilities", "logprobs"}


def learning(teacher: AnyTeacher) -> tuple[Tensor | None, ...]:
    """Return the tensors that `LEARNING` names, with one row per token; none if none requires a gradient."""
    given: list[Tensor | None] = [getattr(teacher, name, None) for name in LEARNING]
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)):
        return (None,) * len(LEARNING)
    return tuple(
        t if t is None or name not in _OF_TOKENS else t.reshape(t.shape[:-1].numel(), t.shape[-1])
        for name, t in zip(LEARNING, given)
    )


@dataclass(frozen=True)
class Taught(Targets):
    """Targets of rows that have a teacher too."""

    teacher: Teacher = Teacher()

    def __getitem__(self, rows: "slice | Tensor") -> "Taught":
        own = super().__getitem__(rows)
        return Taught(own.classes, own.weights, own.token_weights, own.temperatures, teacher=self.teacher[rows])


_KINDS = {kind: kinds_of(kind) for kind in get_args(AnyTeacher)}


def expect_teacher(teacher: AnyTeacher) -> None:
    """Raise TypeError unless this is a teacher, and all it has is of the declared kind."""
    kinds = next((kinds for cls, kinds in _KINDS.items() if isinstance(teacher, cls)), None)
    if kinds is None:
        raise TypeError(
            f"teacher must be a TeacherStates, TeacherLogits, TeacherProbabilities or TeacherTopK; got {what(teacher)}"
        )
    for name, kind in kinds.items():
        expect_kind(f"teacher.{name}", getattr(teacher, name), kind)


def flattened(teacher: AnyTeacher, hidden: Tensor, V: int, ignore_index: int) -> Teacher:
    """Check a teacher of tokens that have these hidden states, and return its rows.

    Its tensors are detached, and those of a `TeacherStates` cast to autocast's dtype.

    Raises:
        ValueError, TypeError: it does not fit.
    """
    tokens = hidden.shape[:-1]
    if isinstance(teacher, TeacherStates):
        return _states(teacher, hidden, V)
    if isinstance(teacher, TeacherLogits):
        t = teacher.logits
        _expect_floats("teacher.logits", t, (*tokens, V), hidden.device)
        return Teacher(logits=_rows(t, V))
    if isinstance(teacher, TeacherProbabilities):
        t = teacher.probabilities
        _expect_floats("teacher.probabilities", t, (*tokens, V), hidden.device)
        return Teacher(probabilities=_rows(t, V))
    return _top(teacher, hidden, V, ignore_index)


def _states(teacher: TeacherStates, like: Tensor, V: int) -> Teacher:
    hidden, weight, bias, device = teacher.hidden, teacher.weight, teacher.bias, like.device
    tokens = like.shape[:-1]
    expect(
        hidden.dim() == like.dim() and hidden.shape[:-1] == tokens and hidden.shape[-1] > 0 and hidden.device == device,
        f"teacher.hidden must be {(*tokens, 'D')} on {device}; got {describe(hidden)}",
    )
    _expect_floats("teacher.hidden", hidden, tuple(hidden.shape), device)
    _expect_floats("teacher.weight", weight, (V, hidden.shape[-1]), device)
    if bias is not None:
        _expect_floats("teacher.bias", bias, (V,), device)
        bias = bias.detach().contiguous()
    if autocasting(device):
        hidden, weight = (t.to(torch.get_autocast_dtype(device.type)) for t in (hidden, weight))
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"teacher.hidden and teacher.weight must share a dtype; got {describe(hidden)} and {describe(weight)}"
        )
    rows = _rows(hidden, hidden.shape[-1])
    return Teacher(rows, weight.detach(), bias, teacher.softcap, teacher.logit_scale)


def _top(teacher: TeacherTopK, hidden: Tensor, V: int, ignore_index: int) -> Teacher:
    ids, logprobs, tokens = teacher.ids, teacher.logprobs, hidden.shape[:-1]
    if teacher.tail not in ("drop", "bucket"):
        raise ValueError(f"teacher.tail must be 'drop' or 'bucket'; got {teacher.tail!r}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"teacher.ids must be int64 or int32; got {describe(ids)}")
    expect(
        ids.shape[:-1] == tokens and ids.dim() > len(tokens) and ids.shape[-1] > 0 and ids.device == hidden.device,
        f"teacher.ids must be {(*tokens, 'K')} on {hidden.device}; got {describe(ids)}",
    )
    K = ids.shape[-1]
    _expect_floats("teacher.logprobs", logprobs, tuple(ids.shape), hidden.device)
    ids = ids.detach().reshape(-1, K).long()
    none = ids == ignore_index
    if ids.is_cpu and not has_no_data(ids):  # on a GPU, looking would be a host sync
        wrong = ~none & ((ids < 0) | (ids >= V))
        expect(not wrong.any(), f"teacher.ids must be in [0, {V}) or ignore_index={ignore_index}; got {ids[wrong][:1]}")
        ordered = ids.masked_fill(none, -1).sort(1)[0]
        same = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        expect(not same.any(), f"teacher.ids must differ within a token; got {ordered[:, 1:][same][:1]} twice")
    # -1 lies in no column, and stands for whatever is no class.
    ids = torch.where(none | (ids < 0) | (ids >= V), -1, ids)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logprobs = logprobs.detach().reshape(-1, K).to(wide).masked_fill(ids < 0, -torch.inf)
    return Teacher(ids=ids, logprobs=logprobs, bucket=teacher.tail == "bucket")


def _expect_floats(name: str, t: Tensor, shape: tuple[Any, ...], device: torch.device) -> None:
    expect(
        tuple(t.shape) == shape and t.device == device, f"{name} must be {tuple(shape)} on {device}; got {describe(t)}"
    )
    if not t.is_floating_point():
        raise TypeError(f"{name} must be floating point; got {describe(t)}")


def _rows(t: Tensor, width: int) -> Tensor:
    """Return one row per token, with stride 1 along it, in the memory of `t` if possible."""
    rows = t.detach().reshape(-1, width) if t.numel() else t.detach().new_empty(t.shape[:-1].numel(), width)
    return rows if rows.stride(1) == 1 else rows.contiguous()
