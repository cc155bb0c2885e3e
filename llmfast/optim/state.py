"""What a fused optimizer keeps of each parameter: made, brought into the formats asked for, saved and loaded."""

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from llmfast._checks import describe
from llmfast.optim import formats
from llmfast.optim.formats import LOW
from llmfast.optim.options import Extras, Options
from llmfast.optim.row import Row, is_dense, is_dtensor, local, shard_of

Names = tuple[str | None, str | None, str | None]
CODES = {True: torch.int8, False: torch.uint8}  # of 8-bit states that have a sign, and that have none
LOW_NAMES = tuple(dict.fromkeys(name for name, _ in LOW.values()))
OWN_NAMES = ("ema_param", *LOW_NAMES)  # beside those that torch has


class StateKeeper(torch.optim.Optimizer, ABC):
    """An optimizer whose state_dict is torch's, and that keeps more than torch's where `Extras` say so."""

    options: Options
    rule: ClassVar[str]  # the kernels' name of it
    # States that are squares, and so without a sign.
    squares: ClassVar[frozenset[str]] = frozenset()
    # States that 8 bits are too few for: they are float32 then.
    never_coded: ClassVar[frozenset[str]] = frozenset()
    # Keys of groups that torch's optimizer does not have.
    own_group_keys: ClassVar[tuple[str, ...]] = ()

    def _take(self, extras: Extras) -> None:
        """To be called before torch's constructor, which adds parameter groups."""
        self.options = Options.given(extras)

    @abstractmethod
    def _state_names(self, group: dict[str, Any]) -> Names:
        """Names of the states that are shaped like the parameter, in the order of the rule's arguments."""

    def _first_value(self, group: dict[str, Any]) -> float:
        """Of every state."""
        return 0.0

    # Making it.

    def _row(self, p: Tensor, index: int, identity: int) -> Row:
        """The parameter with its state: made where missing, in its memory order and the formats asked for."""
        group, o, state = self.param_groups[index], self.options, self.state[p]
        names = self._state_names(group)
        if state.get("step") is None:  # torch's SGD keeps none: a buffer says that there was a step
            before = state.get("momentum_buffer") is not None and self.rule == "sgd"
            state["step"] = torch.tensor(float(before), dtype=torch.float32, device="cpu")
        # Torch makes it where and in what its defaults for new tensors say; a complex parameter's is torch's own.
        home = state["step"].device if p.is_complex() else p.device
        if (state["step"].device, state["step"].dtype) != (home, torch.float32):
            state["step"] = state["step"].to(home, torch.float32)
        self._keep_low(p, identity, state)
        if o.ema_decay is not None and "ema_param" not in state:
            state["ema_param"] = self._value(p, state).to(torch.float32, copy=True)
        for name in names:
            if name is not None:
                self._keep_state(p, state, name, self._first_value(group))
        pieces = {name: local(t) for name, t in state.items() if isinstance(t, Tensor)}
        master = o.master_of(p)
        return Row(
            p, index, identity, state, local(p), shard_of(p), master, names,
            states=tuple(None if name is None else pieces[name] for name in names),
            scales=tuple(None if name is None else pieces.get(f"{name}_scale") for name in names[:2]),
            low=pieces[LOW[master][0]] if master in LOW else None,
            ema=pieces["ema_param"] if o.ema_decay is not None else None,
        )  # fmt: skip

    def _check_states(self) -> None:
        """Raises ValueError if a state does not belong to its parameter."""
        for group in self.param_groups:
            names = [name for name in (*self._state_names(group), *OWN_NAMES) if name is not None]
            for p in group["params"]:
                if (state := self.state.get(p)) is not None:
                    for name in names:
                        self._check(p, name, state)

    def _check(self, p: Tensor, name: str, state: dict[str, Any]) -> None:
        t = state.get(name)
        if t is None:
            return
        if t.shape != p.shape or t.device != p.device:  # of another model, or left behind
            raise ValueError(f"state {name} is {describe(t)}, its parameter {describe(p)}")
        if _spread(t) != _spread(p):
            raise ValueError(
                f"state {name} of {describe(p)} is spread over ranks as {_spread(t)}, its parameter as {_spread(p)}; "
                "torch.distributed.checkpoint brings a state to where it belongs"
            )
        scale, groups = state.get(f"{name}_scale"), -(-local(t).numel() // formats.GROUP)
        if t.dtype in CODES.values() and name not in OWN_NAMES and (scale is None or scale.shape != (groups,)):
            came = "none" if scale is None else describe(scale)
            raise ValueError(f"state {name} of {describe(p)} holds 8-bit codes, which need {groups} scales; got {came}")

    def _keep_state(self, p: Tensor, state: dict[str, Any], name: str, first: float) -> None:
        """Make the state, or bring it to the dtype that the options ask for and to the parameter's memory order."""
        t, wanted = state.get(name), self.options.state_dtype
        if wanted == "8bit" and name in self.never_coded:
            wanted = torch.float32
        if wanted == "8bit":
            dtype = CODES[name not in self.squares]
            if t is None or t.dtype != dtype or not _lies_like(t, p):
                if t is None:
                    t = torch.full_like(p, first, dtype=torch.float32, memory_format=torch.preserve_format)
                elif t.dtype in CODES.values():
                    t = self._decoded(state, name)
                state[name], state[f"{name}_scale"] = _coded(t, p, dtype)
            return
        if t is None:
            value = complex(first, first) if p.is_complex() else first
            state[name] = torch.full_like(p, value, dtype=wanted, memory_format=torch.preserve_format)
            return
        if t.dtype in CODES.values():
            t = self._decoded(state, name).to(wanted or p.dtype)
            del state[f"{name}_scale"]
        if wanted is not None:
            t = t.to(wanted)
        if not _lies_like(t, p):  # loaded from a run where it lay otherwise
            t = torch.empty_like(p, dtype=t.dtype, requires_grad=False).copy_(t)
        if t is not state[name]:
            state[name] = t

    def _keep_low(self, p: Tensor, identity: int, state: dict[str, Any]) -> None:
        """Make what the options say to keep beside the parameter, out of what another way of it has left, if any."""
        master = self.options.master_of(p)
        name, dtype = LOW.get(master or "", (None, None))
        kept = [n for n in LOW_NAMES if n in state]
        if name is not None and kept == [name] and state[name].dtype == (dtype or p.dtype):
            if not _lies_like(state[name], p):
                state[name] = torch.empty_like(p, dtype=state[name].dtype, requires_grad=False).copy_(state[name])
            return
        value = self._value(p, state)
        for n in kept:
            del state[n]
        if name is not None:
            state[name] = _low_bits(p, value, cast(str, master), dtype or p.dtype)
        elif kept:
            warnings.warn(
                f"the state holds {kept[0]}: bits of parameter {identity}, {describe(p)}, beyond those of its dtype, "
                f"which are lost with master_weights={self.options.master_weights!r}",
                stacklevel=5,
            )

    def _value(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """The parameter with all the bits it has, in whatever way these are kept."""
        p = p.detach()
        if "master_param" in state:
            master: Tensor = state["master_param"]
            return master
        if "kahan_comp" in state:
            compensation: Tensor = state["kahan_comp"]
            return p.float() + compensation.float()
        if "remainder" in state and p.dtype == torch.bfloat16:
            low = state["remainder"]
            value = torch.empty_like(p, dtype=torch.float32)
            local(value).copy_(formats.joined(local(p), local(low), 8 * low.dtype.itemsize))
            return value
        return p

    def _decoded(self, state: dict[str, Any], name: str) -> Tensor:
        """An 8-bit state in float32."""
        codes = state[name]
        value = torch.empty_like(codes, dtype=torch.float32)
        flat = formats.decoded(formats.in_memory_order(local(codes)), state[f"{name}_scale"])
        formats.in_memory_order(local(value)).copy_(flat)
        return value

    def master_value(self, p: Tensor) -> Tensor:
        """A parameter with all the bits that the optimizer has of it: float32 where `master_weights` keeps more."""
        return self._value(p, self.state.get(p, {})).clone()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group, index = self.param_groups[-1], len(self.param_groups) - 1
        names = group.get("param_names", [f"parameter {i} of group {index}" for i in range(len(group["params"]))])
        try:
            for p, name in zip(group["params"], names):
                self.options.expect_fits(p, name)
        except ValueError:
            self.param_groups.pop()
            raise

    # Saving and loading it.

    def state_dict(self) -> dict[str, Any]:
        """As torch's optimizer of the same name saves it; with keys of its own for what `Extras` keep.

        An 8-bit state is `<name>_code` and `<name>_scale`, which nobody takes for what torch has; of a DTensor it is
        `<name>` in float32, which other ranks can take over. `torch_state_dict` is for torch.
        """
        saved = super().state_dict()
        params = self._params_by_key()
        saved["state"] = {key: self._exported(params.get(key), state) for key, state in saved["state"].items()}
        saved["state"] = {key: state for key, state in saved["state"].items() if state or key not in params}
        return saved

    def torch_state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizer of the same name can load it: 8-bit states decoded, and no keys of our own."""
        saved = self.state_dict()
        for key in self._params_by_key():
            if (state := saved["state"].get(key)) is not None:
                ours = {*OWN_NAMES, *(["step"] if self.rule == "sgd" else [])}
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

    def _params_by_key(self) -> dict[Any, Tensor]:
        return dict(enumerate(p for group in self.param_groups for p in group["params"]))

    def _exported(self, p: Tensor | None, state: dict[str, Any]) -> dict[str, Any]:
        """What is saved of one parameter's state."""
        exported: dict[str, Any] = {}
        spread = p is not None and is_dtensor(p)
        for name, value in state.items():
            base = name.removesuffix("_scale")
            if f"{name}_scale" in state:
                exported[name if spread else f"{name}_code"] = self._decoded(state, name) if spread else value
            elif spread and name == "remainder" and value.dtype == torch.int16:  # NCCL and gloo do not carry that
                exported[name] = value.int()
            elif not (spread and name.endswith("_scale") and base in state):
                exported[name] = value
        return exported

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, from any optimizer of the same name, and without casting what `Extras` keep in other dtypes."""
        given: dict[str, Any] = {}
        mine = [{k: v for k, v in group.items() if k in self.own_group_keys} for group in self.param_groups]
        # The last of the hooks: it sees what the others have made of it.
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: given.update(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        ids = [i for group in given["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params):
            saved = given["state"].get(i, {})
            for name, value in saved.items():
                if name.endswith("_code"):
                    self.state[p][name.removesuffix("_code")] = self.state[p].pop(name)
                if isinstance(value, Tensor) and self._stays_as_saved(name):
                    # int32 is a DTensor's "remainder": see `_exported`.
                    dtype = torch.int16 if value.dtype == torch.int32 else value.dtype
                    self.state[p][name.removesuffix("_code")] = value.to(p.device, dtype)
        for group, kept in zip(self.param_groups, mine):
            for key, value in kept.items():
                group.setdefault(key, value)

    def _stays_as_saved(self, name: str) -> bool:
        if name in OWN_NAMES or name.endswith(("_code", "_scale")):
            return True
        return name != "step" and self.options.state_dtype is not None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "options": dataclasses.replace(self.options)}

    # The average.

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, parameters have the values of their averages; those without an average yet stay as they are.

        Raises:
            ValueError: the optimizer keeps no averages.
        """
        if self.options.ema_decay is None:
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


def _spread(t: Tensor) -> Any:
    """Placements and mesh of a DTensor."""
    return (t.placements, t.device_mesh) if is_dtensor(t) else None  # type: ignore[attr-defined]


def _lies_like(t: Tensor, p: Tensor) -> bool:
    """True if `t` lies in memory as `p` does, or as a tensor made like `p` would."""
    return local(t).stride() == local(p).stride() or not is_dense(local(p))


def _coded(value: Tensor, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes like `p`, rounded to nearest, and their scales."""
    codes = torch.empty_like(p, dtype=dtype, requires_grad=False)
    flat = torch.empty_like(local(codes), dtype=torch.float32).copy_(local(value))
    code, scale = formats.encoded(formats.in_memory_order(flat), None, dtype == torch.int8)
    formats.in_memory_order(local(codes)).copy_(code)
    return codes, scale


def _low_bits(p: Tensor, value: Tensor, master: str, dtype: torch.dtype) -> Tensor:
    """What the optimizer keeps beside `p`, so that both make `value`."""
    made = torch.empty_like(p, dtype=dtype, requires_grad=False)
    x = local(value).float()
    if master == "fp32":
        local(made).copy_(x)
    elif master == "kahan":
        missed = x - local(p).float()
        local(made).copy_(torch.where(missed.isfinite(), missed, 0))
    else:
        high, low = formats.split(x, formats.BITS[master])
        # It may have been rounded to the other neighbour. Where it is further away, somebody has set it since, and
        # nothing is known beyond its dtype.
        known = (x - local(p).float()).abs() <= 2.0**-7 * local(p).float().abs()
        local(p).copy_(torch.where(known, high, local(p)))
        local(made).copy_(torch.where(known, low, 0))
    return made
