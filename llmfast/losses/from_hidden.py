"""Cross-entropy of `hidden @ weight.T`, a slab of logits at a time.

The plan (`plan.py`) says how rows and columns are cut, and `stages.py` does the work. In the row stage, one slab is
reused for chunks of rows: the row kernel turns logits, in place, into their gradients, and two matrix products turn
those into the gradients of `hidden` and of the first columns of `weight`. In backward, the upstream gradient is
multiplied in, while casting where that is needed, and the column stage finishes the other columns of `weight`.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from llmfast._dispatch import adds_into_float32, multiplies_into_float32, use_kernels
from llmfast.losses import plain, plain_dense
from llmfast.losses.loss import Found, Loss, Returned, Tensors
from llmfast.losses.parallel import group_size, sum_over_ranks
from llmfast.losses.plan import BudgetError, LinearCrossEntropyPlan, may_hold, planned, row_width
from llmfast.losses.products import Products
from llmfast.losses.stages import Gradients, Matrices, Stages, put_scaled
from llmfast.losses.ways import Call
from llmfast_kernels.teaching import TAUGHT
from llmfast_kernels.terms import Rows, Softmax, Upstream


@dataclass
class Kept:
    """State between forward and backward. The first backward pass scales the gradients and writes over the logits."""

    plan: LinearCrossEntropyPlan
    made: Gradients | None  # as far as they are made in the forward pass; `late_factor` is still to be multiplied in
    logits: Tensor | None  # (N, kept), or (N, padded V) if all are kept
    cast: Matrices | None  # spares casting the inputs again

    @property
    def usable(self) -> bool:
        """Return whether the plan can be followed: a second backward pass has nothing that was made or kept."""
        return self.made is not None or not (self.plan.way.in_forward or (self.plan.way.kept and self.logits is None))


@dataclass(frozen=True, kw_only=True)
class LinearCrossEntropy(Loss):
    """Cross-entropy of hidden @ weight.T + bias. The inputs are `hidden` (N, D), `weight` (V, D) and `bias` (V,)."""

    budget: int | None  # bytes to hold beyond inputs and gradients; None chooses
    held: int  # bytes of the budget that the caller has taken
    slab_dtype: torch.dtype
    weight_dtype: torch.dtype  # of the weight's gradient
    accumulate_dtype: torch.dtype  # of its sums over chunks
    grad_filter: float | None
    accumulate_into: Tensor | None = None
    functional: bool = False  # return all that backward needs, as an operator must: keep no logits

    @property
    def divides_early(self) -> bool:
        if self.grad_filter is not None:  # its threshold is for gradients of the sum
            return False
        # Plain torch takes a pass over the logits for it, which saves a rounding in bfloat16 and nothing in float32.
        worth = self.dtype == torch.bfloat16 or use_kernels(self.targets.classes, self.dtype)
        return worth and not self.is_half

    @property
    def traceable(self) -> bool:
        return self.group is None and self.accumulate_into is None

    def makes_gradients(self, inputs: Tensors, wants: tuple[bool, ...]) -> bool:
        if self.reduction == "none":
            return False
        if not (self.functional and wants[1]):
            return True
        # An operator returns the weight's gradient as a float32 sum of all columns, if there is room for that and for
        # all else that a slab of one row takes. An inequality does not fix a graph's number of rows.
        hidden, weight = cast(tuple[Tensor, Tensor], inputs[:2])
        (N, D), V, wide = hidden.shape, weight.shape[0], torch.promote_types(self.dtype, torch.float32)
        return may_hold(V * D * wide.itemsize + 100 * N + 40 * V + 4096, self.budget, weight.device)

    def fits(self, inputs: Tensors) -> bool:
        """Return whether this call, with gradients for all inputs that require them, keeps to the budget."""
        enabled = torch.is_grad_enabled()
        wants = tuple(enabled and t is not None and t.requires_grad for t in inputs)
        try:
            self._plan(inputs, wants, per_token=not self.makes_gradients(inputs, wants))
        except BudgetError:
            return False
        return True

    def forward(self, inputs: Tensors, wants: tuple[bool, ...]) -> Found:
        plan = self._plan(inputs, wants, per_token=not self.makes_gradients(inputs, wants))
        call, way = plan.call, plan.way
        stages = self._stages(plan, self._matrices(inputs), inputs)
        make = cache(partial(self._row_buffers, stages, wants)) if way.in_forward and any(wants) else None
        slab = self._slab(stages)
        logits = slab if plan.keeps_all else slab.new_empty(call.N, way.kept) if way.kept > 0 else None
        copied = None if plan.keeps_all else logits
        more = {"stats": self.stats, "logprobs": self.logprobs, "places": self.places}
        factor = None if make is None else self.early_factor
        results = _Results(plan, slab)
        for part in stages.forward(make, copied, slab, **more, grad_scale=factor):
            results.add(part)
            del part  # before its products are made
        del slab
        found = results.rows or self._no_rows(stages.matrices)
        made = None if make is None else make()
        if made is not None and made.hidden is not None and self.group is not None:
            sum_over_ranks(made.hidden, self.group)  # each rank has its columns' part
        later = any(wants) and (not way.in_forward or plan.column_share > 0)
        cast_now = later and any(t is not used for t, used in zip(inputs, stages.matrices))
        kept = Kept(plan, made, logits, stages.matrices if cast_now else None)
        return Found(found, found.lse if self.stats else None, kept)

    def backward(
        self, inputs: Tensors, wants: tuple[bool, ...], softmax: Softmax, returned: Returned, kept: Kept | None
    ) -> Tensors:
        if kept is not None and kept.made is not None and (returned.lse is not None or returned.entropy is not None):
            kept.made = kept.logits = None  # the gradient of the loss alone
        if kept is None or not kept.usable:
            cast_inputs = None if kept is None else kept.cast
            kept = Kept(self._plan(inputs, wants, per_token=True, keeps=False), None, None, cast_inputs)
        used = kept.made is None or kept.plan.column_share > 0
        matrices = kept.cast or (self._matrices(inputs) if used else Matrices(*cast(tuple[Tensor, Tensor], inputs[:2])))
        stages = self._stages(kept.plan, matrices, inputs)
        if kept.made is None:
            found = self._again(stages, wants, softmax, returned, kept)
        else:
            found = self._rest(stages, softmax, returned, kept)
        return tuple(None if g is None or t is None else g for g, t in zip(found, inputs))

    def _again(
        self, stages: Stages, wants: tuple[bool, ...], softmax: Softmax, returned: Returned, kept: Kept
    ) -> Gradients:
        """Make all gradients from logits that were kept, which are written over, or from new ones."""
        plan, call, way, hidden = stages.plan, stages.plan.call, stages.plan.way, stages.matrices.hidden
        new = hidden.new_empty if call.N > 0 and call.V > 0 else hidden.new_zeros  # where there is no product
        if len(softmax.peak) < call.N:
            results = _Results(plan, hidden)
            for part in stages.forward(None, None, self._slab(stages), stats=False):
                results.add(part)
                del part
            assert results.rows is not None  # there are rows
            softmax = results.rows.softmax
        upstream = returned.per_row(self.count, softmax.peak)
        into, later = self.accumulate_into, way.finished < call.N
        d_hidden = rest = sums = None
        d_weight = into if wants[1] else None
        summed = plan.sums_hidden and not call.ranks
        if wants[0] and not (summed and way.finished == 0):
            d_hidden = new(call.N, call.D, dtype=call.wide if call.ranks else call.hidden_dtype)
            rest = d_hidden[way.finished :]
        if wants[0] and summed:
            rest = new(call.N - way.finished, call.D, dtype=call.wide)
        if d_weight is None and way.summed > 0:
            columns = way.summed if plan.separate else call.V
            sums = new(columns, call.D, dtype=plan.sum_dtype)
        d_bias = new(call.V, dtype=call.wide).zero_() if wants[2] else None
        if way.finished > 0 and call.V > 0:
            finished = Gradients(d_hidden, sums if d_weight is None else d_weight, None if later else d_bias)
            stages.finish_rows(softmax, upstream, finished, add=into is not None)
            del finished
        if wants[1] and d_weight is None:
            d_weight = sums
            if sums is None or plan.separate:
                d_weight = new(call.V, call.D, dtype=self.weight_dtype)
            if d_weight is not None and sums is not None and d_weight is not sums:
                d_weight[: way.summed] = sums
        sums = None  # freed before the columns' slab is made
        if plan.column_share > 0:
            left = Gradients(rest if later else None, d_weight, d_bias if later else None)
            logits, kept.logits = kept.logits, None
            stages.finish_columns(softmax, upstream, logits, left, add=into is not None)
            del logits  # d_hidden is cast when the slabs are freed
        if summed and d_hidden is not None and rest is not None:
            d_hidden[way.finished :] = rest
        d_hidden = rest if d_hidden is None else d_hidden
        if d_hidden is not None and self.group is not None:
            sum_over_ranks(d_hidden, self.group)
        hidden_dtype, bias = call.hidden_dtype, stages.terms.bias
        return Gradients(
            None if d_hidden is None else d_hidden.to(hidden_dtype),
            d_weight if into is None else None,
            d_bias if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )

    def _rest(self, stages: Stages, softmax: Softmax, returned: Returned, kept: Kept) -> Gradients:
        """Multiply gradients that were made by what is upstream, and make those of the columns that are left."""
        assert returned.loss is not None and kept.made is not None  # or backward would not run
        plan, call, way, scale = stages.plan, stages.plan.call, stages.plan.way, stages.ops.scale
        made, kept.made, logits, kept.logits = kept.made, None, kept.logits, None
        factor, into, bias = self.late_factor(returned.loss), self.accumulate_into, stages.terms.bias
        d_hidden, sums, d_bias = made
        del made  # each is freed when its successor is there
        if d_hidden is not None:
            as_made = d_hidden.dtype == call.hidden_dtype
            out = None if as_made else d_hidden.new_empty(d_hidden.shape, dtype=call.hidden_dtype)
            d_hidden = scale(d_hidden, factor, out=out)
        if d_bias is not None and bias is not None:
            d_bias = plain.times(d_bias, factor).to(bias.dtype)
        d_weight = None
        if sums is not None:
            d_weight = sums
            if into is not None:
                d_weight = into
            elif plan.separate:
                d_weight = sums.new_empty(call.V, call.D, dtype=self.weight_dtype)
            if way.summed > 0:
                out = None if d_weight is sums else d_weight[: way.summed]
                put_scaled(stages.ops, sums[: way.summed], factor, out, add=into is not None)
        del sums
        if plan.column_share > 0:
            # float16 gradients must not be divided by a count before they are summed.
            like, later = softmax.peak, factor if call.is_half else None
            upstream = Upstream(torch.ones_like(like)) if call.is_half else returned.per_row(self.count, like)
            left = Gradients(None, d_weight, None)
            stages.finish_columns(softmax, upstream, logits, left, add=into is not None, factor=later)
        return Gradients(d_hidden, d_weight if into is None else None, d_bias)

    def _plan(
        self, inputs: Tensors, wants: tuple[bool, ...], *, per_token: bool, keeps: bool = True
    ) -> LinearCrossEntropyPlan:
        hidden, weight = cast(tuple[Tensor, Tensor], inputs[:2])
        (N, D), V, device, kernels = hidden.shape, weight.shape[0], hidden.device, use_kernels(hidden)
        copies = (t for t in (hidden, weight) if t.dtype != self.dtype or (self.grad_filter and not t.is_contiguous()))
        wide = torch.promote_types(self.dtype, torch.float32)
        kernels = kernels and self.dtype != torch.float64
        K = self.targets.classes.shape[1]
        widest = V if self.group is None else -(-self.terms.V // group_size(self.group))
        call = Call(
            N=N,
            D=D,
            V=widest,  # all ranks must take the same number of chunks
            dtype=self.dtype,
            slab_dtype=self.slab_dtype,
            hidden_dtype=hidden.dtype,
            weight_dtype=self.weight_dtype,
            accumulate_dtype=wide if self.functional else self.accumulate_dtype,
            wants=(wants[0], wants[1], wants[2]),
            row_width=row_width(widest, self.dtype, kernels, self.grad_filter is not None),
            per_token=per_token,
            kernels=kernels,
            filtered=self.grad_filter is not None and not per_token,
            ranks=self.group is not None,
            into=self.accumulate_into is not None,
            functional=self.functional and not per_token,
            stats=self.stats,
            float32_products=multiplies_into_float32(device, self.dtype),
            float32_sums=adds_into_float32(device, self.dtype),
            held=self.held + sum(t.shape[0] * D * self.dtype.itemsize for t in copies),
            keeps=keeps and not self.functional,
            ids=K if self.logprobs else 0,
            places=self.places,
            **({} if kernels else plain.space(self.terms, self.stats, K, wide)),
        )
        call = self._taught(call)
        return planned(call, "auto" if self.budget is None else self.budget, device).narrowed(V)

    def _taught(self, call: Call) -> Call:
        """Return the call with the cost of targets that are probabilities of all classes."""
        if self.targets.probabilities is None:
            return call
        space: dict[str, Any] = {} if call.kernels else plain_dense.space()
        return replace(call, taught=TAUGHT, **space)

    def _stages(self, plan: LinearCrossEntropyPlan, matrices: Matrices, inputs: Tensors) -> Stages:
        bias, terms = inputs[2], self.terms
        if bias is not None:
            terms = replace(terms, bias=bias.detach().contiguous())
        ops, products = self.ops(matrices.hidden), Products(plan.call.float32_products)
        return Stages(plan, matrices, self.targets, terms, products, ops, self.grad_filter)

    def _matrices(self, inputs: Tensors) -> Matrices:
        hidden, weight = cast(tuple[Tensor, Tensor], inputs[:2])
        if hidden.dtype != self.dtype or weight.dtype != self.dtype:
            hidden, weight = hidden.to(self.dtype), weight.to(self.dtype)
        if self.grad_filter is not None:  # unlike torch's products, the filtered one needs contiguous factors
            hidden, weight = hidden.contiguous(), weight.contiguous()
        return Matrices(hidden, weight)

    def _slab(self, stages: Stages) -> Tensor:
        """Make the row stage's slab. Other ranks may have more classes, and wider rows."""
        plan, call = stages.plan, stages.plan.call
        slab = stages.matrices.hidden.new_empty(min(plan.way.rows, call.N), call.row_width, dtype=self.slab_dtype)
        return slab[:, : plan.padded(call.V)]

    def _no_rows(self, matrices: Matrices) -> Rows:
        # Each is a tensor of its own: autograd marks some of them as not differentiable.
        wide = torch.promote_types(self.dtype, torch.float32)
        loss, peak, total, entropy = (matrices.hidden.new_empty(0, dtype=wide) for _ in range(4))
        best = loss.long() if self.stats else None
        each = loss.new_empty((0, self.targets.classes.shape[1])) if self.logprobs else None
        places = None if best is None or not self.places else best.new_empty((0, self.targets.classes.shape[1]))
        taught = None if self.targets.probabilities is None else loss.new_empty((0, TAUGHT))
        return Rows(loss, peak, total, entropy if self.stats else None, best, each, places, taught=taught)

    def _row_buffers(self, stages: Stages, wants: tuple[bool, ...]) -> Gradients:
        """Make what the row stage fills in the forward pass: zeros where there is no product."""
        plan, call, way, hidden = stages.plan, stages.plan.call, stages.plan.way, stages.matrices.hidden
        new = hidden.new_empty if call.N > 0 and call.V > 0 else hidden.new_zeros
        d_hidden = d_weight = d_bias = None
        if wants[0]:
            d_hidden = new(call.N, call.D, dtype=call.wide if call.ranks else call.hidden_dtype)
        if wants[1]:
            columns = way.summed if plan.separate else call.V
            d_weight = new(columns, call.D, dtype=plan.sum_dtype)
        if wants[2]:
            d_bias = hidden.new_zeros(call.V, dtype=call.wide)
        return Gradients(d_hidden, d_weight, d_bias)


