"""Leaving out the rows that are ignored, where the number of the others is known without waiting for the device."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmfast._checks import expect
from llmfast._dispatch import takes_plain_torch
from llmfast_kernels.terms import Targets


@dataclass(frozen=True)
class ValidRows:
    """Rows of a batch that have a valid target, and room for more of them."""

    N: int  # rows of the batch
    index: Tensor  # (n,) numbers of the rows, in order; then 0 if fewer than n are valid
    surplus: Tensor  # (n,) bool: True for those zeros
    count: Tensor  # ()
    ignore_index: int

    def gather(self, hidden: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """Return these rows of (N, D) and of the targets."""
        chosen = targets[self.index]
        classes = chosen.classes.masked_fill(self.surplus[:, None], self.ignore_index)
        return hidden.index_select(0, self.index), replace(chosen, classes=classes)

    def spread(self, found: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Return a loss and statistics of these rows for all rows; the loss is NaN if there are more than n."""
        home = torch.where(self.surplus, self.N, self.index)  # surplus rows end beyond the last row

        def over_all(t: "Tensor | None", empty: float) -> "Tensor | None":
            if t is None:
                return None
            return t.new_full((self.N + 1, *t.shape[1:]), empty).index_copy(0, home, t)[: self.N]

        loss, *stats, argmax, places = found
        assert loss is not None
        poison = torch.where(self.count > len(self.index), torch.nan, 0.0).to(loss.dtype)
        whole = over_all(loss, 0.0) if loss.dim() else loss
        assert whole is not None
        return whole + poison, *(over_all(t, 0.0) for t in stats), over_all(argmax, -1), over_all(places, -1)


def valid_rows(
    hidden: Tensor, targets: Targets, ignore_index: int, num_valid: float | Tensor | None, budget: int | None
) -> ValidRows | None:
    """Find the rows to compute: at most `num_valid` where that is an int; on a CPU just the valid ones. None for all.

    On a CPU, all rows are computed if a copy of the valid ones and their gradients would take a quarter of `budget`.

    Raises:
        ValueError: more rows than `num_valid` are valid. Only on a CPU: elsewhere looking would be a wait.
    """
    N = targets.classes.shape[0]
    most = num_valid if isinstance(num_valid, int) and not isinstance(num_valid, bool) else N
    on_cpu = hidden.device.type == "cpu" and takes_plain_torch(hidden)
    if N == 0 or (most >= N and not on_cpu):
        return None
    valid = (targets.classes != ignore_index).any(1)
    count = valid.sum()
    n = most
    if on_cpu:
        n = int(count)
        expect(
            n <= most,
            f"num_valid must be at least {n}, the number of valid tokens; got {num_valid}. To divide by "
            "another number, use reduction='sum'",
        )
        if n == N or (budget is not None and 8 * n * hidden.shape[1] * hidden.element_size() > budget):
            return None
    index = torch.nonzero_static(valid, size=n, fill_value=0)[:, 0]
    surplus = torch.arange(n, dtype=torch.int64, device=count.device) >= count
    return ValidRows(N, index, surplus, count, ignore_index)
