"""Models of Hugging Face compute the same loss and the same gradients without logits."""

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evidence.traffic import counting
from llmfast.losses import linear_cross_entropy

transformers = pytest.importorskip("transformers", reason="transformers is missing: make test-integrations")

from llmfast.integrations.transformers import fuse_loss, unfuse_loss  # noqa: E402

Make = Callable[..., Any]
Batch = dict[str, Any]
Result = tuple[float, dict[str, Tensor]]

CLASSES = [
    *("llama", "tied", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "olmo2", "gpt2", "gpt", "deepseek"),
    *("mixtral", "ernie", "granite", "cohere", "phi"),
]

# The Trainer's smoothing takes the place of the model's whole loss, that of its router too.
NO_ROUTER_LOSS: dict[str, dict[str, Any]] = {"mixtral": {"output_router_logits": False}}


def plain(V: int = 320, T: int = 12) -> Batch:
    ids = torch.randint(3, V, (2, T), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def padded() -> Batch:
    """Return a batch whose second row ends early, and whose first row has a prompt without labels."""
    batch = plain()
    mask, labels = torch.ones_like(batch["input_ids"]), batch["labels"].clone()
    mask[1, 7:] = 0
    labels[1, 7:] = labels[0, :4] = -100
    return {**batch, "labels": labels, "attention_mask": mask}


def packed() -> Batch:
    """Return three documents in one row, as the flattening collator packs them."""
    ids, positions = plain()["input_ids"].view(1, -1), torch.cat([torch.arange(n) for n in (5, 9, 10)])
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "labels": labels, "position_ids": positions[None], "use_cache": False}


def result(model: nn.Module, *batches: Batch) -> Result:
    """Return the sum of losses and its gradient."""
    model.zero_grad()
    losses = [model(**batch).loss for batch in batches]
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return sum(loss.item() for loss in losses), gradients


def assert_same(ours: Result, theirs: Result, rounding: float = 1e-5) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=rounding)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        furthest = (ours[1][name] - gradient).abs().max()
        assert furthest <= rounding * max(gradient.abs().max(), 1e-3), name


# The numbers.


