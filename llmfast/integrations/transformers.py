"""Hugging Face causal language models that compute their loss without logits.

A model's own forward runs as it is, whatever it does beside the loss. Only its output embedding is given a stand-in for
the hidden states, and so makes a stand-in for the logits. That one remembers what is done to it (a scale, a softcap, a
view, a shift), and where it meets `torch.nn.functional.cross_entropy` it becomes `linear_cross_entropy`. So nothing is
read out of a config, no model has a patch of its own, and what a model does to its logits that the stand-in cannot
follow is an error that says so: `fuse_loss` runs into it first and leaves the model alone.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypedDict, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfast._checks import describe, expect
from llmfast.integrations import require
from llmfast.losses import linear_cross_entropy
from llmfast.optim.row import is_dtensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

PreTrainedModel: type[nn.Module] = require("transformers", extra="hf").PreTrainedModel

M = TypeVar("M", bound=nn.Module)
CALL = "_llmfast_call"  # of a watched module, while a forward with labels runs
OPTIONS = "_llmfast_options"  # of a fused model


class FusedOptions(TypedDict, total=False):
    """What the loss does beyond the model's own, as in `linear_cross_entropy`."""

    label_smoothing: float
    z_loss: float
    memory_budget: int | Literal["auto"]
    slab_dtype: torch.dtype | None
    grad_filter: float | None


def fuse_loss(model: M, **options: "Unpack[FusedOptions]") -> M:
    """Let a causal language model compute its loss without logits, from now on and in place.

    What changes is what `model(..., labels=labels)` holds in memory, and that `outputs.logits` is None there: so the
    Trainer can evaluate the loss, but has no logits for `compute_metrics`. Without labels nothing changes.

    How labels are shifted, what `num_items_in_batch`, `shift_labels` and padding mean, scales and softcaps of the
    logits, router losses of experts: all of that stays the model's own code. The output embedding may be tied, have a
    bias, or be adapted by PEFT's LoRA, before this or after.

    Copying, pickling, `save_pretrained`, `generate`, `torch.compile`, gradient checkpointing and PEFT work as before.
    Call this before a model is wrapped or sharded (DDP, FSDP), or given to a trainer that replaces its forward. Such a
    one, TRL's SFTTrainer of today, makes its losses itself, and options given here have no effect on them; the subclass
    in `examples/sft_trainer.py` takes the model's loss. The Trainer makes one itself with
    `TrainingArguments(label_smoothing_factor=)`: give `label_smoothing` here instead.

    Args:
        model: A decoder-only `PreTrainedModel`, or a PEFT model around one, on any device and in any dtype.
        options: `label_smoothing`, `z_loss`, `memory_budget`, `slab_dtype` and `grad_filter`, as in
            `linear_cross_entropy`.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is neither a `PreTrainedModel` nor a PEFT model around one, or an option is unknown.
        ValueError: The model does not fit, for the reason given, and is as it was. To find out, its loss is computed
            with and without logits for two sequences of eight tokens, in eval mode and without gradients.
    """
    lm = causal_lm(model)
    expect_options(options)
    expect_fusable(lm)
    with unchanged(lm):
        batches = probes(lm)
        wanted = [own_loss(lm, batch) for batch in batches]
        become(lm, Fused)
        try:
            for batch, loss in zip(batches, wanted):
                expect_loss(lm, batch, loss)
        except Exception:
            restore(lm)
            raise
    setattr(lm, OPTIONS, dict(options))
    return model


def unfuse_loss(model: M) -> M:
    """Undo `fuse_loss`, in place.

    Raises:
        TypeError: `model` is neither a `PreTrainedModel` nor a PEFT model around one.
        ValueError: The model is not fused, or was sharded since, or has heads that `remove_mtp` takes away.
    """
    lm = causal_lm(model)
    expect_mixin(lm, Fused, "fused by fuse_loss")
    restore(lm)
    return model


# What a fused model is.


