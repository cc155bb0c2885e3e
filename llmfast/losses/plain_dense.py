"""Cross-entropy of rows whose targets are probabilities of all classes, in plain torch.

The functions have the signatures of the Triton launchers, where `llmfast_kernels.distillation` says what they compute.
Of the numbers in `Rows.taught`, only the third is used: what multiplies the softmax in the gradient.
"""

from typing import Any

import torch
from torch import Tensor

from llmfast.losses import plain
from llmfast.losses.plain import read_logits, row_blocks, through_softcap
from llmfast_kernels.teaching import TAUGHT
from llmfast_kernels.terms import Rows, Softmax, Targets, Terms, Upstream

BLOCKS = 6  # buffers for a block of rows, at most


def space() -> dict[str, int]:
    """Return the memory that the functions take for a block of rows, as fields of `llmfast.losses.ways.Call`."""
    return {
        "blocks": BLOCKS,
        "block_bytes": plain.BLOCK_BYTES,
        "threads": torch.get_num_threads(),
        "plain_row_bytes": 40,
    }


def dense_cross_entropy(
    logits: Tensor,  # (N, V or more)
    targets: Targets,
    terms: Terms,
    *,
    V: int | None = None,  # columns from V on are padding
    d_logits: Tensor | None = None,  # like `logits`, filled; may be `logits`
    grad_scale: Tensor | None = None,  # ()
) -> Rows:
    logits, d_logits = logits[:, :V], None if d_logits is None else d_logits[:, :V]
    loss = logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
    peaks, totals = torch.empty_like(loss), torch.empty_like(loss)
    taught = loss.new_zeros((len(loss), TAUGHT))
    for rows, space in row_blocks(logits, loss.dtype):
        x = read_logits(logits[rows], terms, space)
        p = _weighed(targets, terms, rows, x)
        peak = x.amax(1).clamp(min=torch.finfo(x.dtype).min)  # finite, also of columns that are all impossible
        below = x - peak[:, None]
        pull = (below * p).masked_fill_(p == 0, 0.0).sum(1)  # an impossible class may have a logit of -inf
        mass = p.sum(1)
        total = below.exp_().sum(1)
        log_total = total.log()
        lse = peak + log_total
        loss[rows] = plain.add_terms(mass * log_total - pull, lse, terms)
        slope: Any = plain.slope_of_lse(mass, terms, lse)
        peaks[rows], totals[rows], taught[rows, 2] = peak, total, slope
        if d_logits is not None:
            d = below.mul_((slope / total)[:, None]).sub_(p)
            for factor in (grad_scale, targets.token_weights):
                if factor is not None:
                    d *= factor if factor.dim() == 0 else factor[rows, None]
            through_softcap(d, x, terms)
            d_logits[rows] = d
    if targets.token_weights is not None:
        loss *= targets.token_weights
    return Rows(loss, peaks, totals, None, None, taught=taught)


def dense_cross_entropy_backward(
    logits: Tensor,  # (N, V or more)
    targets: Targets,
    terms: Terms,
    softmax: Softmax,
    upstream: Upstream,
    *,
    V: int | None = None,
    d_logits: Tensor,  # like `logits`, filled; may be `logits`
) -> None:
    assert softmax.taught is not None
    logits, d_logits = logits[:, :V], d_logits[:, :V]
    up = upstream.loss if targets.token_weights is None else upstream.loss * targets.token_weights
    slope = softmax.taught[:, 2] / softmax.total
    for rows, space in row_blocks(logits, softmax.peak.dtype):
        x = read_logits(logits[rows], terms, space)
        d = (x - softmax.peak[rows, None]).exp_().mul_(slope[rows, None])
        d.sub_(_weighed(targets, terms, rows, x)).mul_(up[rows, None])
        through_softcap(d, x, terms)
        d_logits[rows] = d


def _weighed(targets: Targets, terms: Terms, rows: slice, x: Tensor) -> Tensor:
    """Return the weight of each logit of `x`: its class's probability, smoothed and times its class weight."""
    assert targets.probabilities is not None
    columns = slice(terms.v_start, terms.v_start + x.shape[1])
    p = targets.probabilities[rows, columns].to(x.dtype)
    if terms.label_smoothing is not None:
        p = (p * (1 - terms.label_smoothing)).add_(terms.label_smoothing / terms.V)
    return p if terms.class_weights is None else p * terms.class_weights[columns]
