"""The state of one parameter: creating it, and converting it to the formats that the options ask for."""

import warnings
from typing import Any

import torch
from torch import Tensor

from llmfast._checks import describe
from llmfast._dtensor import is_dtensor, local
from llmfast.optim import formats
from llmfast.optim.formats import LOW_NAMES, format_in, is_code, param_format
from llmfast.optim.options import Options
from llmfast.optim.row import is_dense
from llmfast_kernels.sizes import PER_SCALE

OWN_NAMES = ("ema_param", *LOW_NAMES)  # names of states that torch's optimizers do not have


def stored_name(state: dict[str, Any], name: str) -> str:
    """Return the name under which a state is stored: see `Kept.keep`."""
    code = f"{name}_code"
    return code if code in state else name


def decoded(state: dict[str, Any], name: str) -> Tensor:
    """Decode an 8-bit state into float32."""
    codes = state[stored_name(state, name)]
    value = torch.empty_like(codes, dtype=torch.float32)
    local(value).copy_(formats.decoded_like(local(codes), state[f"{name}_scale"]))
    return value


class Kept:
    """The state of a parameter; `identity` is the parameter's number in warnings."""

    def __init__(self, param: Tensor, state: dict[str, Any], options: Options, identity: int = 0) -> None:
        self.param, self.state, self._options, self._identity = param, state, options, identity

    def value(self) -> Tensor:
        """Return the parameter with all bits that its state holds, in whatever format."""
        p, kept = self.param.detach(), format_in(self.state, self.param)
        if kept.state is None:
            return p
        value = torch.empty_like(p, dtype=torch.float32)
        local(value).copy_(kept.read(local(p), local(self.state[kept.state]), torch.float32))
        return value

    def keep(self, name: str, first: float, code: torch.dtype | None) -> None:
        """Create a state, filled with `first`, in the parameter's memory order, or convert the existing one.

        Its dtype is that of the options, or `code` if it is kept as 8-bit codes. Those are named `<name>_code`, and
        their scales `<name>_scale`. The codes of a DTensor are named `<name>`, because it is saved decoded under that
        name, and torch.distributed.checkpoint loads only names that the optimizer's state has.
        """
        p, state, wanted = self.param, self.state, self._options.state_format.dtype
        stored = stored_name(state, name)
        t = state.get(stored)
        if t is not None and t.layout != torch.strided:  # of torch's SGD with sparse gradients
            t = t.to_dense()
        if t is None and code is None:
            value = complex(first, first) if p.is_complex() else first
            state[name] = torch.full_like(p, value, dtype=wanted, memory_format=torch.preserve_format)
        elif code is not None:
            if t is None:
                t = torch.full_like(p, first, dtype=torch.float32, memory_format=torch.preserve_format)
            elif t.dtype == code and _lies_like(t, p):
                return
            elif is_code(t):
                t = decoded(state, name)
            state.pop(stored, None)
            state[name if is_dtensor(p) else f"{name}_code"] = codes = _empty_like(p, code)
            state[f"{name}_scale"] = formats.encode_into(local(codes), local(t).float(), None)
        else:
            assert t is not None
            if is_code(t):
                t = decoded(state, name).to(wanted or p.dtype)
                del state[stored], state[f"{name}_scale"]
            state[name] = _laid_like(t if wanted is None else t.to(wanted), p)

    def keep_average(self) -> None:
        """Create the average if `ema_decay` is set, or lay out the existing one like the parameter.

        Otherwise delete it, so that a later one does not start from it.
        """
        if self._options.ema_decay is None:
            if self.state.pop("ema_param", None) is not None:
                self._warn("an average (ema_param) of {}, which ema_decay=None discards")
        elif "ema_param" not in self.state:
            self.state["ema_param"] = self.value().to(torch.float32, copy=True)
        else:
            self.state["ema_param"] = _laid_like(self.state["ema_param"], self.param)

    def keep_low(self, loaded: bool) -> None:
        """Create the additional bits of the parameter's format, converting those of another format if there are any."""
        p, state, master = self.param, self.state, self._options.master_weights
        asked = param_format(self._options.master_of(p))
        name, dtype = asked.state, asked.dtype or p.dtype
        kept = [n for n in LOW_NAMES if n in state]
        if name is not None and kept == [name] and state[name].dtype == dtype:
            state[name] = _laid_like(state[name], p)
            if asked.is_copy and loaded:  # the loaded copy may belong to other weights than the loaded model
                x, q = local(state[name]), local(p)
                x.copy_(torch.where((x.to(q.dtype) == q) | q.isnan(), x, q))
            return
        value = self.value()
        for n in kept:
            del state[n]
        if name is not None:
            state[name] = _empty_like(p, dtype)
            asked.keep(local(p), local(state[name]), local(value).float())
        elif kept:
            self._warn(f"additional bits ({kept[0]}) of {{}}, which master_weights={master!r} discards")

    def _warn(self, what: str) -> None:
        message = f"the state has {what}".format(f"parameter {self._identity}, {describe(self.param)}")
        warnings.warn(message, stacklevel=9)  # the caller's line, below the frames that torch and `eager` add to a step

    def check(self, base: str) -> None:
        """Raise ValueError if a state does not belong to its parameter."""
        p, state = self.param, self.state
        name = stored_name(state, base)
        t = state.get(name)
        if t is None:
            return
        if t.shape != p.shape or t.device != p.device:  # it is another model's, or the parameter has moved
            raise ValueError(
                f"state {name} must have the shape and device of its parameter, {describe(p)}; got {describe(t)}"
            )
        if _spread(t) != _spread(p):
            raise ValueError(
                f"state {name} of {describe(p)} must be sharded as its parameter, {_spread(p)}; got {_spread(t)}; "
                "torch.distributed.checkpoint loads a state with the parameter's sharding"
            )
        scale, groups = state.get(f"{base}_scale"), -(-local(t).numel() // PER_SCALE)
        if is_code(t) and base not in OWN_NAMES and (scale is None or scale.shape != (groups,)):
            came = "none" if scale is None else describe(scale)
            raise ValueError(f"state {base} of {describe(p)} holds 8-bit codes, which need {groups} scales; got {came}")


def _spread(t: Tensor) -> Any:
    """Return placements and mesh of a DTensor."""
    return (t.placements, t.device_mesh) if is_dtensor(t) else None  # type: ignore[attr-defined]


def _empty_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(p, dtype=dtype, requires_grad=False)


def _lies_like(t: Tensor, p: Tensor) -> bool:
    """Return True if `t` has the memory layout of `p`, or of a tensor created like `p`."""
    return local(t).stride() == local(p).stride() or not is_dense(local(p))


def _laid_like(t: Tensor, p: Tensor) -> Tensor:
    """Return `t` in the memory layout of `p`: it may have been loaded from a run with another one."""
    return t if _lies_like(t, p) else _empty_like(p, t.dtype).copy_(t)
