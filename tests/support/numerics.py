"""The rule every numerical test applies: no further from the truth than torch in the same dtype."""

import torch
from torch import Tensor


def assert_no_worse(ours: Tensor, torchs: Tensor, truth: Tensor, *, scale: float = 0.0) -> None:
    """Assert |truth - ours| <= |truth - torch| + slack, element by element.

    The slack is one rounding of the result's own dtype, as torch can be lucky, and a few roundings of float32 at the
    magnitude of the intermediate values, `scale` (for a loss, that of the logits).
    """
    truth = truth.double()
    torch.testing.assert_close(ours.isnan(), truth.isnan())
    torch.testing.assert_close(ours.isinf(), truth.isinf())
    error, allowed = (truth - ours.double()).abs(), (truth - torchs.double()).abs()
    slack = torch.finfo(ours.dtype).eps * truth.abs() + 4 * torch.finfo(torch.float32).eps * scale + 1e-9
    excess = (error - allowed - slack)[truth.isfinite()]
    worst = excess.max().item() if excess.numel() else 0.0
    assert worst <= 0, f"worse than torch by {worst:.3g} beyond the slack"


def assert_close_in_norm(ours: Tensor, torchs: Tensor, truth: Tensor, *, factor: float = 1.1) -> None:
    """Assert ||truth - ours|| <= factor * ||truth - torch|| + slack, for sums whose single elements differ by luck."""
    truth = truth.double()
    error, allowed = (truth - ours.double()).norm(), (truth - torchs.double()).norm()
    slack = 2e-6 * truth.norm() + 1e-6
    assert error <= factor * allowed + slack, f"error {error:.3g}, torch's {allowed:.3g}, slack {slack:.3g}"
