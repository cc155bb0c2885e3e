"""Cross-entropy of `hidden @ weight.T`, a slab of logits at a time.

The plan (`plan.py`) says how many rows of logits exist at once. One slab is reused for chunks of rows: the row kernel
turns logits, in place, into their gradients (not yet divided by any count), two matrix products turn those into the
gradients of `hidden` and `weight`, and a last pass multiplies by upstream / count while casting. The cost is reading W
and updating dW once per chunk, so the fewer chunks the better.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from llmfast._dispatch import multiplies_into_float32, use_kernels
from llmfast.losses.loss import Found, Loss, Returned, Tensors
from llmfast.losses.parallel import group_size, sum_over_ranks
from llmfast.losses.plain import times
from llmfast.losses.plan import LinearCrossEntropyPlan
from llmfast.losses.products import Products, live_blocks
from llmfast.losses.rows import row_ops
from llmfast.losses.targets import divided
from llmfast_kernels.terms import GROUP, Rows, Softmax, Terms, Upstream


class Gradients(NamedTuple):
    """Gradients of the inputs; None where none is wanted."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,) float32


class Matrices(NamedTuple):
    """The inputs in the compute dtype."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)


@dataclass
class Kept:
    """State between forward and backward. Gradients are scaled and logits written over by the first backward pass."""

    plan: LinearCrossEntropyPlan
    made: Gradients | None  # gradients of sum(loss)
    logits: Tensor | None
    cast: Matrices | None  # spares casting them again


@dataclass(frozen=True, kw_only=True)
class LinearCrossEntropy(Loss):
    """Cross-entropy of hidden @ weight.T + bias. The inputs are `hidden` (N, D), `weight` (V, D) and `bias` (V,)."""

    makes_gradients: ClassVar[bool] = True

    budget: int | None  # bytes of logits; None chooses
    slab_dtype: torch.dtype
    grad_filter: float | None
    accumulate_into: Tensor | None = None
    functional: bool = False  # return all that backward needs, as an operator must: keep no logits

    @property
    def traceable(self) -> bool:
        return self.group is None and self.accumulate_into is None

    def forward(self, inputs: Tensors, wants: tuple[bool, ...]) -> Found:
        plan = self._plan(inputs, wants)
        matrices, terms = self._matrices(inputs, plan), self._terms(inputs)
        products, ops = Products(plan.float32_products), self.ops(matrices.hidden)
        made = None
        if any(wants) and plan.mode == "chunk" and self.reduction != "none":
            made = self._buffers(matrices, plan, wants)
        # Other ranks may have more classes, and wider rows.
        slab = matrices.hidden.new_empty(min(plan.rows, plan.N), plan.row_width, dtype=self.slab_dtype)
        logits = slab = slab[:, : plan.padded(plan.V)]
        low = slab if slab.dtype == plan.dtype or made is None else slab.new_empty(slab.shape, dtype=plan.dtype)
        alive, filtering = None, {}
        parts: list[Rows] = []
        for rows in plan:
            n = rows.stop - rows.start
            logits, d_logits = slab[:n], None if made is None else low[:n]
            products.logits(matrices.hidden[rows], matrices.weight, out=logits[:, : plan.V])
            if made is not None and self.grad_filter is not None:
                alive = slab.new_empty(n, plan.row_width // GROUP, dtype=torch.int8)
                filtering = {"alive": alive, "threshold": self.grad_filter}
            part = ops.cross_entropy(
                logits,
                self.targets[rows],
                terms,
                V=plan.V,
                entropy=self.stats,
                argmax=self.stats,
                d_logits=d_logits,
                **filtering,
            )
            parts.append(part)
            if d_logits is not None and made is not None:
                self._add_chunk(products, matrices, rows, d_logits[:, : plan.V], alive, made)
        found = _joined(parts, self._no_rows(matrices, plan))
        if made is not None and made.hidden is not None and self.group is not None:
            sum_over_ranks(made.hidden, self.group)  # each rank has its columns' part
        cast_now = plan.mode != "chunk" and any(t is not used for t, used in zip(inputs, matrices))
        kept = Kept(plan, made, logits if plan.mode == "materialise" else None, matrices if cast_now else None)
        return Found(found, ops.lse(found) if self.stats else None, kept)

    def backward(
        self, inputs: Tensors, wants: tuple[bool, ...], softmax: Softmax, returned: Returned, kept: Kept | None
    ) -> Tensors:
        made, logits = (None, None) if kept is None else (kept.made, kept.logits)
        if kept is not None:
            kept.made = kept.logits = None
        if made is not None and returned.lse is None and returned.entropy is None:
            return self._scaled(made, returned, inputs)
        plan = self._plan(inputs, wants) if kept is None else kept.plan
        if logits is None and plan.mode != "recompute":
            plan = plan.cut("recompute")
        matrices = kept.cast if kept is not None and kept.cast is not None else self._matrices(inputs, plan)
        upstream = returned.per_row(self.count, softmax.peak)
        found = self._buffers(matrices, plan, wants)
        self._fill(found, plan, matrices, self._terms(inputs), softmax, upstream, logits)
        del logits  # gradients are cast when the slabs are freed
        if found.hidden is not None and self.group is not None:
            sum_over_ranks(found.hidden, self.group)
        if self.accumulate_into is not None:
            found = found._replace(weight=None)
        return tuple(None if g is None or t is None else g.to(t.dtype) for g, t in zip(found, inputs))

    def _fill(
        self,
        found: Gradients,
        plan: LinearCrossEntropyPlan,
        matrices: Matrices,
        terms: Terms,
        softmax: Softmax,
        upstream: Upstream,
        logits: Tensor | None,
    ) -> None:
        """Fill the gradients from logits that were kept, which are written over, or from slabs of new ones."""
        products, ops = Products(plan.float32_products), row_ops(matrices.hidden)
        slab = logits
        if slab is None:
            slab = matrices.hidden.new_empty(plan.N, plan.backward_width, dtype=self.slab_dtype)
        low = slab if slab.dtype == plan.dtype else slab.new_empty(slab.shape, dtype=plan.dtype)
        for columns in plan.column_slabs():
            width, weight = columns.stop - columns.start, matrices.weight[columns]
            block, d_block = (t[:, : plan.padded(width)] for t in (slab, low))
            if logits is None:
                products.logits(matrices.hidden, weight, out=block[:, :width])
            own = terms.columns(columns)
            ops.cross_entropy_backward(block, self.targets, own, softmax, upstream, V=width, d_logits=d_block)
            d_logits = d_block[:, :width]
            if found.hidden is not None:
                products.multiply(d_logits, weight, out=found.hidden, add=columns.start > 0)
            if found.weight is not None:
                add = self.accumulate_into is not None
                products.multiply(d_logits.T, matrices.hidden, out=found.weight[columns], add=add)
            if found.bias is not None:
                torch.sum(d_logits, 0, dtype=found.bias.dtype, out=found.bias[columns])

    def _plan(self, inputs: Tensors, wants: tuple[bool, ...]) -> LinearCrossEntropyPlan:
        hidden, weight = cast(tuple[Tensor, Tensor], inputs[:2])
        plan = LinearCrossEntropyPlan.make(
            hidden.shape[0],
            hidden.shape[1],
            weight.shape[0],
            dtype=self.dtype,
            slab_dtype=self.slab_dtype,
            weight_dtype=weight.dtype,
            device=hidden.device,
            memory_budget="auto" if self.budget is None else self.budget,
            reduction=self.reduction,
            wants=(wants[0], wants[1]),
            kernels=use_kernels(hidden) and self.dtype != torch.float64,
            filtered=self.grad_filter is not None,
            widest=0 if self.group is None else -(-self.terms.V // group_size(self.group)),
            float32_products=multiplies_into_float32(hidden.device, self.dtype),
        )
        return plan.cut("chunk") if self.functional else plan

    def _matrices(self, inputs: Tensors, plan: LinearCrossEntropyPlan) -> Matrices:
        cast_inputs = (cast(Tensor, t).to(plan.dtype) for t in inputs[:2])
        if self.grad_filter is None:
            return Matrices(*cast_inputs)
        return Matrices(*(t.contiguous() for t in cast_inputs))  # unlike torch's products, the filtered one needs that

    def _terms(self, inputs: Tensors) -> Terms:
        bias = inputs[2]
        return self.terms if bias is None else replace(self.terms, bias=bias.detach().contiguous())

    def _no_rows(self, matrices: Matrices, plan: LinearCrossEntropyPlan) -> Rows:
        # Each is a tensor of its own: autograd marks some of them as not differentiable.
        loss, peak, total, entropy = (matrices.hidden.new_empty(0, dtype=plan.accumulate_dtype) for _ in range(4))
        return Rows(loss, peak, total, *((entropy, loss.long()) if self.stats else (None, None)))

    def _buffers(self, matrices: Matrices, plan: LinearCrossEntropyPlan, wants: tuple[bool, ...]) -> Gradients:
        """Make buffers that the products fill, or zeros where there is no product."""
        make = torch.empty_like if plan.N > 0 and plan.V > 0 else torch.zeros_like
        d_hidden = d_weight = d_bias = None
        if wants[0]:
            summed = plan.mode == "recompute" or self.group is not None
            dtype = plan.accumulate_dtype if summed else plan.dtype
            d_hidden = make(matrices.hidden, dtype=dtype, memory_format=torch.contiguous_format)
        if wants[1] and self.accumulate_into is not None and plan.mode != "chunk":
            d_weight = self.accumulate_into  # the gradients of chunks wait for the count
        elif wants[1]:
            dtype = plan.weight_gradient_dtype
            d_weight = make(matrices.weight, dtype=dtype, memory_format=torch.contiguous_format)
        if wants[2]:
            d_bias = matrices.hidden.new_zeros(plan.V, dtype=plan.accumulate_dtype)
        return Gradients(d_hidden, d_weight, d_bias)

    def _add_chunk(
        self,
        products: Products,
        matrices: Matrices,
        rows: slice,
        d_logits: Tensor,  # (n, V)
        alive: Tensor | None,  # (n, groups)
        made: Gradients,
    ) -> None:
        """Add what a chunk of rows contributes to the gradients; the filter leaves the bias alone."""
        if made.bias is not None:
            made.bias.add_(d_logits.sum(0, dtype=made.bias.dtype))
        d_logits, blocks = (d_logits, None) if alive is None else live_blocks(d_logits, alive)
        if made.hidden is not None:
            products.multiply(d_logits, matrices.weight, out=made.hidden[rows], blocks=blocks)
        if made.weight is not None:
            turned = None if blocks is None else blocks.T
            out, add = made.weight, rows.start > 0
            products.multiply(d_logits.T, matrices.hidden[rows], out=out, add=add, blocks=turned)

    def _scaled(self, made: Gradients, returned: Returned, inputs: Tensors) -> Tensors:
        """Multiply gradients of sum(loss) by upstream / count, into the inputs' dtypes or the buffer to add to."""
        assert returned.loss is not None  # or backward would not run
        factor, given = divided(returned.loss, self.count), self.accumulate_into
        hidden, weight, bias = inputs
        scale = row_ops(cast(Tensor, hidden)).scale

        def cast_to(t: Tensor | None, like: Tensor | None) -> Tensor | None:
            if t is None or like is None:
                return None
            return scale(t, factor, out=None if t.dtype == like.dtype else torch.empty_like(t, dtype=like.dtype))

        if made.weight is None or given is None:
            d_weight = cast_to(made.weight, weight)
        else:
            d_weight = None
            if given.is_contiguous():
                scale(made.weight, factor, out=given, add=True)
                increment_version(given)  # a kernel does not
            else:
                given.add_(scale(made.weight, factor))
        d_bias = None if made.bias is None or bias is None else times(made.bias, factor).to(bias.dtype)
        return cast_to(made.hidden, hidden), d_weight, d_bias


def _joined(parts: list[Rows], empty: Rows) -> Rows:
    """Concatenate the rows of all chunks."""
    if len(parts) <= 1:
        return parts[0] if parts else empty

    def join(name: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        return None if columns[0] is None else torch.cat(columns)

    return Rows(*(join(name) for name in Rows._fields))
