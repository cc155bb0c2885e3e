"""The options of the losses. Each is declared once, here: its name, type, default and check.

A function takes the options of a `TypedDict` as `**options: Unpack[...]`, which type checkers read; `takes` shows them
one by one in the signature that `help()` prints. An option that is a field of `llmfast_kernels.terms.Terms` reaches the
rows, and the operators of `torch.compile`, by that name alone.
"""

# Options that are not given have their defaults by the time anything is read:
# pyright: reportTypedDictNotRequiredAccess=false

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, TypeVar, cast

import torch
from torch import Tensor

from llmfast._checks import describe, expect, overlaps
from llmfast.losses.parallel import ProcessGroup

Reduction = Literal["mean", "sum", "none"]
MemoryBudget = int | Literal["auto"]
Function = TypeVar("Function", bound=Callable[..., Any])


class Inputs(NamedTuple):
    """The tensors of a call, which its options have to fit."""

    rows: Tensor  # (..., V) logits or (..., D) hidden states
    targets: Tensor  # (...) or (..., K)
    V: int  # classes of all ranks
    weight: Tensor | None = None  # (V of this rank, D)
    dtype: torch.dtype | None = None  # of matrix products


@dataclass(frozen=True)
class Option:
    """What is declared of an option besides its name and type."""

    default: Any
    # Raises an error unless the value, which is not None, fits the inputs and the other options.
    check: Callable[[str, Any, Inputs, "LossOptions"], None] | None = None
    idle: float | None = None  # a value that changes nothing: `Terms` then has None, which costs nothing


# Checks. Numbers may be symbols to torch.compile, which makes no messages of those: hence no `expect` for them.


def _fraction(name: str, value: float, inputs: Inputs, options: "LossOptions") -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1]; got {value}")


def _positive(name: str, value: float, inputs: Inputs, options: "LossOptions") -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive; got {value}")


def _reduction(name: str, value: str, inputs: Inputs, options: "LossOptions") -> None:
    expect(value in ("mean", "sum", "none"), f"{name} must be 'mean', 'sum' or 'none'; got {value!r}")


def _num_valid(name: str, value: int | Tensor, inputs: Inputs, options: "LossOptions") -> None:
    reduction = options["reduction"]
    expect(reduction == "mean", f"{name} divides a mean; reduction is {reduction!r}")
    if isinstance(value, Tensor):
        expect(value.numel() == 1, f"{name} must hold one number; got {describe(value)}")
    elif not value >= 0:
        raise ValueError(f"{name} must not be negative; got {value}")


def _shift(name: str, value: int, inputs: Inputs, options: "LossOptions") -> None:
    if value < 0:
        raise ValueError(f"{name} must not be negative; got {value}")
    expect(value == 0 or inputs.rows.dim() > 1, f"{name} needs a token axis; logits of one token have none")


def _vocab_size(name: str, value: int, inputs: Inputs, options: "LossOptions") -> None:
    if value != inputs.V:
        raise ValueError(f"{name}={value} needs a process_group")


def _class_weights(name: str, value: Tensor, inputs: Inputs, options: "LossOptions") -> None:
    _check_tensor(name, value, inputs, [(inputs.V,)])


def _token_weights(name: str, value: Tensor, inputs: Inputs, options: "LossOptions") -> None:
    _check_tensor(name, value, inputs, [tuple(inputs.rows.shape[:-1])])


def _target_weights(name: str, value: Tensor, inputs: Inputs, options: "LossOptions") -> None:
    expect(inputs.targets.dim() == inputs.rows.dim(), f"{name} need targets of shape (..., K)")
    K = inputs.targets.shape[-1]
    _check_tensor(name, value, inputs, [(K,), (*inputs.rows.shape[:-1], K)])


def _document_ids(name: str, value: Tensor, inputs: Inputs, options: "LossOptions") -> None:
    expect(options["shift"] > 0, f"{name} bound a shift; shift is 0")
    _check_tensor(name, value, inputs, [tuple(inputs.rows.shape[:-1])], floating=False)


