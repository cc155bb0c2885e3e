"""States that a fused optimizer keeps per parameter: creating, converting, saving and loading them."""

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmfast._checks import describe
from llmfast._dtensor import is_dtensor, local
from llmfast.optim import formats
from llmfast.optim.formats import CODES, LOW_BITS, LOW_NAMES, PARAM_FORMATS, format_in, is_code, param_format
from llmfast.optim.options import Extras, Options
from llmfast.optim.row import SHARED, Place, Row, is_dense, shard_of

Names = tuple[str | None, str | None, str | None]
OLD_LOW_BITS = "remainder"  # the name in older checkpoints, where int8 or int16 says how many bits there are
OWN_NAMES = ("ema_param", *LOW_NAMES)  # names of states that torch's optimizers do not have


class StateKeeper(torch.optim.Optimizer, ABC):
    """An optimizer whose state_dict is torch's, plus the states that `Extras` ask for."""

    options: Options
    group_options: list[dict[str, Any]]
    """Options that parameter groups have in place of `options`, one dict per group; see `Extras`."""
    rule: ClassVar[str]  # its name among the kernels' rules and in `reference`
    torch_counts_steps: ClassVar[bool] = True  # whether torch's optimizer keeps a step counter
    # Names of states that are never negative.
    squares: ClassVar[frozenset[str]] = frozenset()
    # Names of states that need more than 8 bits; they are float32 if the others have 8.
    never_coded: ClassVar[frozenset[str]] = frozenset()
    # Keys of groups that torch's optimizer does not have.
    own_group_keys: ClassVar[tuple[str, ...]] = ()
    # Parameters whose states were loaded, until these are in use.
    _loaded: set[Tensor] | frozenset[Tensor] = frozenset()
    # Arguments of the constructor, beyond `Extras`, that cannot be set per group.
    whole_arguments: ClassVar[tuple[str, ...]] = ()

    def _take(self, extras: Extras) -> None:
        """Take the extra options; call this before torch's constructor, which adds parameter groups."""
        self.options = Options.given(extras)
        self.group_options = []

    def option(self, index: int, name: str) -> Any:
        """Return the option of a group: its own value, or else the optimizer's."""
        return self.group_options[index].get(name, getattr(self.options, name))

    def options_of(self, index: int) -> Options:
        """Return all options of a group."""
        return dataclasses.replace(self.options, **self.group_options[index])

    def _match_groups(self) -> None:
        """Raise ValueError if the options of groups can no longer be matched to groups."""
        if len(self.group_options) != len(self.param_groups):
            if any(self.group_options):
                raise RuntimeError(
                    f"param_groups must only grow, by add_param_group, if groups have their own options; "
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
        """Return the clip that a group belongs to: its index, SHARED, or None if it is not clipped."""
        if self.option(index, "max_grad_norm") is None:
            return None
        return index if "max_grad_norm" in self.group_options[index] else SHARED

    @abstractmethod
    def _state_names(self, group: dict[str, Any]) -> Names:
        """Return the names of the states that have the parameter's shape, in the order of the rule's arguments."""

    def _first_value(self, group: dict[str, Any]) -> float:
        """Return the initial value of every state."""
        return 0.0

    # Making it.

    def _row(self, p: Tensor, index: int, identity: int) -> Row:
        """Return the parameter with its state, created if missing, in its memory order and the requested formats."""
        group, o, state = self.param_groups[index], self.options_of(index), self.state[p]
        names = self._state_names(group)
        if state.get("step") is None:  # torch's SGD has no counter; a momentum buffer shows that it has stepped
            before = state.get("momentum_buffer") is not None and not self.torch_counts_steps
            state["step"] = torch.tensor(float(before), dtype=torch.float32, device="cpu")
        # Torch creates it on the default device, in the default dtype. For complex ones it stays as torch has it.
        home = state["step"].device if p.is_complex() else p.device
        if (state["step"].device, state["step"].dtype) != (home, torch.float32):
            state["step"] = state["step"].to(home, torch.float32)
        self._keep_low(p, identity, state, o)
        self._keep_average(p, identity, state, o)
        for name in names:
            if name is not None:
                self._keep_state(p, state, name, self._first_value(group), o)
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
            states=tuple(None if name is None else pieces[_stored(state, name)] for name in names),
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
                        self._check(p, name, state)

    def _check(self, p: Tensor, base: str, state: dict[str, Any]) -> None:
        name = _stored(state, base)
        t = state.get(name)
        if t is None:
            return
        if t.shape != p.shape or t.device != p.device:  # it is another model's, or the parameter has moved
            raise ValueError(f"state {name} is {describe(t)}, its parameter {describe(p)}")
        if _spread(t) != _spread(p):
            raise ValueError(
                f"state {name} of {describe(p)} must be sharded as its parameter, {_spread(p)}; got {_spread(t)}; "
                "torch.distributed.checkpoint loads a state with the parameter's sharding"
            )
        scale, groups = state.get(f"{base}_scale"), -(-local(t).numel() // formats.GROUP)
        if is_code(t) and base not in OWN_NAMES and (scale is None or scale.shape != (groups,)):
            came = "none" if scale is None else describe(scale)
            raise ValueError(f"state {base} of {describe(p)} holds 8-bit codes, which need {groups} scales; got {came}")

    def _keep_state(self, p: Tensor, state: dict[str, Any], name: str, first: float, o: Options) -> None:
        """Create the state, or convert it to the dtype in the options and to the parameter's memory order.

        8-bit codes are named `<name>_code`, and their scales `<name>_scale`. The codes of a DTensor are named `<name>`,
        because it is saved as numbers under that name, and torch.distributed.checkpoint loads only names that the
        optimizer's state has.
        """
        stored = _stored(state, name)
        t, wanted = state.get(stored), o.state_format.dtype
        if o.state_format.coded and name not in self.never_coded:
            dtype = CODES[name not in self.squares]
            if t is None or t.dtype != dtype or not _lies_like(t, p):
                if t is None:
                    t = torch.full_like(p, first, dtype=torch.float32, memory_format=torch.preserve_format)
                elif is_code(t):
                    t = self._decoded(state, name)
                state.pop(stored, None)
                state[name if is_dtensor(p) else f"{name}_code"], state[f"{name}_scale"] = _coded(t, p, dtype)
            return
        if t is None:
            value = complex(first, first) if p.is_complex() else first
            state[name] = torch.full_like(p, value, dtype=wanted, memory_format=torch.preserve_format)
            return
        if is_code(t):
            t = self._decoded(state, name).to(wanted or p.dtype)
            del state[stored], state[f"{name}_scale"]
        if wanted is not None:
            t = t.to(wanted)
        if not _lies_like(t, p):  # loaded from a run with another memory layout
            t = torch.empty_like(p, dtype=t.dtype, requires_grad=False).copy_(t)
        if t is not state.get(name):
            state[name] = t

    def _keep_average(self, p: Tensor, identity: int, state: dict[str, Any], o: Options) -> None:
        """Create the average if `ema_decay` is set. Otherwise delete it, so that a later one does not start from it."""
        if o.ema_decay is not None and "ema_param" not in state:
            state["ema_param"] = self._value(p, state).to(torch.float32, copy=True)
        elif o.ema_decay is None and state.pop("ema_param", None) is not None:
            warnings.warn(
                f"the state has an average (ema_param) of parameter {identity}, {describe(p)}, which ema_decay=None "
                "discards",
                stacklevel=5,
            )

    def _keep_low(self, p: Tensor, identity: int, state: dict[str, Any], o: Options) -> None:
        """Create the additional bits of the parameter's format, converting those of another format if there are any."""
        asked = param_format(o.master_of(p))
        name, dtype = asked.state, asked.dtype or p.dtype
        kept = [n for n in LOW_NAMES if n in state]
        if name is not None and kept == [name] and state[name].dtype == dtype:
            if not _lies_like(state[name], p):
                state[name] = torch.empty_like(p, dtype=state[name].dtype, requires_grad=False).copy_(state[name])
            if asked.is_copy and p in self._loaded:  # the loaded copy may belong to other weights than the loaded model
                x, q = local(state[name]), local(p)
                x.copy_(torch.where((x.to(q.dtype) == q) | q.isnan(), x, q))
            return
        value = self._value(p, state)
        for n in kept:
            del state[n]
        if name is not None:
            state[name] = torch.empty_like(p, dtype=dtype, requires_grad=False)
            asked.keep(local(p), local(state[name]), local(value).float())
        elif kept:
            warnings.warn(
                f"the state has more bits ({kept[0]}) of parameter {identity}, {describe(p)}, than its dtype, which "
                f"master_weights={o.master_weights!r} discards",
                stacklevel=5,
            )

    def _value(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the parameter with all bits that its state holds, in whatever format."""
        p, kept = p.detach(), format_in(state, p)
        if kept.state is None:
            return p
        value = torch.empty_like(p, dtype=torch.float32)
        local(value).copy_(kept.read(local(p), local(state[kept.state]), torch.float32))
        return value

    def _decoded(self, state: dict[str, Any], name: str) -> Tensor:
        """Decode an 8-bit state into float32."""
        codes = state[_stored(state, name)]
        value = torch.empty_like(codes, dtype=torch.float32)
        flat = formats.decoded(formats.in_memory_order(local(codes)), state[f"{name}_scale"])
        formats.in_memory_order(local(value)).copy_(flat)
        return value

    def master_value(self, p: Tensor) -> Tensor:
        """Return a parameter with all bits that the optimizer keeps: float32 if `master_weights` adds bits."""
        return self._value(p, self.state.get(p, {})).clone()

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
        except ValueError:
            self.param_groups.pop()
            raise
        self.group_options.append(own)

    def _complete_group(self, group: dict[str, Any], options: Options) -> None:
        """Fill in missing keys of a new group; raise ValueError if its options contradict each other."""
        return

    # Saving and loading it.

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's corresponding optimizer saves it, with additional keys for what `Extras` keep.

        An 8-bit state is saved as `<name>_code` and `<name>_scale`, names that torch does not use; for a DTensor it is
        `<name>` in float32, which other ranks can load. Use `torch_state_dict` for torch. Options of groups are not
        saved: states of any format load into an optimizer with any other.
        """
        saved = super().state_dict()
        params = self._params_by_key()
        for key, state in saved["state"].items():
            p, index = params.get(key, (None, 0))
            saved["state"][key] = self._exported(p, index, state)
        saved["state"] = {key: state for key, state in saved["state"].items() if state or key not in params}
        return saved

    def torch_state_dict(self) -> dict[str, Any]:
        """Return the state in a form that torch's optimizer can load: decoded, without additional keys."""
        saved = self.state_dict()
        for key in self._params_by_key():
            if (state := saved["state"].get(key)) is not None:
                ours = {*OWN_NAMES, *([] if self.torch_counts_steps else ["step"])}
                saved["state"][key] = {
                    name.removesuffix("_code"): self._decoded_code(state, name) if name.endswith("_code") else value
                    for name, value in state.items()
                    if name not in ours and not name.endswith("_scale")
                }
        for group in saved["param_groups"]:
            for name in self.own_group_keys:
                group.pop(name, None)
        return saved

    def _decoded_code(self, state: dict[str, Any], name: str) -> Tensor:
        base = name.removesuffix("_code")
        return self._decoded({base: state[name], f"{base}_scale": state[f"{base}_scale"]}, base)

    def _params_by_key(self) -> dict[Any, tuple[Tensor, int]]:
        """Return parameters by number, each with the index of its group."""
        return dict(enumerate((p, index) for index, group in enumerate(self.param_groups) for p in group["params"]))

    def _exported(self, p: Tensor | None, index: int, state: dict[str, Any]) -> dict[str, Any]:
        """Return what is saved of one parameter's state."""
        # torch.distributed.checkpoint casts by value to the dtype that it finds under the same name. So low bits are
        # always saved as 16 bits.
        exported = {name: formats.sixteen(t) if name == LOW_BITS else t for name, t in state.items()}
        if p is None or not is_dtensor(p):
            return exported
        for name in state:
            if f"{name}_scale" in state:
                exported[name] = self._decoded(state, name)
                del exported[f"{name}_scale"]
            elif name == LOW_BITS:  # NCCL and gloo do not carry int16
                exported[name] = exported[name].int()
        return exported

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of torch's or our optimizer. States that `Extras` keep in other dtypes are not cast."""
        given: dict[str, Any] = {}
        mine = [{k: v for k, v in group.items() if k in self.own_group_keys} for group in self.param_groups]

        def read(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
            ids = [i for group in loaded["param_groups"] for i in group["params"]]
            state = dict(loaded["state"])
            for i, (p, index) in zip(ids, self._params_by_key().values()):
                if i in state:
                    state[i] = self._of_one_format(p, index, self._readable(i, state[i]))
            given.update(loaded, state=state)
            return given

        # The last of the hooks, so that it sees the state dict as the others have changed it.
        handle = self.register_load_state_dict_pre_hook(read)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        ids = [i for group in given["param_groups"] for i in group["params"]]
        self._loaded = {p for p, _ in self._params_by_key().values()}
        for i, (p, index) in zip(ids, self._params_by_key().values()):
            for name, value in given["state"].get(i, {}).items():
                if isinstance(value, Tensor) and self._stays_as_saved(index, name):
                    value = value.to(p.device)
                    self.state[p][name] = formats.sixteen(value) if name == LOW_BITS else value
        for group, kept in zip(self.param_groups, mine):
            for key, value in kept.items():
                group.setdefault(key, value)
            for key in Options.PER_GROUP.intersection(group):  # saved by old versions, where they had no effect
                del group[key]

    def _readable(self, i: Any, saved: dict[str, Any]) -> dict[str, Any]:
        """Rename one parameter's saved state to current names, without entries that a flattened one left empty.

        From a flattened state dict, torch.distributed.checkpoint passes on entries whose names are in the current
        state, and an empty dict for names that are missing.
        """
        empty = {name for name, value in saved.items() if isinstance(value, dict) and not value}
        if len(empty) == len(saved):
            return {}
        for name in sorted(empty):
            # Neither a scale of a state that was saved as numbers nor torch's missing counter is ever saved.
            scale_of_numbers = name.endswith("_scale") and name.removesuffix("_scale") in saved.keys() - empty
            if not scale_of_numbers and (name != "step" or self.torch_counts_steps):
                raise ValueError(
                    f"the flattened state dict must have {name} for parameter {i}, which {self._keeper_of(name)} "
                    "keeps; got one of an optimizer with other settings. Load it into an optimizer with those settings "
                    "first, and that optimizer's state_dict() into this one"
                )
        readable = {name: value for name, value in saved.items() if name not in empty}
        if OLD_LOW_BITS in readable:
            readable[LOW_BITS] = readable.pop(OLD_LOW_BITS)
        return readable

    def _of_one_format(self, p: Tensor, index: int, saved: dict[str, Any]) -> dict[str, Any]:
        """Leave out entries that torch.distributed.checkpoint has added to a whole state dict (`full_state_dict`).

        It takes names that the saved state lacks from this optimizer's current state. If the formats differ, the result
        then has the same state twice: as it was saved, and as this optimizer keeps it.
        """
        options, here = self.options_of(index), self.state.get(p, {})
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

    def _keeper_of(self, name: str) -> str:
        """Return the setting under which a state of that name is kept."""
        masters = [repr(master) for master, kept in PARAM_FORMATS.items() if kept.state == name]
        if masters or name == "ema_param":
            return f"master_weights={' or '.join(masters)}" if masters else "ema_decay"
        return "state_dtype='8bit'" if name.endswith(("_code", "_scale")) else "a state_dtype other than '8bit'"

    def _stays_as_saved(self, index: int, name: str) -> bool:
        if name in OWN_NAMES or name.endswith(("_code", "_scale")):
            return True
        return name != "step" and self.option(index, "state_dtype") is not None

    def __getstate__(self) -> dict[str, Any]:
        """Keep every public attribute except wrapped methods, such as the `step` that schedulers wrap."""
        methods = {name for name in vars(self) if callable(getattr(type(self), name, None))}
        public = {name: value for name, value in vars(self).items() if not name.startswith("_") and name not in methods}
        own = [dict(options) for options in self.group_options]
        public |= {"options": dataclasses.replace(self.options), "group_options": own}
        return public | super().__getstate__()

    # The average.

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, parameters have the values of their averages; those without an average yet stay as they are.

        Raises:
            ValueError: the optimizer keeps no averages.
        """
        if all(self.option(index, "ema_decay") is None for index in range(len(self.param_groups))):
            raise ValueError("ema_weights is for optimizers with ema_decay; this one has None")
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


def _stored(state: dict[str, Any], name: str) -> str:
    """Return the name under which a state is stored: see `_keep_state`."""
    code = f"{name}_code"
    return code if code in state else name


def _spread(t: Tensor) -> Any:
    """Return placements and mesh of a DTensor."""
    return (t.placements, t.device_mesh) if is_dtensor(t) else None  # type: ignore[attr-defined]


def _lies_like(t: Tensor, p: Tensor) -> bool:
    """Return True if `t` has the memory layout of `p`, or of a tensor created like `p`."""
    return local(t).stride() == local(p).stride() or not is_dense(local(p))


def _coded(value: Tensor, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round to codes like `p`, to nearest, and return them with their scales."""
    codes = torch.empty_like(p, dtype=dtype, requires_grad=False)
    flat = torch.empty_like(local(codes), dtype=torch.float32).copy_(local(value))
    code, scale = formats.encoded(formats.in_memory_order(flat), None, dtype == torch.int8)
    formats.in_memory_order(local(codes)).copy_(code)
    return codes, scale
