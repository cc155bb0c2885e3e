"""A thin trainer. Its names are imported on first use, because they need the extra `train`."""

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

_MODULE_OF = {
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
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    except ModuleNotFoundError as e:
        missing = "llmfast" if e.name is None else e.name.partition(".")[0]
        if missing.startswith("llmfast"):  # ours, also llmfast_kernels
            raise
        raise ImportError(f"llmfast.train needs {missing}: pip install 'llmfast-torch[train]'") from e


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
