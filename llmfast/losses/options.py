"""The options of the losses. Each is declared once, here: its name, type, default and check.

The type is checked too: `complete` refuses a value that the annotation does not allow.

A function takes the options of a `TypedDict` as `**options: Unpack[...]`, which type checkers read; `takes` shows them
one by one in the signature that `help()` prints. An option that is a field of `llmfast_kernels.terms.Terms` reaches the
rows, and the operators of `torch.compile`, by that name alone.
"""

# Options that are not given have their defaults by the time anything is read:
# pyright: reportTypedDictNotRequiredAccess=false

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, TypeVar, cast, get_args

import torch
from torch import Tensor

from llmfast._checks import describe, expect, overlaps
from llmfast._dispatch import has_no_data, in_transform
from llmfast._kinds import ArgumentKind, expect_kinds, expect_tensors, kinds_of
from llmfast.losses.parallel import ProcessGroup

Numbers = Tensor | Sequence[float]
Reduction = Literal["mean", "sum", "none"]
Function = TypeVar("Function", bound=Callable[..., Any])

# Names that other libraries use, for hints: torch's `weight` resembles `token_weights` but means something else.
_ELSEWHERE = {
    "weight": "class_weights",
    "ce_weight": "class_weights",
    "lse_square_scale": "z_loss",
    "filter_eps": "grad_filter",
}


class Inputs(NamedTuple):
    """The tensors of a call, which its options have to fit."""

    rows: Tensor  # (..., V) logits or (..., D) hidden states
    targets: Tensor  # (...) or (..., K)
    V: int  # classes of all ranks
    weight: Tensor | None = None  # (V of this rank, D)
    dtype: torch.dtype | None = None  # of matrix products
    name: str = "targets"  # what the caller calls the targets
    dense: bool = False  # the targets are probabilities of all classes


# A function that raises an error unless an option's value (never None) fits the inputs and the other options.
Check = Callable[[str, Any, Inputs, "LossOptions"], None]


class Option:
    """Everything that is declared about an option, except its name and type."""

    def __init__(self, default: Any, *checks: Check, idle: float | None = None) -> None:
        """Declare an option.

        Args:
            default: Its value if it is not given.
            checks: Tests of a value, in this order.
            idle: A value that changes nothing. `Terms` has None for it, which costs nothing.
        """
        self.default, self.checks, self.idle = default, checks, idle


def must(wanted: str, test: Callable[[Any], bool]) -> Check:
    """Make a check of a value alone. Its message is made late, because torch.compile cannot format symbolic numbers."""

    def check(name: str, value: Any, inputs: Inputs, options: "LossOptions") -> None:
        if not test(value):
            raise ValueError(f"{name} must {wanted}; got {value!r}")

    return check


def tensor(*shapes: str, floating: bool = True, differentiable: bool = False) -> Check:
    """Make a check of a tensor. Shapes: "V" classes, "v" classes of this rank, "T" the tokens' shape, "K" or "TK"."""

    def check(name: str, t: Tensor, inputs: Inputs, options: "LossOptions") -> None:
        tokens, K, device = tuple(inputs.rows.shape[:-1]), inputs.targets.shape[-1:], inputs.rows.device
        own = () if inputs.weight is None else inputs.weight.shape[:1]
        sizes = {"V": (inputs.V,), "v": tuple(own), "T": tokens, "K": tuple(K), "TK": (*tokens, *K)}
        fits = [sizes[shape] for shape in shapes]
        wanted = " or ".join(str(shape) for shape in fits)
        expect(tuple(t.shape) in fits and t.device == device, f"{name} must be {wanted} on {device}; got {describe(t)}")
        if t.is_floating_point() != floating:
            raise TypeError(f"{name} must be {'floating point' if floating else 'integers'}; got {describe(t)}")
        expect(
            differentiable or not (t.requires_grad and torch.is_grad_enabled()),
            f"{name} gets no gradient here; detach it, or weigh the losses of reduction='none'",
        )

    return check


