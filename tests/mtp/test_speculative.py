"""Guessing ahead changes how many passes a text takes, and nothing else."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmfast.models import Decoder, DecoderConfig
from llmfast.models.sampling import Sampler
from llmfast.mtp import SequentialDepths, Speculation, speculative, speculative_generate, speculative_passes

KINDS = [("parallel", 2), ("parallel", 4), ("sequential", 1), ("sequential", 3)]


def untrained(**options: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(10, **{"width": 32, "layers": 2, "heads": 2} | options))


@pytest.mark.parametrize(("mtp", "heads"), KINDS)
def test_the_same_text_in_fewer_passes(mtp: str, heads: int, knows_a_period: Callable[[str, int], Decoder]) -> None:
    model = knows_a_period(mtp, heads)
    prompt = torch.tensor([3, 1, 4, 1, 5])
    found = speculative_generate(model, prompt, 18)
    assert torch.equal(found.tokens, model.generate(prompt, 18, context=99, temperature=0))
    assert found.tokens[5:13].tolist() == [9, 2, 6, 3, 1, 4, 1, 5]
    # Every guess is right, so that a pass makes as many tokens as there are heads; the first pass checks none.
    assert found.acceptance == [1.0] * (model.config.targets - 1)
    assert found.passes == 1 + math.ceil(17 / model.config.targets)


@pytest.mark.parametrize("mtp", ["parallel", "sequential"])
@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_wrong_guesses_cost_nothing(mtp: str, count: int) -> None:
    for options in ({}, {"mtp_hidden": "post_norm", "mtp_repeated_layer": True}):
        model = untrained(mtp=mtp, mtp_heads=3, **options)
        torch.nn.init.normal_(model.embedding.weight)  # so that it does not repeat one token
        found = speculative_generate(model, torch.tensor([1, 2]), count)
        assert torch.equal(found.tokens, model.generate(torch.tensor([1, 2]), count, context=99, temperature=0))
        assert found.passes <= count and len(found.acceptance) == model.config.targets - 1


@pytest.mark.parametrize(("mtp", "heads"), KINDS)
def test_guesses_that_are_sometimes_right(mtp: str, heads: int, knows_a_period: Callable[[str, int], Decoder]) -> None:
    """Noise on what it learnt makes some guesses wrong."""
    model = untrained(mtp=mtp, mtp_heads=heads)
    model.load_state_dict(knows_a_period(mtp, heads).state_dict())
    wrong = right = 0
    for noise in (0.3, 0.5, 0.7):
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                if p.dim() > 1:
                    p += noise * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        prompt = torch.tensor([7, 3, 1])
        found = speculative_generate(model, prompt, 30)
        assert torch.equal(found.tokens, model.generate(prompt, 30, context=99, temperature=0))
        assert len(found.tokens) - 3 == found.passes + sum(found.accepted)
        right += sum(found.accepted)
        wrong += sum(found.guessed) - sum(found.accepted)
    assert right > 0 and wrong > 0


def drafts_without_cache(model: Decoder, tokens: torch.Tensor, count: int) -> list[int]:
    """Draft the `count` tokens after `tokens` from all but the last, reading everything again."""
    rows, text = len(tokens) - 1, tokens
    if not isinstance(model.mtp, SequentialDepths):
        heads = model(tokens[None, :rows], all_heads=True)[1 : count + 1, 0, -1]
        drafts: list[int] = (heads @ model.unembedding.T).argmax(-1).tolist()
        return drafts
    trunk = model.trunk(tokens[None, :rows])
    hidden = trunk.out if model.mtp.hidden == "pre_norm" else model.norm(trunk.out)
    for k in range(1, count + 1):
        hidden, out = model.mtp.advance(k, hidden, model.embedding(text[None, k:]), trunk.rope, None)
        text = torch.cat([text, (out[0, -1:] @ model.unembedding.T).argmax(-1)])
    return text[rows + 1 :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"mtp": "parallel", "mtp_heads": 4},
        {"mtp": "sequential", "mtp_heads": 4},
        {"mtp": "sequential", "mtp_heads": 3, "mtp_hidden": "post_norm", "mtp_repeated_layer": True},
    ],
)
@torch.no_grad()
def test_drafts_with_a_cache_are_those_without(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Play the passes after the fact: each must have drafted what is drafted without a cache."""
    guesses: list[list[int]] = []
    for kind in (speculative._ParallelDrafts, speculative._SequentialDrafts):

        def guess(self: Any, *args: Any, original: Any = kind.guess) -> torch.Tensor:
            found: torch.Tensor = original(self, *args)
            guesses.append(found.tolist())
            return found

        monkeypatch.setattr(kind, "guess", guess)
    model, right = untrained(**options).double(), 0
    for p in model.parameters():  # gains too: a norm left out must show
        torch.nn.init.normal_(p, std=0.5) if p.dim() > 1 else torch.nn.init.uniform_(p, 0.7, 1.4)
    model.embedding.weight[3:] *= 0.2  # some drafts are right: the heads see much of what the trunk sees
    for prompt in (1, 2, 3, 9):
        tokens = torch.randint(0, 10, (prompt,), generator=torch.Generator().manual_seed(prompt))
        guesses.clear()
        passes = list(speculative_passes(model, tokens, 40))
        text = torch.cat([tokens, *(each.tokens for each in passes)])
        known, drafts, drafted = prompt, list[int](), iter(guesses)
        for each in passes:
            assert each.guessed == len(drafts)
            wanted = text[known : known + len(drafts)].tolist()
            accepted = next((i for i, (a, b) in enumerate(zip(drafts, wanted)) if a != b), len(drafts))
            assert each.accepted == accepted and len(each.tokens) == accepted + 1
            known, right = known + len(each.tokens), right + accepted
            room = max(0, min(model.config.targets - 1, prompt + 39 - known))
            drafts = drafts_without_cache(model, text[:known], room)
            assert drafts == (next(drafted) if room else [])
        assert known == prompt + 40
    assert right > 0