def _check_tensor(
    name: str, t: Tensor, inputs: Inputs, shapes: list[tuple[int, ...]], *, floating: bool = True
) -> None:
    device = inputs.rows.device
    wanted = " or ".join(str(shape) for shape in shapes)
    expect(tuple(t.shape) in shapes and t.device == device, f"{name} must be {wanted} on {device}; got {describe(t)}")
    if t.is_floating_point() != floating:
        raise TypeError(f"{name} must be {'floating point' if floating else 'integers'}; got {describe(t)}")
    expect(
        not (t.requires_grad and torch.is_grad_enabled()),
        f"{name} gets no gradient here; detach it, or weigh the losses of reduction='none'",
    )


def _inplace(name: str, value: bool, inputs: Inputs, options: "LossOptions") -> None:
    if not value:
        return
    logits = inputs.rows
    expect(logits.is_contiguous(), f"{name}=True needs contiguous logits; got strides {logits.stride()}")
    owner = logits if logits._base is None else logits._base
    expect(
        not (owner.requires_grad and owner.is_leaf and torch.is_grad_enabled()),
        f"{name}=True would overwrite logits that are a leaf of the graph; pass the result of an operation",
    )


def _bias(name: str, value: Tensor, inputs: Inputs, options: "LossOptions") -> None:
    assert inputs.weight is not None
    shape = tuple(inputs.weight.shape[:1])
    expect(
        tuple(value.shape) == shape and value.device == inputs.rows.device,
        f"{name} must be {shape} on {inputs.rows.device}; got {describe(value)}",
    )


def _memory_budget(name: str, value: MemoryBudget, inputs: Inputs, options: "LossOptions") -> None:
    if value != "auto" and not value > 0:
        raise ValueError(f"{name} must be positive or 'auto'; got {value}")


def _slab_dtype(name: str, value: torch.dtype, inputs: Inputs, options: "LossOptions") -> None:
    if value not in (inputs.dtype, torch.float32):
        raise TypeError(f"{name} must be torch.float32 or the inputs' dtype; got {value}")


def _accumulate_into(name: str, value: Tensor, inputs: Inputs, options: "LossOptions") -> None:
    weight, dtype = inputs.weight, inputs.dtype
    assert weight is not None and dtype is not None
    fits = value.shape == weight.shape and value.device == weight.device
    expect(fits, f"{name} must be {describe(weight)}, in float32; got {describe(value)}")
    expect(not overlaps(value), f"{name} must have memory for each element; got strides {value.stride()}")
    expect(
        weight.requires_grad or not torch.is_grad_enabled(),
        f"{name} is for the gradient of a weight that requires one",
    )
    if value.dtype != torch.promote_types(dtype, torch.float32):
        raise TypeError(f"{name} must be float32; got {describe(value)}")


def _grad_filter(name: str, value: float, inputs: Inputs, options: "LossOptions") -> None:
    _positive(name, value, inputs, options)
    expect(options["reduction"] != "none", f"{name} needs reduction 'mean' or 'sum'")
    expect(options.get("process_group") is None, f"{name} does not work with process_group")


# The options.


class RowOptions(TypedDict, total=False):
    """Options of every loss that say what the loss of a row is."""

    ignore_index: Annotated[int, Option(-100)]
    label_smoothing: Annotated[float, Option(0.0, _fraction, idle=0.0)]
    z_loss: Annotated[float, Option(0.0, idle=0.0)]
    softcap: Annotated[float | None, Option(None, _positive)]
    logit_scale: Annotated[float | None, Option(None, idle=1.0)]
    class_weights: Annotated[Tensor | None, Option(None, _class_weights)]  # (V,)
    token_weights: Annotated[Tensor | None, Option(None, _token_weights)]  # (...)


