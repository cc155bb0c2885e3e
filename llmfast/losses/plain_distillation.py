"""Losses of rows that have a teacher, in plain torch.

The functions have the signatures of the Triton launchers, where `llmfast_kernels.distillation` says what they compute.
In `Rows.taught`, a row has the peak of the teacher's logits (of some ids: by how much its log-probabilities of the
other classes differ from the student's), the logarithm of the sum of its exponentials, the number that the gradient
subtracts (see `_gradient`), and the logarithm of the student's sum of exponentials without temperature.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from llmfast.losses import plain
from llmfast.losses.plain import read_logits, row_blocks, store_gradient, through_softcap
from llmfast_kernels.teaching import TAUGHT, Divergence, TeacherRows
from llmfast_kernels.terms import Rows, Softmax, Targets, Terms, Upstream

BLOCKS = 9  # buffers for a block of rows, at most


def space(K: int) -> dict[str, int]:
    """Return the memory that the functions take for a block of rows, as fields of `llmfast.losses.ways.Call`."""
    return {
        "blocks": BLOCKS,
        "block_bytes": plain.BLOCK_BYTES,
        "threads": torch.get_num_threads(),
        "plain_row_bytes": 40 + 24 * K,
    }


class _Hard:
    """The part of the loss that learns targets, (N, 1)."""

    def __init__(self, targets: Targets, terms: Terms, V: int) -> None:
        classes = targets.classes[:, 0]
        self.ignored = classes == terms.ignore_index  # (N,)
        self.here = ~self.ignored & (classes >= terms.v_start) & (classes < terms.v_start + V)
        self.columns = torch.where(self.here, classes - terms.v_start, 0).long()

    def add_gradient(self, d: Tensor, below: Tensor, log_total: Tensor, weight: float, rows: slice) -> None:
        """Add the gradient of weight * (log_total - below[target]); `below` is written over."""
        d.add_(below.sub_(log_total[:, None]).exp_(), alpha=weight)
        own = self.here[rows].to(d.dtype).mul_(-weight)
        d.scatter_add_(1, self.columns[rows, None], own[:, None])


class _Said(NamedTuple):
    """A teacher's log-probabilities of a block of rows."""

    logprobs: Tensor  # (rows, V)
    first: Tensor  # (rows,): the first two of `Rows.taught`
    second: Tensor
    mass: Tensor | None  # (rows,): sum of its probabilities; None for 1


def distillation(
    logits: Tensor,  # (N, V or more)
    targets: Targets,  # (N, 1)
    terms: Terms,
    teacher: TeacherRows,
    divergence: Divergence,
    *,
    V: int | None = None,  # columns from V on are padding
    d_logits: Tensor | None = None,  # like `logits`, filled; may be `logits`
    grad_scale: Tensor | None = None,  # ()
) -> Rows:
    logits, d_logits = logits[:, :V], None if d_logits is None else d_logits[:, :V]
    N, width = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss, peaks, totals = (logits.new_empty(N, dtype=wide) for _ in range(3))
    taught = logits.new_zeros((N, TAUGHT), dtype=wide)
    hard = _Hard(targets, terms, width)
    up = grad_scale if targets.token_weights is None else targets.token_weights
    if grad_scale is not None and targets.token_weights is not None:
        up = targets.token_weights * grad_scale
    for rows, space in row_blocks(logits, wide):
        x = read_logits(logits[rows], terms, space)
        peak = x.amax(1)
        T = _temperature(targets, rows, divergence)
        below = (x - peak[:, None]).div_(T)
        total = below.exp().sum(1)
        s = below.sub_(total.log()[:, None])
        said = _said(teacher, s, rows, T)
        soft, centre = _divergence(s, said, divergence.beta)
        peaks[rows], totals[rows] = peak, total
        taught[rows, 0], taught[rows, 1], taught[rows, 2] = said.first, said.second, centre
        loss[rows] = divergence.soft_weight * soft
        if divergence.hard_weight is not None:
            below = x - peak[:, None]
            y = below.gather(1, hard.columns[rows, None])[:, 0]
            taught[rows, 3] = log_total = below.exp_().sum(1).log_()
            loss[rows] += divergence.hard_weight * (log_total - y)
        if d_logits is not None:
            d = _gradient(s, said.logprobs, centre, divergence, T)
            if divergence.hard_weight is not None:
                below = torch.sub(x, peak[:, None], out=s)
                hard.add_gradient(d, below, taught[rows, 3], divergence.hard_weight, rows)
            if up is not None:
                d *= up if up.dim() == 0 else up[rows, None]
            through_softcap(d, x, terms)
            store_gradient(d, hard.ignored[rows], d_logits[rows])
    if targets.token_weights is not None:
        loss *= targets.token_weights
    taught.masked_fill_(hard.ignored[:, None], 0.0)
    return plain.empty_where(hard.ignored, Rows(loss, peaks, totals, None, None, taught=taught))


