"""Optimizers that are drop-ins for `torch.optim`, with one update launch a step."""

from llmfast.optim import reference
from llmfast.optim.adam import FusedAdamW

__all__ = ["FusedAdamW", "reference"]
