"""Multi-token prediction: modules that predict more than the next token, and related functions.

Their common loss is `llmfast.losses.mtp_cross_entropy`. Head k at row t predicts token t + 1 + k, so head 0 is ordinary
next-token prediction.
"""

from llmfast.models.depths import SequentialDepths
from llmfast.models.heads import ParallelHeads
from llmfast.mtp.export import load_deepseek, save_deepseek
from llmfast.mtp.schedules import constant_weights, head_weights, linear_weights, staged_weights
from llmfast.mtp.sequential import sequential_backward
from llmfast.mtp.speculative import Pass, Speculation, speculative_generate, speculative_passes

__all__ = [
    "ParallelHeads",
    "Pass",
    "SequentialDepths",
    "Speculation",
    "constant_weights",
    "head_weights",
    "linear_weights",
    "load_deepseek",
    "save_deepseek",
    "sequential_backward",
    "speculative_generate",
    "speculative_passes",
    "staged_weights",
]