def distillation_backward(
    logits: Tensor,  # (N, V or more)
    targets: Targets,  # (N, 1)
    terms: Terms,
    teacher: TeacherRows,
    divergence: Divergence,
    softmax: Softmax,
    upstream: Upstream,
    *,
    V: int | None = None,
    d_logits: Tensor,  # like `logits`, filled; may be `logits`
) -> None:
    assert softmax.taught is not None
    logits, d_logits = logits[:, :V], d_logits[:, :V]
    hard = _Hard(targets, terms, logits.shape[1])
    up = upstream.loss if targets.token_weights is None else upstream.loss * targets.token_weights
    for rows, space in row_blocks(logits, softmax.peak.dtype):
        x = read_logits(logits[rows], terms, space)
        peak, taught = softmax.peak[rows], softmax.taught[rows]
        T = _temperature(targets, rows, divergence)
        s = (x - peak[:, None]).div_(T).sub_(softmax.total[rows].log()[:, None])
        t = _said_again(teacher, s, rows, T, taught, terms.v_start)
        d = _gradient(s, t, taught[:, 2], divergence, T)
        if divergence.hard_weight is not None:
            below = torch.sub(x, peak[:, None], out=s)
            hard.add_gradient(d, below, taught[:, 3], divergence.hard_weight, rows)
        d *= up[rows, None]
        through_softcap(d, x, terms)
        store_gradient(d, hard.ignored[rows], d_logits[rows])


def teachers_gradient(
    logits: Tensor,  # (N, V) of the student
    targets: Targets,  # (N, 1), whose token weights are what is upstream
    terms: Terms,
    teacher: TeacherRows,  # probabilities, or log-probabilities of some ids
    divergence: Divergence,
    *,
    out: Tensor,  # (N, V) or (N, K), filled
) -> None:
    """Fill `out` with the gradient of soft_weight * divergence for a teacher's probabilities or log-probabilities.

    Let g be the derivative for a probability p, see `_derivative`. The derivative for log(p) is then p (g - G). If the
    K probabilities are divided by their sum, G is sum p g; if the other classes count as one, G is the g of that class.
    """
    assert targets.token_weights is not None
    ignored = targets.classes[:, 0] == terms.ignore_index
    for rows, space in row_blocks(logits, torch.promote_types(logits.dtype, torch.float32)):
        x = read_logits(logits[rows], terms, space)
        T = _temperature(targets, rows, divergence)
        s = x.sub(x.amax(1)[:, None]).div_(T)
        s.sub_(s.exp().sum(1).log_()[:, None])
        said = _said(teacher, s, rows, T)
        if teacher.ids is None:
            d = _derivative(s, said.logprobs, divergence.beta)
        else:
            at = teacher.ids[rows].clamp(min=0)
            own = said.logprobs.gather(1, at).masked_fill_(teacher.ids[rows] < 0, -torch.inf)
            d, p = _derivative(s.gather(1, at), own, divergence.beta), own.exp()
            ratio = said.first[:, None]
            others = _derivative(torch.zeros_like(ratio), ratio, divergence.beta) if teacher.bucket else None
            d.sub_((p * d).sum(1, keepdim=True) if others is None else others).mul_(p)
        d *= (targets.token_weights[rows] * divergence.soft_weight)[:, None]
        store_gradient(d, ignored[rows], out[rows])


