"""The rule that every numerical test applies: no further from the truth than torch in the same dtype."""

from torch import Tensor

from llmfast.checkup.numerics import excess, excess_in_norm


def assert_no_worse(ours: Tensor, torchs: Tensor, truth: Tensor, *, scale: float = 0.0) -> None:
    """Assert |truth - ours| <= |truth - torch| + slack, element by element: see `excess`."""
    worst = excess(ours, torchs, truth, scale)
    assert worst <= 0, f"worse than torch by {worst:.3g} beyond the slack"


def assert_close_in_norm(ours: Tensor, torchs: Tensor, truth: Tensor, *, factor: float = 1.1) -> None:
    """Assert ||truth - ours|| <= factor * ||truth - torch|| + slack, for sums whose single elements differ by luck."""
    worst = excess_in_norm(ours, torchs, truth, factor=factor)
    assert worst <= 0, f"worse than {factor} times torch's error by {worst:.3g} beyond the slack"
