"""Rows whose columns are split over devices (vocab-parallel)."""

from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from llmfast._checks import expect
from llmfast._dtensor import is_dtensor
from llmfast.losses import plain
from llmfast.losses.rows import RowOps
from llmfast_kernels.teaching import TAUGHT
from llmfast_kernels.terms import Partials, Rows, Targets, Terms, Upstream

ProcessGroup: TypeAlias = "dist.ProcessGroup"


def own_columns(group: Any, columns: int, vocab_size: int | None) -> tuple[int, slice]:
    """Return V of all ranks and this rank's columns, split as `torch.chunk` and DTensor split.

    Raises:
        ValueError: this rank does not hold the number of columns that this split gives it.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    V = columns * world if vocab_size is None else vocab_size
    share = -(-V // world)
    start = min(rank * share, V)
    own = min(share, V - start)
    expect(
        columns == own,
        f"rank {rank} of {world} must hold {own} of {V} classes (the first ranks {share} each); it holds {columns}",
    )
    return V, slice(start, start + own)


def over_ranks(ops: RowOps, group: Any) -> RowOps:
    """Return `ops` whose cross-entropy and counts are over the columns of all ranks, and the same on each."""
    return ops._replace(
        cross_entropy=partial(_cross_entropy, ops, group), count_above=partial(_count_above, ops, group)
    )


def _cross_entropy(
    ops: RowOps,
    group: Any,
    logits: Tensor,  # (N, own columns), or wider with padding
    targets: Targets,
    terms: Terms,
    *,
    V: int,
    stats: bool = False,
    logprobs: bool = False,
    d_logits: Tensor | None = None,
    grad_scale: Tensor | None = None,  # ()
) -> Rows:
    """Compute rows with two all-reduces of a few numbers per row, and a third for the argmax.

    The gradient takes a launch of its own.
    """
    if V == 0:  # fewer classes than ranks
        none = logits.new_zeros(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
        lowest = torch.full_like(none, torch.finfo(none.dtype).min)
        best = torch.zeros_like(none, dtype=torch.int64) if stats else None
        each = none.new_zeros(targets.classes.shape) if logprobs else None
        own = Partials(lowest, none, none if stats else None, none, none, best, each)
    else:
        own = ops.cross_entropy_partials(logits, targets, terms, V=V, stats=stats, logprobs=logprobs)
    peak, best = own.peak.clone(), own.argmax
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    # Finite, also for a rank without classes.
    shift = (own.peak - peak).clamp(min=torch.finfo(peak.dtype).min)
    rescale = shift.exp()
    parts = [own.total * rescale, own.pull + own.mass * shift, own.mass]
    if own.moment is not None:
        # exp(-1000) is 0 too, but 0 * -inf would be NaN.
        parts.append((own.moment + own.total * shift.clamp(min=-1000)) * rescale)
    if own.below is not None:
        here = (targets.classes >= terms.v_start) & (targets.classes < terms.v_start + V)
        parts += torch.where(here, own.below + shift[:, None], own.below).unbind(1)
    sums = torch.stack(parts)
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    total, pull, mass, *more = sums
    log_total = total.log()
    H = log_total - more.pop(0) / total if stats else None
    lse = peak + log_total
    loss = plain.add_terms(mass * log_total - pull, lse, terms)
    if targets.token_weights is not None:
        loss *= targets.token_weights
    if best is not None:
        best = torch.where(own.peak < peak, terms.V, best)
        dist.all_reduce(best, dist.ReduceOp.MIN, group)
    ignored = targets.classes == terms.ignore_index
    each = torch.where(ignored, 0, torch.stack(more, 1) - log_total[:, None]) if more else None
    taught = None
    if targets.probabilities is not None:  # what multiplies the softmax in the gradient
        taught = total.new_zeros((len(total), TAUGHT))
        slope: Any = plain.slope_of_lse(mass, terms, lse)
        taught[:, 2] = slope
    rows = Rows(loss, peak, total.clone(), H, best, each, taught=taught)  # without the other sums
    plain.empty_where(ignored.all(1), rows)
    if d_logits is not None and V > 0:
        ones = torch.ones_like(loss)
        upstream = Upstream(ones if grad_scale is None else ones * grad_scale)
        ops.cross_entropy_backward(logits, targets, terms, rows.softmax, upstream, V=V, d_logits=d_logits)
    return rows


def _count_above(ops: RowOps, group: Any, logits: Tensor, keys: Tensor, terms: Terms, *, V: int) -> Tensor:
    """Count with two all-reduces. Each rank has the keys of its own columns, and zeros for the others."""
    dist.all_reduce(keys, dist.ReduceOp.SUM, group)
    counts = torch.zeros_like(keys, dtype=torch.int64) if V == 0 else ops.count_above(logits, keys, terms, V=V)
    dist.all_reduce(counts, dist.ReduceOp.SUM, group)
    return counts


def group_size(group: Any) -> int:
    return dist.get_world_size(group)


def sum_over_ranks(t: Tensor, group: Any) -> None:
    dist.all_reduce(t, dist.ReduceOp.SUM, group)


def local_weight(hidden: Tensor, weight: Tensor, options: Any) -> tuple[Tensor, Tensor, Any]:
    """Return plain tensors for DTensors, and in the options the group that the classes are split over, if they are."""
    bias, group = options.get("bias"), options.get("process_group")
    if not any(is_dtensor(t) for t in (hidden, weight, bias)):
        return hidden, weight, options
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    def local(t: Any) -> Any:
        return t.to_local() if isinstance(t, DTensor) else t

    if group is not None:  # naming it says that the classes are split over it
        V = options.get("vocab_size") or weight.shape[0]
        return local(hidden), local(weight), {**options, "bias": local(bias), "vocab_size": V}
    expect(isinstance(weight, DTensor), "weight must be a DTensor where hidden or bias is one")
    assert isinstance(weight, DTensor)
    mesh = weight.device_mesh
    own_classes = [i for i, placement in enumerate(weight.placements) if placement == Shard(0)]
    others = [p for p in weight.placements if p not in (Shard(0), Replicate())]
    expect(not others, f"weight must be sharded on dim 0 or replicated; its placements are {weight.placements}")
    if isinstance(hidden, DTensor) and own_classes:
        expect(
            hidden.device_mesh == mesh and all(hidden.placements[i] == Replicate() for i in own_classes),
            f"hidden must be replicated over the mesh that weight is sharded on; it is {hidden.placements}",
        )
        expect(len(own_classes) == 1, "weight may be sharded over only one dimension of its mesh")
        split = {"process_group": mesh.get_group(own_classes[0]), "vocab_size": weight.shape[0]}
        return local(hidden), local(weight), {**options, **split, "bias": local(bias)}
    # Each rank has tokens of its own (FSDP2): the whole weight, and a gradient averaged over the mesh.
    average = [Partial("avg")] * mesh.ndim

    def gathered(t: Any) -> Any:
        if not isinstance(t, DTensor):
            return t
        return t.redistribute(placements=[Replicate()] * mesh.ndim).to_local(grad_placements=average)

    return local(hidden), gathered(weight), {**options, "bias": gathered(bias)}