def _derivative(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """Return the derivative of the divergence for the teacher's p: log(p / q) + 1, -q / p or beta log(p / m).

    It is 0 for a class of probability 0, though the first two are infinite in the limit.
    """
    if beta == 0:
        d = (t - s).add_(1.0)
    elif beta == 1:
        d = (s - t).exp_().neg_()
    else:
        d = (t - _mixture(s, t, beta)).mul_(beta)
    return d.masked_fill_(t == -torch.inf, 0.0)


def _temperature(targets: Targets, rows: slice, divergence: Divergence) -> float | Tensor:
    """Return the temperature of all rows, or those of some, (rows, 1)."""
    return divergence.temperature if targets.temperatures is None else targets.temperatures[rows, None]


def _teachers_logits(teacher: TeacherRows, rows: slice, like: Tensor) -> Tensor:
    assert teacher.logits is not None
    given = teacher.logits[rows, : like.shape[1]]
    return plain.final_logits(given.to(like.dtype), teacher.terms.bias, teacher.terms)


def _said(teacher: TeacherRows, s: Tensor, rows: slice, T: float | Tensor) -> _Said:
    """Return what the teacher says about whole rows, of which `s` are the student's log-probabilities."""
    none = s.new_zeros(len(s))
    if teacher.logits is not None:
        t = _teachers_logits(teacher, rows, s)
        peak = t.amax(1)
        t = (t - peak[:, None]).div_(T)
        log_total = t.exp().sum(1).log_()
        return _Said(t.sub_(log_total[:, None]), peak, log_total, None)
    if teacher.probabilities is not None:
        p = teacher.probabilities[rows].to(s.dtype)
        return _Said(p.log(), none, none, p.sum(1))
    assert teacher.ids is not None and teacher.logprobs is not None
    ids, logprobs = teacher.ids[rows], teacher.logprobs[rows].to(s.dtype)
    known = logprobs.logsumexp(1)
    ratio = none - torch.inf
    if teacher.bucket:
        rest = torch.log(-torch.expm1(known.clamp(max=0.0)))
        students = _put(s.clone(), ids, s.new_full((), -torch.inf).expand_as(logprobs), 0).logsumexp(1)
        # Where the ids are all classes, there is no bucket, and what rounding leaves of 1 belongs nowhere.
        empty = (rest == -torch.inf) | ((ids >= 0).sum(1) == s.shape[1])
        ratio = torch.where(empty, -torch.inf, rest - students)
    else:
        logprobs = logprobs - known[:, None]
    return _Said(_put(s + ratio[:, None], ids, logprobs, 0), ratio, none if teacher.bucket else known, None)


def _said_again(
    teacher: TeacherRows, s: Tensor, rows: slice, T: float | Tensor, taught: Tensor, v_start: int
) -> Tensor:
    """Return the teacher's log-probabilities of some columns, from the numbers of whole rows."""
    first, second = taught[:, 0, None], taught[:, 1, None]
    if teacher.logits is not None:
        return (_teachers_logits(teacher, rows, s) - first).div_(T).sub_(second)
    if teacher.probabilities is not None:
        return teacher.probabilities[rows].to(s.dtype).log()
    assert teacher.ids is not None and teacher.logprobs is not None
    return _put(s + first, teacher.ids[rows], teacher.logprobs[rows].to(s.dtype) - second, v_start)


def _put(t: Tensor, ids: Tensor, values: Tensor, v_start: int) -> Tensor:
    """Put the values of ids where they are in `t`, (rows, columns), whose first column is `v_start`."""
    columns = ids - v_start
    here = (columns >= 0) & (columns < t.shape[1])
    wider = torch.cat([t, t.new_empty(len(t), 1)], 1)  # one more column takes those that lie elsewhere
    wider.scatter_(1, torch.where(here, columns, t.shape[1]), values)
    return wider[:, :-1]


def _divergence(s: Tensor, said: _Said, beta: float) -> tuple[Tensor, Tensor]:
    """Return the divergence, and what the gradient subtracts, (rows,) both."""
    t = said.logprobs
    if beta == 0:
        loss = _expected(t, t - s)
        return loss, torch.ones_like(loss) if said.mass is None else said.mass
    if beta == 1:
        loss = _expected(s, s - t)
        return loss, loss
    m = _mixture(s, t, beta)
    own = _expected(s, s - m)
    return beta * _expected(t, t - m) + (1 - beta) * own, own


def _expected(logprobs: Tensor, values: Tensor) -> Tensor:
    """Return the sums of probabilities times `values`, which are written over; 0 times anything is 0."""
    p = logprobs.exp()
    return values.mul_(p).masked_fill_(p == 0, 0.0).sum(1)


def _mixture(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """Return the logarithms of beta e^t + (1 - beta) e^s."""
    return torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))


def _gradient(s: Tensor, t: Tensor, centre: Tensor, divergence: Divergence, T: float | Tensor) -> Tensor:
    """Return the gradient of soft_weight * divergence for the student's logits, before their cap and scale.

    The divergence's own is q centre - p, q (log(q / p) - centre) or (1 - beta) q (log(q / m) - centre).
    """
    beta, factor = divergence.beta, divergence.soft_weight / T
    q = s.exp()
    if beta == 0:
        return q.mul_(centre[:, None]).sub_(t.exp()).mul_(factor)
    if beta == 1:
        d = s - t
    else:
        d, factor = s - _mixture(s, t, beta), factor * (1 - beta)
    d.sub_(centre[:, None]).mul_(q).masked_fill_(q == 0, 0.0)
    return d.mul_(factor)
