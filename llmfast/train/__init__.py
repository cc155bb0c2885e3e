"""A thin trainer. Needs the extra `llmfast-torch[train]`; importing this package does not."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmfast.train.config import Config, ConfigError, load_config
    from llmfast.train.loop import Trainer
    from llmfast.train.run import train

__all__ = ["Config", "ConfigError", "Trainer", "load_config", "train"]

_HOME = {"Config": "config", "ConfigError": "config", "load_config": "config", "Trainer": "loop", "train": "run"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError as e:
        if e.name is not None and e.name.partition(".")[0] == "llmfast":
            raise
        raise ImportError(f"llmfast.train needs {e.name}: pip install 'llmfast-torch[train]'") from e
