"""Stand-ins that a model uses in place of hidden states and logits, so that the loss needs no logits.

The output embedding receives a `HeadInput` and makes `Logits` from it. These record the operations applied to them and
become `linear_cross_entropy` when they reach `torch.nn.functional.cross_entropy`.
"""

import copy
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from llmfast._checks import describe
from llmfast._dtensor import is_dtensor
from llmfast.losses import linear_cross_entropy, linear_logprobs


class Call:
    """State of one forward pass that is expected to compute a loss."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self.losses = 0

    def head_input(self, hidden: Tensor) -> "HeadInput":
        return HeadInput(hidden, self)

    def loss(self, logits: "Logits", targets: Tensor, given: dict[str, Any]) -> Tensor:
        """Compute the loss; `given` holds keyword arguments of `linear_cross_entropy`."""
        hidden, weight = logits.joined()
        loss: Tensor = linear_cross_entropy(hidden, weight, targets, bias=logits.bias, **given)
        return loss


def split_input(
    args: tuple[Any, ...], kwargs: dict[str, Any] | None, module: nn.Module | None = None
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Split off the first argument, positional or by name, of a call of a module or a torch function."""
    named = dict(kwargs or {})
    if args:
        return args[0], args[1:], named
    name = "input" if module is None else next(iter(inspect.signature(module.forward).parameters), "")
    return named.pop(name, None), (), named


class StandIn:
    """Placeholder for a tensor that supports the few operations models use; any other is an error that names it."""

    _other_use: ClassVar[str]  # how that error's sentence begins

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{self._other_use} .{name}")


def _refusing(operator: str) -> Any:
    def method(self: StandIn, *others: Any) -> NoReturn:
        raise TypeError(f"{self._other_use} {operator}")

    return method


_BINARY = ("add", "sub", "mul", "truediv", "matmul", "pow")
for _operator in (*_BINARY, *(f"r{name}" for name in _BINARY), "neg", "abs", "lt", "le", "gt", "ge", "getitem"):
    setattr(StandIn, f"__{_operator}__", _refusing(f"__{_operator}__"))  # Python looks these up on the class


class HeadInput(StandIn):
    """Hidden states (..., D) on their way into the output embedding.

    The operations it applies to them are executed, except the final linear map, which returns `Logits`.
    """

    _other_use = "the output embedding must be a linear map; it accesses its input's"

    def __init__(self, hidden: Tensor, call: Call) -> None:
        self.hidden, self.call = hidden, call

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def shape(self) -> torch.Size:
        return self.hidden.shape

    def to(self, *args: Any, **kwargs: Any) -> "HeadInput":
        return HeadInput(self.hidden.to(*args, **kwargs), self.call)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        x, others, kwargs = split_input(args, kwargs)
        if isinstance(x, HeadInput) and function is F.linear:
            return linear(x.hidden, x.call, *others, **kwargs)
        if isinstance(x, HeadInput) and function is F.dropout:
            return HeadInput(F.dropout(x.hidden, *others, **kwargs), x.call)
        raise TypeError(f"the output embedding must be a linear map; it uses torch's {_name(function)}")


def linear(hidden: Tensor, call: Call, weight: Tensor, bias: Tensor | None = None) -> "Logits":
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return Logits(((hidden, weight),), bias, dtype, dtype, call)