class LossOptions(RowOptions, total=False):
    """Options of both losses, and of their definitions in `reference`."""

    reduction: Annotated[Reduction, Option("mean", _reduction)]
    num_valid: Annotated[int | Tensor | None, Option(None, _num_valid)]
    target_weights: Annotated[Tensor | None, Option(None, _target_weights)]  # (K,) or (..., K)
    shift: Annotated[int, Option(0, _shift)]
    document_ids: Annotated[Tensor | None, Option(None, _document_ids)]  # (...)


class RankOptions(TypedDict, total=False):
    """Options for classes that are split over ranks."""

    process_group: Annotated["ProcessGroup | None", Option(None)]
    vocab_size: Annotated[int | None, Option(None, _vocab_size)]


class ProductOptions(TypedDict, total=False):
    """Options of logits that are a product of hidden states and a weight."""

    bias: Annotated[Tensor | None, Option(None, _bias)]  # (V,)
    memory_budget: Annotated[MemoryBudget, Option("auto", _memory_budget)]
    slab_dtype: Annotated[torch.dtype | None, Option(None, _slab_dtype)]
    accumulate_into: Annotated[Tensor | None, Option(None, _accumulate_into)]  # (V, D) float32
    grad_filter: Annotated[float | None, Option(None, _grad_filter)]


class CrossEntropyOptions(LossOptions, RankOptions, total=False):
    """Keyword arguments of `cross_entropy`."""

    inplace: Annotated[bool, Option(False, _inplace)]


class LinearCrossEntropyOptions(LossOptions, RankOptions, ProductOptions, total=False):
    """Keyword arguments of `linear_cross_entropy`."""


class MTPOptions(RowOptions, RankOptions, ProductOptions, total=False):
    """Keyword arguments that `mtp_cross_entropy` shares with `linear_cross_entropy`."""


# What is done with them.


def declared(kind: type) -> dict[str, Option]:
    """Return the options that a `TypedDict` declares, by name."""
    return {name: hint.__metadata__[0] for name, hint in kind.__annotations__.items()}


def defaults(kind: type) -> Any:
    """Return the defaults of a `TypedDict`'s options."""
    return {name: option.default for name, option in declared(kind).items()}


TABLE = declared(CrossEntropyOptions) | declared(LinearCrossEntropyOptions)
AnyOptions = TypeVar("AnyOptions", bound=RowOptions)


def takes(kind: type) -> Callable[[Function], Function]:
    """Decorate a function of `**options` so that its signature shows the options of `kind` one by one."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        shown = []
        for name, hint in kind.__annotations__.items():
            annotation = getattr(hint.__origin__, "__forward_arg__", hint.__origin__)
            default = hint.__metadata__[0].default
            shown.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            )
        parameters = sorted([*kept[:-1], *shown, *kept[-1:]], key=lambda p: p.kind)
        function.__dict__["__signature__"] = signature.replace(parameters=parameters)
        return function

    return decorate


def complete(function: str, defaults: AnyOptions, given: AnyOptions) -> AnyOptions:
    """Return the options of a call: those `given`, and `defaults` for the others.

    Raises:
        TypeError: `function` has no option of that name.
    """
    options = cast(AnyOptions, {**defaults, **given})
    if len(options) > len(defaults):
        name = next(name for name in given if name not in defaults)
        close = get_close_matches(name, defaults, n=1)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")
    return options


def check(given: Mapping[str, Any], options: LossOptions, inputs: Inputs) -> None:
    """Raise ValueError or TypeError unless the options that are `given` fit the inputs and each other."""
    for name, value in given.items():
        test = TABLE[name].check
        if value is not None and test is not None:
            test(name, value, inputs, options)


def only(names: tuple[str, ...], given: Mapping[str, Any]) -> bool:
    """Return True if all options but `names` have their defaults."""
    return all(name in names or value == TABLE[name].default for name, value in given.items())
