"""Fused losses, optimizers and a thin trainer for large language models.

Import what you use: `llmfast.losses`, `llmfast.optim`, `llmfast.models`, `llmfast.data`, `llmfast.train`.
Importing this package imports neither Triton nor anything that touches a GPU.
"""

from importlib import metadata

try:
    __version__ = metadata.version("llmfast-torch")  # in an editable install: the version at installation
except metadata.PackageNotFoundError:  # a folder on the path, not installed
    __version__ = "0+unknown"
