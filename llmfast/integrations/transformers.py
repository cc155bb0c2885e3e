"""Hugging Face causal language models that compute their loss without logits.

A model's own forward runs unchanged. Only its output embedding receives a stand-in for the hidden states, and therefore
makes a stand-in for the logits. The latter records the operations applied to it (a scale, a softcap, a view, a shift)
and becomes `linear_cross_entropy` when it reaches `torch.nn.functional.cross_entropy`. Nothing is read from a config,
and no model needs its own patch. If a model does something to its logits that the stand-in cannot follow, an error says
so: `fuse_loss` tries this first and then leaves the model unchanged.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from llmfast._checks import describe, expect
from llmfast._dtensor import is_dtensor
from llmfast.integrations import require
from llmfast.integrations.stand_ins import Call, LazyLogits, Logits, split_input

if TYPE_CHECKING:
    from typing_extensions import Unpack

PreTrainedModel: type[nn.Module] = require("transformers", extra="hf").PreTrainedModel

M = TypeVar("M", bound=nn.Module)
CALL = "_llmfast_call"  # attribute of a hooked module while a forward with labels runs
OPTIONS = "_llmfast_options"  # attribute of a fused model
ASKED = "_llmfast_asked"  # attribute of a fused model while it is asked for log-probabilities


class FusedOptions(TypedDict, total=False):
    """Options of the loss beyond the model's own, as in `linear_cross_entropy`."""

    label_smoothing: float
    z_loss: float
    memory_budget: int | Literal["auto"]
    slab_dtype: torch.dtype | None
    grad_filter: float | None


def fuse_loss(model: M, **options: "Unpack[FusedOptions]") -> M:
    """Let a causal language model compute its loss without logits, in place.

    This changes the memory use of `model(..., labels=labels)`. In training mode `outputs.logits` becomes None. In eval
    mode it is computed when it is first used, so the Trainer's `compute_metrics` and `preprocess_logits_for_metrics`
    work, and an evaluation of the loss alone needs no logits. Without labels nothing changes.

    The model's own code still determines how labels are shifted, the meaning of `num_items_in_batch`, `shift_labels`
    and padding, scales and softcaps of the logits, and router losses of experts. The output embedding may be tied, have
    a bias, or be adapted by PEFT's LoRA, before or after this call.

    Copying, pickling, `save_pretrained`, `generate`, `torch.compile`, gradient checkpointing and PEFT work as before.
    Call this function before the model is wrapped or sharded (DDP, FSDP), or passed to a trainer that replaces its
    forward. Such a trainer (currently TRL's SFTTrainer) computes its own losses, which these options do not affect; the
    subclass in `examples/sft_trainer.py` uses the model's loss. The Trainer also computes its own loss with
    `TrainingArguments(label_smoothing_factor=)`: pass `label_smoothing` here instead.

    Args:
        model: A decoder-only `PreTrainedModel`, or a PEFT model around one, on any device and in any dtype.
        options: `label_smoothing`, `z_loss`, `memory_budget`, `slab_dtype` and `grad_filter`, as in
            `linear_cross_entropy`.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is neither a `PreTrainedModel` nor a PEFT model around one, or an option is unknown.
        ValueError: The model is unsuitable for the reason given and was not changed. To check it, its loss is computed
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
        ValueError: The model is not fused, was sharded since, or has heads, which `remove_mtp` removes.
    """
    lm = causal_lm(model)
    expect_mixin(lm, Fused, "fused by fuse_loss")
    restore(lm)
    return model


class ModelLogprobOptions(TypedDict, total=False):
    """Options of `model_logprobs`, as in `linear_logprobs`; the model itself determines what the logits are."""

    ignore_index: int
    temperature: float | Tensor
    return_rank: bool
    memory_budget: int | Literal["auto"]
    slab_dtype: torch.dtype | None