class Call:
    """One forward that is to end in a loss."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self.losses = 0

    def head_input(self, hidden: Tensor) -> "HeadInput":
        return HeadInput(hidden, self)

    def loss(self, logits: "Logits", targets: Tensor, given: dict[str, Any]) -> Tensor:
        """`given`: keyword arguments of `linear_cross_entropy`."""
        hidden, weight = logits.joined()
        loss: Tensor = linear_cross_entropy(hidden, weight, targets, bias=logits.bias, **given)
        return loss


def defer_input(head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Replace the output embedding's input; its forward pre-hook."""
    call: Call | None = getattr(head, CALL, None)
    if call is None:
        return None
    hidden, others, named = split_input(args, kwargs, head)
    return (call.head_input(hidden), *others), named


def split_input(
    args: tuple[Any, ...], kwargs: dict[str, Any] | None, module: nn.Module | None = None
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The first argument of a module's or a torch function's call, by position or by name; and the others."""
    named = dict(kwargs or {})
    if args:
        return args[0], args[1:], named
    name = "input" if module is None else next(iter(inspect.signature(module.forward).parameters), "")
    return named.pop(name, None), (), named


class Fused:
    """Stands before a model's class among the bases of the class that a fused model has."""

    _llmfast_base: type
    _llmfast_mixin: type
    _llmfast_hooks: ClassVar[tuple[Any, ...]] = (defer_input,)  # all that may be on the model's modules

    def _llmfast_call_of(self, arguments: Mapping[str, Any]) -> Call:
        return Call(getattr(self, OPTIONS))

    def _llmfast_watched(self) -> list[nn.Module]:
        """The modules whose hooks are to know of the call."""
        head: nn.Module = self.get_output_embeddings()  # type: ignore[attr-defined]
        if defer_input not in head._forward_pre_hooks.values():  # PEFT or a new vocabulary brings a new one
            head.register_forward_pre_hook(defer_input, with_kwargs=True)
        return [head]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are fused too, though nobody can import their class."""
        return _empty, (self._llmfast_base, self._llmfast_mixin), vars(self)


def _empty(base: type, mixin: type) -> Any:
    cls = fused_class(base, mixin)
    return cls.__new__(cls)


@cache
def fused_class(base: Any, mixin: type) -> Any:
    """`base` with the methods of `mixin` and another forward. A class and not a forward of the instance, since that
    would be lost in pickles, and bound to the wrong instance in copies."""
    signature = inspect.signature(base.forward)
    names = list(signature.parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args)), **kwargs}
        if arguments.get("labels") is None:
            return base.forward(self, *args, **kwargs)
        call = self._llmfast_call_of(arguments)
        watched = self._llmfast_watched()
        for module in watched:
            setattr(module, CALL, call)
        try:
            outputs = base.forward(self, *args, **kwargs)
        finally:
            for module in watched:
                setattr(module, CALL, None)
        if call.losses == 0:
            raise RuntimeError(f"{base.__name__} does not make its loss by cross_entropy of its output embedding")
        return _without_logits(outputs)

    # Trainer and generate() read the signature. No __wrapped__: accelerate would unwrap this forward to the bare one.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = base.forward.__doc__
    known_as = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    namespace = {**known_as, "forward": forward, "_llmfast_base": base, "_llmfast_mixin": mixin}
    return type(base)(base.__name__, (mixin, base), namespace)


def become(lm: Any, mixin: type) -> None:
    base: Any = type(lm)
    lm.__class__ = fused_class(base, mixin)
    setattr(lm, OPTIONS, {})


def restore(lm: Any) -> None:
    """What it was before `become`."""
    ours = type(lm)._llmfast_hooks
    lm.__class__ = type(lm)._llmfast_base
    vars(lm).pop(OPTIONS)
    for module in lm.modules():
        vars(module).pop(CALL, None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in ours]:
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                del hooks[key]


def expect_mixin(lm: Any, mixin: type, how: str) -> None:
    kind = vars(type(lm)).get("_llmfast_mixin")
    sharded = kind is None and isinstance(lm, mixin)
    name = type(lm).__name__
    expect(not sharded, f"model must be as it was when {how}; {name} was made of it since, by FSDP perhaps")
    expect(kind is mixin, f"model must have been {how}; this {name} was not")


def _without_logits(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return tuple(value for value in outputs if not isinstance(value, Logits))
    return type(outputs)(**{name: value for name, value in outputs.items() if not isinstance(value, Logits)})


# Stand-ins for hidden states and logits.


class StandIn:
    """A place for a tensor that models use in a few ways. Any other use is an error that names it."""

    _other_use: ClassVar[str]  # how that error's sentence begins

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{self._other_use} .{name}")


def _refusing(operator: str) -> Any:
    def method(self: StandIn, *others: Any) -> NoReturn:
        raise TypeError(f"{self._other_use} {operator}")

    return method


_BINARY = ("add", "sub", "mul", "truediv", "matmul", "pow")
for _operator in (*_BINARY, *(f"r{name}" for name in _BINARY), "neg", "abs", "lt", "le", "gt", "ge", "getitem"):
    setattr(StandIn, f"__{_operator}__", _refusing(f"__{_operator}__"))  # Python looks for these in the class alone


class HeadInput(StandIn):
    """Hidden states (..., D) on their way into the output embedding. What it does to them is done, but for the last
    linear map: that makes `Logits`."""

    _other_use = "the output embedding is more than a linear map: it asks its input for"

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
        raise TypeError(f"the output embedding is more than a linear map: it uses torch's {_name(function)}")


def linear(hidden: Tensor, call: Call, weight: Tensor, bias: Tensor | None = None) -> "Logits":
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return Logits(((hidden, weight),), bias, dtype, call)


@dataclass(frozen=True, eq=False)
class Logits(StandIn):
    """(..., V), not computed: cap * tanh(scale * z) where there is a cap, else scale * z, of z = the sum of all
    hidden @ weight.T, and bias. They answer to what models do to logits on the way to a loss, and to nothing else.
    """

    _other_use: ClassVar[str] = "the model needs its logits for more than a loss: it asks them for"

    parts: tuple[tuple[Tensor, Tensor], ...]  # hidden states (..., D) and weight (V, D), each with a D of its own
    bias: Tensor | None  # (V,)
    dtype: torch.dtype  # that they would have
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
        """As one part."""
        if not torch.compiler.is_compiling():
            for _, weight in self.parts:
                if not is_dtensor(weight) and weight.untyped_storage().nbytes() == 0:
                    raise RuntimeError(
                        "the output embedding's weight was freed before the loss: let it belong to FSDP's root, or "
                        "give it reshard_after_forward=False; DeepSpeed's ZeRO-3 does not fit"
                    )
        if len(self.parts) == 1:
            return self.parts[0]
        return torch.cat([hidden for hidden, _ in self.parts], -1), torch.cat([weight for _, weight in self.parts], -1)

    # What of them are still such logits.

    def __mul__(self, factor: Any) -> "Logits":
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise TypeError(f"the model multiplies or divides its logits by a {type(factor).__name__}, not a number")
        if self.cap is None:
            return replace(self, scale=self.scale * factor)
        return replace(self, cap=self.cap * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "Logits":
        return self * (1.0 / divisor if isinstance(divisor, int | float) else divisor)

    def tanh(self) -> "Logits":
        if self.cap is not None:
            raise TypeError("the model puts its logits through tanh twice")
        return replace(self, cap=1.0)

    def __add__(self, other: Any) -> "Logits":
        """An adapter's to those of the layer it adapts."""
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
        sizes = sizes or tuple(named.values())  # torch calls them `size` here and `shape` in reshape
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
            raise TypeError(f"the model takes a part of its vocabulary: its logits at {index}")
        return self._rows(lambda hidden: hidden[index])

    def _rows(self, change: Any) -> "Logits":
        return replace(self, parts=tuple((change(hidden), weight) for hidden, weight in self.parts))

    # What becomes of them.

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
            if function is F.linear and x.scale == 1.0 and x.cap is None:  # the first half of an adapter
                return linear(F.linear(*x.joined(), x.bias), x.call, *others, **kwargs)
        raise TypeError(f"the model needs its logits for more than a loss: it uses torch's {_name(function)}")

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
        """`torch.nn.functional.cross_entropy`."""
        if len(self.shape) != 2 or target.dim() != 1 or size_average is not None or reduce is not None:
            raise TypeError(f"the model's cross_entropy is of {tuple(self.shape)} with targets {describe(target)}")
        given = {
            **self.call.options,
            "softcap": self.cap,
            "logit_scale": self.scale * (1.0 if self.cap is None else self.cap),
            "class_weights": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
        }
        if label_smoothing:
            given["label_smoothing"] = label_smoothing
        self.call.losses += 1
        loss = self.call.loss(self, target, given)
        return loss if torch.is_autocast_enabled(self.device.type) else loss.to(self.dtype)


def _name(function: Any) -> str:
    return getattr(function, "__name__", str(function))


# Who can be fused.


def causal_lm(model: Any) -> Any:
    """The `PreTrainedModel` in a PEFT model, or itself."""
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(lm, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, or PEFT's around one; got {type(model)}")
    return lm


def expect_options(options: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError for options that `FusedOptions` does not have, or that are out of range."""
    known = [*FusedOptions.__annotations__]
    if not options.keys() <= set(known):
        raise TypeError(f"options of the loss must be among {known}; got {[*options]}")
    smoothing = options.get("label_smoothing", 0.0)
    expect(0 <= smoothing <= 1, f"label_smoothing must be in [0, 1]; got {smoothing}")


def expect_fusable(lm: Any) -> None:
    """Raises ValueError for what can be known without running the model."""
    name = type(lm).__name__
    expect(not isinstance(lm, Fused), f"{name} is fused already; unfuse_loss, or remove_mtp, undoes that")
    expect(
        "forward" not in vars(lm),
        f"the forward of this {name} was replaced (by accelerate, Liger or TRL, say); fuse before that",
    )
    expect(not getattr(lm.config, "is_encoder_decoder", False), f"{name} is no decoder-only model")
    expect("labels" in inspect.signature(type(lm).forward).parameters, f"the forward of {name} takes no labels")
    expect(lm.get_output_embeddings() is not None, f"{name} has no output embeddings")
    for key, p in lm.named_parameters():
        expect(p.device.type != "meta" and p.numel() > 0, f"{key} of {name} holds no values: {describe(p)}")
        expect(
            not is_dtensor(p), f"{key} of {name} is a DTensor: fuse before sharding; tensor parallelism does not fit"
        )


@contextmanager
def unchanged(lm: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; random numbers and modes are as before afterwards."""
    training = {module: module.training for module in lm.modules()}
    device = next(lm.parameters()).device
    with_generators = device.type in ("cuda", "xpu")
    forked = torch.random.fork_rng([device] if with_generators else [], device_type=device.type)
    try:
        with torch.no_grad(), forked:
            lm.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def probes(lm: Any) -> list[dict[str, Tensor]]:
    """Two batches of 2 x 8 tokens, the second with padding and with labels to ignore."""
    device, V = lm.get_input_embeddings().weight.device, lm.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(1, 17, dtype=torch.int64, device=device) % V).view(2, 8)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :3] = labels[1, 5:] = -100
    mask[1, 5:] = 0
    return [{"input_ids": ids, "labels": ids}, {"input_ids": ids, "attention_mask": mask, "labels": labels}]


def own_loss(lm: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    try:
        return _loss(lm(**batch))
    except Exception as error:
        raise ValueError(f"{type(lm).__name__} fails on two sequences of 8 tokens with labels: {error}") from error


def expect_loss(lm: nn.Module, batch: dict[str, Tensor], wanted: Tensor) -> None:
    """Raises ValueError unless the fused model's is the same."""
    name = type(lm).__name__
    try:
        loss = _loss(lm(**batch))
    except Exception as error:
        raise ValueError(f"{name} cannot be fused: {error}") from error
    # Its own logits may be of 16 bits, and in sums of thousands of products; ours are neither.
    close = 1e-4 if all(p.dtype in (torch.float32, torch.float64) for p in lm.parameters()) else 3e-2
    expect(
        loss.dtype == wanted.dtype and abs(float(loss) - float(wanted)) <= close * max(1.0, abs(float(wanted))),
        f"{name} cannot be fused: its loss is {float(wanted)} of {wanted.dtype}, and without logits {float(loss)} of "
        f"{loss.dtype}",
    )


def _loss(outputs: Any) -> Tensor:
    loss: Tensor = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
    return loss
