"""Guessing ahead changes how many passes a text takes, and nothing else."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmfast.models import Decoder, DecoderConfig
from llmfast.mtp import Speculation, speculative_generate

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
