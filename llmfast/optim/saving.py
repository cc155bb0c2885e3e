"""Saving the states of a fused optimizer."""

import dataclasses
from typing import Any

from torch import Tensor

from llmfast._dtensor import is_dtensor
from llmfast.optim.formats import LOW_BITS, sixteen
from llmfast.optim.kept import OWN_NAMES, decoded
from llmfast.optim.row import places
from llmfast.optim.state import StateKeeper


class StateSaver(StateKeeper):
    """An optimizer whose state_dict is torch's, plus what `Extras` keep."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's corresponding optimizer saves it, with additional keys for what `Extras` keep.

        An 8-bit state is saved as `<name>_code` and `<name>_scale`, names that torch does not use; for a DTensor it is
        `<name>` in float32, which other ranks can load. Use `torch_state_dict` for torch. Options of groups are not
        saved: states of any format load into an optimizer with any other.
        """
        saved = super().state_dict()
        params = {place.identity: place for place in places(self.param_groups)}
        exported = {
            key: self._exported(params[key].param, params[key].group, state) if key in params else state
            for key, state in saved["state"].items()
        }
        return saved | {"state": {key: state for key, state in exported.items() if state or key not in params}}

    def torch_state_dict(self) -> dict[str, Any]:
        """Return the state in a form that torch's optimizer can load: decoded, without additional keys."""
        saved = self.state_dict()
        ours = {*OWN_NAMES, *([] if self.torch_counts_steps else ["step"])}
        for place in places(self.param_groups):
            if (state := saved["state"].get(place.identity)) is not None:
                saved["state"][place.identity] = {
                    base: value if base == name else decoded(state, base)
                    for name, value in state.items()
                    if (base := name.removesuffix("_code")) not in ours and not name.endswith("_scale")
                }
        for group in saved["param_groups"]:
            for name in self.own_group_keys:
                group.pop(name, None)
        return saved

    def _exported(self, p: Tensor, index: int, state: dict[str, Any]) -> dict[str, Any]:
        """Return what is saved of one parameter's state."""
        # torch.distributed.checkpoint casts by value to the dtype that it finds under the same name. So low bits are
        # always saved as 16 bits.
        exported = {name: sixteen(t) if name == LOW_BITS else t for name, t in state.items()}
        if is_dtensor(p):
            for name in state:
                if f"{name}_scale" in state:
                    exported[name] = decoded(state, name)
                    del exported[f"{name}_scale"]
                elif name == LOW_BITS:  # NCCL and gloo do not carry int16
                    exported[name] = exported[name].int()
        return exported

    def __getstate__(self) -> dict[str, Any]:
        """Keep every public attribute except wrapped methods, such as the `step` that schedulers wrap."""
        methods = {name for name in vars(self) if callable(getattr(type(self), name, None))}
        public = {name: value for name, value in vars(self).items() if not name.startswith("_") and name not in methods}
        own = [dict(options) for options in self.group_options]
        public |= {"options": dataclasses.replace(self.options), "group_options": own}
        public["_loaded"] = self._loaded  # what a step still has to look at is looked at by the copy's too
        return public | super().__getstate__()
