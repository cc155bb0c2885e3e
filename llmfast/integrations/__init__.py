"""llmfast inside other people's training loops. Import what you use: `llmfast.integrations.transformers`, `.mtp`.

The optimizers need none of this. Hugging Face's Trainer takes them as
`optimizer_cls_and_kwargs=(FusedAdamW, {"lr": 1e-3})`, or as
`optimizers=(FusedAdamW(model.parameters(), lr=1e-3), None)`. It clips gradients itself, to a norm of 1 if nothing else
is said. To have the update do it, without a pass of its own over the gradients, say so to both:
`TrainingArguments(max_grad_norm=0)` and `(FusedAdamW, {"lr": 1e-3, "max_grad_norm": 1.0})`.
"""

from importlib import import_module
from typing import Any


def require(name: str, extra: str) -> Any:
    """The module `name`, or an ImportError that says which extra brings it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} could not be imported; pip install 'llmfast-torch[{extra}]'") from error
