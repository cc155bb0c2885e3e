"""Cross-entropy of `hidden @ weight.T` in chunks of tokens: the logits never exist at once.

One slab of logits is reused by all chunks. The row kernel turns it, in place, into the gradient with respect to the
logits (not yet divided by any count), two GEMMs turn that into the gradients of `hidden` and `weight`, and a last pass
multiplies by upstream / count while casting. What costs is reading W and updating dW once a chunk, so the fewer
chunks the better: the budget is in bytes, and decides how many rows a chunk has.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast._checks import describe, expect
from llmfast._dispatch import eager, use_kernels
from llmfast.losses.rows import RowOps, row_ops
from llmfast.losses.targets import (
    Reduction,
    check_reduction,
    check_targets,
    denominator,
    reciprocal,
    reduced,
    refuse_second_derivative,
    torch_cross_entropy,
)

# A slab larger than this saves nothing on a GPU: at Llama-3's vocabulary it holds 4096 rows, and the traffic of W and
# dW is an eighth of the GEMMs' time (modelled: 476 / rows on an H100). On a CPU the GEMMs are slower, so fewer rows do.
DEFAULT_BUDGET = {"cpu": 64 << 20}
DEFAULT_BUDGET_ELSEWHERE = 1 << 30

# Up to this many logits in all, a CPU is done with them before the bookkeeping of chunks is.
SMALL = 1 << 18


def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...)
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_valid: int | Tensor | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Cross-entropy of the logits `hidden @ weight.T`, without ever holding them all.

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64; any leading dimensions.
        weight: (V, D), of the same dtype; under autocast both are cast once to autocast's dtype.
        targets: (...), int64 or int32, in [0, V) or `ignore_index`.
        ignore_index: target value of tokens that count in neither the sum nor the mean.
        reduction: "mean" over the tokens that are not ignored, "sum", or "none" for one loss per token (its backward
            computes the logits a second time).
        num_valid: what the mean divides by instead, as an int or a one-element tensor: the number of valid tokens
            of the whole step under gradient accumulation or data parallelism.
        memory_budget: bytes that logits may take at any time; at least one row is always held. Default: 64 MiB on a
            CPU, 1 GiB elsewhere but never more than a tenth of the device's memory.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or (...) for "none". With nothing to average the mean is NaN
        and the gradients zero.

    Gradients are made in the forward pass, in float32 accumulation; only those that are needed. Backward with
    `retain_graph=True` works: the second time, they are computed again. Inside `torch.compile`, a CPU takes torch's own
    operations, which materialise the logits; the kernels are a break in the graph.

    Raises:
        ValueError, TypeError: as `cross_entropy`, or `hidden` and `weight` do not fit together.
    """
    expect(hidden.dim() >= 1 and hidden.shape[-1] > 0, f"hidden must be (..., D) with D > 0; got {describe(hidden)}")
    expect(
        weight.dim() == 2 and weight.shape[1] == hidden.shape[-1] and weight.shape[0] > 0,
        f"weight must be (V, {hidden.shape[-1]}) with V > 0; got {describe(weight)}",
    )
    expect(weight.device == hidden.device, f"weight must be on {hidden.device}; got {describe(weight)}")
    expect(memory_budget is None or memory_budget > 0, f"memory_budget must be positive; got {memory_budget}")
    check_targets(targets, hidden.shape[:-1], weight.shape[0], hidden.device, ignore_index)
    check_reduction(reduction, num_valid)
    dtype = _compute_dtype(hidden, weight)
    small = memory_budget is None and dtype == torch.float32 and targets.numel() * weight.shape[0] <= SMALL
    if (small or torch.compiler.is_compiling()) and not use_kernels(hidden):
        return torch_cross_entropy(F.linear(hidden, weight), targets, ignore_index, reduction, num_valid)
    return _chunked(hidden, weight, targets, ignore_index, reduction, num_valid, memory_budget, dtype)