_PER_TOKEN = tensor("T")


def _num_valid(name: str, value: float | Tensor, inputs: Inputs, options: "LossOptions") -> None:
    reduction = options["reduction"]
    expect(reduction == "mean", f"{name} needs reduction='mean', which it divides; got reduction={reduction!r}")
    if isinstance(value, Tensor):
        expect(value.numel() == 1, f"{name} must hold one number; got {describe(value)}")
    elif not value >= 0:
        raise ValueError(f"{name} must not be negative; got {value}")


def _indices(name: str, value: Any, inputs: Inputs, options: "LossOptions") -> None:
    expect(
        not inputs.dense or (isinstance(value, int) and value == 0),
        f"{name} needs class indices as targets; got probabilities, {describe(inputs.targets)}",
    )


def _ignore_index(name: str, value: int, inputs: Inputs, options: "LossOptions") -> None:
    expect(
        not inputs.dense or value < 0,
        f"{name} must be negative, and has no use, where targets are probabilities; got {value}",
    )


def _target_weights(name: str, value: Tensor, inputs: Inputs, options: "LossOptions") -> None:
    expect(inputs.targets.dim() == inputs.rows.dim(), f"{name} need targets of shape (..., K)")


def _shift(name: str, value: int, inputs: Inputs, options: "LossOptions") -> None:
    expect(value == 0 or inputs.rows.dim() > 1, f"{name} needs a token axis; logits of one token have none")


def _document_ids(name: str, value: Tensor, inputs: Inputs, options: "LossOptions") -> None:
    expect(options["shift"] > 0, f"{name} need shift > 0; got shift=0")


def _vocab_size(name: str, value: int, inputs: Inputs, options: "LossOptions") -> None:
    if value != inputs.V:
        raise ValueError(f"{name}={value} needs a process_group")


def _inplace(name: str, value: bool, inputs: Inputs, options: "LossOptions") -> None:
    logits = inputs.rows
    expect(not value or logits.is_contiguous(), f"{name}=True needs contiguous logits; got strides {logits.stride()}")
    owner = logits if logits._base is None else logits._base
    expect(
        not (value and owner.requires_grad and owner.is_leaf and torch.is_grad_enabled()),
        f"{name}=True would overwrite logits that are a leaf of the graph; pass the result of an operation",
    )


def _slab_dtype(name: str, value: torch.dtype, inputs: Inputs, options: "LossOptions") -> None:
    if value not in (inputs.dtype, torch.float32):
        raise TypeError(f"{name} must be torch.float32 or the inputs' dtype; got {value}")


def _accumulate_into(name: str, value: Tensor, inputs: Inputs, options: "LossOptions") -> None:
    weight, dtype = inputs.weight, inputs.dtype
    assert weight is not None and dtype is not None
    fits = value.shape == weight.shape and value.device == weight.device
    expect(fits, f"{name} must be {describe(weight)}, in float32; got {describe(value)}")
    expect(not overlaps(value), f"{name} must have memory for each element; got strides {value.stride()}")
    wanted = weight.requires_grad or not torch.is_grad_enabled()
    expect(wanted, f"{name} needs a weight that requires a gradient")
    if value.dtype != torch.promote_types(dtype, torch.float32):
        raise TypeError(f"{name} must be float32; got {describe(value)}")


def _accumulate_dtype(name: str, value: torch.dtype, inputs: Inputs, options: "LossOptions") -> None:
    weight, dtype = inputs.weight, inputs.dtype
    assert weight is not None and dtype is not None
    wide = torch.promote_types(dtype, torch.float32)
    if value not in (weight.dtype, wide):
        raise TypeError(f"{name} must be {wide} or the weight's dtype; got {value}")
    if value != wide:
        for other in ("accumulate_into", "grad_filter"):
            expect(options.get(other) is None, f"{name}={value} does not work with {other}")
        expect(value == dtype, f"{name} must be {wide} for a weight that is cast to {dtype}; got {value}")