@dataclass(frozen=True, eq=False)
class Logits(StandIn):
    """Logits (..., V), not computed: cap * tanh(scale * z) if there is a cap, else scale * z.

    z is the sum of all hidden @ weight.T, plus bias. Only the operations that models apply to logits on the way to a
    loss are supported.
    """

    _other_use: ClassVar[str] = "the model must use its logits only for a loss; it accesses their"

    parts: tuple[tuple[Tensor, Tensor], ...]  # hidden states (..., D) and weight (V, D); D may differ between parts
    bias: Tensor | None  # (V,)
    dtype: torch.dtype  # that computed logits would have
    product: torch.dtype  # of the product's operands and result
    call: Call
    scale: float = 1.0
    cap: float | None = None

    @property
    def shape(self) -> torch.Size:
        hidden, weight = self.parts[0]
        return torch.Size((*hidden.shape[:-1], weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.parts[0][0].device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def joined(self) -> tuple[Tensor, Tensor]:
        """Return hidden states and weight of all parts, concatenated to one part."""
        if not torch.compiler.is_compiling():
            for _, weight in self.parts:
                if not is_dtensor(weight) and weight.untyped_storage().nbytes() == 0:
                    raise RuntimeError(
                        "the output embedding's weight was freed before the loss: make it part of FSDP's root "
                        "module, or set reshard_after_forward=False for it; DeepSpeed's ZeRO-3 is not supported"
                    )
        if len(self.parts) == 1:
            return self.parts[0]
        return torch.cat([hidden for hidden, _ in self.parts], -1), torch.cat([weight for _, weight in self.parts], -1)

    def computed(self) -> Tensor:
        """Compute them, as the model would have."""
        hidden, weight = self.joined()
        bias = None if self.bias is None else self.bias.to(self.product)
        with torch.autocast(self.device.type, enabled=False):
            logits = F.linear(hidden.to(self.product), weight.to(self.product), bias).to(self.dtype)
            logits = logits if self.scale == 1.0 else logits * self.scale
            return logits if self.cap is None else torch.tanh(logits) * self.cap

    # Operations whose result is again such logits.

    def __mul__(self, factor: Any) -> "Logits":
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise TypeError(f"the model must multiply or divide its logits by numbers; got a {type(factor).__name__}")
        if self.cap is None:
            return replace(self, scale=self.scale * factor)
        return replace(self, cap=self.cap * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "Logits":
        return self * (1.0 / divisor if isinstance(divisor, int | float) else divisor)

    def tanh(self) -> "Logits":
        if self.cap is not None:
            raise TypeError("the model applies tanh to its logits twice")
        return replace(self, cap=1.0)

    def __add__(self, other: Any) -> "Logits":
        """Add the logits of an adapter to those of the layer it adapts."""
        if not isinstance(other, Logits) or self.cap is not None or other.cap is not None:
            raise TypeError(f"the model adds a {type(other).__name__} to its logits")
        ours, theirs = self._unscaled(), other._unscaled()
        hidden, weight = ours.parts[0]
        added = tuple((h.to(hidden.dtype), w.to(weight.dtype)) for h, w in theirs.parts)
        bias = ours.bias if theirs.bias is None else theirs.bias if ours.bias is None else ours.bias + theirs.bias
        return replace(ours, parts=ours.parts + added, bias=bias)

    def _unscaled(self) -> "Logits":
        if self.scale == 1.0:
            return self
        parts = tuple((hidden * self.scale, weight) for hidden, weight in self.parts)
        return replace(self, parts=parts, bias=None if self.bias is None else self.bias * self.scale, scale=1.0)

    def float(self, memory_format: Any = None) -> "Logits":
        return replace(self, dtype=torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> "Logits":
        logits = self
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                logits = logits.to(value.dtype, value.device)
            elif isinstance(value, torch.dtype):
                logits = replace(logits, dtype=value)
            elif isinstance(value, str | torch.device) and torch.device(value) != self.device:
                raise TypeError(f"the model moves its logits from {self.device} to {value}")
        return logits

    def contiguous(self, memory_format: Any = None) -> "Logits":
        return self

    def view(self, *sizes: Any, **named: Any) -> "Logits":
        sizes = sizes or tuple(named.values())  # torch names the argument `size` here and `shape` in reshape
        *lead, last = sizes[0] if isinstance(sizes[0], tuple | list) else sizes
        rows, V = self.shape[:-1].numel(), self.shape[-1]
        if last != V and not (last == -1 and math.prod(lead) == rows):
            raise TypeError(f"the model views its logits, {tuple(self.shape)}, as {(*lead, last)}")
        return self._rows(lambda hidden: hidden.reshape(*lead, hidden.shape[-1]))

    reshape = view

    def __getitem__(self, index: Any) -> "Logits":
        at = index if isinstance(index, tuple) else (index,)
        ends = any(i is ... for i in at)
        taken = sum(i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else i is not None for i in at)
        if (ends or taken == len(self.shape)) and not (isinstance(at[-1], slice) and at[-1] == slice(None)):
            raise TypeError(f"the model selects part of its vocabulary: its logits at {index}")
        return self._rows(lambda hidden: hidden[index])

    def _rows(self, change: Any) -> "Logits":
        return replace(self, parts=tuple((change(hidden), weight) for hidden, weight in self.parts))

    # The loss.

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        x, others, kwargs = split_input(args, kwargs)
        if isinstance(x, Logits):
            if function is F.cross_entropy:
                return x.cross_entropy(*others, **kwargs)
            if function is torch.tanh:
                return x.tanh(*others, **kwargs)
            if function is F.linear and x.scale == 1.0 and x.cap is None:  # the first matrix of an adapter
                return linear(F.linear(*x.joined(), x.bias), x.call, *others, **kwargs)
        raise TypeError(f"the model must use its logits only for a loss; it uses torch's {_name(function)}")

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Any = "mean",
        label_smoothing: Any = 0.0,
    ) -> Tensor:
        """Replace `torch.nn.functional.cross_entropy`."""
        if len(self.shape) != 2 or target.dim() != 1 or size_average is not None or reduce is not None:
            raise TypeError(
                "the model must call cross_entropy with (N, V) logits and (N,) targets, not size_average or reduce; "
                f"it passes {tuple(self.shape)} and {describe(target)}"
            )
        given = {
            **self.call.options,
            **self._final(),
            "class_weights": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
        }
        if label_smoothing:
            given["label_smoothing"] = label_smoothing
        self.call.losses += 1
        loss = self.call.loss(self, target, given)
        return loss if torch.is_autocast_enabled(self.device.type) else loss.to(self.dtype)

    def logprobs(self, ids: Tensor, given: Mapping[str, Any]) -> Any:
        """Compute the log-probabilities of `ids`; `given` holds keyword arguments of `linear_logprobs`."""
        hidden, weight = self.joined()
        arguments: dict[str, Any] = {**given, **self._final(), "bias": self.bias}
        return linear_logprobs(hidden, weight, ids, **arguments)

    def _final(self) -> dict[str, Any]:
        """Return the options that say what the logits are."""
        return {"softcap": self.cap, "logit_scale": self.scale * (1.0 if self.cap is None else self.cap)}


class LazyLogits:
    """Logits that a model in eval mode returns next to its loss: a tensor, computed when it is first used.

    Shape, dtype and device are known before. A change of dtype waits too: accelerate changes that of every output.
    `isinstance` takes them for a tensor, as the Trainer requires of what it keeps.
    """

    def __init__(self, logits: Logits) -> None:
        self._logits = logits
        self._computed: Tensor | None = None
        self.shape, self.dtype, self.device = logits.shape, logits.dtype, logits.device

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Tensor

    def computed(self) -> Tensor:
        if self._computed is None:
            self._computed = self._logits.computed()
        return self._computed

    def float(self) -> "LazyLogits":
        return LazyLogits(self._logits.float())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copies and pickles look for before there is anything to compute
            raise AttributeError(name)
        return getattr(self.computed(), name)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(self.computed(), memo)

    def __reduce__(self) -> Any:
        return self.computed().__reduce_ex__(2)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args = tree_map_only(LazyLogits, LazyLogits.computed, args)
        named: dict[str, Any] = tree_map_only(LazyLogits, LazyLogits.computed, kwargs or {})
        return function(*args, **named)


def _computed_first(operator: str) -> Any:
    def method(self: LazyLogits, *others: Any) -> Any:
        return getattr(self.computed(), operator)(*others)

    return method


# Python looks operators up on the class: all that a tensor has, such as bool(x), `in` and x[0] = 1.
_OBJECTS = {*object.__dict__} - {f"__{name}__" for name in ("repr", "format", "eq", "ne", "lt", "le", "gt", "ge")}
for _operator in {x for x in dir(Tensor) if re.fullmatch("__[a-z]+__", x) and callable(getattr(Tensor, x))}:
    if _operator not in {*LazyLogits.__dict__, *_OBJECTS, "__setstate__"}:
        setattr(LazyLogits, _operator, _computed_first(_operator))


def _name(function: Any) -> str:
    return getattr(function, "__name__", str(function))
