"""Cross-entropy of `hidden @ weight.T`: the logits need never exist at once.

The plan (`plan.py`) says how many rows of logits do. In chunks of rows, one slab is reused: the row kernel turns
logits, in place, into their gradients (not yet divided by any count), two GEMMs turn those into the gradients of
`hidden` and `weight`, and a last pass multiplies by upstream / count while casting. What costs is reading W and
updating dW once a chunk, so the fewer chunks the better.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from llmfast._checks import describe, expect, overlaps
from llmfast._dispatch import (
    adds_into_float32,
    eager,
    expect_data,
    has_no_data,
    multiplies_into_float32,
    use_kernels,
)
from llmfast.losses.cross_entropy import contiguous, finish, with_stats
from llmfast.losses.parallel import ProcessGroup, group_size, local_weight, own_columns, parallel_rows, sum_over_ranks
from llmfast.losses.plain import times
from llmfast.losses.plan import LinearCrossEntropyPlan
from llmfast.losses.rows import row_ops
from llmfast.losses.targets import (
    NO_STATS,
    SMALL,
    LossStats,
    Options,
    OptionsGiven,
    Reduction,
    RowStats,
    denominator,
    per_row,
    reciprocal,
    reduced,
    refuse_second_derivative,
)
from llmfast_kernels.terms import GROUP, Rows, Softmax, Targets, Terms, Upstream, pack, unpack

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LinearCrossEntropyOptions(OptionsGiven, total=False):
    """Keyword arguments, for type checkers."""

    bias: Tensor | None
    memory_budget: int | Literal["auto"]
    slab_dtype: torch.dtype | None
    accumulate_into: Tensor | None
    grad_filter: float | None


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: "Unpack[LinearCrossEntropyOptions]",
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_stats: Literal[True],
    **options: "Unpack[LinearCrossEntropyOptions]",
) -> tuple[Tensor, LossStats]: ...
def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...) or (..., K)
    *,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_valid: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    class_weights: Tensor | None = None,  # (V,)
    token_weights: Tensor | None = None,  # (...)
    target_weights: Tensor | None = None,  # (K,) or (..., K)
    shift: int = 0,
    document_ids: Tensor | None = None,  # (...)
    return_stats: bool = False,
    process_group: "ProcessGroup | None" = None,
    vocab_size: int | None = None,
    memory_budget: int | Literal["auto"] = "auto",
    slab_dtype: torch.dtype | None = None,
    accumulate_into: Tensor | None = None,  # (V, D) float32
    grad_filter: float | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """Cross-entropy of the logits `hidden @ weight.T + bias`, without ever holding them all.

    All options of `cross_entropy` mean the same here; logits are softcap(logit_scale * (hidden @ weight.T + bias)).

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64; any leading dimensions.
        weight: (V, D), of the same dtype; under autocast both are cast once to autocast's dtype. A DTensor sharded on
            dim 0 is vocab-parallel if `hidden` is a DTensor replicated over its mesh, or `process_group` is given. With
            a plain `hidden` (FSDP2) it is gathered once, and its gradient averaged over the mesh and scattered.
        targets: (...), int64 or int32, in [0, V) or `ignore_index`; or (..., K), K targets for each token's logits.
        bias: (V,), any floating point dtype.
        num_valid: as in `cross_entropy`. An int below the number of tokens says besides that no more of them than that
            are valid, and so many rows are gathered before the matrix products, without waiting for the device.
            If more are valid the loss is NaN (ValueError on a CPU): to divide by something else, divide a sum.
        process_group: `weight` and `bias` hold only this rank's classes, in rank order, split as by `torch.chunk`.
            `hidden` is the same on all ranks and so is its gradient, which takes one more all-reduce, of (N, D).
        memory_budget: bytes that logits may take at any time; at least one row is always held. "auto": 64 MiB on a
            CPU, 1 GiB elsewhere but never more than a tenth of the device's memory. `LinearCrossEntropyPlan` shows what
            it leads to.
        slab_dtype: torch.float32 keeps the logits unrounded between the matrix product and the softmax: for low
            precision inputs with large logits, at 6 bytes a logit instead of 2.
        accumulate_into: a (V, D) float32 `main_grad` that the weight's gradient is added to in backward; `weight.grad`
            stays None. Not with `process_group` over DTensors.
        grad_filter: skip what 128 x 128 blocks of logits add to the gradients where none of their gradients (not yet
            divided by a count) reaches this, e.g. 2.4e-4. Deterministic, approximate, and wrong early in training: at
            initialisation all of them are 1 / V, below such a threshold, and nothing but targets would be learnt from.

    Returns:
        As `cross_entropy`. With nothing to average the mean is NaN and the gradients zero. Gradients of ignored tokens
        are zero, and so is what they add to the others, also where the upstream gradient is infinite or NaN.

    For mean and sum, gradients are made in the forward pass if the logits do not fit `memory_budget`; only those that
    are needed, in float32 accumulation. Losses per token, and gradients through `LossStats`, compute the logits twice
    then. Backward with `retain_graph=True` works: the second time, gradients are computed again. Inside
    `torch.compile` this is one operator, with `process_group`, DTensors or `accumulate_into` a break in the graph.

    Raises:
        ValueError, TypeError: as `cross_entropy`, or `hidden` and `weight` do not fit together.
    """
    expect(hidden.dim() >= 1 and hidden.shape[-1] > 0, f"hidden must be (..., D) with D > 0; got {describe(hidden)}")
    expect(
        weight.dim() == 2
        and weight.shape[1] == hidden.shape[-1]
        and (weight.shape[0] > 0 or process_group is not None),
        f"weight must be (V, {hidden.shape[-1]}) with V > 0; got {describe(weight)}",
    )
    expect(weight.device == hidden.device, f"weight must be on {hidden.device}; got {describe(weight)}")
    hidden, weight, bias, process_group, vocab_size = local_weight(hidden, weight, bias, process_group, vocab_size)
    if process_group is not None:
        expect_data(hidden, "process_group")
    own = weight.shape[0]
    V, columns = (own, slice(0, own)) if process_group is None else own_columns(process_group, own, vocab_size)
    if process_group is None and vocab_size not in (None, V):
        raise ValueError(f"vocab_size={vocab_size} needs a process_group")
    if memory_budget != "auto" and not memory_budget > 0:
        raise ValueError(f"memory_budget must be positive or 'auto'; got {memory_budget}")
    dtype = _compute_dtype(hidden, weight)
    if bias is not None:
        expect(bias.shape == (own,) and bias.device == hidden.device, f"bias must be ({own},); got {describe(bias)}")
    if slab_dtype not in (None, dtype, torch.float32):
        raise TypeError(f"slab_dtype must be torch.float32 or the inputs' dtype; got {slab_dtype}")
    if accumulate_into is not None:
        fits = accumulate_into.shape == weight.shape and accumulate_into.device == weight.device
        expect(fits, f"accumulate_into must be {describe(weight)}, in float32; got {describe(accumulate_into)}")
        expect(
            not overlaps(accumulate_into),
            f"accumulate_into must have memory for each element; got strides {accumulate_into.stride()}",
        )
        expect(
            weight.requires_grad or not torch.is_grad_enabled(),
            "accumulate_into is for the gradient of a weight that requires one",
        )
        if accumulate_into.dtype != torch.promote_types(dtype, torch.float32):
            raise TypeError(f"accumulate_into must be float32; got {describe(accumulate_into)}")
    if grad_filter is not None:
        if not grad_filter > 0:
            raise ValueError(f"grad_filter must be positive; got {grad_filter}")
        expect(reduction != "none", "grad_filter needs reduction 'mean' or 'sum'")
        expect(process_group is None, "grad_filter does not work with process_group")
    options = Options(
        ignore_index, reduction, num_valid, label_smoothing, z_loss, softcap, logit_scale, class_weights, token_weights,
        target_weights, shift, document_ids,
    )  # fmt: skip
    shape = hidden.shape[:-1]
    options.check(targets, shape, V, hidden.device)
    if accumulate_into is not None:
        expect_data(hidden, "accumulate_into")

    special = return_stats or grad_filter or accumulate_into is not None or process_group is not None
    if (
        not has_no_data(hidden) and not use_kernels(hidden) and dtype == torch.float32 and not special
        and memory_budget == "auto" and targets.numel() * V <= SMALL["hidden"] and options.are_torchs(targets, shape)
    ):  # fmt: skip
        return options.torch_cross_entropy(F.linear(hidden, weight, bias), targets)

    wide = torch.promote_types(dtype, torch.float32)
    call = Call(
        options.resolve(targets, shape, wide),
        options.terms(V, columns, wide),
        reduction, num_valid, return_stats, process_group, memory_budget, dtype, slab_dtype or dtype, accumulate_into,
        grad_filter,
    )  # fmt: skip
    rows_2d = hidden.reshape(-1, hidden.shape[-1])
    loss, stats = _on_valid_rows(rows_2d, weight, bias, call)
    return finish(loss, stats, call.targets, ignore_index, shape, squeeze=targets.dim() == len(shape))


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype inside autocast, else the one the inputs share."""
    for name, t in (("hidden", hidden), ("weight", weight)):
        if not t.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {describe(t)}")
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # a meta device has none
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden and weight must share a dtype; got {describe(hidden)} and {describe(weight)}")
    return hidden.dtype