def model_logprobs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    ids: Tensor,  # (B, T) or (B, T, K)
    *,
    return_stats: bool = False,
    **options: "Unpack[ModelLogprobOptions]",
) -> Any:
    """Ask a model of `fuse_loss` for the log-probabilities of `ids` instead of logits.

    They are those of `model(**inputs).logits`, with the model's own scales, softcaps and adapters, for preference and
    policy losses. The forward runs through `model` as it is given, so that wrappers (PEFT, DDP, FSDP) do their part.

    Args:
        model: A model of `fuse_loss`, or one that wraps it.
        inputs: Keyword arguments of its forward, without labels.
        ids: For each row of the logits an id, or K of them. Where the input is the text itself, row t says what follows
            token t: `F.pad(input_ids[:, 1:], (0, 1), value=-100)`.
        return_stats: Also return `LogprobStats`.
        options: `ignore_index`, `temperature`, `return_rank`, `memory_budget` and `slab_dtype`, as in
            `linear_logprobs`.

    Returns:
        As `linear_logprobs`.

    Raises:
        TypeError, ValueError: As `linear_logprobs`, or the model is not fused, or uses its logits otherwise.
    """
    known = [*ModelLogprobOptions.__annotations__]
    if not options.keys() <= set(known):
        raise TypeError(f"options of model_logprobs must be among {known}; got {[*options]}")
    expect(inputs.get("labels") is None, "inputs must have no labels: with them the model would compute a loss")
    lm = causal_lm(getattr(model, "module", model))
    expect(isinstance(lm, Fused), f"model must have been fused by fuse_loss; this {type(lm).__name__} was not")
    asked = Asked(ids, {**options, "return_stats": return_stats})
    setattr(lm, ASKED, asked)
    try:
        model(**inputs)
    finally:
        delattr(lm, ASKED)
    expect(asked.found is not None, f"{type(lm).__name__} returned no logits of its output embedding")
    return asked.found


class Asked:
    """Ids whose log-probabilities the next forward is asked for, and what it found."""

    def __init__(self, ids: Tensor, options: Mapping[str, Any]) -> None:
        self.ids, self.options, self.found = ids, options, None

    def answered(self, outputs: Any) -> Any:
        """Return a model's outputs with log-probabilities instead of logits.

        They are made within the forward, and returned by it, so that wrappers see a tensor with a gradient.
        """

        def answer(value: Any) -> Any:
            if not isinstance(value, Logits):
                return value
            self.found = found = value.logprobs(self.ids, self.options)
            return found[0] if isinstance(found, tuple) else found

        if isinstance(outputs, tuple):
            return tuple(answer(value) for value in outputs)
        return type(outputs)(**{name: answer(value) for name, value in outputs.items()})


# The class of a fused model.