@eager
def _chunked(hidden: Tensor, weight: Tensor, targets: Tensor, *options: Any) -> Tensor:
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), *options, torch.is_grad_enabled()
    )
    return loss.view(targets.shape) if loss.dim() else loss


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype inside autocast, else the one the inputs share."""
    for name, t in (("hidden", hidden), ("weight", weight)):
        if not t.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {describe(t)}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden and weight must share a dtype; got {describe(hidden)} and {describe(weight)}")
    return hidden.dtype


@dataclass(frozen=True)
class ChunkPlan:
    """How many rows of logits are alive at a time."""

    N: int
    V: int
    rows: int  # of a chunk; the last may have fewer
    row_width: int  # columns of the slab, V padded so that rows start aligned

    @staticmethod
    def make(N: int, V: int, row_bytes: int, row_width: int, budget: int) -> "ChunkPlan":
        """As few chunks as fit `budget`, of nearly equal size, in multiples of 16 rows where possible."""
        most = max(1, budget // row_bytes)
        chunks = max(1, -(-N // most))
        rows = max(1, -(-N // chunks))
        rounded = -(-rows // 16) * 16
        return ChunkPlan(N, V, rounded if rounded <= most else rows, row_width)

    def __iter__(self) -> Iterator[slice]:
        return (slice(start, min(start + self.rows, self.N)) for start in range(0, self.N, self.rows))


def default_budget(device: torch.device) -> int:
    """Bytes. A tenth of the memory there is, not of what happens to be free: chunking must not change between runs."""
    budget = DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET_ELSEWHERE)
    if device.type == "cuda":
        budget = min(budget, torch.cuda.get_device_properties(device).total_memory // 10)
    return budget


class Gradients(NamedTuple):
    hidden: Tensor | None  # (N, D) in the compute dtype
    weight: Tensor | None  # (V, D), float32 if chunks were summed


class Chunks:
    """One call's tensors in the compute dtype, and the loop over chunks of tokens."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, budget: int | None, dtype: torch.dtype
    ) -> None:
        self.hidden = hidden.to(dtype)  # (N, D)
        self.weight = weight.to(dtype)  # (V, D)
        self.targets = targets.contiguous()  # (N,)
        self.ignore_index = ignore_index
        self.ops: RowOps = row_ops(self.hidden)
        N, V = targets.shape[0], weight.shape[0]
        # Rows of a multiple of 128 bytes: aligned for the row kernel's 16-byte accesses and for the GEMMs' loads.
        # Plain torch wants no padding: its softmax would copy.
        pad = 128 // self.hidden.element_size() if use_kernels(self.hidden) else 1
        row_width = -(-V // pad) * pad
        row_bytes = row_width * self.hidden.element_size()
        self.plan = ChunkPlan.make(N, V, row_bytes, row_width, budget or default_budget(hidden.device))

    def losses(self, wants: tuple[bool, bool]) -> tuple[Tensor, Tensor, Gradients]:
        """Loss and lse, (N,), and the gradients of sum(loss) for the inputs that want one."""
        losses, lses, gradients = [], [], self._empty(wants)
        for rows, logits in self._logits():
            loss, lse = self.ops.cross_entropy(
                logits, self.targets[rows], V=self.plan.V, ignore_index=self.ignore_index,
                d_logits=logits if any(wants) else None,
            )  # fmt: skip
            losses.append(loss)
            lses.append(lse)
            self._backpropagate(rows, logits, gradients)
        if not losses:
            empty = self.hidden.new_empty(0, dtype=self._accumulate_dtype())
            return empty, empty, gradients
        return torch.cat(losses), torch.cat(lses), gradients

    def gradients(self, wants: tuple[bool, bool], lse: Tensor, d_loss: Tensor) -> Gradients:
        """The gradients of sum(d_loss * loss), from logits computed again."""
        gradients = self._empty(wants)
        for rows, logits in self._logits():
            self.ops.cross_entropy_backward(
                logits, self.targets[rows], lse[rows], d_loss[rows],
                V=self.plan.V, ignore_index=self.ignore_index, d_logits=logits,
            )  # fmt: skip
            self._backpropagate(rows, logits, gradients)
        return gradients

    def _logits(self) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk's rows with their logits, (rows, row_width), all in one slab."""
        slab = self.hidden.new_empty(self.plan.rows, self.plan.row_width)
        for rows in self.plan:
            logits = slab[: rows.stop - rows.start]
            torch.mm(self.hidden[rows], self.weight.T, out=logits[:, : self.plan.V])
            yield rows, logits

    def _empty(self, wants: tuple[bool, bool]) -> Gradients:
        """Buffers that the chunks fill; zeros where there is no chunk."""
        make = torch.empty_like if self.plan.N > 0 else torch.zeros_like
        # One chunk leaves nothing to accumulate, and its product may come rounded anyway.
        alone = self.plan.rows >= self.plan.N and not self._float32_products()
        dtype = self.weight.dtype if alone else self._accumulate_dtype()
        return Gradients(
            make(self.hidden, memory_format=torch.contiguous_format) if wants[0] else None,
            make(self.weight, dtype=dtype, memory_format=torch.contiguous_format) if wants[1] else None,
        )

    def _backpropagate(self, rows: slice, d_logits: Tensor, gradients: Gradients) -> None:
        d_logits = d_logits[:, : self.plan.V]
        if gradients.hidden is not None:
            torch.mm(d_logits, self.weight, out=gradients.hidden[rows])
        if gradients.weight is not None:
            self._add_product(gradients.weight, d_logits.T, self.hidden[rows], first=rows.start == 0)

    def _add_product(self, out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
        """out (+)= a @ b, accumulated in `out`'s dtype; the first chunk overwrites, so `out` needs no zeros."""
        if a.dtype == out.dtype:
            torch.mm(a, b, out=out) if first else out.addmm_(a, b)
        elif not self._float32_products():
            # Casting the matrices would make the GEMM several times slower, so each chunk's product is rounded once
            # and only their sum is float32.
            out.copy_(a @ b) if first else out.add_(a @ b)
        elif first:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        elif torch.__version__ >= "2.10":  # a TorchVersion: compared as versions are
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:  # addmm took no float32 to add to (pytorch#154086, mended by #167931)
            out.add_(torch.mm(a, b, out_dtype=out.dtype))

    def _float32_products(self) -> bool:
        """Whether low-precision matrices can be multiplied into a float32 result: on CUDA, not on CPUs or ROCm."""
        return self.hidden.is_cuda and torch.version.hip is None

    def _accumulate_dtype(self) -> torch.dtype:
        return torch.promote_types(self.hidden.dtype, torch.float32)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        targets: Tensor,  # (N,)
        ignore_index: int,
        reduction: Reduction,
        num_valid: int | Tensor | None,
        memory_budget: int | None,
        dtype: torch.dtype,
        grad_enabled: bool,  # in here it never is
    ) -> Tensor:
        chunks = Chunks(hidden, weight, targets, ignore_index, memory_budget, dtype)
        wants = (grad_enabled and ctx.needs_input_grad[0], grad_enabled and ctx.needs_input_grad[1])
        # The upstream gradient of mean and sum is one number, so their gradients can be made now and scaled later.
        now = wants if reduction != "none" else (False, False)
        loss, lse, gradients = chunks.losses(now)
        count = denominator(targets, ignore_index, num_valid, loss.dtype) if reduction == "mean" else None
        inverse = None if count is None else reciprocal(count)

        ctx.chunk_arguments = (ignore_index, memory_budget, dtype)
        ctx.wants, ctx.made = wants, gradients if any(now) else None
        if any(wants):
            ctx.save_for_backward(hidden, weight, targets, lse, inverse)
        return reduced(loss, reduction, count)

    @staticmethod
    def backward(ctx: Any, *d_losses: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (d_loss,) = d_losses
        hidden, weight, targets, lse, inverse = ctx.saved_tensors
        factor = d_loss if inverse is None else d_loss * inverse
        if ctx.made is not None:
            # Scaled in place, so what was made in forward is used up.
            (d_hidden, d_weight), ctx.made = ctx.made, None
            scale = row_ops(hidden).scale
            if d_hidden is not None:
                d_hidden = scale(d_hidden, factor)
            if d_weight is not None:
                same = d_weight.dtype == weight.dtype
                d_weight = scale(d_weight, factor, out=None if same else torch.empty_like(d_weight, dtype=weight.dtype))
        else:
            per_row = factor.to(lse.dtype).expand_as(lse).contiguous()
            d_hidden, d_weight = Chunks(hidden, weight, targets, *ctx.chunk_arguments).gradients(
                ctx.wants, lse, per_row
            )
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None, None, None, None, None, None, None,
        )  # fmt: skip