class _Results:
    """Results of all rows, gathered from their chunks; of a plan that forgets, the sums of the chunks' losses."""

    def __init__(self, plan: LinearCrossEntropyPlan, like: Tensor) -> None:
        self.rows: Rows | None = None  # None before the first chunk
        self._N, self._done, self._losses = plan.call.N, 0, None
        if plan.forgets:
            self._losses = like.new_empty(plan.chunks, dtype=plan.call.wide)
            none = self._losses.new_empty(0)
            self.rows = Rows(self._losses, none, none, None, None, taught=none if plan.call.taught else None)

    def add(self, part: Rows) -> None:
        """Take the results of the next chunk: keep them, copy them, or add up their losses."""
        n, start = len(part.loss), self._done
        if self._losses is not None:
            torch.sum(part.loss, 0, out=self._losses[start])
            self._done += 1
            return
        if n == self._N:
            self.rows = part
            return
        if self.rows is None:
            self.rows = Rows._make([None if t is None else t.new_empty(self._N, *t.shape[1:]) for t in part])
        # One launch, where dtypes agree. The row kernel could write there itself, but would be compiled again for
        # slices that are not aligned.
        some = [t for t in part if t is not None]
        whole = [t[start : start + n] for t in self.rows if t is not None]
        torch._foreach_copy_(whole, some)  # pyright: ignore[reportPrivateImportUsage]
        self._done += n