def defer_input(head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Replace the output embedding's input. This is its forward pre-hook."""
    call: Call | None = getattr(head, CALL, None)
    if call is None:
        return None
    hidden, others, named = split_input(args, kwargs, head)
    return (call.head_input(hidden), *others), named


class Fused:
    """Mixin placed before a model's class to fuse its loss."""

    _llmfast_base: type
    _llmfast_mixin: type
    _llmfast_hooks: ClassVar[tuple[Any, ...]] = (defer_input,)  # all hooks that may be on the model's modules

    def _llmfast_call_of(self, arguments: Mapping[str, Any]) -> Call:
        return Call(getattr(self, OPTIONS))

    def _llmfast_watched(self) -> list[nn.Module]:
        """Return the modules whose hooks need the current call."""
        head: nn.Module = self.get_output_embeddings()  # type: ignore[attr-defined]
        if defer_input not in head._forward_pre_hooks.values():  # PEFT or a resized vocabulary replaces the head
            head.register_forward_pre_hook(defer_input, with_kwargs=True)
        return [head]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy the fused class too, although it cannot be imported."""
        return _empty, (self._llmfast_base, self._llmfast_mixin), vars(self)


def _empty(base: type, mixin: type) -> Any:
    cls = fused_class(base, mixin)
    return cls.__new__(cls)


@cache
def fused_class(base: Any, mixin: type) -> Any:
    """Derive a class from `base` with the methods of `mixin` and a forward that collects the loss.

    A forward set on the instance would be lost in pickles and bound to the wrong instance in copies.
    """
    signature = inspect.signature(base.forward)
    names = list(signature.parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args)), **kwargs}
        asked = vars(self).get(ASKED)
        if asked is None and arguments.get("labels") is None:
            return base.forward(self, *args, **kwargs)
        call = Call({}) if asked else self._llmfast_call_of(arguments)
        watched = Fused._llmfast_watched(self) if asked else self._llmfast_watched()
        for module in watched:
            setattr(module, CALL, call)
        try:
            outputs = base.forward(self, *args, **kwargs)
        finally:
            for module in watched:
                setattr(module, CALL, None)
        if asked:
            return asked.answered(outputs)
        if call.losses == 0:
            raise RuntimeError(f"{base.__name__} does not compute its loss by cross_entropy of its output embedding")
        # Compiled code and DataParallel can only return tensors.
        lazy = not (self.training or torch.compiler.is_compiling() or getattr(self, "_is_replica", False))
        return _with_lazy_logits(outputs) if lazy else _without_logits(outputs)

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
    """Restore the model to its state before `become`."""
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
    expect(
        not sharded, f"model must not change its class after it was {how}; it is now a {name}, perhaps because of FSDP"
    )
    expect(kind is mixin, f"model must have been {how}; this {name} was not")


def _without_logits(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return tuple(value for value in outputs if not isinstance(value, Logits))
    return type(outputs)(**{name: value for name, value in outputs.items() if not isinstance(value, Logits)})


def _with_lazy_logits(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return tuple(LazyLogits(value) if isinstance(value, Logits) else value for value in outputs)
    named = {name: LazyLogits(value) if isinstance(value, Logits) else value for name, value in outputs.items()}
    return type(outputs)(**named)


# Which models can be fused.


def causal_lm(model: Any) -> Any:
    """Return the `PreTrainedModel` inside a PEFT model, or the model itself."""
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(lm, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, or PEFT's around one; got {type(model)}")
    return lm


def expect_options(options: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for options that `FusedOptions` does not have, or that are out of range."""
    known = [*FusedOptions.__annotations__]
    if not options.keys() <= set(known):
        raise TypeError(f"options of the loss must be among {known}; got {[*options]}")
    smoothing = options.get("label_smoothing", 0.0)
    expect(0 <= smoothing <= 1, f"label_smoothing must be in [0, 1]; got {smoothing}")


def expect_fusable(lm: Any) -> None:
    """Raise ValueError for problems that can be found without running the model."""
    name = type(lm).__name__
    expect(not isinstance(lm, Fused), f"{name} is already fused; unfuse_loss or remove_mtp undoes that")
    expect(
        "forward" not in vars(lm),
        f"the forward of this {name} was replaced (by accelerate, Liger or TRL, say); fuse before that",
    )
    expect(not getattr(lm.config, "is_encoder_decoder", False), f"{name} is not a decoder-only model")
    expect("labels" in inspect.signature(type(lm).forward).parameters, f"the forward of {name} takes no labels")
    expect(lm.get_output_embeddings() is not None, f"{name} has no output embeddings")
    for key, p in lm.named_parameters():
        expect(p.device.type != "meta" and p.numel() > 0, f"{key} of {name} holds no values: {describe(p)}")
        expect(
            not is_dtensor(p),
            f"{key} of {name} is a DTensor: fuse before sharding; tensor parallelism is not supported",
        )


@contextmanager
def unchanged(lm: nn.Module) -> Iterator[None]:
    """Switch to eval mode without gradients; restore modes and random number generators afterwards."""
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
    """Return two batches of 2 x 8 tokens, the second with padding and with labels to ignore."""
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
    """Raise ValueError unless the fused model computes the same loss."""
    name = type(lm).__name__
    try:
        loss = _loss(lm(**batch))
    except Exception as error:
        raise ValueError(f"{name} cannot be fused: {error}") from error
    # The model's own logits may have 16 bits and sum thousands of products.
    close = 1e-4 if all(p.dtype in (torch.float32, torch.float64) for p in lm.parameters()) else 3e-2
    expect(
        loss.dtype == wanted.dtype and abs(float(loss) - float(wanted)) <= close * max(1.0, abs(float(wanted))),
        f"{name} cannot be fused: its loss is {float(wanted)} of {wanted.dtype}, and without logits {float(loss)} of "
        f"{loss.dtype}",
    )


def _loss(outputs: Any) -> Tensor:
    loss: Tensor = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
    return loss
