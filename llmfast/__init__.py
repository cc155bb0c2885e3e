"""Fused losses, optimizers and a thin trainer for large language models.

Import what you use: `llmfast.losses`, `llmfast.optim`, `llmfast.models`, `llmfast.data`, `llmfast.train`.
Importing this package imports neither Triton nor anything that touches a GPU.
"""

__version__ = "0.1.0"