@pytest.mark.parametrize("name", CLASSES)
def test_loss_and_all_gradients_are_the_models_own(make: Make, name: str) -> None:
    model = make(name)
    items = {"num_items_in_batch": torch.tensor(31)}
    steps = [[plain()], [padded()], [packed()], [padded() | items, plain() | items]]  # the last one accumulates
    theirs = [result(model, *step) for step in steps]
    fuse_loss(model)
    for step, wanted in zip(steps, theirs):
        assert_same(result(model, *step), wanted)
        assert model(**step[0]).logits is None


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_are_no_further_from_the_truth_than_its_own(make: Make, name: str, autocast: bool) -> None:
    model = make(name)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    batches = [padded() for _ in range(4)]  # the rounding of a single one may favour either
    for i, batch in enumerate(batches):
        batch["input_ids"] = batch["input_ids"].roll(i, 1)
    truths = [result(model, batch) for batch in batches]
    if not autocast:
        model.bfloat16()

    def distance(batch: Batch, truth: Result) -> tuple[float, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, gradients = result(model, batch)
        return abs(loss - truth[0]), sum(
            float((g - truth[1][k]).norm() / truth[1][k].norm()) for k, g in gradients.items()
        )

    theirs = list(map(distance, batches, truths))
    fuse_loss(model)
    ours = list(map(distance, batches, truths))
    for (loss, _), (their_loss, _), (true_loss, _) in zip(ours, theirs, truths):
        assert loss <= their_loss + 4e-3 * true_loss
    assert sum(distance for _, distance in ours) <= 1.05 * sum(distance for _, distance in theirs)


@pytest.mark.parametrize("name", CLASSES)
def test_label_smoothing_is_the_trainers(make: Make, name: str) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    model, batch = make(name, **NO_ROUTER_LOSS.get(name, {})), padded()
    loss = LabelSmoother(0.1)(model(**batch), batch["labels"], shift_labels=True)
    loss.backward()
    theirs = loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert_same(result(fuse_loss(model, label_smoothing=0.1), batch), theirs)


def test_options_reach_the_loss(make: Make) -> None:
    model, batch = make("llama"), plain()
    states = model.model(batch["input_ids"]).last_hidden_state[:, :-1].detach()
    wanted = linear_cross_entropy(states, model.lm_head.weight.detach(), batch["labels"][:, 1:], z_loss=0.01)
    assert fuse_loss(model, z_loss=0.01)(**batch).loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_shift_labels_are_the_callers(make: Make) -> None:
    model, batch = make("llama"), plain()
    batch["shift_labels"] = batch["labels"].roll(1, 1)
    wanted = model(**batch).loss.item()
    assert wanted != pytest.approx(model(**plain()).loss.item())
    assert fuse_loss(model)(**batch).loss.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(make: Make, reentrant: bool) -> None:
    model = make("qwen3")
    wanted = result(model, padded())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(result(fuse_loss(model), padded()), wanted)


def test_compiles_without_a_break(make: Make) -> None:
    model = make("gemma2", num_hidden_layers=1)
    wanted = result(model, padded())
    fuse_loss(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    model.zero_grad()
    loss = compiled(**padded()).loss
    loss.backward()
    ours = loss.item(), {name: p.grad for name, p in model.named_parameters()}
    assert_same(ours, wanted)


def test_grad_scaler_and_float16(make: Make) -> None:
    """Gradients are scaled up through the loss, and the optimizer unscales them."""
    from llmfast.optim import FusedAdamW

    def curve(fused: bool) -> list[float]:
        model = make("llama")
        if fused:
            fuse_loss(model)
        optimizer = (FusedAdamW if fused else torch.optim.AdamW)(model.parameters(), lr=1e-3)
        scaler, losses = torch.amp.GradScaler("cpu", init_scale=2.0**10), []
        for _ in range(8):
            with torch.autocast("cpu", torch.float16):
                loss = model(**padded()).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    ours, theirs = curve(fused=True), curve(fused=False)
    assert theirs[-1] < 0.9 * theirs[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=5e-3, atol=0)


# Memory.


@pytest.mark.parametrize("name", CLASSES)
def test_a_step_saves_the_memory_of_the_logits(make: Make, name: str) -> None:
    V, batch = 32_000, plain(V=32_000, T=96)
    model = make(name, vocab_size=V, **{"n_positions" if name in ("gpt", "gpt2") else "max_position_embeddings": 96})
    logits = batch["input_ids"].numel() * V * 4

    def peak() -> int:
        model.zero_grad()
        with counting() as counts:
            model(**batch).loss.backward()
        return counts.peak_bytes

    theirs = peak()
    fuse_loss(model, memory_budget=logits // 24)
    assert theirs - peak() >= logits


# Logits in eval mode.


@pytest.mark.parametrize("name", CLASSES)
def test_logits_in_eval_mode_are_the_models_own(make: Make, name: str) -> None:
    model = make(name).eval()
    theirs = model(**padded()).logits
    ours = fuse_loss(model)(**padded()).logits
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_rounded_as_the_models_own(make: Make, dtype: torch.dtype, autocast: bool) -> None:
    model = make("llama").to(dtype).eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        theirs = model(**plain()).logits
        ours = fuse_loss(model)(**plain()).logits
    assert torch.equal(ours.detach(), theirs) and ours.dtype == theirs.dtype


def test_what_is_done_with_logits_in_eval_mode(make: Make) -> None:
    """Use them as torch, numpy and Python use a tensor."""
    model = make("llama").eval()
    theirs = model(**plain()).logits
    made = fuse_loss(model)(**plain())
    ours = made.logits
    assert torch.equal(made["logits"] + 1, theirs + 1) and torch.equal(1 + ours, 1 + theirs)
    assert torch.equal(ours[:, -1, 5:], theirs[:, -1, 5:]) and torch.equal(ours.argmax(-1), theirs.argmax(-1))
    assert torch.equal(torch.softmax(ours, -1), theirs.softmax(-1)) and torch.equal(torch.cat([ours, ours])[:2], theirs)
    assert torch.equal(torch.softmax(input=ours, dim=-1), theirs.softmax(-1))
    assert torch.equal(torch.cat(tensors=[theirs, ours]), torch.cat([theirs, theirs]))
    assert torch.equal(torch.add(theirs, other=ours), 2 * theirs)
    assert (np.asarray(ours.detach().cpu()) == theirs.detach().numpy()).all() and len(ours) == 2
    assert torch.equal(pickle.loads(pickle.dumps(ours.detach())), theirs) and repr(ours) == repr(theirs)
    with pytest.raises(RuntimeError, match="Boolean value of Tensor with more than one value is ambiguous"):
        bool(ours)
    assert theirs.max() in ours and theirs.max() + 1 not in ours and hash(ours) == hash(ours)
    with torch.no_grad():
        last = model(**plain()).logits
        last[:, -1] = 0
        last[0, 0, 0] += 1
        assert not last[:, -1].any() and last[0, 0, 0] == theirs[0, 0, 0] + 1
        one = model(**plain()).logits
        one -= one
        assert not one.any() and torch.equal(+ours // 2, theirs // 2)
        again = model(**plain())
        assert torch.equal(copy.deepcopy(again).logits.detach(), theirs)
        assert torch.equal(pickle.loads(pickle.dumps(again.logits)), theirs)
    assert torch.equal(model(**plain(), return_dict=False)[1].detach(), theirs)
    (ours.logsumexp(-1).sum()).backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    (theirs.logsumexp(-1).sum()).backward()
    torch.testing.assert_close(gradient, model.lm_head.weight.grad)


def test_logits_that_nobody_uses_are_not_computed(make: Make) -> None:
    """Evaluate the loss as the Trainer does, with accelerate's conversion of outputs to float32."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is missing: make test-integrations")
    V, T = 20_000, 32
    model, batch = make("llama", vocab_size=V).bfloat16().eval(), plain(V, T)
    fuse_loss(model, memory_budget=2**20)
    with torch.no_grad(), counting() as counted:
        converted = accelerate.utils.convert_to_fp32(model(**batch))
    assert counted.peak_bytes < 2 * T * V * 2
    assert converted.logits.dtype == torch.float32 and converted.logits.detach().dtype == torch.float32


# Everything else stays.


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_without_labels_nothing_changes(make: Make, name: str) -> None:
    model, ids = make(name).eval(), plain()["input_ids"]
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    theirs = model(ids), model.generate(ids, **asked)
    fuse_loss(model)
    ours = model(ids), model.generate(ids, **asked)
    assert torch.equal(ours[0].logits, theirs[0].logits)
    assert ours[0].keys() == theirs[0].keys()
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_past_key_values(make: Make) -> None:
    """Put the beginning in the cache, and pass the rest with labels and without."""
    model, ids = make("qwen3").eval(), plain()["input_ids"]

    def continued(**labels: Tensor) -> Any:
        return model(ids[:, 8:], past_key_values=model(ids[:, :8]).past_key_values, **labels)

    theirs = continued(), continued(labels=ids[:, 8:]).loss.item()
    fuse_loss(model)
    ours = continued(), continued(labels=ids[:, 8:])
    assert torch.equal(ours[0].logits, theirs[0].logits)
    assert ours[0].past_key_values.get_seq_length() == ours[1].past_key_values.get_seq_length() == 12
    assert ours[1].loss.item() == pytest.approx(theirs[1], rel=1e-6)


def test_one_fused_and_one_not(make: Make) -> None:
    """Alternate between models of the same class."""
    theirs, ours = make("gemma2"), fuse_loss(make("gemma2"))
    wanted = result(theirs, padded())
    assert_same(result(ours, padded()), wanted)
    again = result(theirs, padded())
    assert again[0] == wanted[0] and all(torch.equal(g, wanted[1][name]) for name, g in again[1].items())
    assert type(theirs) is transformers.Gemma2ForCausalLM
    assert theirs(**padded()).logits is not None
    assert ours(**padded()).logits is None
    assert make("gemma2")(**padded()).logits is not None


def test_other_inputs_and_outputs(make: Make) -> None:
    model, batch = make("llama"), padded()
    names = list(inspect.signature(model.forward).parameters)
    by_place = [batch.get(name) for name in names[: names.index("labels") + 1]]
    embedded = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]), "labels": batch["labels"]}
    theirs = model(**batch, output_hidden_states=True), model(**embedded)
    fuse_loss(model)
    ours = model(**batch, output_hidden_states=True)
    assert ours.keys() == theirs[0].keys() - {"logits"}
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs[0].hidden_states))
    wanted = pytest.approx(theirs[0].loss.item(), rel=1e-6)
    assert model(*by_place).loss.item() == wanted
    first, *others = model(**batch, return_dict=False)
    assert first.item() == wanted
    assert not any(isinstance(other, Tensor) for other in others)
    assert model(**embedded).loss.item() == pytest.approx(theirs[1].loss.item(), rel=1e-6)


def test_the_router_loss_of_experts_stays(make: Make) -> None:
    model, batch = make("mixtral", router_aux_loss_coef=0.5), padded()
    theirs = model(**batch)
    ours = fuse_loss(model)(**batch)
    assert ours.aux_loss.item() == pytest.approx(theirs.aux_loss.item())
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    assert model(**batch, output_router_logits=False).loss.item() != pytest.approx(theirs.loss.item(), rel=1e-3)


def test_copies_and_pickles_are_fused_and_apart(make: Make) -> None:
    model = fuse_loss(make("llama"), label_smoothing=0.1)
    wanted = model(**plain()).loss.item()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            model.lm_head.weight.add_(1.0)
        assert type(other) is type(model)
        assert other(**plain()).logits is None
        assert other(**plain()).loss.item() == wanted
        with torch.no_grad():
            model.lm_head.weight.sub_(1.0)
        assert unfuse_loss(other)(**plain()).logits is not None
    assert model(**plain()).logits is None


def test_saves_as_what_it_was(make: Make, tmp_path: Path) -> None:
    model = fuse_loss(make("llama"))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


def test_looks_like_the_class_it_was(make: Make) -> None:
    from transformers.utils.generic import find_labels

    model = make("llama")
    signature, name = inspect.signature(model.forward), str(type(model))
    fuse_loss(model)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert inspect.signature(model.forward) == signature
    assert str(type(model)) == name
    assert find_labels(type(model)) == ["labels"]
    assert model.can_generate()


def state(model: nn.Module) -> Any:
    """Return everything in a model that fusing could change."""
    modules = [
        (
            *(type(m), m.training, sorted(vars(m)), list(m._forward_hooks.values())),
            *(list(m._forward_pre_hooks.values()), list(m._forward_pre_hooks_with_kwargs)),
        )
        for m in model.modules()
    ]
    return modules, torch.get_rng_state().tolist()


def test_undone_it_is_as_before(make: Make) -> None:
    model = make("gpt2", resid_pdrop=0.1)
    model.transformer.h[0].eval()
    model(**plain())  # the library puts hooks of its own on a model that ran
    before = state(model)
    fuse_loss(model)
    assert torch.get_rng_state().tolist() == before[1]
    assert not model.transformer.h[0].training and model.training
    unfuse_loss(model)
    assert state(model) == before


def test_a_new_vocabulary_has_a_new_head(make: Make) -> None:
    model = fuse_loss(make("llama"))
    model.resize_token_embeddings(400)
    ours = result(model, padded())
    assert model(**padded()).logits is None
    assert_same(ours, result(unfuse_loss(model), padded()))


def test_a_forward_wrapped_by_accelerate_and_unwrapped(make: Make) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is missing: make test-integrations")
    model = fuse_loss(make("llama"))
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    assert prepared(**plain()).loss.dtype == torch.float32
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped(**plain()).logits is None
    assert isinstance(unwrapped(**plain(), return_dict=False), tuple)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("head", ["of the root", "kept", "freed"])
def test_sharded_by_fsdp2(make: Make, head: str) -> None:
    """Use the output embedding's weight after the forward of its module, as the loss does."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = make("llama")
    wanted = result(model, padded())
    fuse_loss(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if head != "of the root":
        fully_shard(model.lm_head, reshard_after_forward=head == "freed")
    fully_shard(model)
    if head == "freed":
        with pytest.raises(RuntimeError, match="the output embedding's weight was freed before the loss"):
            model(**padded())
        return
    loss, gradients = result(model, padded())
    local = {name: g.full_tensor() for name, g in gradients.items() if isinstance(g, DTensor)}
    assert_same((loss, local), wanted)
    with pytest.raises(ValueError, match="it is now a FSDPLlamaForCausalLM"):
        unfuse_loss(model)


@pytest.mark.usefixtures("one_rank")
def test_refuses_what_is_sharded_already(make: Make) -> None:
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(ValueError, match="is a DTensor: fuse before sharding"):
        fuse_loss(fully_shard(make("llama")))


# Adapters.


LORA = {
    "plain": {"target_modules": ["q_proj", "lm_head"]},
    "dropout, rank-stabilised, bias": {
        "target_modules": ["lm_head"],
        "lora_dropout": 0.2,
        "use_rslora": True,
        "lora_bias": True,
    },
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens of a tied model": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 300]},
}


@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("first", ["fuse", "adapt"])
def test_an_adapted_head(make: Make, kind: str, first: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is missing: make test-integrations")
    model = make("phi" if "bias" in kind else "tied" if "tied" in kind else "llama")
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **LORA[kind])

    def seeded(adapted: nn.Module) -> Result:
        torch.manual_seed(1)  # for dropout
        return result(adapted, padded())

    if first == "fuse":
        fuse_loss(model)
    adapted = peft.get_peft_model(model, config).train()
    if first == "adapt":
        fuse_loss(adapted)
    ours = seeded(adapted)
    assert adapted(**padded()).logits is None
    with adapted.disable_adapter():
        without = adapted(**padded()).loss.item()
    unfuse_loss(adapted)
    assert_same(ours, seeded(adapted))
    with adapted.disable_adapter():
        assert without == pytest.approx(adapted(**padded()).loss.item(), rel=1e-6)


def test_two_adapters_at_a_time(make: Make) -> None:
    peft = pytest.importorskip("peft", reason="peft is missing: make test-integrations")
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["lm_head"])
    adapted = peft.get_peft_model(fuse_loss(make("llama")), config)
    adapted.add_adapter("second", config)
    adapted.base_model.set_adapter(["default", "second"])
    ours = result(adapted, padded())
    assert_same(ours, result(unfuse_loss(adapted), padded()))


# What models may write otherwise.


class Named(nn.Linear):
    """An output embedding whose every call names its arguments."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(weight=self.weight, input=F.dropout(training=True, input=input, p=0.0))


class ByName(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
    """All that the stand-ins answer to, with every argument named, and in another order where Python allows that."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head = Named(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        logits, loss = self.lm_head(input=hidden.to(dtype=torch.float32)), None
        if labels is not None:
            capped = torch.tanh(input=logits.to(tensor=hidden) / 3.0) * 3.0
            shifted = capped[:, :-1].contiguous(memory_format=torch.contiguous_format)
            shifted = shifted.float(memory_format=torch.preserve_format)
            rows = shifted.view(size=(-1, shifted.size(dim=-1))).reshape(shape=(-1, shifted.size(dim=-1)))
            loss = F.cross_entropy(ignore_index=-100, target=labels[:, 1:].reshape(-1), input=rows)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(loss=loss, logits=logits)


def test_arguments_may_be_named(make: Make) -> None:
    model = ByName(make("llama").config).train()
    theirs = result(model, padded())
    fuse_loss(model)
    assert_same(result(model, padded()), theirs)
    assert model(**padded()).logits is None


# What is refused.


class Handwritten(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
    """The loss as models from before `loss_function` write it, and some that cannot be followed."""

    how = "classic"

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids, attention_mask=attention_mask).last_hidden_state)
        loss = None
        if labels is not None:
            if self.how == "temperature of its own":
                logits = logits * self.model.norm.weight.mean()
            if self.how == "operators":
                logits = -logits
            if self.how == "part of the vocabulary":
                logits = logits[..., :300]
            shifted, targets = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
            V = shifted.size(-1)
            if self.how == "masked":
                keep = attention_mask[..., 1:] != 0 if attention_mask is not None else torch.ones_like(targets).bool()
                shifted, targets = shifted[keep].contiguous(), targets[keep].contiguous()
            if self.how == "log_softmax":
                loss = F.nll_loss(F.log_softmax(shifted.view(-1, V), -1), targets.view(-1))
            elif self.how == "other head":
                loss = F.cross_entropy(self.model.embed_tokens.weight[targets.view(-1)].sin(), targets.view(-1) % 32)
            else:
                loss = nn.CrossEntropyLoss()(shifted.view(-1, V), targets.view(-1))
            if self.how == "mean":
                loss = loss + logits.mean()
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize("how", ["classic", "masked"])
def test_a_loss_written_out_by_hand(make: Make, how: str) -> None:
    model = Handwritten(make("llama").config).train()
    model.how = how
    theirs = result(model, padded())
    fuse_loss(model)
    assert_same(result(model, padded()), theirs)
    assert model(**padded()).logits is None


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("temperature of its own", "must multiply or divide its logits by numbers; got a Tensor"),
        ("operators", "accesses their __neg__"),
        ("part of the vocabulary", "selects part of its vocabulary"),
        ("log_softmax", "uses torch's log_softmax"),
        ("mean", "accesses their .mean"),
        ("other head", "does not compute its loss by cross_entropy of its output embedding"),
    ],
)
def test_refuses_what_it_cannot_follow_and_leaves_it_alone(make: Make, how: str, reason: str) -> None:
    model = Handwritten(make("llama").config).train()
    model.how = how
    model(**plain(V=300))
    before = state(model)
    with pytest.raises(ValueError, match=f"Handwritten cannot be fused: .*{reason}"):
        fuse_loss(model)
    assert state(model) == before


def test_a_loss_function_of_the_users(make: Make) -> None:
    """A custom loss made of cross-entropy is honoured; any other is rejected or fails later."""

    def doubled(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return 2 * F.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1))

    def entropic(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return doubled(logits, labels, vocab_size) + logits.softmax(-1).square().sum()

    def smoothed(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        rows, targets = logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1)
        return F.cross_entropy(rows, targets, label_smoothing=0.2)

    for own in (doubled, smoothed):
        model = make("llama")
        model.loss_function = own
        theirs = result(model, plain())
        assert_same(result(fuse_loss(model), plain()), theirs)
    model.loss_function = entropic
    with pytest.raises(AttributeError, match=r"must use its logits only for a loss; it accesses their \.softmax"):
        model(**plain())
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be fused: .* accesses their \.softmax"):
        fuse_loss(unfuse_loss(model))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stand_ins_look_like_the_logits(make: Make, dtype: torch.dtype, autocast: bool) -> None:
    seen = []

    def looking(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        seen.append((logits.dtype, logits.device, logits.shape, logits.size(-1)))
        return F.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1)).float()

    model = make("llama").to(dtype)
    model.loss_function = looking
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(**plain())
        theirs = seen.pop()
        fuse_loss(model)
        model(**plain())
    assert seen and set(seen[-1:]) == {theirs}


