"""Fused losses, optimizers and a thin trainer for large language models.

Import what you use: `llmfast.losses`, `llmfast.optim`, `llmfast.models`, `llmfast.data`, `llmfast.train`.
Importing this package imports neither Triton nor anything that touches a GPU.
"""

from importlib import metadata

try:
    __version__ = metadata.version("llmfast-torch")  # of an editable install: what it was when that was made
except metadata.PackageNotFoundError:  # a folder on the path
    __version__ = "0+unknown"