def _temperature(name: str, value: float | Tensor, inputs: Inputs, options: "LossOptions") -> None:
    if not isinstance(value, Tensor):
        expect(value > 0, f"{name} must be a positive number, or one for each token; got {value!r}")
        return
    expect(
        not (value.requires_grad and torch.is_grad_enabled()),
        f"{name} gets no gradient here; detach it, or divide the logits by it",
    )
    _PER_TOKEN(name, value, inputs, options)
    if value.device.type == "cpu" and not has_no_data(value):  # on a GPU, looking would be a host sync
        wrong = ~(value > 0)
        expect(not wrong.any(), f"{name} must be positive for each token; found {value[wrong][:1].tolist()}")


def _grad_filter(name: str, value: float, inputs: Inputs, options: "LossOptions") -> None:
    expect(options["reduction"] != "none", f"{name} needs reduction 'mean' or 'sum'")
    expect(options.get("process_group") is None, f"{name} does not work with process_group")


class TargetOptions(TypedDict, total=False):
    """Options that say which targets count. Losses and log-probabilities have them."""

    ignore_index: Annotated[int, Option(-100, _ignore_index)]


class TermOptions(TypedDict, total=False):
    """Options that change the loss of a row or add to it."""

    label_smoothing: Annotated[float, Option(0.0, must("be in [0, 1]", lambda x: 0 <= x <= 1), idle=0.0)]
    z_loss: Annotated[float, Option(0.0, idle=0.0)]


class LogitOptions(TypedDict, total=False):
    """Options that say what the logits are. Losses and log-probabilities have them."""

    softcap: Annotated[float | None, Option(None, must("be positive", lambda x: x > 0))]
    logit_scale: Annotated[float | None, Option(None, idle=1.0)]


class RowOptions(TargetOptions, TermOptions, LogitOptions, total=False):
    """Options that say what the loss of a row is. Every cross-entropy has them."""

    class_weights: Annotated[Tensor | None, Option(None, tensor("V"))]  # (V,)
    token_weights: Annotated[Tensor | None, Option(None, tensor("T"))]  # (...)


class LossOptions(RowOptions, total=False):
    """Options of `cross_entropy` and `linear_cross_entropy`, and of their definitions in `reference`."""

    reduction: Annotated[
        Reduction, Option("mean", must("be 'mean', 'sum' or 'none'", lambda x: x in get_args(Reduction)))
    ]
    num_valid: Annotated[float | Tensor | None, Option(None, _num_valid)]
    target_weights: Annotated[
        Tensor | None, Option(None, _indices, _target_weights, tensor("K", "TK"))
    ]  # (K,) or (..., K)
    shift: Annotated[int, Option(0, must("not be negative", lambda x: x >= 0), _indices, _shift)]
    document_ids: Annotated[Tensor | None, Option(None, _document_ids, tensor("T", floating=False))]  # (...)


class RankOptions(TypedDict, total=False):
    """Options for classes that are split over ranks."""

    process_group: Annotated["ProcessGroup | None", Option(None)]
    vocab_size: Annotated[int | None, Option(None, _vocab_size)]


class ProductOptions(TypedDict, total=False):
    """Options of logits that are a product of hidden states and a weight."""

    bias: Annotated[Tensor | None, Option(None, tensor("v", differentiable=True))]  # (V,)
    memory_budget: Annotated[
        int | Literal["auto"], Option("auto", must("be positive or 'auto'", lambda x: x == "auto" or x > 0))
    ]
    slab_dtype: Annotated[torch.dtype | None, Option(None, _slab_dtype)]
    accumulate_into: Annotated[Tensor | None, Option(None, _accumulate_into)]  # (V, D) float32
    accumulate_dtype: Annotated[torch.dtype | None, Option(None, _accumulate_dtype)]


