"""Fused losses, optimizers and a thin trainer for large language models.

Import the packages that you use, such as `llmfast.losses` and `llmfast.optim`: `load_run` is the only name here.
Importing this package imports neither Triton nor anything that touches a GPU.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmfast.train import load_run as load_run

try:
    __version__ = metadata.version("llmfast-torch")  # an editable install has the version of its installation
except metadata.PackageNotFoundError:  # a folder on the path, not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "load_run":  # imported late, because `llmfast.train` needs the extra `train`
        return import_module("llmfast.train").load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
