"""Messages about models of Hugging Face, word for word."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is missing: make test-integrations")

from llmfast.integrations import mtp as module  # noqa: E402
from llmfast.integrations import require, stand_ins  # noqa: E402
from llmfast.integrations.decoding import speculative_generate  # noqa: E402
from llmfast.integrations.mtp import add_mtp, load_mtp, remove_mtp, set_head_weights  # noqa: E402
from llmfast.integrations.stand_ins import Call, HeadInput  # noqa: E402
from llmfast.integrations.transformers import (  # noqa: E402
    expect_loss,
    expect_mixin,
    fuse_loss,
    fused_class,
    model_logprobs,
    unfuse_loss,
)

Make = Callable[..., Any]
LINEAR, LLAMA = "<class 'torch.nn.modules.linear.Linear'>", "LlamaForCausalLM"
OPTIONS = "['label_smoothing', 'z_loss', 'memory_budget', 'slab_dtype', 'grad_filter']"
WEIGHTS = "head_weights must be 3 numbers of 0 or more, the next token's first; got"
SEEN = "(8, 32) torch.float32 on cpu"
NONE = f"model must have heads of add_mtp; this {LLAMA} has none"


def says(message: str) -> str:
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"heads": 0}, "heads must be at least 1; got 0"),
        ({"kind": "shared"}, "kind must be one of ('parallel', 'sequential'); got 'shared'"),
        ({"head_weights": [1, 1]}, f"{WEIGHTS} [1.0, 1.0]"),
        ({"head_weights": [1, 1, 0, 1]}, f"{WEIGHTS} [1.0, 1.0, 0.0, 1.0]"),
        ({"head_weights": [1, -0.5, 1]}, f"{WEIGHTS} [1.0, -0.5, 1.0]"),
        ({"head_weights": [1, 1, float("inf")]}, f"{WEIGHTS} [1.0, 1.0, inf]"),
        ({"head_weights": [float("nan"), 1, 1]}, f"{WEIGHTS} [nan, 1.0, 1.0]"),
        ({"depths": {"detach": True}}, "depths needs kind='sequential'; got 'parallel'"),
        ({"options": {"label_smoothing": -0.1}}, "label_smoothing must be in [0, 1]; got -0.1"),
        ({"options": {"softcap": 3.0}}, f"options of the loss must be among {OPTIONS}; got ['softcap']"),
    ],
)
def test_heads_that_cannot_be_added(make: Make, given: dict[str, Any], message: str) -> None:
    model = make("llama")
    with pytest.raises((ValueError, TypeError), match=says(message)):
        add_mtp(model, **{"heads": 2} | given)
    assert type(model) is transformers.LlamaForCausalLM and not hasattr(model, "mtp")
    assert not hasattr(model.config, "llmfast_mtp")


def test_models_that_take_no_heads_or_have_none(make: Make) -> None:
    with pytest.raises(TypeError, match=says(f"model must be a transformers PreTrainedModel; got {LINEAR}")):
        add_mtp(nn.Linear(2, 2), 1)
    model = make("llama")
    for wrong, message in (
        (lambda: set_head_weights(model, [1, 1]), f"model must have heads of add_mtp; {LLAMA} has none"),
        (lambda: remove_mtp(model), f"model must have been given heads by add_mtp; this {LLAMA} was not"),
        (lambda: speculative_generate(model, torch.tensor([3]), 1), NONE),
    ):
        with pytest.raises(ValueError, match=says(message)):
            wrong()
    model.mtp = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=says(f"model must not have an attribute mtp; this {LLAMA} has one")):
        add_mtp(model, 1)


def test_layers_and_norms_that_are_not_where_heads_need_them(make: Make) -> None:
    model = make("llama")
    model.others = nn.ModuleList([nn.ModuleList([nn.Identity()] * 2), nn.Identity()])
    many = f"{LLAMA} must have one list of 2 layers; it has ['model.layers', 'others']"
    with pytest.raises(ValueError, match=says(many)):
        add_mtp(model, 1)
    del model.others
    model.lm_head.register_forward_pre_hook(lambda head, args: (args[0] + 1,))
    between = f"{LLAMA} must have one module, its norm, between its last layer and its output embedding; it has "
    with pytest.raises(ValueError, match=says(f"{between}more of them")):
        add_mtp(model, 1)
    model.lm_head._forward_pre_hooks.clear()
    model.model.norm = nn.Sequential(model.model.norm)
    with pytest.raises(ValueError, match=says(f"{between}['model.norm.0', 'model.norm']")):
        add_mtp(model, 1)
    model.model.norm = model.model.norm[0]

    def again(trunk: nn.Module, args: Any, output: Any) -> None:
        model.lm_head(output[0])

    model.model.register_forward_hook(again)
    with pytest.raises(ValueError, match=says(f"{LLAMA} must call its last layer and output embedding once each")):
        add_mtp(model, 1)
    for wrong in ({}, [[1]], None):
        told = f"the last layer must return hidden states, alone or first; got {type(wrong)}"
        with pytest.raises(ValueError, match=says(told)):
            module.hidden_of(wrong)


def test_folders_that_hold_no_heads(make: Make, tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "plain")
    add_mtp(make("llama"), 1).save_pretrained(tmp_path / "heads")
    config = tmp_path / "heads" / "config.json"
    config.write_text(config.read_text().replace(f'"{LLAMA}"', '"OtherForCausalLM"'))
    for name, message in (
        ("plain", "must hold a model saved after add_mtp; its config has no llmfast_mtp"),
        ("heads", "holds a OtherForCausalLM, which transformers does not have"),
    ):
        with pytest.raises(ValueError, match=says(f"{tmp_path / name} {message}")):
            load_mtp(tmp_path / name)
    config.write_text(config.read_text().replace('"OtherForCausalLM"', ""))
    with pytest.raises(ValueError, match=says(f"{tmp_path}/heads holds a ?, which transformers does not have")):
        load_mtp(tmp_path / "heads")
    with pytest.raises(TypeError, match=says(f"options of the loss must be among {OPTIONS}; got ['softcap']")):
        load_mtp(tmp_path / "heads", {"softcap": 3.0})  # type: ignore[typeddict-unknown-key]


def test_losses_that_several_heads_cannot_have(make: Make) -> None:
    model, ids = add_mtp(make("llama"), 1), torch.arange(3, 11).view(2, 4)
    positions = "position_ids must be (B, 4) for several heads; got "
    for wrong in (torch.zeros(2, 2, 4, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=says(f"{positions}{tuple(wrong.shape)} torch.int64 on cpu")):
            module._documents(wrong, ids)
    need = "several heads need a loss with reduction 'mean' or 'sum' and without class weights"
    for given in ({"reduction": "none"}, {"reduction": "mean", "weight": torch.ones(320)}):

        def own(logits: Any, labels: Tensor, vocab_size: int, given: dict[str, Any] = given, **more: Any) -> Any:
            return nn.functional.cross_entropy(logits.view(-1, vocab_size), labels.view(-1).repeat(2), **given)

        model.loss_function = own
        with pytest.raises(TypeError, match=says(need)):
            model(input_ids=ids, labels=ids)
    call = module.AllHeads(model, {"labels": ids})
    call.input = torch.ones(2, 4, 32), (), {}
    model.mtp.forward = lambda x, args, kwargs: x[None]
    with pytest.raises(TypeError, match=says(f"its output embedding must be given (2, 4, 32) states; got {SEEN}")):
        call.head_input(torch.ones(8, 32))
    with torch.no_grad(), pytest.raises(RuntimeError) as raised:
        call.keeps()
    assert str(raised.value) == (
        "checkpointing with use_reentrant=True hides the layers from further heads; "
        "pass gradient_checkpointing_kwargs={'use_reentrant': False}"
    )


def test_models_that_cannot_be_fused(make: Make) -> None:
    model = make("llama")
    around = "model must be a transformers PreTrainedModel, or PEFT's around one; got"
    for call in (fuse_loss, unfuse_loss):
        with pytest.raises(TypeError, match=says(f"{around} {LINEAR}")):
            call(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=says(f"model must have been fused by fuse_loss; this {LLAMA} was not")):
        unfuse_loss(model)
    with pytest.raises(TypeError, match=says(f"options of the loss must be among {OPTIONS}; got ['z_loss', 'cap']")):
        fuse_loss(model, z_loss=0.1, cap=30.0)  # type: ignore[call-arg]
    for smoothing in (-0.1, 1.1):
        with pytest.raises(ValueError, match=says(f"label_smoothing must be in [0, 1]; got {smoothing}")):
            fuse_loss(model, label_smoothing=smoothing)
    classes = transformers.LlamaForSequenceClassification(model.config)
    with pytest.raises(ValueError, match=says("LlamaForSequenceClassification has no output embeddings")):
        fuse_loss(classes)
    with pytest.raises(ValueError, match=says("the forward of LlamaModel takes no labels")):
        fuse_loss(model.model)
    model.forward = model.forward
    replaced = f"the forward of this {LLAMA} was replaced (by accelerate, Liger or TRL, say); fuse before that"
    with pytest.raises(ValueError, match=says(replaced)):
        fuse_loss(model)
    del model.forward
    model.loss_function = lambda *args, **kwargs: 1 / 0
    fails = f"{LLAMA} fails on two sequences of 8 tokens with labels: division by zero"
    with pytest.raises(ValueError, match=says(fails)):
        fuse_loss(model)
    model = make("llama")
    empty = make("llama").to("meta")
    values = f"model.embed_tokens.weight of {LLAMA} holds no values: (320, 32) torch.float32 on meta"
    with pytest.raises(ValueError, match=says(values)):
        fuse_loss(empty)
    fuse_loss(model)
    with pytest.raises(ValueError, match=says(f"{LLAMA} is already fused; unfuse_loss or remove_mtp undoes that")):
        add_mtp(model, 1)
    sharded = type(f"FSDP{LLAMA}", (type(model),), {})
    model.__class__ = sharded
    changed = "model must not change its class after it was X; it is now a FSDP" + LLAMA
    with pytest.raises(ValueError, match=says(f"{changed}, perhaps because of FSDP")):
        expect_mixin(model, fused_class(transformers.LlamaForCausalLM, model._llmfast_mixin)._llmfast_mixin, "X")


@pytest.mark.parametrize(
    ("dtype", "loss", "wanted", "close"),
    [
        *((torch.float32, 2.0 + off, 2.0, off < 2e-4) for off in (1.9e-4, 2.1e-4)),
        *((torch.float32, 0.5 - off, 0.5, off < 1e-4) for off in (0.9e-4, 1.1e-4)),
        *((torch.bfloat16, 2.0 - off, 2.0, off < 6e-2) for off in (5.9e-2, 6.1e-2)),
    ],
)
def test_a_loss_is_close_by_the_bits_of_the_model(dtype: torch.dtype, loss: float, wanted: float, close: bool) -> None:
    class Made(nn.Linear):
        def forward(self, found: Tensor) -> Any:  # type: ignore[override]
            return {"loss": found}

    model, found, right = Made(1, 1).to(dtype), torch.tensor(loss), torch.tensor(wanted)
    if close:
        expect_loss(model, {"found": found}, right)
        model.weight.data = model.weight.data.double()
    told = f"Made cannot be fused: its loss is {wanted} of torch.float32, and without logits {found.item()} of "
    if not close:
        with pytest.raises(ValueError, match=says(f"{told}torch.float32")):
            expect_loss(model, {"found": found}, right)
    with pytest.raises(ValueError, match=says(f"{told.replace(str(found.item()), '7.0')}torch.float64")):
        expect_loss(model, {"found": torch.tensor(7.0, dtype=torch.float64)}, right)
    with pytest.raises(ValueError, match=r"^Made cannot be fused: .*unexpected keyword argument 'other'$"):
        expect_loss(model, {"other": found}, right)


def test_log_probabilities_that_cannot_be_asked_for(make: Make) -> None:
    model, ids = make("llama"), torch.arange(3, 11).view(2, 4)
    asked = {"input_ids": ids}
    known = "['ignore_index', 'temperature', 'return_rank', 'memory_budget', 'slab_dtype']"
    with pytest.raises(TypeError, match=says(f"options of model_logprobs must be among {known}; got ['softcap']")):
        model_logprobs(model, asked, ids, softcap=3.0)  # type: ignore[call-arg]
    labels = "inputs must have no labels: with them the model would compute a loss"
    with pytest.raises(ValueError, match=says(labels)):
        model_logprobs(model, asked | {"labels": ids}, ids)
    with pytest.raises(ValueError, match=says(f"model must have been fused by fuse_loss; this {LLAMA} was not")):
        model_logprobs(model, asked, ids)
    fuse_loss(model)
    model.get_output_embeddings = lambda: nn.Linear(2, 2)
    with pytest.raises(ValueError, match=says(f"{LLAMA} returned no logits of its output embedding")):
        model_logprobs(model, asked, ids)
    loss = f"{LLAMA} does not compute its loss by cross_entropy of its output embedding"
    with pytest.raises(RuntimeError, match=says(loss)):
        model(input_ids=ids, labels=ids)
    del model.get_output_embeddings
    assert model_logprobs(model, asked, ids).shape == (2, 4)


HIDDEN, HEAD, TARGETS = torch.ones(2, 5, 4), torch.ones(7, 4), torch.zeros(10, dtype=torch.int64)
ONLY, LINEAR_MAP = "the model must use its logits only for a loss; it", "the output embedding must be a linear map; it"
NUMBERS = "the model must multiply or divide its logits by numbers; got a"
CALLED = "the model must call cross_entropy with (N, V) logits and (N,) targets, not size_average or reduce; it passes"


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda z: z * HIDDEN, f"{NUMBERS} Tensor"),
        (lambda z: z / "2", f"{NUMBERS} str"),
        (lambda z: True * z, f"{NUMBERS} bool"),
        (lambda z: z.tanh().tanh(), "the model applies tanh to its logits twice"),
        (lambda z: z + 1, "the model adds a int to its logits"),
        (lambda z: 1 + z, f"{ONLY} accesses their __radd__"),
        (lambda z: z > 1, f"{ONLY} accesses their __gt__"),
        (lambda z: z.mean(), f"{ONLY} accesses their .mean"),
        (lambda z: torch.softmax(z, -1), f"{ONLY} uses torch's softmax"),
        (lambda z: z.view(-1, 6), "the model views its logits, (2, 5, 7), as (-1, 6)"),
        (lambda z: z.view((7, -1)), "the model views its logits, (2, 5, 7), as (7, -1)"),
        (lambda z: z.to("meta"), "the model moves its logits from cpu to meta"),
        (lambda z: z[..., 3], "the model selects part of its vocabulary: its logits at (Ellipsis, 3)"),
        (lambda z: nn.functional.cross_entropy(z, TARGETS), f"{CALLED} (2, 5, 7) and (10,) torch.int64 on cpu"),
    ],
)
def test_what_is_done_to_logits_is_named(use: Any, message: str) -> None:
    with pytest.raises((TypeError, AttributeError), match=says(message)):
        use(stand_ins.linear(HIDDEN, Call({}), HEAD))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda x: x + 1, f"{LINEAR_MAP} accesses its input's __add__"),
        (lambda x: x.sum(), f"{LINEAR_MAP} accesses its input's .sum"),
        (lambda x: torch.relu(x), f"{LINEAR_MAP} uses torch's relu"),
    ],
)
def test_what_is_done_to_hidden_states_is_named(use: Any, message: str) -> None:
    with pytest.raises((TypeError, AttributeError), match=says(message)):
        use(HeadInput(HIDDEN, Call({})))


def test_a_weight_that_is_gone_before_the_loss() -> None:
    weight = torch.ones(7, 4)
    logits = stand_ins.linear(HIDDEN, Call({}), weight)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError) as raised:
        logits.joined()
    assert str(raised.value) == (
        "the output embedding's weight was freed before the loss: make it part of FSDP's root module, or set "
        "reshard_after_forward=False for it; DeepSpeed's ZeRO-3 is not supported"
    )


def test_texts_that_cannot_be_decoded(make: Make) -> None:
    model, state = add_mtp(make("llama"), 1), add_mtp(make("falcon"), 1)
    keeps = "model must keep keys and values, from which drafts can be removed; FalconH1ForCausalLM keeps a state"
    empty, two = torch.zeros(0, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    for call, message in (
        (lambda: speculative_generate(model, empty, 1), "tokens must be (T,) with T > 0; got (0,) torch.int64 on cpu"),
        (lambda: speculative_generate(model, two, 1), "tokens must be (T,) with T > 0; got (1, 3) torch.int64 on cpu"),
        (lambda: speculative_generate(model, two[0], -1), "count must not be negative; got -1"),
        (lambda: speculative_generate(state, two[0], 1), keeps),
    ):
        with pytest.raises(ValueError, match=says(message)):
            call()
    with pytest.raises(ImportError, match=says("nowhere could not be imported; pip install 'llmfast-torch[ours]'")):
        require("nowhere", extra="ours")
