"""Distillation of `hidden @ weight.T`, a slab of logits of student and teacher at a time.

A teacher that learns too gets its gradients in backward, once the student has its own.

A divergence is the same with student and teacher exchanged, and beta replaced by 1 - beta. So the gradient for a
teacher's logits is the one for a student's, and needs no row operation of its own. With p of the teacher, q of the
student and m = beta p + (1 - beta) q it is, times the temperature,

    KL(p || q)  p (log(p / q) - KL(p || q))
    KL(q || p)  p - q
    a mixture   beta p (log(p / m) - KL(p || m))

A teacher of hidden states therefore has a linear loss like the student's, in chunks of its own. A teacher of logits has
a loss of these logits, and `plain_distillation.teachers_gradient` makes the gradients of probabilities. For these two
the student's logits are made again, a slab of rows at a time.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from llmfast._dispatch import multiplies_into_float32, use_kernels
from llmfast.losses import plain_distillation
from llmfast.losses.from_hidden import Kept, LinearCrossEntropy
from llmfast.losses.loss import Found, Returned, Tensors
from llmfast.losses.plan import BudgetError, LinearCrossEntropyPlan
from llmfast.losses.products import Products
from llmfast.losses.rows import RowOps
from llmfast.losses.stages import Matrices
from llmfast.losses.teachers import Taught, Teacher
from llmfast.losses.ways import Call
from llmfast_kernels.teaching import TAUGHT, Divergence
from llmfast_kernels.terms import Rows, Softmax, Targets, Terms, Upstream

OWN = 3  # inputs of the student: hidden, weight and bias; those after them are `LEARNING`
_NUMBERS = 12  # numbers per row: what the student's loss leaves, and what is made of upstream gradients


@dataclass(frozen=True, kw_only=True)
class LinearDistillation(LinearCrossEntropy):
    """A linear loss of rows that have a teacher. The inputs are those of `LinearCrossEntropy`, then `LEARNING`."""

    targets: Taught
    divergence: Divergence
    teacher_dtype: torch.dtype | None  # of the teacher's logits; None for that of its hidden states
    teachers_weight_dtype: torch.dtype | None  # of the gradient of the teacher's weight
    by_kernels: bool  # use kernels, where there are any; only plain torch reads a teacher's ids

    @property
    def traceable(self) -> bool:
        return False

    def forward(self, inputs: Tensors, wants: tuple[bool, ...]) -> Found:
        if any(wants[OWN:]):
            _expect_room(self, inputs, wants)
        return super().forward(inputs[:OWN], wants[:OWN])

    def backward(
        self, inputs: Tensors, wants: tuple[bool, ...], softmax: Softmax, returned: Returned, kept: Kept | None
    ) -> Tensors:
        own, theirs = inputs[:OWN], inputs[OWN:]
        made: Tensors = (None,) * OWN
        if any(wants[:OWN]):
            made = super().backward(own, wants[:OWN], softmax, returned, kept)
        if not any(wants[OWN:]):
            return (*made, *(None for _ in theirs))
        students = kept.cast if kept is not None and kept.cast is not None else self._matrices(own)
        rows = softmax.peak.new_empty(len(self.targets.classes))  # peaks may be forgotten
        upstream = returned.per_row(self.count, rows).loss
        return (*made, *_gradients(self, inputs, wants, upstream, students))

    def ops(self, t: Tensor) -> RowOps:
        functions: Any = plain_distillation
        if self.by_kernels and use_kernels(t):
            from llmfast_kernels import distillation as functions  # not everyone has Triton
        return (
            super()
            .ops(t)
            ._replace(
                cross_entropy=partial(self._rows, functions.distillation),
                cross_entropy_backward=partial(self._rows_backward, functions.distillation_backward),
            )
        )

    def _rows(self, function: Any, logits: Tensor, targets: Targets, terms: Terms, **more: Any) -> Rows:
        for name in ("stats", "logprobs"):
            assert not more.pop(name)
        rows: Rows = function(
            logits, targets, terms, self._teacher(logits, targets, terms, more["V"]), self.divergence, **more
        )
        return rows

    def _rows_backward(
        self,
        function: Any,
        logits: Tensor,
        targets: Targets,
        terms: Terms,
        softmax: Softmax,
        upstream: Upstream,
        *,
        V: int,
        d_logits: Tensor,
    ) -> None:
        teacher = self._teacher(logits, targets, terms, V)
        more = {"softmax": softmax, "upstream": upstream, "V": V, "d_logits": d_logits}
        function(logits, targets, terms, teacher, self.divergence, **more)

    def _teacher(self, logits: Tensor, targets: Targets, terms: Terms, V: int) -> Any:
        columns = slice(terms.v_start, terms.v_start + V)
        return cast(Taught, targets).teacher.slab(columns, logits.shape[1], self.teacher_dtype, self._products())

    def _products(self) -> Products:
        hidden = self.targets.teacher.hidden
        return Products(hidden is not None and multiplies_into_float32(hidden.device, hidden.dtype))

    def _taught(self, call: Call) -> Call:
        teacher = self.targets.teacher
        K = 0 if teacher.ids is None else teacher.ids.shape[1]
        more: dict[str, Any] = {"taught": TAUGHT, "keeps": False}
        if not (call.kernels and self.by_kernels):
            more |= plain_distillation.space(K)
        if teacher.hidden is not None:
            dtype = self.teacher_dtype or teacher.hidden.dtype
            cast_for_product = dtype != teacher.hidden.dtype and not self._products().float32
            more["teacher_width"] = teacher.hidden.shape[1]
            more["teacher_bytes"] = dtype.itemsize
            more["teacher_cast"] = dtype.itemsize if cast_for_product else 0
        return replace(call, **more)

    def _no_rows(self, matrices: Any) -> Rows:
        rows = super()._no_rows(matrices)
        return rows._replace(taught=rows.loss.new_empty((0, TAUGHT)))


def _expect_room(loss: LinearDistillation, inputs: Tensors, wants: tuple[bool, ...]) -> None:
    """Raise BudgetError unless both sides' gradients keep to the budget. The error names what is enough for both."""
    errors = []
    try:
        loss._plan(inputs[:OWN], wants[:OWN], per_token=not loss.makes_gradients(inputs[:OWN], wants[:OWN]))
    except BudgetError as error:
        errors.append(error)
    try:
        _plan(loss, inputs, wants)
    except BudgetError as error:
        errors.append(error)
    if errors:
        raise max(errors, key=lambda error: error.least)


