"""Distillation of rows of logits: the divergence from a teacher's rows, and its gradient. `teaching.py` defines it.

A cross-entropy whose targets are probabilities of all classes is the same without the entropy of the teacher.

A program reads a row of the student and the same row of the teacher, tile by tile: their peaks and sums, and what the
Kullback-Leibler divergences need, in one pass; for a mixture, whose logarithm takes final sums, a second one. The last
pass writes the gradient, from reads that the caches serve. `pairs.py` has the parts.

In `Rows.taught`, a row has the teacher's peak; the logarithm in base 2 of its sum; the number that the gradient
subtracts (see `gradient`); and the logarithm in base 2 of the student's sum without temperature.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from llmfast_kernels import pairs
from llmfast_kernels import row as parts
from llmfast_kernels.cross_entropy import LEAST_BLOCK, row_terms, vectors
from llmfast_kernels.launch import FP_FUSION, Choice, Tile, cdiv, expect_contiguous, next_power_of_2, warps
from llmfast_kernels.teaching import CROSS_ENTROPY, TAUGHT, Divergence, TeacherRows
from llmfast_kernels.terms import Rows, Softmax, Targets, Terms, Upstream

# Two rows take twice the registers of one: fewer threads than for one row, which may have more of them.
FEW_TERMS = Choice(Tile(8, 512), Tile(8, 256), Tile(16, 256))
MANY_TERMS = Choice(Tile(8, 128), Tile(8, 256))
BACKWARD = Choice(Tile(8, 256), Tile(8, 128), Tile(8, 512))
SIZES = ["V", "row_width", "v_start", "logits_stride_n", "teacher_stride_n", "d_logits_stride_n", "ignore_index"]
BY_ROW = ["targets_ptr", "token_weights_ptr", "grad_scale_ptr", "d_loss_ptr"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=BY_ROW)
def distillation_kernel(
    # in
    logits_ptr,  # (N, row_width)
    targets_ptr,  # (N,) int32 or int64
    token_weights_ptr,  # (N,) f32, or None for 1
    grad_scale_ptr,  # () f32 that multiplies the gradient, or None for 1
    terms,  # RowTerms
    weights,  # Weights
    teacher,  # Given
    # out
    rows,  # Rows
    d_logits_ptr,  # (N, row_width), may be logits_ptr; or None
    # sizes
    V,
    row_width,  # columns of the student's buffers, >= V; those from V on are padding
    # strides
    logits_stride_n,
    teacher_stride_n,
    d_logits_stride_n,
    # scalars
    ignore_index,
    # flags
    KIND: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    # tile
    BLOCK_V: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,  # elements of the student's rows that one access may move
    VECTOR_TAIL: tl.constexpr,  # whether row_width is a multiple of it too
    TEACHER_VECTOR: tl.constexpr,  # the same of the teacher's rows
):
    n = tl.program_id(0).to(tl.int64)  # N * V can pass 2**31
    if VECTOR_TAIL:
        row_width = parts.known_multiple(row_width, VECTOR)
    row = parts.Row(logits_ptr + n * parts.known_multiple(logits_stride_n, VECTOR), terms, V, row_width)
    values = teacher.ptr + n * parts.known_multiple(teacher_stride_n, TEACHER_VECTOR)
    taught = parts.Row(values, teacher, V, V)  # `Given` names its terms as `read_logits` does
    d_logits = d_logits_ptr
    if d_logits_ptr is not None:
        d_logits += n * parts.known_multiple(d_logits_stride_n, VECTOR)
    y = parts.read_targets(n, targets_ptr, V, ignore_index, 1)
    if tl.max(y, axis=0) == parts.IGNORED:
        pairs.store_ignored(row, n, rows, d_logits_ptr, d_logits, BLOCK_V)
        return

    weights = pairs.of_row(weights, n)
    here = y >= 0
    target = pairs.Target(y, parts.read_logits(row, y, here, here), pairs.read_teacher(taught, y, here, PROBABILITIES))
    running = pairs.fold_pairs(
        row, taught, weights, THREADS, KIND=KIND, PROBABILITIES=PROBABILITIES, BLOCK_V=BLOCK_V, VECTOR=VECTOR
    )
    both = pairs.joined(running, weights, PROBABILITIES)
    log_total = tl.log2(both.total)
    teacher_log_total = 0.0 if PROBABILITIES else tl.log2(both.teacher_total)
    frame = pairs.Frame(both.peak, log_total, both.teacher_peak, teacher_log_total)
    if KIND == pairs.MIXED:
        soft, centre = pairs.mixed_divergence(
            row, taught, frame, weights, THREADS, PROBABILITIES=PROBABILITIES, BLOCK_V=BLOCK_V, VECTOR=VECTOR
        )
    else:
        soft, centre = pairs.kl_divergence(running, both, weights, KIND, PROBABILITIES)
    if KIND == pairs.CROSS_ENTROPY:
        soft, centre = parts.add_terms_of_lse(soft, centre, both.peak, log_total * parts.LN2, terms)

    # Without TRITON_DEBUG=1 nothing asserts: a row with an unknown target becomes NaN, in backward too.
    centre *= tl.where(tl.max(y, axis=0) == parts.UNKNOWN, float("nan"), 1.0)
    loss = weights.soft * tl.where(centre == centre, soft, centre)
    hard_log_total = tl.log2(both.untempered)
    if weights.hard is not None:
        below = tl.sum(tl.where(here, target.x - both.peak, 0.0), axis=0)
        loss += weights.hard * tl.fma(hard_log_total, parts.LN2, -below)
    t = 1.0
    if token_weights_ptr is not None:
        t = tl.load(token_weights_ptr + n)
    tl.store(rows.loss + n, loss * t)
    tl.store(rows.peak + n, both.peak)
    tl.store(rows.total + n, both.total)
    tl.store(rows.taught + n * pairs.NUMBERS, both.teacher_peak)
    tl.store(rows.taught + n * pairs.NUMBERS + 1, teacher_log_total)
    tl.store(rows.taught + n * pairs.NUMBERS + 2, centre)
    tl.store(rows.taught + n * pairs.NUMBERS + 3, hard_log_total)

    if d_logits_ptr is not None:
        if grad_scale_ptr is not None:
            t *= tl.load(grad_scale_ptr)
        hard = None if weights.hard is None else t * weights.hard
        factor = t * pairs.soft_factor(weights, KIND)
        slopes = pairs.Slopes(centre, factor, hard, hard_log_total)
        pairs.store_gradients(
            row, taught, d_logits, frame, slopes, weights, KIND=KIND, PROBABILITIES=PROBABILITIES, BLOCK_V=BLOCK_V
        )
        if weights.hard is not None:
            pairs.store_target_gradient(
                row, target, d_logits, frame, slopes, weights, KIND=KIND, PROBABILITIES=PROBABILITIES
            )


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=BY_ROW)
def distillation_backward_kernel(
    # in
    logits_ptr,  # (N, row_width)
    targets_ptr,  # (N,) int32 or int64
    token_weights_ptr,  # (N,) f32, or None for 1
    terms,  # RowTerms
    weights,  # Weights
    teacher,  # Given
    softmax,  # Softmax of all columns
    d_loss_ptr,  # (N,) f32
    # out
    d_logits_ptr,  # (N, row_width); may be logits_ptr
    # sizes
    V,  # classes in the buffers
    row_width,
    v_start,  # class of the buffers' first column
    # strides
    logits_stride_n,
    teacher_stride_n,
    d_logits_stride_n,
    # scalars
    ignore_index,
    # flags
    KIND: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    # tile
    BLOCK_V: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTOR_TAIL: tl.constexpr,
    TEACHER_VECTOR: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    if VECTOR_TAIL:
        row_width = parts.known_multiple(row_width, VECTOR)
    row = parts.Row(logits_ptr + n * parts.known_multiple(logits_stride_n, VECTOR), terms, V, row_width)
    values = teacher.ptr + n * parts.known_multiple(teacher_stride_n, TEACHER_VECTOR)
    taught = parts.Row(values, teacher, V, V)  # `Given` names its terms as `read_logits` does
    d_logits = d_logits_ptr + n * parts.known_multiple(d_logits_stride_n, VECTOR)
    start = tl.program_id(1) * BLOCK_V
    y = tl.load(targets_ptr + n).to(tl.int64)
    if y == ignore_index:  # zeros, even if the upstream gradient or logits are not finite
        out = parts.Gradient(d_logits, None, None)
        if start + BLOCK_V <= V:
            parts.store_zeros(row, start, out, TAIL=False, BLOCK_V=BLOCK_V)
        else:
            parts.store_zeros(row, start, out, TAIL=True, BLOCK_V=BLOCK_V)
        return

    weights = pairs.of_row(weights, n)
    t = tl.load(d_loss_ptr + n)
    if token_weights_ptr is not None:
        t *= tl.load(token_weights_ptr + n)
    hard = None if weights.hard is None else t * weights.hard
    numbers = softmax.taught + n * pairs.NUMBERS
    frame = pairs.Frame(
        tl.load(softmax.peak + n), tl.log2(tl.load(softmax.total + n)), tl.load(numbers), tl.load(numbers + 1)
    )
    slopes = pairs.Slopes(tl.load(numbers + 2), t * pairs.soft_factor(weights, KIND), hard, tl.load(numbers + 3))
    column = tl.arange(0, 1) + (y - v_start)
    here = (column >= start) & (column < start + BLOCK_V) & (column < V)
    own = (weights.hard is not None) & (tl.max(here.to(tl.int32), axis=0) > 0)
    x = parts.read_logits(row, column, here, here)
    target = pairs.Target(tl.where(here, column, -1), x, pairs.read_teacher(taught, column, here, PROBABILITIES))
    if own:
        tl.debug_barrier()  # d_logits may be logits: read the target's before any thread overwrites it
    if start + BLOCK_V <= V:
        pairs.store_gradient(
            row,
            taught,
            start,
            d_logits,
            frame,
            slopes,
            weights,
            KIND=KIND,
            PROBABILITIES=PROBABILITIES,
            TAIL=False,
            BLOCK_V=BLOCK_V,
        )
    else:
        pairs.store_gradient(
            row,
            taught,
            start,
            d_logits,
            frame,
            slopes,
            weights,
            KIND=KIND,
            PROBABILITIES=PROBABILITIES,
            TAIL=True,
            BLOCK_V=BLOCK_V,
        )
    if weights.hard is not None:
        if own:
            pairs.store_target_gradient(
                row, target, d_logits, frame, slopes, weights, KIND=KIND, PROBABILITIES=PROBABILITIES
            )


def tile(V: int, *, many_terms: bool) -> dict[str, int]:
    """Choose block, threads and warps for pairs of rows of `V` logits. One program processes one pair.

    Mixtures, targets, caps and biases take more registers per thread.
    """
    elements, threads = (MANY_TERMS if many_terms else FEW_TERMS).chosen
    block = min(max(next_power_of_2(V), LEAST_BLOCK), threads * elements)
    return {"BLOCK_V": block, "THREADS": block // elements, "num_warps": warps(block // elements)}


def backward_tile(V: int) -> dict[str, int]:
    """Choose block and warps for the backward kernel, which is elementwise."""
    elements, threads = BACKWARD.chosen
    block = min(max(next_power_of_2(V), LEAST_BLOCK), threads * elements)
    return {"BLOCK_V": block, "num_warps": warps(block // elements)}


def arguments(
    logits: Tensor,
    targets: Targets,
    terms: Terms,
    teacher: TeacherRows,
    divergence: Divergence,
    *,
    V: int | None,
    d_logits: Tensor | None,
) -> dict[str, Any]:
    """Return the arguments that both kernels take."""
    values = teacher.probabilities if teacher.logits is None else teacher.logits
    if values is None or values.stride(1) != 1 or logits.stride(1) != 1:
        raise ValueError("logits, and the teacher's logits or probabilities, must have stride 1 along V")
    tensors = {"targets": targets.classes, "token_weights": targets.token_weights}
    own, temperatures = teacher.terms, targets.temperatures
    expect_contiguous(
        **tensors, temperatures=temperatures, bias=terms.bias, teachers_bias=own.bias, class_weights=own.class_weights
    )
    row_width = logits.shape[1]
    V = V or row_width
    if row_width > (most := (V // LEAST_BLOCK + 1) * LEAST_BLOCK):
        raise ValueError(f"logits must have at most {most} columns for V={V}; got {row_width}")
    beta, T = divergence.beta, divergence.temperature
    inverse, temperature = (1.0 / T, T) if T != 1.0 else (None, None)
    kind = {0.0: pairs.FORWARD_KL, 1.0: pairs.REVERSE_KL}.get(beta, pairs.MIXED)
    access = vectors(row_width, logits, d_logits)
    # Threads that read more neighbours of the teacher's row than of the student's would exchange them in every tile.
    teacher_vector = min(vectors(V, values, None)["VECTOR"], access["VECTOR"])
    if not divergence.entropy:
        kind = pairs.CROSS_ENTROPY
    class_weights = None if own.class_weights is None else own.class_weights[own.v_start :]
    smoothing = own.label_smoothing
    smoothed = (None, None) if smoothing is None else (1.0 - smoothing, smoothing / own.V)
    return {
        "logits_ptr": logits,
        **{f"{name}_ptr": t for name, t in tensors.items()},
        "terms": parts.RowTerms(None, None, *row_terms(terms)),
        "weights": pairs.Weights(
            divergence.soft_weight,
            divergence.hard_weight,
            beta if kind is pairs.MIXED else None,
            inverse,
            temperature,
            temperatures,
        ),
        "teacher": pairs.Given(values, own.bias, own.logit_scale, own.softcap, class_weights, *smoothed),
        **{"V": V, "row_width": row_width, "logits_stride_n": logits.stride(0)},
        **{"teacher_stride_n": values.stride(0), "d_logits_stride_n": 0 if d_logits is None else d_logits.stride(0)},
        **{"ignore_index": terms.ignore_index, "KIND": kind.value, "PROBABILITIES": teacher.logits is None},
        **access,
        "TEACHER_VECTOR": teacher_vector,
        **FP_FUSION,
    }


def distillation(
    logits: Tensor,  # (N, V), or (N, row_width) with padding from V on
    targets: Targets,  # (N, 1)
    terms: Terms,
    teacher: TeacherRows,  # logits or probabilities
    divergence: Divergence,
    *,
    V: int | None = None,
    d_logits: Tensor | None = None,  # (N, row_width), filled; may be `logits`
    grad_scale: Tensor | None = None,  # () f32
) -> Rows:
    """Return the loss, peak and total of every row, and what backward reads of its teacher.

    Fills `d_logits` with the gradient of grad_scale * sum(loss), and its padding with zeros.
    """
    loss, peak, total = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))
    rows = Rows(loss, peak, total, None, None, taught=loss.new_empty((len(logits), TAUGHT)))
    if len(logits) > 0:
        given = arguments(logits, targets, terms, teacher, divergence, V=V, d_logits=d_logits)
        own = teacher.terms
        extra = (terms.softcap, terms.bias, own.softcap, own.bias, own.class_weights, divergence.hard_weight)
        many_terms = 0 < divergence.beta < 1 or any(t is not None for t in extra)
        with device_of(logits):
            distillation_kernel[(len(logits),)](
                rows=rows,
                d_logits_ptr=d_logits,
                grad_scale_ptr=grad_scale,
                **given,
                **tile(given["V"], many_terms=many_terms),
            )
    return rows


def distillation_backward(
    logits: Tensor,  # (N, V), or (N, row_width) with padding from V on
    targets: Targets,  # (N, 1)
    terms: Terms,
    teacher: TeacherRows,  # logits or probabilities
    divergence: Divergence,
    softmax: Softmax,  # of all columns
    upstream: Upstream,
    *,
    V: int | None = None,
    d_logits: Tensor,  # (N, row_width), filled; may be `logits`
) -> None:
    """Fill `d_logits` with the gradient of sum(upstream.loss * loss), and its padding with zeros."""
    N, row_width = logits.shape
    if N == 0:
        return
    expect_contiguous(peak=softmax.peak, total=softmax.total, taught=softmax.taught, d_loss=upstream.loss)
    given = arguments(logits, targets, terms, teacher, divergence, V=V, d_logits=d_logits)
    meta = backward_tile(row_width)
    with device_of(logits):
        distillation_backward_kernel[(N, cdiv(row_width, meta["BLOCK_V"]))](
            softmax=softmax, d_loss_ptr=upstream.loss, d_logits_ptr=d_logits, v_start=terms.v_start, **given, **meta
        )


def dense_cross_entropy(
    logits: Tensor,  # (N, V), or (N, row_width) with padding from V on
    targets: Targets,  # probabilities
    terms: Terms,
    *,
    V: int | None = None,
    d_logits: Tensor | None = None,  # (N, row_width), filled; may be `logits`
    grad_scale: Tensor | None = None,  # () f32
) -> Rows:
    """Return the rows of a cross-entropy with probabilities of all classes; fill `d_logits` as `distillation` does."""
    own, teacher = dense(logits, targets, terms, V)
    return distillation(logits, targets, own, teacher, CROSS_ENTROPY, V=V, d_logits=d_logits, grad_scale=grad_scale)


def dense_cross_entropy_backward(
    logits: Tensor,  # (N, V), or (N, row_width) with padding from V on
    targets: Targets,  # probabilities
    terms: Terms,
    softmax: Softmax,  # of all columns
    upstream: Upstream,
    *,
    V: int | None = None,
    d_logits: Tensor,  # (N, row_width), filled; may be `logits`
) -> None:
    """Fill `d_logits` with the gradient of sum(upstream.loss * loss), and its padding with zeros."""
    own, teacher = dense(logits, targets, terms, V)
    distillation_backward(logits, targets, own, teacher, CROSS_ENTROPY, softmax, upstream, V=V, d_logits=d_logits)


def dense(logits: Tensor, targets: Targets, terms: Terms, V: int | None) -> tuple[Terms, TeacherRows]:
    """Return the terms of the logits, and the probabilities of their columns as a teacher's."""
    assert targets.probabilities is not None
    columns = slice(terms.v_start, terms.v_start + (V or logits.shape[1]))
    theirs = Terms(
        terms.V, v_start=terms.v_start, class_weights=terms.class_weights, label_smoothing=terms.label_smoothing
    )
    own = replace(terms, class_weights=None, class_weight_sums=None, label_smoothing=None)
    return own, TeacherRows(theirs, probabilities=targets.probabilities[:, columns])