@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_has_the_dtype_that_the_models_has(make: Make, autocast: bool) -> None:
    model = Handwritten(make("llama").config).train()  # which does not make its logits float32
    model = model if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted = model(**padded()).loss
        ours = fuse_loss(model)(**padded()).loss
    assert ours.dtype == wanted.dtype == (torch.float32 if autocast else torch.bfloat16)


def test_logits_stay_on_their_device(make: Make) -> None:
    model = fuse_loss(make("llama"))
    for ask in (
        lambda x: x.to("meta"),
        lambda x: x.to(device=torch.device("meta")),
        lambda x: x.to(torch.ones(1).to("meta")),
    ):
        model.loss_function = lambda logits, labels, vocab_size, ask=ask, **kwargs: ask(logits)
        with pytest.raises(TypeError, match="the model moves its logits from cpu to meta"):
            model(**plain())


def test_refuses_an_adapter_that_is_no_sum(make: Make) -> None:
    peft = pytest.importorskip("peft", reason="peft is missing: make test-integrations")
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be fused"):
        fuse_loss(peft.get_peft_model(make("llama"), config))


def test_refuses_a_head_that_changes_its_input(make: Make) -> None:
    peft = pytest.importorskip("peft", reason="peft is missing: make test-integrations")
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be fused: .* accesses its input's __mul__"):
        fuse_loss(peft.get_peft_model(make("llama"), config))


