"""Options of an optimizer and of its parameter groups: see `Extras`."""

import dataclasses
from typing import Any, ClassVar

import torch

from llmfast.optim.options import Extras, Options
from llmfast.optim.row import SHARED


class GroupedOptions(torch.optim.Optimizer):
    """An optimizer whose parameter groups may have options of their own."""

    options: Options
    group_options: list[dict[str, Any]]
    """Options of parameter groups that override `options`, one dict per group; see `Extras`."""
    # Group keys that torch's optimizer does not have.
    own_group_keys: ClassVar[tuple[str, ...]] = ()
    # Arguments of the constructor, beyond `Extras`, that cannot be set per group.
    whole_arguments: ClassVar[tuple[str, ...]] = ()

    def _take(self, extras: Extras) -> None:
        """Store the extra options; call this before torch's constructor, which adds parameter groups."""
        self.options = Options.given(extras)
        self.group_options = []

    def option(self, index: int, name: str) -> Any:
        """Return the option of a group: its own value, or else the optimizer's."""
        return self.group_options[index].get(name, getattr(self.options, name))

    def options_of(self, index: int) -> Options:
        """Return all options of a group."""
        return dataclasses.replace(self.options, **self.group_options[index])

    def _match_groups(self) -> None:
        """Give new groups an empty entry in `group_options`, and check that the options are where they take effect.

        Raises:
            RuntimeError: groups were added or removed by hand although some have options of their own.
            ValueError: an option is set in a group itself.
        """
        if len(self.group_options) != len(self.param_groups):
            if any(self.group_options):
                raise RuntimeError(
                    f"param_groups must be changed only by add_param_group if groups have their own options; "
                    f"got {len(self.param_groups)} groups for group_options={self.group_options}"
                )
            self.group_options = [{} for _ in self.param_groups]
        for index, group in enumerate(self.param_groups):
            if not Options.PER_GROUP.isdisjoint(group):
                name = min(Options.PER_GROUP.intersection(group))
                raise ValueError(
                    f"{name} of group {index} must be set in group_options[{index}], not in the group itself, where "
                    f"it has no effect; got {group[name]!r}"
                )

    def _clip_of(self, index: int) -> int | None:
        """Return which norm clips a group: the group's index for its own, SHARED, or None if it is not clipped."""
        if self.option(index, "max_grad_norm") is None:
            return None
        return index if "max_grad_norm" in self.group_options[index] else SHARED

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._match_groups()
        own: dict[str, Any] = {}
        if isinstance(param_group, dict):  # torch raises the error for anything else
            allowed = {*self.defaults, *self.own_group_keys, "params", "param_names"}
            own = self.options.given_in(param_group, allowed, type(self))
        if own:  # leave them in the caller's dict, which may be used for another optimizer
            param_group = {key: value for key, value in param_group.items() if key not in own}
        super().add_param_group(param_group)
        group, index = self.param_groups[-1], len(self.param_groups) - 1
        names = group.get("param_names", [f"parameter {i} of group {index}" for i in range(len(group["params"]))])
        options = dataclasses.replace(self.options, **own)
        try:
            for p, name in zip(group["params"], names):
                options.expect_fits(p, name)
            self._complete_group(group, options)
        except BaseException:
            self.param_groups.pop()
            raise
        self.group_options.append(own)

    def _complete_group(self, group: dict[str, Any], options: Options) -> None:
        """Fill in missing keys of a new group; raise ValueError if its options contradict each other."""