@dataclass(frozen=True)
class Call:
    """What one call asks for, beside the tensors that get gradients."""

    targets: Targets
    terms: Terms  # without the bias
    reduction: Reduction
    num_valid: int | Tensor | None
    stats: bool
    group: Any
    budget: int | Literal["auto"]
    dtype: torch.dtype  # of the matrix products
    slab_dtype: torch.dtype
    accumulate_into: Tensor | None = None
    grad_filter: float | None = None

    def plan(self, hidden: Tensor, weight: Tensor, wants: tuple[bool, bool]) -> LinearCrossEntropyPlan:
        kernels = use_kernels(hidden) and self.dtype != torch.float64
        return LinearCrossEntropyPlan.make(
            hidden.shape[0], hidden.shape[1], weight.shape[0], dtype=self.dtype, slab_dtype=self.slab_dtype,
            weight_dtype=weight.dtype, device=hidden.device, memory_budget=self.budget, reduction=self.reduction,
            wants=wants, kernels=kernels, filtered=self.grad_filter is not None,
            widest=0 if self.group is None else -(-self.terms.V // group_size(self.group)),
            float32_products=multiplies_into_float32(hidden.device, self.dtype),
        )  # fmt: skip


def _on_valid_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, RowStats | None]:
    """The loss, over the rows that count alone where their number is known on the host."""
    classes, ignore_index = call.targets.classes, call.terms.ignore_index
    N = classes.shape[0]
    hint = call.num_valid if isinstance(call.num_valid, int) and not isinstance(call.num_valid, bool) else None
    on_cpu = classes.device.type == "cpu" and not has_no_data(classes) and not use_kernels(hidden)
    if N == 0 or (not on_cpu and (hint is None or hint >= N)):
        return _dispatch(hidden, weight, bias, call)
    valid = (classes != ignore_index).any(1)
    count = valid.sum()
    if on_cpu:
        size = int(count)
        if hint is not None:
            expect(size <= hint, f"num_valid={hint}, but {size} tokens are valid; to divide otherwise, divide a sum")
        if size == N:
            return _dispatch(hidden, weight, bias, call)
    else:
        assert hint is not None
        size = hint
    index = torch.nonzero_static(valid, size=size, fill_value=0)[:, 0]
    surplus = torch.arange(size, dtype=torch.int64, device=count.device) >= count  # rows gathered in vain
    targets = call.targets[index]
    targets = replace(targets, classes=targets.classes.masked_fill(surplus[:, None], ignore_index))
    loss, stats = _dispatch(hidden.index_select(0, index), weight, bias, replace(call, targets=targets))
    home = torch.where(surplus, N, index)  # those end beyond the last row

    def spread(t: Tensor, empty: float) -> Tensor:
        return t.new_full((N + 1,), empty).index_copy(0, home, t)[:N]

    poison = torch.where(count > size, torch.nan, 0.0)  # the rest of the rows would be lost
    loss = (spread(loss, 0.0) if loss.dim() else loss) + poison.to(loss.dtype)
    if stats is not None:
        token_loss, lse, entropy, argmax = stats
        stats = RowStats(spread(token_loss, 0.0), spread(lse, 0.0), spread(entropy, 0.0), spread(argmax, -1))
    return loss, stats