class FilterOptions(TypedDict, total=False):
    """Options of losses whose gradients can be made in the forward pass."""

    grad_filter: Annotated[float | None, Option(None, must("be positive", lambda x: x > 0), _indices, _grad_filter)]


class CrossEntropyOptions(LossOptions, RankOptions, total=False):
    """Keyword arguments of `cross_entropy`."""

    inplace: Annotated[bool, Option(False, _inplace)]


class LinearOptions(LossOptions, RankOptions, ProductOptions, FilterOptions, total=False):
    """Keyword arguments of `linear_cross_entropy`."""


class LogprobOptions(TargetOptions, LogitOptions, total=False):
    """Options of log-probabilities, and of their definitions in `reference`."""

    temperature: Annotated[float | Tensor, Option(1.0, _temperature, idle=1.0)]  # or (...)
    return_rank: Annotated[bool, Option(False)]


class RankedLogprobOptions(LogprobOptions, RankOptions, total=False):
    """Keyword arguments of `logprobs`."""


class LinearLogprobOptions(RankedLogprobOptions, ProductOptions, total=False):
    """Keyword arguments of `linear_logprobs`."""


class MTPLogprobOptions(LinearLogprobOptions, total=False):
    """Keyword arguments of `mtp_logprobs`. The last two are its own."""

    document_ids: Annotated[Tensor | None, Option(None)]  # (..., T)
    heads: Annotated[int | None, Option(None)]


Kind = Literal["forward_kl", "reverse_kl", "jsd"]


def _beta(name: str, value: float, inputs: Inputs, options: Any) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1]; got {value}")
    expect(options["kind"] == "jsd", f"{name} needs kind='jsd'; got kind={options['kind']!r}")


class DistillationOptions(TargetOptions, LogitOptions, ProductOptions, total=False):
    """Keyword arguments of `linear_distillation`."""

    kind: Annotated[
        Kind, Option("forward_kl", must("be 'forward_kl', 'reverse_kl' or 'jsd'", lambda x: x in get_args(Kind)))
    ]
    beta: Annotated[float | None, Option(None, _beta)]
    temperature: Annotated[float | Tensor, Option(1.0, _temperature)]  # or (...)
    soft_weight: Annotated[float, Option(1.0)]
    hard_weight: Annotated[float, Option(0.0)]
    token_weights: Annotated[Tensor | None, Option(None, tensor("T"))]  # (...)
    reduction: Annotated[
        Reduction, Option("mean", must("be 'mean', 'sum' or 'none'", lambda x: x in get_args(Reduction)))
    ]
    num_valid: Annotated[float | Tensor | None, Option(None, _num_valid)]


class MTPOptions(RowOptions, RankOptions, ProductOptions, FilterOptions, total=False):
    """Keyword arguments of `mtp_cross_entropy`. The last four are its own."""

    document_ids: Annotated[Tensor | None, Option(None)]  # (..., T)
    head_weights: Annotated[Numbers | None, Option(None)]  # (K,)
    num_valid: Annotated[Numbers | None, Option(None)]  # (K,)
    detach_unembedding: Annotated[bool | Sequence[bool], Option(False)]


def declared(kind: type) -> dict[str, Option]:
    """Return the options that a `TypedDict` declares, by name."""
    return {name: hint.__metadata__[0] for name, hint in kind.__annotations__.items()}


def defaults(kind: type) -> Any:
    """Return the defaults of a `TypedDict`'s options."""
    return {name: option.default for name, option in declared(kind).items()}


TABLE = declared(CrossEntropyOptions) | declared(LinearOptions) | declared(LogprobOptions)
# Of all options by name, but for those of `mtp_cross_entropy`, which takes numbers for each head.
KINDS = kinds_of(CrossEntropyOptions) | kinds_of(LinearOptions) | kinds_of(MTPLogprobOptions)
KINDS |= kinds_of(DistillationOptions)
AnyOptions = TypeVar("AnyOptions", bound=TargetOptions)


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


