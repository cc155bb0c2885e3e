"""Update rules as plain functions of one tensor, in the dtype they are given: `reference.adam`, `reference.lion`, ...

Each is defined in the file of its optimizer, and found here under its name. The tests compare the kernels with these
functions, which also update tensors that no kernel supports. All work in place. `l2` times the parameter is added to
the gradient; `decay` is the fraction by which the parameter shrinks in addition to the update. `step` counts from 1 at
the first update; `step`, `lr` and `decay` may be tensors.
"""

from collections.abc import Callable

from llmfast.optim.base import FusedOptimizer


def _rules() -> dict[str, Callable[..., None]]:
    return {cls.rule.__name__: cls.rule for cls in FusedOptimizer.__subclasses__()}


def __dir__() -> list[str]:
    return [*_rules()]


def __getattr__(name: str) -> Callable[..., None]:
    if (rule := _rules().get(name)) is None:
        raise AttributeError(f"no optimizer has a rule {name!r}; there are {', '.join(_rules())}")
    return rule
