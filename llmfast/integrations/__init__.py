"""llmfast inside other trainers. Import what you use: `llmfast.integrations.transformers` or `.mtp`.

The optimizers need no adapter. Hugging Face's Trainer takes them as
`optimizer_cls_and_kwargs=(FusedAdamW, {"lr": 1e-3})`, or as
`optimizers=(FusedAdamW(model.parameters(), lr=1e-3), None)`. It clips gradients itself, by default to a norm of 1. To
clip in the update, without an extra pass over the gradients, set both `TrainingArguments(max_grad_norm=0)` and
`(FusedAdamW, {"lr": 1e-3, "max_grad_norm": 1.0})`.
"""

import inspect
from importlib import import_module
from typing import Any


def require(name: str, extra: str) -> Any:
    """Import and return the module `name`, or raise an ImportError that names the extra to install."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} could not be imported; pip install 'llmfast-torch[{extra}]'") from error


def cache_argument(model: Any) -> str:
    """Return what a model's forward calls its cache of keys and values: transformers has renamed it."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
