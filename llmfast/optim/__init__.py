"""Drop-in replacements for the optimizers of `torch.optim`, and Lion, with one update launch per dtype signature."""

from llmfast.optim import reference
from llmfast.optim.adagrad import FusedAdagrad
from llmfast.optim.adam import FusedAdam, FusedAdamW
from llmfast.optim.base import FusedOptimizer
from llmfast.optim.lion import FusedLion
from llmfast.optim.options import Extras
from llmfast.optim.release import optimizer_in_backward
from llmfast.optim.rmsprop import FusedRMSprop
from llmfast.optim.scaling import scale_lr
from llmfast.optim.sgd import FusedSGD

__all__ = [
    "Extras",
    "FusedAdagrad",
    "FusedAdam",
    "FusedAdamW",
    "FusedLion",
    "FusedOptimizer",
    "FusedRMSprop",
    "FusedSGD",
    "optimizer_in_backward",
    "reference",
    "scale_lr",
]
