"""Further heads on Hugging Face's models: what they compute, how they are saved, and how the Trainer trains them."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evidence.traffic import counting
from llmfast.optim import FusedAdamW

transformers = pytest.importorskip("transformers", reason="transformers is missing: make test-integrations")

from llmfast.integrations.mtp import Block, _documents, _layers, add_mtp, load_mtp, remove_mtp, set_head_weights  # noqa: E402
from llmfast.integrations.transformers import fuse_loss, unfuse_loss  # noqa: E402

Make = Callable[..., Any]
KINDS = ["parallel", "sequential"]


def batch(T: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(3, 320, (2, T), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :3] = labels[1, 9:] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: nn.Module, *batches: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    total = 0.0
    for each in batches:
        loss = model(**each).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-5)


# What they compute.


def by_hand(model: Any, inputs: dict[str, Tensor], weights: list[float], documents: Tensor, **depths: Any) -> Tensor:
    """Compute the loss of a Llama with heads by calling its modules one by one, with logits; `depths` of `add_mtp`."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    T = ids.shape[1]
    trunk, last = model.model, model.model.layers[-1]
    positions = inputs.get("position_ids", torch.arange(T)[None])
    embedded = trunk.embed_tokens(ids)
    seen = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    asked = {"attention_mask": mask, "position_embeddings": trunk.rotary_emb(embedded, positions)}
    x = embedded
    for layer in trunk.layers[:-1]:
        x = layer(x, **asked)
    out = last(x, **asked)
    hiddens = [trunk.norm(out)]
    if hasattr(model.mtp, "blocks"):
        hiddens += [trunk.norm(block.layer(x, **asked)) for block in model.mtp.blocks]
    else:
        post_norm = depths.get("hidden") == "post_norm"
        h = hiddens[0] if post_norm else out
        if depths.get("detach"):
            h, embedded = h.detach(), embedded.detach()
        for k in range(1, len(weights)):
            depth = model.mtp.layers[0 if depths.get("repeated_layer") else k - 1]
            ahead = F.pad(embedded[:, k:], (0, 0, 0, k))
            inside = F.pad(documents[:, k:] == documents[:, :-k], (0, k))
            parts = [depth.enorm(ahead * inside[..., None]), depth.hnorm(h)]
            joined = torch.cat(parts[::-1] if depths.get("concat_order") == "hidden_first" else parts, -1)
            x = depth.block.layer(depth.eh_proj(joined), **asked)
            hiddens.append(depth.norm(x))
            h = hiddens[-1] if post_norm else x
    total = torch.zeros(())
    for k, (hidden, weight) in enumerate(zip(hiddens, weights)):
        targets = F.pad(labels[:, k + 1 :], (0, k + 1), value=-100)
        if k:  # row t + k, whose next token this is, has to be of row t's document
            targets = targets.masked_fill(F.pad(documents[:, k:] != documents[:, :-k], (0, k), value=True), -100)
        logits = hidden @ model.lm_head.weight.T
        total = total + weight * F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return total / (labels[:, 1:] != -100).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_those_of_modules_called_by_hand(make: Make, kind: Any, packed: bool) -> None:
    weights = [1.0, 0.5, 0.25]
    inputs: dict[str, Any] = batch()
    documents = torch.zeros(2, 12, dtype=torch.long)
    if packed:
        positions = torch.cat([torch.arange(n) for n in (5, 4, 3)]).expand(2, -1)
        documents = (positions == 0).cumsum(1)
        labels = inputs["labels"].masked_fill(positions == 0, -100)
        inputs = {"input_ids": inputs["input_ids"], "labels": labels, "position_ids": positions}
        inputs["use_cache"] = False  # with a cache, transformers does not see that rows are packed
    model = add_mtp(make("llama"), 2, kind, head_weights=weights)
    model.zero_grad()
    wanted = by_hand(model, inputs, weights, documents)
    wanted.backward()
    theirs = wanted.item(), {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_same(gradients(model, inputs), theirs)


@pytest.mark.parametrize(
    "depths",
    [{"hidden": "post_norm"}, {"concat_order": "hidden_first"}, {"repeated_layer": True}, {"detach": True}],
    ids=lambda depths: next(iter(depths)),
)
def test_depths_of_every_kind_are_modules_called_by_hand(make: Make, depths: dict[str, Any]) -> None:
    weights = [1.0, 0.5, 0.25]
    model = add_mtp(make("llama"), 2, "sequential", head_weights=weights, depths=depths)
    for norm in (m for m in model.modules() if type(m).__name__.endswith("RMSNorm")):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # so that a state before its norm differs from one after it
    model.zero_grad()
    wanted = by_hand(model, batch(), weights, torch.zeros(2, 12, dtype=torch.long), **depths)
    wanted.backward()
    theirs = wanted.item(), {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_same(gradients(model, batch()), theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_new_heads_are_in_the_models_mode(make: Make, kind: Any, training: bool) -> None:
    model = make("gpt2", resid_pdrop=0.5).train(training)
    modes = {name: m.training for name, m in model.named_modules()}
    add_mtp(model, 2, kind)
    assert {m.training for m in model.mtp.modules()} == {training}
    assert all(dict(model.named_modules())[name].training == mode for name, mode in modes.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tied", "gpt2", "gpt", "gemma2", "deepseek", "mixtral", "ernie", "phi"])
def test_every_class_of_models(make: Make, name: str, kind: Any) -> None:
    """All heads learn, and the next token's loss is the model's own."""
    model = make(name)
    theirs = model(**batch()).loss.item()
    add_mtp(model, 2, kind, head_weights=[1, 0, 0])
    alone = model(**batch()).loss.item()
    assert alone == pytest.approx(theirs, rel=1e-5)
    set_head_weights(model, [1, 0.5, 0.5])
    loss, found = gradients(model, batch())
    assert loss > 1.5 * theirs
    assert all(bool(g.any()) for key, g in found.items() if key.startswith("mtp") and "expert" not in key)
    assert model.eval()(**batch()).loss.item() == pytest.approx(theirs, rel=1e-5), "of the next token alone"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_micro_batches(make: Make, kind: Any) -> None:
    model = add_mtp(make("llama"), 3, kind)
    whole = {**batch(), "num_items_in_batch": torch.tensor(17)}
    rows = [{k: v[i : i + 1] if v.dim() else v for k, v in whole.items()} for i in range(2)]
    assert_same(gradients(model, *rows), gradients(model, whole))


@pytest.mark.parametrize("kind", KINDS)
def test_heads_alone_learn_on_a_frozen_model(make: Make, kind: Any) -> None:
    model = add_mtp(make("llama").bfloat16().requires_grad_(False), 2, kind)
    model(**batch()).loss.backward()
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16
        assert p.requires_grad == (p.grad is not None) == name.startswith("mtp")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["nothing", "a part of the layer", "the layer", "the model"])
def test_copies_train_what_the_layer_trains(make: Make, kind: Any, frozen: str) -> None:
    """They do not train what no model of the class trains, such as the bias of a router."""
    model = make("ernie")
    layer = model.model.layers[-1]
    never = {name for name, p in layer.named_parameters() if not p.requires_grad}
    assert len(never) == 1
    if frozen == "a part of the layer":
        layer.self_attn.requires_grad_(False)
    elif frozen != "nothing":
        (model if frozen == "the model" else layer).requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in layer.named_parameters()}
    if not any(wanted.values()):
        wanted = {name: name not in never for name in wanted}
    add_mtp(model, 2, kind)
    copies = [block.layer for block in model.mtp.modules() if isinstance(block, Block)]
    assert len(copies) == 2
    for copied in copies:
        assert {name: p.requires_grad for name, p in copied.named_parameters()} == wanted
        assert not any(p.requires_grad for name, p in copied.named_parameters() if name in never)
    new = [p for name, p in model.mtp.named_parameters() if ".layer." not in name]
    assert len(new) == (8 if kind == "sequential" else 0) and all(p.requires_grad for p in new)
    model(**batch()).loss.backward()
    assert all((p.grad is None) == (not p.requires_grad) for p in model.mtp.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_have_the_dtypes_and_buffers_of_the_layer(make: Make, kind: Any) -> None:
    model = make("gpt2").bfloat16()
    layer = model.transformer.h[-1]
    layer.ln_1.float(), layer.ln_2.float()  # as those do who keep norms precise
    layer.register_buffer("kept", torch.arange(3, dtype=torch.int16))
    layer.register_buffer("passing", torch.full((2,), 0.1, dtype=torch.float64), persistent=False)
    add_mtp(model, 2, kind)
    for block in model.mtp.modules():
        if isinstance(block, Block):
            for ours, theirs in zip(block.layer.parameters(), layer.parameters(), strict=True):
                assert ours.dtype == theirs.dtype and torch.equal(ours, theirs) and ours is not theirs
            ours, theirs = dict(block.layer.named_buffers()), dict(layer.named_buffers())
            assert ours.keys() == theirs.keys() >= {"kept", "passing"}
            assert all(torch.equal(ours[name], b) and ours[name].dtype == b.dtype for name, b in theirs.items())
            assert block.layer.state_dict().keys() == layer.state_dict().keys()
    assert {p.dtype for name, p in model.mtp.named_parameters() if ".layer." not in name} <= {torch.bfloat16}
    model(**batch()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.mtp.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_modules_may_be_called_by_name(make: Make, kind: Any) -> None:
    model = make("llama")
    wanted = gradients(add_mtp(copy.deepcopy(model), 2, kind), batch())

    def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = next(iter(inspect.signature(module.forward).parameters))
        return (), {**kwargs, name: args[0]}

    for module in (model.model.layers[-1], model.model.norm, model.lm_head):
        module.register_forward_pre_hook(by_name, with_kwargs=True)
    assert_same(gradients(add_mtp(model, 2, kind), batch()), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_ignored_is_the_callers(make: Make, kind: Any) -> None:
    model, usual = add_mtp(make("llama"), 2, kind), batch()
    other = {**usual, "labels": usual["labels"].masked_fill(usual["labels"] == -100, 1), "ignore_index": 1}
    assert_same(gradients(model, other), gradients(model, usual))


def test_documents_begin_where_positions_do_not_go_on() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [3, 4, 9, 10, 10, 11], [1, 1, 0, 1, 2, 3]])
    wanted = [[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], [0, 1, 2, 2, 2, 2]]
    found = _documents(positions, torch.zeros(3, 6))
    assert found is not None and found.tolist() == wanted
    one_for_all = _documents(positions[1:2], torch.zeros(2, 6))
    assert one_for_all is not None and one_for_all.tolist() == wanted[1:2] * 2
    assert _documents(None, torch.zeros(3, 6)) is None
    with pytest.raises(ValueError, match=r"position_ids must be \(B, 5\) for several heads"):
        _documents(positions, torch.zeros(3, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_may_be_given_in_place_of_ids(make: Make, kind: Any) -> None:
    model, usual = add_mtp(make("llama"), 2, kind), batch()
    embedded = {"inputs_embeds": model.get_input_embeddings()(usual["input_ids"]), "labels": usual["labels"]}
    assert model(**embedded).loss.item() == pytest.approx(model(**usual).loss.item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_fewer_rows_has_the_documents_of_these(make: Make, kind: Any) -> None:
    """A loss that leaves out the last row of each sequence equals one that ignores it."""

    def shifted(logits: Any, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return F.cross_entropy(logits[..., :-1, :].reshape(-1, vocab_size), labels[:, 1:].reshape(-1))

    model = add_mtp(make("llama"), 2, kind)
    positions = torch.cat([torch.arange(n) for n in (5, 4, 3)]).expand(2, -1)
    packed = {**batch(), "position_ids": positions, "use_cache": False}
    wanted = gradients(model, packed)
    model.loss_function = shifted
    assert_same(gradients(model, packed), wanted)


@pytest.mark.parametrize("layers", [1, 3])
def test_heads_are_copies_of_the_last_of_any_number_of_layers(make: Make, layers: int) -> None:
    given: dict[str, Any] = {"detach": True}
    model = add_mtp(make("llama", num_hidden_layers=layers), 1, "sequential", head_weights=[0.5, 2], depths=given)
    given["detach"] = False
    assert model.config.llmfast_mtp == {
        "heads": 1,
        "kind": "sequential",
        "head_weights": [0.5, 2.0],
        "depths": {"detach": True},
        "layer": f"model.layers.{layers - 1}",
        "norm": "model.norm",
    }
    last = model.model.layers[-1].state_dict()
    copied = model.mtp.layers[0].block.layer.state_dict()
    assert last.keys() == copied.keys() and all(torch.equal(last[name], t) for name, t in copied.items())
    assert model.mtp_weights.tolist() == [0.5, 2.0]


def test_layers_are_those_of_the_text_model_of_a_config_of_several() -> None:
    model: Any = nn.ModuleDict({"seeing": nn.ModuleList([nn.Identity()] * 3), "text": nn.ModuleList([nn.Identity()])})
    text = SimpleNamespace(num_hidden_layers=1)
    model.config = SimpleNamespace(num_hidden_layers=3, get_text_config=lambda: text)
    assert _layers(model) == "text"


def test_a_model_is_loaded_as_from_pretrained_is_told(make: Make, tmp_path: Path) -> None:
    add_mtp(make("llama"), 1).save_pretrained(tmp_path)
    loaded = load_mtp(tmp_path, torch_dtype=torch.bfloat16, attn_implementation="eager")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_hear_of_the_models_own_layer_alone(make: Make, kind: Any) -> None:
    model, heard = make("llama"), []
    for module in model.model.layers[-1].modules():
        module.register_forward_hook(lambda module, *others: heard.append(module))
        module.register_forward_pre_hook(lambda module, *others: heard.append(module))
    model(**batch())
    once, own = len(heard), {*model.model.layers[-1].modules()}
    add_mtp(model, 2, kind)
    heard.clear()
    model(**batch())
    assert len(heard) == once and own.issuperset(heard)


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_new_norms_are_like_the_models(make: Make, eps: float) -> None:
    model = add_mtp(make("llama", rms_norm_eps=eps), 2, "sequential")
    other = add_mtp(make("gpt2"), 2, "sequential")  # whose config names no such number
    for made, wanted in ((model, eps), (other, 1e-5)):
        assert {module.eps for module in made.mtp.modules() if isinstance(module, nn.RMSNorm)} == {wanted}


def test_no_logits_of_any_head(make: Make) -> None:
    """Peak memory of four heads is below the logits of one."""
    V, ids = 32_000, torch.randint(3, 32_000, (2, 256))
    model = make("llama", vocab_size=V, max_position_embeddings=256)
    add_mtp(model, 3, "parallel", options={"memory_budget": 1 << 20})
    with counting() as counts:
        model(input_ids=ids, labels=ids).loss.backward()
    assert counts.peak_bytes < ids.numel() * V * 4


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_or_says_why_not(make: Make, kind: Any, reentrant: bool) -> None:
    model = add_mtp(make("llama"), 2, kind)
    wanted = gradients(model, batch())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    if reentrant and transformers.__version__ < "5":  # whose hooks run inside of what is checkpointed
        with pytest.raises(RuntimeError, match=r"pass gradient_checkpointing_kwargs=\{'use_reentrant': False\}"):
            model(**batch())
    else:
        assert_same(gradients(model, batch()), wanted)


# What stays.


@pytest.mark.parametrize("kind", KINDS)
def test_generation_does_not_use_them_and_undone_they_are_gone(make: Make, kind: Any) -> None:
    model = make("llama")
    before, ids = copy.deepcopy(model), batch()["input_ids"]
    keys, config = list(vars(model)), model.config.to_dict()
    add_mtp(model, 2, kind)
    assert torch.equal(model(ids).logits, before(ids).logits)
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.eval().generate(ids, **asked), before.eval().generate(ids, **asked))
    copied = copy.deepcopy(model).train()
    assert copied(**batch()).loss.item() == model.train()(**batch()).loss.item()
    remove_mtp(model)
    assert type(model) is transformers.LlamaForCausalLM
    assert model.state_dict().keys() == before.state_dict().keys()
    assert list(vars(model)) == keys
    assert model.config.to_dict() == config
    assert model(**batch()).loss.item() == before.train()(**batch()).loss.item()


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek", "diffllama", "falcon"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(make: Make, tmp_path: Path, name: str, kind: Any) -> None:
    depths = {"repeated_layer": True, "hidden": "post_norm"} if kind == "sequential" else None
    model = add_mtp(make(name), 2, kind, head_weights=[1, 0.3, 0.1], depths=depths)
    model.save_pretrained(tmp_path)
    loaded = load_mtp(tmp_path, {"label_smoothing": 0.1}).train()
    smoothed = add_mtp(make(name), 2, kind, head_weights=[1, 0.3, 0.1], depths=depths, options={"label_smoothing": 0.1})
    smoothed.load_state_dict(model.state_dict())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    for ours, theirs in zip(loaded.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded(**batch()).loss.item() == smoothed(**batch()).loss.item() != model(**batch()).loss.item()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain(**batch()).loss.item() == pytest.approx(remove_mtp(model).eval()(**batch()).loss.item(), rel=1e-6)


def test_changed_head_weights_are_saved(make: Make, tmp_path: Path) -> None:
    """A resumed run continues with the weights that its schedule had reached."""
    model = add_mtp(make("llama"), 2, head_weights=[1, 0.5, 0.25])
    set_head_weights(model, [1, 0.125, 0])
    model.save_pretrained(tmp_path)
    loaded = load_mtp(tmp_path).train()
    assert loaded.mtp_weights.tolist() == [1, 0.125, 0]
    assert loaded(**batch()).loss.item() == model(**batch()).loss.item()


def test_adapted_by_lora(make: Make) -> None:
    peft = pytest.importorskip("peft", reason="peft is missing: make test-integrations")
    config = peft.LoraConfig(
        r=4,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        target_modules=["v_proj", "lm_head"],
        modules_to_save=["mtp"],
    )
    model = peft.get_peft_model(add_mtp(make("llama"), 2, "sequential"), config).train()
    model(**batch()).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    for part in ("lm_head.lora_A", "lm_head.lora_B", "mtp.modules_to_save.default.layers.1.eh_proj"):
        assert any(part in name for name in trained)


# In the Trainer.


class Counting(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Sequences in which the token after the next is no harder to tell than the next."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        ids = list(range(3 + i % 20, 15 + i % 20))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_trainer_trains_and_resumes_them(make: Make, tmp_path: Path, kind: Any) -> None:
    pytest.importorskip("accelerate", reason="accelerate is missing: make test-integrations")

    def trained(resume: str | None = None) -> Any:
        args = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=30,
            logging_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            save_strategy="steps",
            save_steps=20,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        made = transformers.Trainer(
            add_mtp(make("llama"), 2, kind),
            args,
            train_dataset=Counting(),
            eval_dataset=Counting(),
            optimizer_cls_and_kwargs=(FusedAdamW, {"lr": 1e-2}),
        )
        made.remove_callback(transformers.PrinterCallback)
        made.train(resume_from_checkpoint=resume)
        return made

    whole = trained()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < 0.4 * losses[0]
    again = trained(resume=str(tmp_path / "checkpoint-20"))
    assert [row["loss"] for row in again.state.log_history if "loss" in row][20:] == losses[20:]
    assert whole.evaluate()["eval_loss"] < losses[-1], "of the next token alone"

    loaded = load_mtp(tmp_path / "checkpoint-30").train()
    ids = torch.tensor([Counting()[5]["input_ids"]])
    weights = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    for each in weights:  # every head tells what is to come, far better than by chance
        set_head_weights(loaded, each)
        assert loaded(input_ids=ids, labels=ids).loss.item() < 0.5 * torch.tensor(320.0).log()


# What is refused.


def test_refuses_what_does_not_fit_and_leaves_it_alone(make: Make) -> None:
    model = make("llama")
    model(**batch())
    before = list(vars(model)), model.config.to_dict(), [list(m._forward_hooks.values()) for m in model.modules()]
    refusals: list[tuple[str, dict[str, Any]]] = [
        ("heads must be at least 1; got 0", {"heads": 0}),
        ("kind must be one of .*; got 'shared'", {"heads": 1, "kind": "shared"}),
        ("head_weights must be 3 numbers of 0 or more", {"heads": 2, "head_weights": [1, 1]}),
        ("depths needs kind='sequential'; got 'parallel'", {"heads": 1, "depths": {"detach": True}}),
        ("hidden must be one of", {"heads": 1, "kind": "sequential", "depths": {"hidden": "first"}}),
    ]
    for reason, arguments in refusals:
        with pytest.raises(ValueError, match=reason):
            add_mtp(model, **arguments)
    assert type(model) is transformers.LlamaForCausalLM
    assert before == (
        list(vars(model)),
        model.config.to_dict(),
        [list(m._forward_hooks.values()) for m in model.modules()],
    )


def test_refuses_one_after_the_other(make: Make) -> None:
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel"):
        add_mtp(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="LlamaForCausalLM is already fused"):
        add_mtp(fuse_loss(make("llama")), 1)
    model = add_mtp(make("llama"), 1)
    with pytest.raises(ValueError, match="LlamaForCausalLM is already fused"):
        fuse_loss(model)
    with pytest.raises(ValueError, match="model must have been fused by fuse_loss"):
        unfuse_loss(model)
    with pytest.raises(ValueError, match="head_weights must be 2 numbers"):
        set_head_weights(model, [1])
    with pytest.raises(ValueError, match="model must have been given heads by add_mtp"):
        remove_mtp(remove_mtp(model))


def test_refuses_a_folder_without_heads(make: Make, tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a model saved after add_mtp"):
        load_mtp(tmp_path)