def _dispatch(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, RowStats | None]:
    if has_no_data(hidden) and call.group is None and call.accumulate_into is None:
        from llmfast.losses import operators

        return operators.linear_cross_entropy(hidden, weight, bias, call)
    return _planned(hidden, weight, bias, call)


@eager
def _planned(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, RowStats | None]:
    return with_stats(_LinearCrossEntropy.apply(hidden, weight, bias, call, torch.is_grad_enabled()))


class Gradients(NamedTuple):
    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,) float32


class Loop:
    """One call's tensors in the compute dtype, cut by a plan."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call, plan: LinearCrossEntropyPlan,
        wants_bias: bool,
    ) -> None:  # fmt: skip
        self.hidden = hidden.to(plan.dtype)  # (N, D)
        self.weight = weight.to(plan.dtype)  # (V, D)
        if call.grad_filter is not None:  # torch's products take any strides, the filtered one does not
            self.hidden, self.weight = self.hidden.contiguous(), self.weight.contiguous()
        self.call, self.plan, self.wants_bias = call, plan, wants_bias
        self.terms = call.terms if bias is None else replace(call.terms, bias=bias.detach().contiguous())
        self.ops = row_ops(self.hidden)

    def forward(self, *, gradients: bool) -> tuple[Rows, Gradients, Tensor | None]:
        """Rows, the gradients of sum(loss) if they are to be made now, and the logits if they are to be kept."""
        plan, call = self.plan, self.call
        made = self._empty_gradients() if gradients else Gradients(None, None, None)
        parts: list[Rows] = []
        # Other ranks may have more classes, and wider rows.
        logits = slab = self._slab(min(plan.rows, plan.N), plan.row_width)[:, : plan.padded(plan.V)]
        low = slab if slab.dtype == plan.dtype or not gradients else slab.new_empty(slab.shape, dtype=plan.dtype)
        for rows in plan:
            n = rows.stop - rows.start
            logits = slab[:n]
            self._logits(self.hidden[rows], self.weight, out=logits[:, : plan.V])
            d_logits = low[:n] if gradients else None
            targets = call.targets[rows]
            if call.group is not None:
                part = parallel_rows(
                    self.ops, logits, targets, self.terms, call.group, V=plan.V, entropy=call.stats, argmax=call.stats
                )
                if d_logits is not None and plan.V > 0:
                    upstream = Upstream(torch.ones_like(part.loss))
                    self.ops.cross_entropy_backward(
                        logits, targets, self.terms, part.softmax, upstream, V=plan.V, d_logits=d_logits
                    )
                alive = None
            else:
                filtered = gradients and call.grad_filter is not None
                alive = slab.new_empty(n, plan.row_width // GROUP, dtype=torch.int8) if filtered else None
                part = self.ops.cross_entropy(
                    logits, targets, self.terms, V=plan.V, entropy=call.stats, argmax=call.stats, d_logits=d_logits,
                    alive=alive, threshold=call.grad_filter if filtered else None,
                )  # fmt: skip
            parts.append(part)
            if d_logits is not None:
                self._backpropagate(rows, d_logits[:, : plan.V], made, alive)
        return (
            _joined(parts, self._empty_rows()),
            self._over_ranks(made),
            logits if plan.mode == "materialise" else None,
        )

    def backward(
        self,
        logits: Tensor | None,
        softmax: Softmax,
        upstream: Upstream,
    ) -> Gradients:
        """Return the gradients that `upstream` becomes, from `logits` or from new ones."""
        plan, call = self.plan, self.call
        made = self._empty_gradients()
        slab = self._slab(plan.N, plan.backward_width) if logits is None else logits
        low = slab if slab.dtype == plan.dtype else slab.new_empty(slab.shape, dtype=plan.dtype)
        for columns in plan.column_slabs():
            width, weight = columns.stop - columns.start, self.weight[columns]
            block, d_block = (t[:, : plan.padded(width)] for t in (slab, low))
            if logits is None:
                self._logits(self.hidden, weight, out=block[:, :width])
            terms = self.terms.columns(columns)
            self.ops.cross_entropy_backward(block, call.targets, terms, softmax, upstream, V=width, d_logits=d_block)
            d_logits = d_block[:, :width]
            if made.hidden is not None:
                self._product(d_logits, weight, out=made.hidden, add=columns.start > 0)
            if made.weight is not None:
                add = call.accumulate_into is not None
                self._product(d_logits.T, self.hidden, out=made.weight[columns], add=add)
            if made.bias is not None:
                torch.sum(d_logits, 0, dtype=made.bias.dtype, out=made.bias[columns])
        return self._over_ranks(made)

    def _slab(self, rows: int, width: int) -> Tensor:
        return self.hidden.new_empty(rows, width, dtype=self.plan.slab_dtype)

    def _empty_rows(self) -> Rows:
        empty = self.hidden.new_empty(0, dtype=self.plan.accumulate_dtype)
        return Rows(empty, empty, empty, *((empty, empty.long()) if self.call.stats else (None, None)))

    def _empty_gradients(self) -> Gradients:
        """Buffers that the products fill; zeros where there is none."""
        plan = self.plan
        make = torch.empty_like if plan.N > 0 and plan.V > 0 else torch.zeros_like
        summed = plan.mode == "recompute" or self.call.group is not None
        d_hidden = d_weight = d_bias = None
        if plan.wants[0]:
            dtype = plan.accumulate_dtype if summed else plan.dtype
            d_hidden = make(self.hidden, dtype=dtype, memory_format=torch.contiguous_format)
        if plan.wants[1] and self.call.accumulate_into is not None and plan.mode != "chunk":
            d_weight = self.call.accumulate_into  # chunks' gradients wait for the count
        elif plan.wants[1]:
            d_weight = make(self.weight, dtype=plan.weight_gradient_dtype, memory_format=torch.contiguous_format)
        if self.wants_bias:
            d_bias = self.hidden.new_zeros(plan.V, dtype=plan.accumulate_dtype)
        return Gradients(d_hidden, d_weight, d_bias)

    def _backpropagate(self, rows: slice, d_logits: Tensor, made: Gradients, alive: Tensor | None) -> None:
        """What a chunk of rows adds."""
        first = rows.start == 0
        if made.bias is not None:
            made.bias.add_(d_logits.sum(0, dtype=made.bias.dtype))
        if alive is None:
            if made.hidden is not None:
                self._product(d_logits, self.weight, out=made.hidden[rows])
            if made.weight is not None:
                self._product(d_logits.T, self.hidden[rows], out=made.weight, add=not first)
            return
        # Blocks of GROUP rows and columns.
        n, groups = alive.shape
        blocks = F.pad(alive, (0, 0, 0, -n % GROUP)).view(-1, GROUP, groups).amax(1)
        if use_kernels(d_logits):
            from llmfast_kernels.filtered_matmul import filtered_matmul

            if made.hidden is not None:
                filtered_matmul(d_logits, self.weight, blocks, out=made.hidden[rows])
            if made.weight is not None:
                filtered_matmul(d_logits.T, self.hidden[rows], blocks.T, out=made.weight, add=not first)
        else:
            keep = blocks.repeat_interleave(GROUP, 0)[:n].repeat_interleave(GROUP, 1)[:, : d_logits.shape[1]]
            self._backpropagate(rows, d_logits * keep, made._replace(bias=None), None)

    def _logits(self, hidden: Tensor, weight: Tensor, *, out: Tensor) -> None:
        if out.dtype != hidden.dtype and not self.plan.float32_products:
            # Slow, but the caller asked for unrounded logits.
            torch.mm(hidden.to(out.dtype), weight.T.to(out.dtype), out=out)
        else:
            self._product(hidden, weight.T, out=out)

    def _product(self, a: Tensor, b: Tensor, *, out: Tensor, add: bool = False) -> None:
        """Put a @ b into `out`, or add it there, accumulated in its dtype.

        Every product here says where it goes: autocast leaves those alone, and would round the others.
        """
        if a.dtype == out.dtype:
            out.addmm_(a, b) if add else torch.mm(a, b, out=out)
        elif not self.plan.float32_products:
            # Casting the matrices would make the GEMM several times slower, so each chunk's product is rounded once and
            # only their sum is float32.
            product = torch.mm(a, b, out=a.new_empty(out.shape))
            out.add_(product) if add else out.copy_(product)
        elif not add:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        elif adds_into_float32(out.device, a.dtype):
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            out.add_(torch.mm(a, b, out_dtype=out.dtype, out=torch.empty_like(out)))

    def _over_ranks(self, made: Gradients) -> Gradients:
        """Every rank has its columns' part of the hidden states' gradient."""
        if self.call.group is not None and made.hidden is not None:
            sum_over_ranks(made.hidden, self.call.group)
        return made


def _joined(parts: list[Rows], empty: Rows) -> Rows:
    if len(parts) <= 1:
        return parts[0] if parts else empty

    def join(name: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        return None if columns[0] is None else torch.cat(columns)

    return Rows(*(join(name) for name in Rows._fields))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        call: Call,
        grad_enabled: bool,  # in here it never is
    ) -> tuple[Tensor | None, ...]:
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        plan = call.plan(hidden, weight, (needs[0], needs[1]))
        loop = Loop(hidden, weight, bias, call, plan, needs[2])
        now = any(needs) and plan.mode == "chunk" and call.reduction != "none"
        rows, made, logits = loop.forward(gradients=now)
        count = None
        if call.reduction == "mean":
            count = denominator(call.targets, call.terms, call.num_valid, plan.accumulate_dtype)
        inverse = None if count is None else reciprocal(count)

        ctx.set_materialize_grads(False)
        if any(needs):
            tensors, ctx.numbers = pack(call.targets, call.terms)
            ctx.save_for_backward(hidden, weight, bias, rows.peak, rows.total, rows.entropy, inverse, *tensors)
            ctx.call, ctx.plan, ctx.needs = call, plan, needs
            ctx.made, ctx.logits = made if now else None, logits
            cast = plan.mode != "chunk" and (loop.hidden is not hidden or loop.weight is not weight)
            ctx.cast = (loop.hidden, loop.weight) if cast else None
        loss = reduced(rows.loss, call.reduction, count)
        if not call.stats:
            return loss, *NO_STATS
        told = RowStats.of(rows, loop.ops.lse(rows), loss)
        ctx.mark_non_differentiable(told.token_loss, told.argmax)
        return loss, *told

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        d_loss, _, d_lse, d_entropy, _ = upstream
        hidden, weight, bias, peak, total, entropy, inverse, *tensors = ctx.saved_tensors
        call: Call = ctx.call
        given = call.accumulate_into
        if ctx.made is not None and d_lse is None and d_entropy is None:
            # Scaled in place, so what was made in forward is used up.
            made, ctx.made = ctx.made, None
            assert d_loss is not None  # or backward would not run
            factor = d_loss if inverse is None else d_loss * inverse
            d_hidden, d_weight, d_bias = scaled(made, factor, hidden, weight, given)
        else:
            plan: LinearCrossEntropyPlan = ctx.plan
            logits, ctx.logits, ctx.made = ctx.logits, None, None
            if logits is None and plan.mode != "recompute":
                plan = plan.cut("recompute")
            targets, terms = unpack(tensors, ctx.numbers)
            used_hidden, used_weight = (hidden, weight) if ctx.cast is None else ctx.cast
            call = replace(call, targets=targets, terms=terms)
            loop = Loop(used_hidden, used_weight, bias, call, plan, ctx.needs[2])
            given_back = Upstream(per_row(d_loss, inverse, peak), contiguous(d_lse), contiguous(d_entropy))
            d_hidden, d_weight, d_bias = loop.backward(logits, Softmax(peak, total, entropy), given_back)
            if given is not None:
                d_weight = None
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None, None,
        )  # fmt: skip


def scaled(made: Gradients, factor: Tensor, hidden: Tensor, weight: Tensor, given: Tensor | None) -> Gradients:
    """Gradients of sum(loss), times `factor`, in the parameters' dtypes; or the weight's added to `given`."""
    scale = row_ops(hidden).scale

    def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if t is None:
            return None
        return scale(t, factor, out=None if t.dtype == dtype else torch.empty_like(t, dtype=dtype))

    d_weight = None
    if made.weight is not None and given is not None:
        if given.is_contiguous():
            scale(made.weight, factor, out=given, add=True)
            increment_version(given)  # which a kernel does not do
        else:
            given.add_(scale(made.weight, factor))
    else:
        d_weight = cast(made.weight, weight.dtype)
    return Gradients(
        cast(made.hidden, hidden.dtype), d_weight, None if made.bias is None else times(made.bias, factor)
    )  # fmt: skip
