"""Decoding with the heads of `add_mtp`: the text of `generate`, in fewer passes where the heads are right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.cli import main
from llmfast.data import ByteTokenizer

transformers = pytest.importorskip("transformers", reason="transformers is missing: make test-integrations")

from llmfast.integrations import decoding  # noqa: E402
from llmfast.integrations.decoding import speculative_generate  # noqa: E402
from llmfast.integrations.mtp import add_mtp, load_mtp  # noqa: E402
from llmfast.integrations.transformers import fuse_loss  # noqa: E402
from llmfast.optim import FusedAdamW  # noqa: E402

Make = Callable[..., Any]
KINDS = ["parallel", "sequential"]


def greedy(model: Any, tokens: Tensor, count: int) -> Tensor:
    """Decode with transformers, whatever the end of text."""
    model.generation_config.eos_token_id = None
    asked: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    made: Tensor = model.eval().generate(tokens[None], **asked)[0]
    return made


def prompt(T: int = 7) -> Tensor:
    return torch.randint(3, 40, (T,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "tied", "qwen3", "gemma2", "gpt2", "deepseek", "mixtral", "granite", "phi"])
def test_the_text_is_that_of_generate(make: Make, name: str, kind: Any, heads: int) -> None:
    model = make(name)
    wanted = greedy(model, prompt(), 20)
    add_mtp(model, heads, kind)
    for p in model.mtp.parameters():  # the copies alone would often be right
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)), alpha=0.02)
    found = speculative_generate(model.train(), prompt(), 20)
    assert torch.equal(found.tokens, wanted) and torch.equal(greedy(model, prompt(), 20), wanted)
    assert found.passes <= 20 and len(found.guessed) == len(found.accepted) == heads
    assert found.passes + sum(found.accepted) == 20
    assert speculative_generate(model, prompt(), 0).passes == 0


@pytest.mark.parametrize("depths", [{"hidden": "post_norm", "concat_order": "hidden_first"}, {"repeated_layer": True}])
def test_kinds_of_depths(make: Make, depths: dict[str, Any]) -> None:
    model = add_mtp(make("llama"), 2, "sequential", depths=depths)
    assert torch.equal(speculative_generate(model, prompt(), 12).tokens, greedy(model, prompt(), 12))


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_have_learned_save_passes(make: Make, kind: Any, tmp_path: Path) -> None:
    """Train on numbers that count up, save and load, and draft nearly always right."""
    model = add_mtp(make("llama"), 2, kind).train()
    optimizer = FusedAdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        ids = torch.arange(16) + torch.arange(3, 27, 3)[:, None] + step % 3
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = load_mtp(tmp_path).eval()
    found = speculative_generate(loaded, torch.arange(5, 11), 18)
    assert found.tokens.tolist() == list(range(5, 29)) == greedy(model, torch.arange(5, 11), 18).tolist()
    assert found.passes <= 8 and min(found.acceptance) > 0.7


def test_the_command_says_who_decodes_them(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_mtp(make("llama"), 1).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    capsys.readouterr()
    assert main(["generate", str(tmp_path), "--prompt=a"]) == 2
    error = capsys.readouterr().err
    assert "holds a model with heads of add_mtp" in error and "speculative_generate(load_mtp(" in error


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_pass_reads_what_is_new(make: Make) -> None:
    model, rows = add_mtp(make("llama"), 2, "sequential"), []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    found = speculative_generate(model, prompt(30), 10)
    assert rows[0] == 30 and len(rows) == found.passes
    assert all(n <= 4 for n in rows[1:])  # the last token, two drafts, and a token that depths read drafts with


def test_a_pass_makes_logits_of_what_it_checks_only(make: Make) -> None:
    """Look at the rows of the model's own output embedding: a token's, and those of two drafts, after any prompt."""
    model, rows = add_mtp(make("llama"), 2), []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: rows.extend([args[0].shape[1]] if args[0].dim() == 3 else []))
    found = speculative_generate(model, prompt(30), 10)
    assert rows[0] == 1 and len(rows) == found.passes and max(rows) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_those_of_heads_that_read_the_whole_text(
    make: Make, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare what heads with caches draft with what they draft after reading everything again."""
    model = add_mtp(make("llama"), 3, kind)
    for p in model.mtp.parameters():
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)), alpha=0.02)
    drafted: list[tuple[list[int], list[int]]] = []
    draft = decoding._Drafts.make

    def twice(self: Any, tokens: Tensor) -> Tensor:
        found = draft(self, tokens)
        fresh = decoding._Drafts(self._lm, self._seen)
        fresh.check(tokens[:-1], tokens[:0])
        drafted.append((found.tolist(), draft(fresh, tokens).tolist()))
        return found

    monkeypatch.setattr(decoding._Drafts, "make", twice)
    speculative_generate(model, prompt(), 20)
    assert len(drafted) > 5 and all(found == wanted and len(found) == 3 for found, wanted in drafted)


def test_what_cannot_be_done_is_said(make: Make) -> None:
    model = make("llama")
    other = make("llama")
    other.mtp = torch.nn.Linear(2, 2)  # as transformers calls heads of its own
    for wrong, message in (
        (lambda: speculative_generate(fuse_loss(make("llama")), prompt(), 3), "must have heads of add_mtp"),
        (lambda: speculative_generate(other, prompt(), 3), "must have heads of add_mtp"),
        (lambda: speculative_generate(add_mtp(model, 1), prompt()[None], 3), r"tokens must be \(T,\)"),
        (lambda: speculative_generate(model, prompt(), -1), "count must not be negative"),
        (lambda: speculative_generate(add_mtp(make("falcon"), 1), prompt(), 3), "keeps a state"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    assert model.training and all(not module._forward_hooks for module in model.model.layers[:1])
