"""Check that parameters and states are still those for which a plan was made, at the same addresses.

Kernels take addresses, so everything is checked before every step. With hundreds of small tensors the checks take most
of a step's time. Hence `map` over functions written in C, the fastest loop in Python.
"""

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor

from llmfast._dtensor import is_dtensor, local


class Watch:
    """A snapshot of all parameters and states, or of one parameter and its state, that detects changes."""

    def __init__(self, groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]], only: Tensor | None) -> None:
        self._only = only
        self._params = [] if only is not None else [list(group["params"]) for group in groups]
        watched = list(chain.from_iterable(self._params)) if only is None else [only]
        self._dtensors = [(p, local(p)) for p in watched if is_dtensor(p)]
        self._locals = [local(p) for p in watched]
        self._seen = self._look(state)

    def holds(self, groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]]) -> bool:
        """Return True if nothing that was recorded has changed."""
        if self._only is None:
            if len(groups) != len(self._params):
                return False
            for group, params in zip(groups, self._params):
                now = group["params"]
                if len(now) != len(params) or not all(map(is_, now, params)):
                    return False
        if not all(local(p) is piece for p, piece in self._dtensors):
            return False
        return self._look(state) == self._seen

    def _look(self, state: dict[Any, dict[str, Any]]) -> tuple[list[int], list[int], list[int]]:
        """Return sizes and addresses of the parameters, and addresses of their state tensors."""
        sizes = list(map(Tensor.numel, self._locals))  # a shortened parameter keeps its address
        params = list(map(Tensor.data_ptr, self._locals))
        states = state.values() if self._only is None else [state.get(self._only, {})]
        values: Iterable[Any] = chain.from_iterable(map(dict.values, states))
        if self._dtensors:
            values = map(local, values)
        try:
            return sizes, params, list(map(Tensor.data_ptr, values))
        except TypeError:  # a state may hold other objects than tensors
            found = chain.from_iterable(map(dict.values, states))
            return sizes, params, [local(t).data_ptr() if isinstance(t, Tensor) else id(t) for t in found]
