"""Cross-entropy of rows in plain torch: what CPU tensors (and any device without Triton) take.

Built on softmax, by far the fastest row operation torch has on a CPU: 13 ms for 1024 x 50257 float32 where one `exp_`
takes 20 and `logsumexp` 27 (two cores, torch 2.13). The signatures are those of the Triton launchers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 2 << 20  # rows are worked through in blocks of this size: several passes over it stay in a CPU's caches


def cross_entropy(
    logits: Tensor,  # (N, V or more)
    targets: Tensor,  # (N,) int32 or int64
    *,
    V: int | None = None,  # columns from V on are padding
    ignore_index: int,
    d_logits: Tensor | None = None,  # like `logits`, filled; may be `logits`
    grad_scale: Tensor | None = None,  # ()
) -> tuple[Tensor, Tensor]:
    """Loss and lse of every row, both (N,); fills `d_logits` with the gradient of grad_scale * sum(loss)."""
    logits, d_logits = logits[:, :V], None if d_logits is None else d_logits[:, :V]
    ignored = targets == ignore_index
    columns = targets.masked_fill(ignored, 0).long()[:, None]
    loss = logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
    lse = torch.empty_like(loss)
    for rows in _blocks(logits):
        x = logits[rows].to(loss.dtype)
        peak = x.amax(1)
        y_below_peak = x.gather(1, columns[rows])[:, 0] - peak
        p = _softmax(x, d_logits, rows)
        log_total = -p.amax(1).log()  # the largest probability is 1 / sum(exp(x - peak))
        loss[rows] = log_total - y_below_peak
        lse[rows] = log_total + peak
        if d_logits is not None:
            _subtract_one_at(columns[rows], p)
            if grad_scale is not None:
                p *= grad_scale
            _store(p, ignored[rows], d_logits[rows])
    return loss.masked_fill_(ignored, 0.0), lse.masked_fill_(ignored, 0.0)


def cross_entropy_backward(
    logits: Tensor,  # (N, V or more)
    targets: Tensor,  # (N,) int32 or int64
    lse: Tensor,  # (N,)
    d_loss: Tensor,  # (N,)
    *,
    V: int | None = None,  # columns from V on are padding
    ignore_index: int,
    d_logits: Tensor,  # like `logits`, filled; may be `logits`
) -> None:
    """Fill `d_logits` with d_loss[n] * (softmax(logits[n]) - onehot(targets[n]))."""
    logits, d_logits = logits[:, :V], d_logits[:, :V]
    ignored = targets == ignore_index
    columns = targets.masked_fill(ignored, 0).long()[:, None]
    for rows in _blocks(logits):
        p = _softmax(logits[rows].to(lse.dtype), d_logits, rows)  # again: faster than exp(x - lse)
        _subtract_one_at(columns[rows], p)
        p *= d_loss[rows, None]
        _store(p, ignored[rows], d_logits[rows])


def scale(x: Tensor, factor: Tensor, *, out: Tensor | None = None) -> Tensor:
    """factor * x into `out`, or over `x`."""
    return x.mul_(factor) if out is None else torch.mul(x, factor, out=out)


def _blocks(logits: Tensor) -> Iterator[slice]:
    N, V = logits.shape
    step = max(1, BLOCK_BYTES // (4 * max(V, 1)))
    return (slice(start, min(start + step, N)) for start in range(0, N, step))


def _softmax(x: Tensor, d_logits: Tensor | None, rows: slice) -> Tensor:
    """Softmax of the block `x`, straight into the gradient's buffer where the dtype allows."""
    if d_logits is None:
        return torch.softmax(x, 1)
    return torch.softmax(x, 1, out=d_logits[rows] if d_logits.dtype == x.dtype else x)


def _subtract_one_at(columns: Tensor, p: Tensor) -> None:
    p.scatter_add_(1, columns, p.new_full((), -1.0).expand_as(columns))


def _store(p: Tensor, ignored: Tensor, d_logits: Tensor) -> None:
    p.masked_fill_(ignored[:, None], 0.0)
    if p.data_ptr() != d_logits.data_ptr():
        d_logits.copy_(p)
