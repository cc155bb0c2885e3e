"""Models of Hugging Face give log-probabilities in the place of logits, to TRL's trainers too."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evidence.traffic import counting
from llmfast.losses import reference
from support.numerics import assert_no_worse

transformers = pytest.importorskip("transformers", reason="transformers is missing: make test-integrations")

from llmfast.integrations.mtp import add_mtp  # noqa: E402
from llmfast.integrations.transformers import fuse_loss, model_logprobs  # noqa: E402

Make = Callable[..., Any]
V = 320


def batch(K: int | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Return two sequences, of which one ends early, and ids that are what follows, or K random ones."""
    tokens = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    ids = F.pad(tokens[:, 1:], (0, 1), value=-100).masked_fill(mask == 0, -100)
    if K is not None:
        ids = torch.randint(3, V, (2, 9, K), generator=torch.Generator().manual_seed(1))
        ids[0, 2] = ids[1, 5, 0] = -100
        ids[:, :, -1] = ids[:, :, 0]
    return {"input_ids": tokens, "attention_mask": mask}, ids


def gradients(model: nn.Module, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(model: Any, K: int | None = None, temperature: Any = 0.7, **more: Any) -> None:
    """Compare values, statistics and all gradients with those of the model's own logits, within their rounding."""
    inputs, ids = batch(K)
    weights = torch.linspace(-1, 1, ids.numel()).view(ids.shape)
    options: dict[str, Any] = {"temperature": temperature, "return_stats": True, "return_rank": True}

    def outcome(found: Any, of: nn.Module) -> tuple[Any, dict[str, Tensor]]:
        value, stats = found
        total = (value * weights).sum() + 0.3 * stats.entropy.sum()
        return (value.detach(), stats), gradients(of, total)

    ours, d_ours = outcome(model_logprobs(model, inputs, ids, **options, **more), model)
    plain, d_plain = outcome(reference.logprobs(model(**inputs).logits, ids, **options), model)
    exact = copy.deepcopy(model).double()
    truth, d_truth = outcome(reference.logprobs(exact(**inputs).logits.double(), ids, **options), exact)
    assert_no_worse(ours[0], plain[0], truth[0], scale=10.0)
    assert torch.equal(ours[1].argmax, truth[1].argmax) and torch.equal(ours[1].rank, truth[1].rank)
    assert d_ours.keys() == d_truth.keys()
    for name, d in d_ours.items():
        assert_no_worse(d, d_plain[name], d_truth[name], scale=30.0)


@pytest.mark.parametrize("name", ["llama", "tied", "gemma2", "granite", "cohere", "phi", "gpt2"])
def test_values_and_gradients_are_those_of_the_logits(make: Make, name: str) -> None:
    check(fuse_loss(make(name)).eval())


def test_several_ids_and_a_temperature_for_each_token(make: Make) -> None:
    check(fuse_loss(make("gemma2")), K=3, temperature=torch.linspace(0.5, 2, 18).view(2, 9), memory_budget=20_000)


def test_training_afterwards_is_as_before(make: Make) -> None:
    model, (inputs, ids) = fuse_loss(make("llama")), batch()
    before = model(**inputs, labels=inputs["input_ids"]).loss
    model_logprobs(model, inputs, ids)
    assert torch.equal(model(**inputs, labels=inputs["input_ids"]).loss, before)
    assert model(**inputs).logits.shape == (2, 9, V)


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_of_the_output_layer(make: Make, when: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is missing: make test-integrations")
    targets = ["q_proj", "lm_head"]
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=targets)
    model = make("llama")
    if when == "before":
        check(peft.get_peft_model(fuse_loss(model), config).eval())
    else:
        check(fuse_loss(peft.get_peft_model(model, config)).eval())


def test_models_with_heads_give_those_of_the_next_token(make: Make) -> None:
    model, (inputs, ids) = make("llama"), batch()
    want = reference.logprobs(model(**inputs).logits, ids)
    model = add_mtp(model, 2)
    for training in (True, False):
        torch.testing.assert_close(model_logprobs(model.train(training), inputs, ids), want, rtol=1e-5, atol=1e-5)


def test_a_wrapper_sees_a_tensor_with_a_gradient(make: Make) -> None:
    """Return them through the wrapper's forward, where DDP and FSDP find what they wait for."""
    seen = []

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            seen.append(self.module(**inputs))
            return seen[-1]

    inputs, ids = batch()
    for return_dict in (True, False):
        found = model_logprobs(Wrapper(fuse_loss(make("llama"))), {**inputs, "return_dict": return_dict}, ids)
        returned = seen[-1].logits if return_dict else seen[-1][0]
        assert returned is found and found.requires_grad and found.shape == ids.shape


def test_the_last_tokens_alone(make: Make) -> None:
    model, (inputs, ids) = fuse_loss(make("llama")), batch()
    found = model_logprobs(model, {**inputs, "logits_to_keep": 4}, ids[:, -4:])
    torch.testing.assert_close(found, model_logprobs(model, inputs, ids)[:, -4:])


def test_refuses(make: Make) -> None:
    model, (inputs, ids) = make("llama"), batch()
    with pytest.raises(ValueError, match="model must have been fused by fuse_loss; this LlamaForCausalLM was not"):
        model_logprobs(model, inputs, ids)
    fuse_loss(model)
    with pytest.raises(ValueError, match="inputs must have no labels"):
        model_logprobs(model, {**inputs, "labels": ids}, ids)
    with pytest.raises(TypeError, match=r"options of model_logprobs must be among .*; got \['softcap'\]"):
        model_logprobs(model, inputs, ids, softcap=3.0)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"ids must have shape \(2, 9\)"):
        model_logprobs(model, inputs, ids[:, 1:])
    assert model(**inputs).logits.shape == (2, 9, V)  # nothing is left of the call