def expect_inputs(function: str, **tensors: Any) -> None:
    """Raise TypeError unless a loss outside of torch.func's transforms was given tensors: the first thing it does.

    The losses look at addresses and write gradients in place, so that some would fail there, and others not.
    """
    if in_transform():
        raise TypeError(
            f"{function} must be called outside of torch.func's transforms (grad, vjp, jvp, vmap and others); "
            f"inside, use llmfast.losses.reference.{function.replace('mtp', 'linear')}"
        )
    expect_tensors(**tensors)


def complete(
    function: str, defaults: AnyOptions, given: AnyOptions, kinds: Mapping[str, ArgumentKind] = KINDS
) -> AnyOptions:
    """Return the options of a call: those `given`, and `defaults` for the others.

    Raises:
        TypeError: `function` has no option of that name, or a value is not of its kind.
    """
    options = cast(AnyOptions, {**defaults, **given})
    if len(options) > len(defaults):
        name = next(name for name in given if name not in defaults)
        known = _ELSEWHERE.get(name)
        close = [known] if known in defaults else get_close_matches(name, defaults, n=1)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")
    plain = expect_kinds(kinds, cast("dict[str, Any]", given))
    return options if plain is given else cast(AnyOptions, {**options, **plain})


def check(
    given: Mapping[str, Any], options: LossOptions, inputs: Inputs, table: "Mapping[str, Option] | None" = None
) -> None:
    """Raise ValueError or TypeError unless the targets, and the options that are `given`, fit the rest."""
    check_targets(inputs, options["ignore_index"])
    for name, value in given.items():
        if value is not None:
            for test in (TABLE if table is None else table)[name].checks:
                test(name, value, inputs, options)


def check_targets(inputs: Inputs, ignore_index: int) -> None:
    """Raise ValueError or TypeError unless the targets fit the rows and classes; call them as `inputs` says."""
    rows, targets, V, _, _, name, dense = inputs
    shape = rows.shape[:-1]
    if dense:
        expect(targets.device == rows.device, f"{name} must be on {rows.device}; got {describe(targets)}")
        expect(
            not (targets.requires_grad and torch.is_grad_enabled()),
            f"{name} get no gradient here; detach them, or use torch.nn.functional.cross_entropy",
        )
        return
    if targets.dtype not in (torch.int64, torch.int32):
        others = f", or floating point probabilities {(*shape, V)}" if name == "targets" else ""
        raise TypeError(f"{name} must be int64 or int32 class indices{others}; got {describe(targets)}")
    if targets.shape != shape and not (targets.shape[:-1] == shape and targets.dim() > 0 and targets.shape[-1] > 0):
        raise ValueError(
            f"{name} must have shape {tuple(shape)}, or one axis more for K of them; got {describe(targets)}"
        )
    if targets.device != rows.device:
        raise ValueError(f"{name} must be on {rows.device}; got {describe(targets)}")
    if targets.device.type == "cpu" and not has_no_data(targets):  # on a GPU, looking would be a host sync
        wrong = (targets != ignore_index) & ((targets < 0) | (targets >= V))
        if wrong.any():
            value = targets[wrong][0].item()
            raise ValueError(f"{name} must be in [0, {V}) or ignore_index={ignore_index}; found {value}")


def are_probabilities(targets: Tensor, shape: torch.Size, V: int) -> bool:
    """Return True if targets of tokens of this shape are probabilities of all classes, as in torch's cross-entropy."""
    return targets.is_floating_point() and targets.shape == (*shape, V)


def only(names: tuple[str, ...], given: Mapping[str, Any]) -> bool:
    """Return True if all options but `names` have their defaults."""
    others = {name: value for name, value in given.items() if name not in names}
    return all(not isinstance(value, Tensor) and value == TABLE[name].default for name, value in others.items())
