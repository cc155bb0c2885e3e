"""The states that a fused optimizer keeps: torch's, plus those that `Extras` ask for."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmfast._dtensor import local
from llmfast.optim.formats import CODES, param_format
from llmfast.optim.groups import GroupedOptions
from llmfast.optim.kept import OWN_NAMES, Kept, stored_name
from llmfast.optim.row import Place, Row, shard_of

Names = tuple[str | None, str | None, str | None]


class StateKeeper(GroupedOptions, ABC):
    """An optimizer that creates its states when they are needed, and converts them when the options change."""

    rule: ClassVar["staticmethod[..., None]"]  # for one tensor, in plain torch; the kernels' has the same name
    torch_counts_steps: ClassVar[bool] = True  # whether torch's optimizer keeps a step counter
    # Names of states that may begin after the first step, because a setting asks for them only then.
    late: ClassVar[frozenset[str]] = frozenset()
    # Names of states that are never negative.
    squares: ClassVar[frozenset[str]] = frozenset()
    # Names of states that need more than 8 bits; they are float32 if the others have 8.
    never_coded: ClassVar[frozenset[str]] = frozenset()
    # Parameters whose states were loaded and have not been used by a plan since.
    _loaded: set[Tensor] | frozenset[Tensor] = frozenset()

    @abstractmethod
    def _state_names(self, group: dict[str, Any]) -> Names:
        """Return the names of the states that have the parameter's shape, in the order of the kernels' rule."""

    def _first_value(self, group: dict[str, Any]) -> float:
        """Return the initial value of every state."""
        return 0.0

    def _row(self, p: Tensor, index: int, identity: int) -> Row:
        """Return the parameter with its state, created if missing, in its memory order and the requested formats."""
        group, o, state = self.param_groups[index], self.options_of(index), self.state[p]
        names = self._state_names(group)
        if state.get("step") is None:  # torch's SGD has no counter; a momentum buffer shows that it has stepped
            before = state.get("momentum_buffer") is not None and not self.torch_counts_steps
            state["step"] = torch.tensor(float(before), dtype=torch.float32, device="cpu")
        # Torch creates the counter on the default device, in the default dtype. For complex parameters it stays there.
        home = state["step"].device if p.is_complex() else p.device
        state["step"] = state["step"].to(home, torch.float32)
        kept = Kept(p, state, o, identity)
        kept.keep_low(p in self._loaded)
        kept.keep_average()
        for name in names:
            if name is not None:
                coded = o.state_format.coded and name not in self.never_coded
                kept.keep(name, self._first_value(group), CODES[name not in self.squares] if coded else None)
        pieces = {name: local(t) for name, t in state.items() if isinstance(t, Tensor)}
        master = o.master_of(p)
        return Row(
            param=p,
            group=index,
            identity=identity,
            state=state,
            local=local(p),
            shard=shard_of(p),
            clip=self._clip_of(index),
            master=master,
            names=names,
            states=tuple(None if name is None else pieces[stored_name(state, name)] for name in names),
            scales=tuple(None if name is None else pieces.get(f"{name}_scale") for name in names[:2]),
            low=pieces.get(param_format(master).state or ""),
            ema=pieces["ema_param"] if o.ema_decay is not None else None,
        )

    def _check_states(self, places: list[Place]) -> None:
        """Raise ValueError if a state does not belong to its parameter."""
        for p, index, _, _ in places:
            if (state := self.state.get(p)) is not None:
                for name in (*self._state_names(self.param_groups[index]), *OWN_NAMES):
                    if name is not None:
                        Kept(p, state, self.options).check(name)

    def state_bytes(self) -> int:
        """Count the bytes of all states once every parameter has had a step. Parameters may be on "meta"."""
        total = 0
        for index, group in enumerate(self.param_groups):
            o, names = self.options_of(index), [name for name in self._state_names(group) if name is not None]
            for p in group["params"]:
                numel = local(p).numel()
                total += 4  # the step
                total += numel * param_format(o.master_of(p)).bytes_per_parameter(p.dtype)
                total += numel * 4 if o.ema_decay is not None else 0
                for name in names:
                    full = o.state_format.coded and name in self.never_coded
                    total += numel * 4 if full else o.state_format.bytes(numel, p.dtype)
        return total

    def master_value(self, p: Tensor) -> Tensor:
        """Return a parameter with all bits that the optimizer keeps: float32 if `master_weights` adds bits."""
        return Kept(p, self.state.get(p, {}), self.options).value().clone()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Give parameters the values of their averages inside the context; those without an average stay as they are.

        Raises:
            ValueError: the optimizer keeps no averages.
        """
        if all(self.option(index, "ema_decay") is None for index in range(len(self.param_groups))):
            raise ValueError("ema_weights needs an optimizer with ema_decay; got ema_decay=None")
        averages = [(p, state["ema_param"]) for p, state in self.state.items() if "ema_param" in state]
        before = [p.detach().clone() for p, _ in averages]
        with torch.no_grad():
            for p, average in averages:
                p.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _), value in zip(averages, before):
                    p.copy_(value)