# TRL.


@pytest.fixture
def example() -> ModuleType:
    pytest.importorskip("trl", reason="trl is missing: make test-integrations")
    module = ModuleType("trl_logprobs")
    path = Path(__file__).parents[2] / "examples" / "trl_logprobs.py"
    exec(compile(path.read_text(), path.name, "exec"), vars(module))
    return module


def large(seed: int) -> Any:
    """Return a model with 128,256 tokens and little else."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=128256, pad_token_id=0, eos_token_id=1, initializer_range=0.2, **shape)
    return fuse_loss(transformers.LlamaForCausalLM(config))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory")
@pytest.mark.parametrize("kind", ["preferences", "policy"])
def test_a_step_of_trl(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Match loss and gradients of the stock trainer, with less than half of the bytes at a real vocabulary."""
    monkeypatch.setattr(example, "llama", large)
    trainer = getattr(example, kind)(1, str(tmp_path))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    if kind == "policy":  # policies that have moved since, and differ in what they were rewarded for
        inputs["advantages"] = torch.linspace(-1, 1, len(inputs["advantages"]))
        inputs["old_per_token_logps"] = torch.full(inputs["completion_ids"].shape, -11.0)

    def step() -> tuple[Tensor, dict[str, Tensor], int]:
        trainer.model.zero_grad()
        with counting() as counts:
            loss = trainer.compute_loss(trainer.model, inputs)
            found = gradients(trainer.model, loss)
        return loss.detach(), found, counts.peak_bytes

    theirs, d_theirs, their_peak = step()
    example.use_logprobs(trainer, memory_budget=8 << 20)
    ours, d_ours, our_peak = step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert d_ours.keys() == d_theirs.keys() and any(d.any() for d in d_theirs.values())
    for name, d in d_ours.items():
        assert (d - d_theirs[name]).norm() <= 1e-5 * d_theirs[name].norm() + 1e-9, name
    assert our_peak < 0.5 * their_peak, (our_peak, their_peak)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory")
def test_the_example_learns(example: ModuleType) -> None:
    margins = [entry["rewards/margins"] for entry in example.train(example.preferences, 5)]
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[-1] > 0.3
    entries = example.train(example.policy, 2)
    assert len(entries) == 2 and all(entry["entropy"] > 5 for entry in entries)
