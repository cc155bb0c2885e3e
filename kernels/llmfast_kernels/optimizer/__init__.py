"""Optimizer steps for many tensors in a few launches. See `kernels/README.md` for how to read them.

The tensors of one dtype signature form a table of addresses on the device (`table.py`). `sum_of_squares` measures their
gradients, where these are clipped. `prepare` turns step counters and hyperparameters into coefficients. `update` then
updates every tensor of the table in one launch. An update rule (`rules.py`) and a precision format (`formats.py`) are
functions that these kernels call without knowing which one they were given.
"""

from llmfast_kernels.optimizer.coefficients import prepare
from llmfast_kernels.optimizer.norm import sum_of_squares
from llmfast_kernels.optimizer.rules import RULES, Rule
from llmfast_kernels.optimizer.step import Kind, update
from llmfast_kernels.optimizer.table import CHUNK, ROW, coefficients_record, group_record

__all__ = [
    "CHUNK",
    "ROW",
    "RULES",
    "Kind",
    "Rule",
    "coefficients_record",
    "group_record",
    "prepare",
    "sum_of_squares",
    "update",
]
