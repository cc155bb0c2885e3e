"""Losses for large vocabularies. Triton kernels on a GPU, plain torch elsewhere; `reference` defines them."""

from llmfast.losses import reference
from llmfast.losses.cross_entropy import cross_entropy
from llmfast.losses.distillation import linear_distillation
from llmfast.losses.linear_cross_entropy import linear_cross_entropy
from llmfast.losses.logprobs import linear_logprobs, logprobs, mtp_logprobs
from llmfast.losses.modules import CrossEntropyLoss, LinearCrossEntropyLoss
from llmfast.losses.mtp import MTPStats, mtp_cross_entropy, mtp_valid_counts
from llmfast.losses.plan import LinearCrossEntropyPlan
from llmfast.losses.targets import LogprobStats, LossStats
from llmfast.losses.teachers import TeacherLogits, TeacherProbabilities, TeacherStates, TeacherTopK

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LinearCrossEntropyPlan",
    "LogprobStats",
    "LossStats",
    "MTPStats",
    "TeacherLogits",
    "TeacherProbabilities",
    "TeacherStates",
    "TeacherTopK",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_logprobs",
    "logprobs",
    "mtp_cross_entropy",
    "mtp_logprobs",
    "mtp_valid_counts",
    "reference",
]
