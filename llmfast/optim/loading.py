"""Loading states that torch's or our optimizer has saved, under any of the options."""

from typing import Any

import torch
from torch import Tensor

from llmfast._dtensor import is_dtensor
from llmfast.optim.formats import LOW_BITS, LOW_NAMES, PARAM_FORMATS, param_format, sixteen
from llmfast.optim.kept import OWN_NAMES, stored_name
from llmfast.optim.options import Options
from llmfast.optim.row import Place, places
from llmfast.optim.state import StateKeeper

OLD_LOW_BITS = "remainder"  # the name in older checkpoints, where int8 or int16 says how many bits there are


class StateLoader(StateKeeper):
    """An optimizer that loads states of any format."""

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of torch's or our optimizer. States that `Extras` keep in other dtypes are not cast.

        Raises:
            ValueError: a state lacks what the rule keeps, or a flattened one was saved under other settings.
        """
        given: dict[str, Any] = {}
        # torch.distributed.checkpoint loses the settings of a group that has no parameters.
        mine = [
            {k: v for k, v in group.items() if k in self.own_group_keys or not group["params"]}
            for group in self.param_groups
        ]

        def read(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
            state = dict(loaded["state"])
            for i, place in self._numbered(loaded):
                if i in state:
                    state[i] = self._of_one_format(place, self._readable(i, state[i]))
                    self._expect_whole(
                        i, self.param_groups[place.group] | loaded["param_groups"][place.group], state[i]
                    )
            given.update(loaded, state=state)
            return given

        # The last of the hooks, so that it sees the state dict as the others have changed it.
        handle = self.register_load_state_dict_pre_hook(read)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._loaded = {p for group in self.param_groups for p in group["params"]}
        for i, (p, index, *_) in self._numbered(given):
            for name, value in given["state"].get(i, {}).items():
                if isinstance(value, Tensor) and self._stays_as_saved(index, name):
                    value = value.to(p.device)
                    self.state[p][name] = sixteen(value) if name == LOW_BITS else value
        for group, kept in zip(self.param_groups, mine):
            for key, value in kept.items():
                group.setdefault(key, value)
            for key in Options.PER_GROUP.intersection(group):  # saved by old versions, where they had no effect
                del group[key]

    def _numbered(self, saved: dict[str, Any]) -> list[tuple[Any, Place]]:
        """Return this optimizer's parameters, each with its key in a state dict."""
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        return [*zip(keys, places(self.param_groups))]

    def _readable(self, i: Any, saved: dict[str, Any]) -> dict[str, Any]:
        """Give one parameter's saved states their current names, without those that a flattened state dict left empty.

        From a flattened state dict, torch.distributed.checkpoint passes on entries whose names are in the current
        state, and an empty dict for names that are missing.
        """
        empty = {name for name, value in saved.items() if isinstance(value, dict) and not value}
        if len(empty) == len(saved):
            return {}
        for name in sorted(empty):
            # Two may be missing: the scale of a state that was saved decoded, and a counter that torch does not keep.
            scale_of_numbers = name.endswith("_scale") and name.removesuffix("_scale") in saved.keys() - empty
            if not scale_of_numbers and (name != "step" or self.torch_counts_steps):
                raise ValueError(
                    f"the flattened state dict must have {name} for parameter {i}, which {_keeper_of(name)} keeps; "
                    "got one of an optimizer with other settings. Load it into an optimizer with those settings "
                    "first, and that optimizer's state_dict() into this one"
                )
        names = {OLD_LOW_BITS: LOW_BITS}
        return {names.get(name, name): value for name, value in saved.items() if name not in empty}

    def _expect_whole(self, i: Any, group: dict[str, Any], saved: dict[str, Any]) -> None:
        """Raise ValueError if a saved state lacks one that the group's rule would have made by then.

        A moment of zeros with a counter of many steps would make the next steps many times too large.
        """
        names = ["step"] * self.torch_counts_steps + [name for name in self._state_names(group) if name is not None]
        lacking = [name for name in names if name not in self.late and saved.get(stored_name(saved, name)) is None]
        if saved and lacking:
            raise ValueError(
                f"the state of parameter {i} must have {', '.join(names)} for {type(self).__name__}; got "
                f"{', '.join(map(str, saved))}, without {', '.join(lacking)}"
            )

    def _of_one_format(self, place: Place, saved: dict[str, Any]) -> dict[str, Any]:
        """Leave out entries that torch.distributed.checkpoint has added to a whole state dict (`full_state_dict`).

        It takes names that the saved state lacks from this optimizer's current state. If the formats differ, the result
        then has the same state twice: as it was saved, and as this optimizer keeps it.
        """
        p, options = place.param, self.options_of(place.group)
        here = self.state.get(p, {})
        low = param_format(options.master_of(p)).state or ""
        added = {low} if any(name in saved for name in LOW_NAMES if name != low) else set()
        # The saved states are other tensors than the current ones, except DTensors, which are loaded in place.
        others_are_loaded = saved.get("step") is not here.get("step") and not is_dtensor(p)
        if others_are_loaded and saved.get("ema_param") is here.get("ema_param"):
            added.add("ema_param")
        for name in saved:
            if f"{name}_code" in saved:
                codes_are_ours = options.state_format.coded and not is_dtensor(p)
                added |= {f"{name}_code", f"{name}_scale"} if codes_are_ours else {name}
        return {name: value for name, value in saved.items() if name not in added}

    def _stays_as_saved(self, index: int, name: str) -> bool:
        if name in OWN_NAMES or name.endswith(("_code", "_scale")):
            return True
        return name != "step" and self.option(index, "state_dtype") is not None


def _keeper_of(name: str) -> str:
    """Return the setting under which a state of that name is kept."""
    masters = [repr(master) for master, kept in PARAM_FORMATS.items() if kept.state == name]
    if masters or name == "ema_param":
        return f"master_weights={' or '.join(masters)}" if masters else "ema_decay"
    return "state_dtype='8bit'" if name.endswith(("_code", "_scale")) else "a state_dtype other than '8bit'"