@pytest.mark.parametrize(("mtp", "heads"), KINDS)
def test_sampled_text_is_that_of_plain_sampling(
    mtp: str, heads: int, knows_a_period: Callable[[str, int], Decoder]
) -> None:
    """Check that every token takes one random number, drafted or not."""
    model, prompt = knows_a_period(mtp, heads), torch.tensor([3, 1, 4])
    texts, accepted = [], 0
    for seed in range(4):
        sampler = Sampler(4.0, 0.99, torch.Generator().manual_seed(seed))
        passes = list(speculative_passes(model, prompt, 25, sampler=sampler))
        texts.append(torch.cat([prompt, *(each.tokens for each in passes)]).tolist())
        generator = torch.Generator().manual_seed(seed)
        plain = model.generate(prompt, 25, context=99, temperature=4.0, top_p=0.99, generator=generator)
        assert texts[-1] == plain.tolist()
        accepted += sum(each.accepted for each in passes)
    assert accepted > 0 and len({*map(tuple, texts)}) > 1


@pytest.mark.parametrize(("mtp", "heads"), KINDS)
def test_a_pass_costs_the_rows_that_it_adds(
    mtp: str, heads: int, knows_a_period: Callable[[str, int], Decoder]
) -> None:
    model, rows = knows_a_period(mtp, heads), list[int]()
    hooks = [
        module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
        for name, module in model.named_modules()
        if name.endswith("attention")
    ]
    passes = list(speculative_passes(model, torch.tensor([3, 1, 4, 1, 5, 9, 2, 6] * 4), 40))
    for hook in hooks:
        hook.remove()
    many = [n for n in rows if n > 2 * model.config.targets]
    assert len(passes) < 40 and len(many) <= len(hooks)  # each layer reads the prompt once


def test_one_head_is_plain_decoding() -> None:
    found = speculative_generate(untrained(mtp="parallel", mtp_heads=1), torch.tensor([1]), 5)
    assert found.passes == 5 and found.acceptance == []


def test_acceptance() -> None:
    found = Speculation(torch.tensor([1]), 3, guessed=[4, 0], accepted=[3, 0])
    assert found.acceptance[0] == 0.75 and math.isnan(found.acceptance[1])


def test_refuses() -> None:
    model = untrained(mtp="parallel", mtp_heads=2)
    with pytest.raises(ValueError, match=r"tokens must be \(T,\) with T > 0; got \(1, 2\)"):
        speculative_generate(model, torch.tensor([[1, 2]]), 3)
    with pytest.raises(ValueError, match="count must not be negative; got -1"):
        speculative_generate(model, torch.tensor([1]), -1)
    for options in ({}, {"mtp": "shared", "mtp_heads": 2}):
        with pytest.raises(ValueError, match="model must have mtp='parallel' or 'sequential'; got "):
            speculative_generate(untrained(**options), torch.tensor([1]), 3)


@pytest.mark.parametrize(("mtp", "heads"), KINDS)
def test_no_graph_is_kept_and_gradients_are_on_between_passes(mtp: str, heads: int) -> None:
    model, inside = untrained(mtp=mtp, mtp_heads=heads), list[bool]()
    for module in (model.norm, *model.mtp.children()):
        module.register_forward_hook(lambda *_: inside.append(torch.is_grad_enabled()))
    for each in speculative_passes(model, torch.tensor([1, 2]), 4):
        assert torch.is_grad_enabled() and not each.tokens.requires_grad and each.tokens.dtype == torch.int64
    assert inside and not any(inside)


@pytest.mark.parametrize(("mtp", "heads"), KINDS)
def test_the_default_device_and_type_do_not_matter(
    mtp: str, heads: int, knows_a_period: Callable[[str, int], Decoder]
) -> None:
    model, prompt = knows_a_period(mtp, heads), torch.tensor([3, 1, 4])
    wanted = speculative_generate(model, prompt, 9)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = speculative_generate(model, prompt, 9)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.tokens, wanted.tokens) and found.accepted == wanted.accepted
