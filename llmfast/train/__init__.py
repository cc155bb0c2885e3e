"""A thin trainer. Using it needs the extra `llmfast-torch[train]`; importing only this package does not."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmfast.train.config import Config, load_config
    from llmfast.train.continued import continued_config
    from llmfast.train.loading import Loaded, load_run
    from llmfast.train.objective import FurtherTokens, NextToken, Objective
    from llmfast.train.parallel import World
    from llmfast.train.run import train
    from llmfast.train.settings import ConfigError
    from llmfast.train.trainer import Hooks, Trainer

__all__ = [
    "Config",
    "ConfigError",
    "FurtherTokens",
    "Hooks",
    "Loaded",
    "NextToken",
    "Objective",
    "Trainer",
    "World",
    "continued_config",
    "load_config",
    "load_run",
    "train",
]

_HOME = {
    **dict.fromkeys(("Config", "load_config"), "config"),
    "ConfigError": "settings",
    **dict.fromkeys(("Loaded", "load_run"), "loading"),
    **dict.fromkeys(("FurtherTokens", "NextToken", "Objective"), "objective"),
    **dict.fromkeys(("Hooks", "Trainer"), "trainer"),
    "World": "parallel",
    "continued_config": "continued",
    "train": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError as e:
        if e.name is not None and e.name.partition(".")[0] == "llmfast":
            raise
        raise ImportError(f"llmfast.train needs {e.name}: pip install 'llmfast-torch[train]'") from e
