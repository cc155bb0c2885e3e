"""Multi-token prediction for Hugging Face models, trained by their stock Trainer.

The extra heads use the values of the model's own forward: hooks on its last layer and its embedding save the hidden
states and the arguments (masks, rotary embeddings). Where hidden states reach the output embedding, those of the extra
heads are added to the batch. The rest works as in `fuse_loss`, with `mtp_cross_entropy` at the end.
"""

import copy
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from llmfast._checks import describe, expect
from llmfast.integrations import require
from llmfast.integrations.stand_ins import Call, HeadInput, Logits, split_input
from llmfast.integrations.transformers import (
    CALL,
    OPTIONS,
    Fused,
    FusedOptions,
    PreTrainedModel,
    become,
    defer_input,
    expect_fusable,
    expect_loss,
    expect_mixin,
    expect_options,
    fused_class,
    own_loss,
    probes,
    restore,
    unchanged,
)
from llmfast.losses import mtp_cross_entropy
from llmfast.mtp import ParallelHeads, SequentialDepths

transformers = require("transformers", extra="hf")

M = TypeVar("M", bound=nn.Module)
Kind = Literal["parallel", "sequential"]


def add_mtp(
    model: M,
    heads: int,
    kind: Kind = "parallel",
    *,
    head_weights: Sequence[float] | None = None,  # (heads + 1,)
    depths: Mapping[str, Any] | None = None,
    options: FusedOptions | None = None,
) -> M:
    """Add heads to a causal language model, in place, that learn to predict further tokens.

    In training mode, `model(..., labels=labels).loss` becomes the weighted sum over all heads, computed without logits;
    the model itself is the head of the next token. In eval mode it is the loss of the next token only. Without labels
    nothing changes: `generate` does not use the heads; `decoding.speculative_generate` does. The documentation of
    `fuse_loss` applies here too.

    The losses of all heads are divided by the same number, the number of next tokens: `num_items_in_batch` if the
    Trainer passes it. A step's gradient therefore does not depend on its division into micro-batches and ranks. Heads
    do not predict across the boundaries of packed documents, where `position_ids` restart.

    The heads are `model.mtp` and are saved with the model. `load_mtp` loads both; `from_pretrained` loads only the
    model and warns about the rest. `config.llmfast_mtp` records what was added.

    Copies of the last layer have its dtypes and buffers, and train the same parameters. If the whole layer is frozen,
    they train what a new model of that class would train, so that heads alone can learn on a frozen model.

    Args:
        model: A decoder-only `PreTrainedModel`, as in `fuse_loss`. Apply PEFT afterwards, with
            `modules_to_save=["mtp"]`.
        heads: The number of tokens to predict beyond the next one.
        kind: "parallel" adds copies of the last layer that read the same input and share the model's final norm
            (Gloeckle et al. 2024, arXiv:2404.19737). "sequential" adds `SequentialDepths` whose blocks are copies of
            the last layer (DeepSeek-V3, arXiv:2412.19437).
        head_weights: The weight of each loss, the next token's first; default 1 each. `set_head_weights` changes them.
        depths: For "sequential", keywords of `SequentialDepths`: `concat_order`, `hidden`, `repeated_layer`, `detach`.
        options: Options of the loss, as in `fuse_loss`. They are not saved.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is not a `PreTrainedModel`.
        ValueError: An argument is out of range, or the model is unsuitable for the reason given and was not changed.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel; got {type(model)}")
    lm: Any = model
    name = type(lm).__name__
    expect(heads >= 1, f"heads must be at least 1; got {heads}")
    expect(kind in get_args(Kind), f"kind must be one of {get_args(Kind)}; got {kind!r}")
    weights = [1.0] * (heads + 1) if head_weights is None else [float(w) for w in head_weights]
    _expect_weights(weights, heads)
    expect(not depths or kind == "sequential", f"depths needs kind='sequential'; got {kind!r}")
    expect_options(options or {})
    expect_fusable(lm)
    expect(not hasattr(lm, "mtp"), f"model must not have an attribute mtp; this {name} has one")
    layers = _layers(lm)
    with unchanged(lm):
        batches = probes(lm)
        wanted = [own_loss(lm, batch) for batch in batches]
        lm.config.llmfast_mtp = {
            "heads": heads,
            "kind": kind,
            "head_weights": weights,
            "depths": dict(depths or {}),
            "layer": f"{layers}.{len(lm.get_submodule(layers)) - 1}",
            "norm": _norm(lm, layers, batches[0]),
        }
        become(lm, WithHeads)
        try:
            attach(lm)
            for batch, loss in zip(batches, wanted):
                expect_loss(lm, batch, loss)
            lm.training = True  # only on the top module: it then returns all heads, but dropout stays off
            lm.mtp_weights = _on_cpu([1.0] + [0.0] * heads)
            for batch, loss in zip(batches, wanted):
                expect_loss(lm, batch, loss)
        except Exception:
            _detach(lm)
            raise
        lm.mtp_weights = _on_cpu(weights)
    setattr(lm, OPTIONS, dict(options or {}))
    lm.mtp.train(lm.training)
    return model


def remove_mtp(model: M) -> M:
    """Undo `add_mtp` in place and return the model without its heads.

    Raises:
        ValueError: The model has no heads of `add_mtp`, or was sharded since.
    """
    expect_mixin(model, WithHeads, "given heads by add_mtp")
    _detach(model)
    return model


def set_head_weights(model: nn.Module, head_weights: Sequence[float]) -> None:
    """Set the weight of each head's loss from the next step on, the next token's first; see `llmfast.mtp.head_weights`.

    Raises:
        ValueError: There is not exactly one non-negative weight per head, or the model has no heads.
    """
    lm: Any = model
    expect(isinstance(lm, WithHeads), f"model must have heads of add_mtp; {type(lm).__name__} has none")
    weights = [float(w) for w in head_weights]
    _expect_weights(weights, lm.config.llmfast_mtp["heads"])
    lm.config.llmfast_mtp["head_weights"] = weights
    lm.mtp_weights = _on_cpu(weights)


def load_mtp(folder: str | PathLike[str], options: FusedOptions | None = None, **kwargs: Any) -> Any:
    """Load a model with heads that `save_pretrained` or a Trainer wrote after `add_mtp`.

    Args:
        folder: As for `from_pretrained`.
        options: As for `add_mtp`.
        kwargs: As for `from_pretrained`.

    Raises:
        ValueError: `folder` holds a model without heads, or one whose class `transformers` does not have.
    """
    expect_options(options or {})
    config = transformers.AutoConfig.from_pretrained(folder)
    expect(
        hasattr(config, "llmfast_mtp"), f"{folder} must hold a model saved after add_mtp; its config has no llmfast_mtp"
    )
    name = (config.architectures or ["?"])[0]
    expect(hasattr(transformers, name), f"{folder} holds a {name}, which transformers does not have")
    lm = fused_class(getattr(transformers, name), WithHeads).from_pretrained(folder, **kwargs)
    setattr(lm, OPTIONS, dict(options or {}))
    _copy_what_is_not_saved(lm)
    return lm


def _copy_what_is_not_saved(lm: Any) -> None:
    """Fill buffers of the copies that a checkpoint does not hold; some models can do so only for their own layers."""
    buffers = dict(lm.get_submodule(lm.config.llmfast_mtp["layer"]).named_buffers())
    for layer in _copies(lm):
        saved = layer.state_dict()
        for name, buffer in layer.named_buffers():
            if name not in saved:
                buffer.copy_(buffers[name])


class Block(nn.Module):
    """Copy of the model's last layer, called with that layer's arguments."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)
        for module in self.layer.modules():  # hooks belong to the model's own layers
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
                hooks.clear()

    def forward(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return hidden_of(self.layer(x, *args, **kwargs))


def keep_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = getattr(layer, CALL, None)
    if isinstance(call, AllHeads) and call.keeps():
        x, others, named = split_input(args, kwargs, layer)
        call.input = x, tuple(map(_but_no_cache, others)), {k: _but_no_cache(v) for k, v in named.items()}


def keep_output(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    call = getattr(layer, CALL, None)
    if isinstance(call, AllHeads) and call.keeps():
        call.output = hidden_of(output)


def keep_embeddings(embedding: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    call = getattr(embedding, CALL, None)
    if isinstance(call, AllHeads):
        call.embeddings = output


class WithHeads(Fused):
    """Mixin placed before a model's class to add heads to it."""

    mtp: ParallelHeads | SequentialDepths
    mtp_weights: Tensor  # (heads + 1,) on the CPU
    _llmfast_hooks = (defer_input, keep_input, keep_output, keep_embeddings)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:  # called by from_pretrained
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        setattr(self, OPTIONS, {})
        attach(self)

    def _llmfast_call_of(self, arguments: Mapping[str, Any]) -> Call:
        lm: Any = self
        return AllHeads(lm, arguments) if lm.training else super()._llmfast_call_of(arguments)

    def _llmfast_watched(self) -> list[nn.Module]:
        lm: Any = self
        layer, embedding = lm.get_submodule(lm.config.llmfast_mtp["layer"]), lm.get_input_embeddings()
        if keep_input not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(keep_input, with_kwargs=True)
            layer.register_forward_hook(keep_output)
        if keep_embeddings not in embedding._forward_hooks.values():
            embedding.register_forward_hook(keep_embeddings)
        return [*super()._llmfast_watched(), layer, embedding]


class AllHeads(Call):
    """State of one forward pass in training mode."""

    def __init__(self, lm: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__(getattr(lm, OPTIONS))
        self.lm = lm
        self.batch = arguments["labels"].shape[0]
        self.embeddings: Tensor | None = arguments.get("inputs_embeds")
        self.document_ids = _documents(arguments.get("position_ids"), arguments["labels"])
        self.input: Any = None  # input of the last layer: (B, T, D), with its other arguments
        self.output: Any = None
        self._with_gradients = torch.is_grad_enabled()

    def keeps(self) -> bool:
        """Return True if the last layer's hooks should save what they see, which must be part of the graph."""
        if self._with_gradients and not torch.is_grad_enabled():
            raise RuntimeError(
                "checkpointing with use_reentrant=True hides the layers from further heads; "
                "pass gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return True

    def head_input(self, hidden: Tensor) -> HeadInput:
        lm, (x, args, kwargs) = self.lm, self.input
        told = lm.config.llmfast_mtp
        if told["kind"] == "parallel":
            further = lm.mtp(x, args, kwargs)
            further = lm.get_submodule(told["norm"])(further) if told["norm"] else further
        else:
            read = hidden if told["depths"].get("hidden") == "post_norm" else self.output
            further = lm.mtp(read, self.embeddings, args, kwargs, document_ids=self.document_ids)
        if further.shape[1:] != hidden.shape:
            raise TypeError(
                f"its output embedding must be given {tuple(further.shape[1:])} states; got {describe(hidden)}"
            )
        return HeadInput(torch.cat([hidden[None], further]), self)

    def loss(self, logits: Logits, targets: Tensor, given: dict[str, Any]) -> Tensor:
        reduction, class_weights = given.pop("reduction"), given.pop("class_weights")
        if reduction == "none" or class_weights is not None:
            raise TypeError("several heads need a loss with reduction 'mean' or 'sum' and without class weights")
        hidden, weight = logits.joined()  # (K * B * T, D): the model has processed and flattened the extra rows
        weights = self.lm.mtp_weights
        K, labels = len(weights), targets.view(self.batch, -1)
        count = (targets != given["ignore_index"]).sum() if reduction == "mean" else targets.new_ones(())
        loss: Tensor = mtp_cross_entropy(
            hidden.view(K, *labels.shape, hidden.shape[-1]),
            weight,
            labels,
            bias=logits.bias,
            document_ids=None if self.document_ids is None else self.document_ids[:, : labels.shape[1]],
            head_weights=weights,
            num_valid=count.expand(K),
            **given,
        )
        return loss


def attach(lm: Any) -> None:
    """Create the heads described by the config, next to the last layer and like it."""
    told = lm.config.llmfast_mtp
    layer = lm.get_submodule(told["layer"])
    if told["kind"] == "parallel":
        lm.mtp = ParallelHeads(lambda: Block(layer), told["heads"])
    else:
        eps = getattr(lm.config, "rms_norm_eps", 1e-5)
        embedding = lm.get_input_embeddings().weight
        lm.mtp = SequentialDepths(
            lambda: Block(layer), told["heads"], embedding.shape[1], norm_eps=eps, **told["depths"]
        )
        for depth in lm.mtp.layers:
            for new in (depth.enorm, depth.hnorm, depth.eh_proj, depth.norm):
                new.to(embedding.device, embedding.dtype)
    if not any(p.requires_grad for p in layer.parameters()):
        _thaw(lm)
    lm.mtp_weights = _on_cpu(told["head_weights"])


def _thaw(lm: Any) -> None:
    """Unfreeze copies of a frozen layer where a new model of the class would train (a router's bias stays frozen)."""
    base, layer = type(lm)._llmfast_base, lm.config.llmfast_mtp["layer"]
    with torch.device("meta"):
        new = base(copy.deepcopy(lm.config)).get_submodule(layer)
    trained = {name for name, p in new.named_parameters() if p.requires_grad}
    for copied in _copies(lm):
        for name, p in copied.named_parameters():
            p.requires_grad_(p.is_floating_point() and name in trained)


def _copies(lm: Any) -> list[nn.Module]:
    """Return the copies of the last layer."""
    return [block.layer for block in lm.mtp.modules() if isinstance(block, Block)]


def _on_cpu(head_weights: list[float]) -> Tensor:
    return torch.tensor(head_weights, dtype=torch.float32, device="cpu")  # independent of torch's defaults


def _detach(lm: Any) -> None:
    restore(lm)
    vars(lm).pop("mtp_weights", None)
    if hasattr(lm, "mtp"):
        del lm.mtp
    del lm.config.llmfast_mtp


def _expect_weights(weights: list[float], heads: int) -> None:
    good = len(weights) == heads + 1 and all(0 <= w < float("inf") for w in weights)
    expect(good, f"head_weights must be {heads + 1} numbers of 0 or more, the next token's first; got {weights}")


def _layers(lm: Any) -> str:
    """Return the name of the model's list of layers."""
    count = lm.config.get_text_config().num_hidden_layers
    found: list[str] = [name for name, m in lm.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    expect(len(outermost) == 1, f"{type(lm).__name__} must have one list of {count} layers; it has {outermost}")
    return outermost[0]


def _norm(lm: Any, layers: str, batch: dict[str, Tensor]) -> str:
    """Return the name of the module between the last layer and the output embedding, or an empty string."""
    last, head = lm.get_submodule(layers)[-1], lm.get_output_embeddings()
    made: list[Tensor] = []  # outputs of the last layer
    given: list[Tensor] = []  # inputs of the output embedding
    between: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = split_input(args, kwargs, module)[0]
            if made and not given and isinstance(x, Tensor) and isinstance(output, Tensor):
                between[name] = x, output

        return hook

    handles = [
        last.register_forward_hook(lambda module, args, output: made.append(hidden_of(output))),
        head.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(split_input(args, kwargs, module)[0]), with_kwargs=True
        ),
        *(
            module.register_forward_hook(see(name), with_kwargs=True)
            for name, module in lm.named_modules()
            if name and not f"{name}.".startswith(f"{layers}.")
        ),
    ]
    try:
        lm(**batch)
    finally:
        for handle in handles:
            handle.remove()
    expect(len(made) == len(given) == 1, f"{type(lm).__name__} must call its last layer and output embedding once each")
    if _same(made[0], given[0]):
        return ""
    names = [name for name, (x, y) in between.items() if _same(x, made[0]) and _same(y, given[0])]
    expect(
        len(names) == 1,
        f"{type(lm).__name__} must have one module, its norm, between its last layer and its output embedding; "
        f"it has {names or 'more of them'}",
    )
    return names[0]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def hidden_of(output: Any) -> Tensor:
    """Return a layer's hidden states: its output, or the first of several outputs."""
    made = output[0] if isinstance(output, tuple | list) else output
    expect(isinstance(made, Tensor), f"the last layer must return hidden states, alone or first; got {type(output)}")
    return made  # type: ignore[no-any-return]


def _but_no_cache(value: Any) -> Any:
    """Replace a key-value cache by None: copies of a layer do not use one."""
    return None if isinstance(value, transformers.Cache) else value


def _documents(position_ids: Tensor | None, labels: Tensor) -> Tensor | None:
    """Return document numbers (B, T) from positions that restart with each document."""
    if position_ids is None:
        return None
    expect(
        position_ids.dim() == 2 and position_ids.shape[-1] == labels.shape[-1],
        f"position_ids must be (B, {labels.shape[-1]}) for several heads; got {describe(position_ids)}",
    )
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return torch.nn.functional.pad(starts.long().cumsum(1), (1, 0)).expand_as(labels).contiguous()