def test_refuses_models_that_are_none(make: Make) -> None:
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel"):
        fuse_loss(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the forward of LlamaModel takes no labels"):
        fuse_loss(make("llama").model)
    t5 = transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is not a decoder-only model"):
        fuse_loss(transformers.T5ForConditionalGeneration(t5))
    with pytest.raises(ValueError, match="holds no values"):
        fuse_loss(make("llama").to("meta"))
    freed = make("llama")
    freed.model.norm.weight.data = torch.empty(0)  # as DeepSpeed's ZeRO-3 leaves parameters between forwards
    with pytest.raises(ValueError, match=r"model\.norm\.weight of LlamaForCausalLM holds no values: \(0,\)"):
        fuse_loss(freed)


def test_refuses_what_was_done_before(make: Make) -> None:
    model = make("llama")
    with pytest.raises(ValueError, match="model must have been fused by fuse_loss; this LlamaForCausalLM was not"):
        unfuse_loss(model)
    fuse_loss(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM is already fused"):
        fuse_loss(model)
    unfuse_loss(model)
    model.forward = model.forward
    with pytest.raises(ValueError, match="the forward of this LlamaForCausalLM was replaced"):
        fuse_loss(model)


def test_refuses_options_out_of_range(make: Make) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\]; got 2"):
        fuse_loss(make("llama"), label_smoothing=2)
    with pytest.raises(TypeError, match=r"must be among \['label_smoothing', .*\]; got \['softcap'\]"):
        fuse_loss(make("llama"), softcap=30.0)  # type: ignore[call-arg]