def _gradients(
    loss: LinearDistillation, inputs: Tensors, wants: tuple[bool, ...], upstream: Tensor, students: Matrices
) -> Tensors:
    """Return the gradients of `LEARNING`.

    Args:
        loss: The student's loss.
        inputs: Its inputs, and those of the teacher.
        wants: Which of them need a gradient.
        upstream: (N,) gradients of the rows' losses, without their token weights.
        students: The student's hidden states and weight as they are multiplied.
    """
    token_weights, theirs, some = loss.targets.token_weights, inputs[OWN:], wants[OWN:]
    turn = _exchanged(loss, inputs, students, upstream if token_weights is None else upstream * token_weights)
    if loss.targets.teacher.hidden is not None:
        found = turn.forward(theirs[:OWN], some[:OWN])
        returned = Returned(upstream.new_ones(()), None, None)
        made = turn.backward(theirs[:OWN], some[:OWN], found.rows.softmax, returned, found.kept)
        return (*made, *(None for _ in theirs[OWN:]))
    out = tuple(t.new_empty(t.shape) if t is not None and wanted else None for t, wanted in zip(theirs, some))
    (filled,) = (t for t in out if t is not None)
    if filled.numel() > 0:
        for rows in _plan(loss, inputs, wants):
            _fill(filled[rows], loss, turn, rows)
    return out


def _exchanged(
    loss: LinearDistillation, inputs: Tensors, students: Matrices, weights: Tensor | None
) -> LinearDistillation:
    """Return the sum of the rows' divergences times `weights`, with student and teacher exchanged."""
    teacher, terms, bias, temperatures = loss.targets.teacher, loss.terms, inputs[2], loss.targets.temperatures
    dtype = loss.dtype if teacher.hidden is None else teacher.hidden.dtype
    wide = torch.promote_types(dtype, torch.float32)
    student = Teacher(
        students.hidden,
        students.weight,
        None if bias is None else bias.detach().contiguous(),
        terms.softcap,
        terms.logit_scale,
    )
    copies = sum(t.numel() * loss.dtype.itemsize for t in inputs[:2] if t is not None and t.dtype != loss.dtype)
    return replace(
        loss,
        targets=Taught(
            loss.targets.classes,
            token_weights=None if weights is None else weights.to(wide),
            temperatures=None if temperatures is None else temperatures.to(wide),
            teacher=student,
        ),
        terms=replace(terms, softcap=teacher.softcap, logit_scale=teacher.logit_scale),
        divergence=loss.divergence.exchanged,
        reduction="sum",
        count=None,
        dtype=dtype,
        held=loss.held + copies + _held_by_rows(loss),
        slab_dtype=loss.teacher_dtype or dtype,
        teacher_dtype=loss.slab_dtype,
        weight_dtype=loss.teachers_weight_dtype or dtype,
        accumulate_dtype=wide,
        accumulate_into=None,
    )


def _held_by_rows(loss: LinearDistillation) -> int:
    wide = torch.promote_types(loss.dtype, torch.float32)
    return _NUMBERS * wide.itemsize * len(loss.targets.classes)


def _plan(loss: LinearDistillation, inputs: Tensors, wants: tuple[bool, ...]) -> LinearCrossEntropyPlan:
    """Return the plan for the teacher's gradients; it looks at no data."""
    own, teacher = cast(tuple[Tensor, Tensor], inputs[:2]), loss.targets.teacher
    if teacher.hidden is not None:
        # They have no rows: a plan needs only widths and dtypes.
        students = Matrices(*(t.new_empty((0, t.shape[1]), dtype=loss.dtype) for t in own))
        turn = _exchanged(loss, inputs, students, None)
        return turn._plan(inputs[OWN : 2 * OWN], wants[OWN : 2 * OWN], per_token=False)
    given = replace(loss, held=loss.held + _held_by_rows(loss), by_kernels=teacher.logits is not None)
    return given._plan(inputs[:OWN], (False,) * OWN, per_token=False)


def _fill(out: Tensor, loss: LinearDistillation, turn: LinearDistillation, rows: slice) -> None:
    """Fill `out`, (n, V) or (n, K), with the gradients of some rows of what a teacher gave."""
    given, targets, V = loss.targets.teacher[rows], turn.targets[rows], loss.terms.V
    if given.logits is not None:
        more = {"V": V, "stats": False, "logprobs": False, "d_logits": out}
        turn.ops(given.logits).cross_entropy(given.logits, targets, turn.terms, **more)
        return
    columns, dtype, products = slice(0, V), loss.slab_dtype, turn._products()
    student = targets.teacher.slab(columns, V, dtype, products)
    teacher = given.slab(columns, V, dtype, products)
    assert student.logits is not None
    terms = replace(student.terms, ignore_index=loss.terms.ignore_index)
    plain_distillation.teachers_gradient(student.logits, targets, terms, teacher, loss.divergence, out=out)
