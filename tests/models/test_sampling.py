"""Choice of the next token, compared with its definition."""

import math

import pytest
import torch

from llmfast.models.sampling import Sampler

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5])


def shares(sampler: Sampler, draws: int = 4000) -> torch.Tensor:
    drawn = torch.cat([sampler(LOGITS) for _ in range(draws)])
    return drawn.bincount(minlength=5) / draws


def test_greedy_is_the_default() -> None:
    assert Sampler() == Sampler(temperature=0.0, top_p=1.0, generator=None)
    assert {int(Sampler()(LOGITS)) for _ in range(50)} == {1}
    assert Sampler(top_p=0.1)(LOGITS.bfloat16()).tolist() == [1]


@pytest.mark.parametrize(
    ("temperature", "top_p", "kept"),
    [
        (1.0, 1.0, [0, 1, 2, 3, 4]),
        (0.5, 1.0, [0, 1, 2, 3, 4]),
        (2.0, 1.0, [0, 1, 2, 3, 4]),
        (1.0, 0.7, [1, 4]),
        (1.0, 0.8, [1, 2, 4]),
        (1.0, 1e-9, [1]),
        (2.0, 0.8, [1, 2, 4]),
    ],
)
def test_shares_are_the_probabilities_of_what_is_kept(temperature: float, top_p: float, kept: list[int]) -> None:
    p = (LOGITS / temperature).softmax(0)
    wanted = torch.zeros(5).index_copy(0, torch.tensor(kept), p[kept])
    generator = torch.Generator().manual_seed(0)
    found = shares(Sampler(temperature, top_p, generator))
    torch.testing.assert_close(found, wanted / wanted.sum(), atol=0.03, rtol=0)
    assert found.nonzero().flatten().tolist() == [i for i in kept if found[i] > 0] and set(kept) >= {1}


def test_what_is_kept_has_the_probability_and_nothing_could_be_left_out() -> None:
    torch.manual_seed(0)
    for top_p in (0.05, 0.3, 0.9, 0.999):
        logits = torch.randn(40)
        p = logits.softmax(0)
        generator = torch.Generator().manual_seed(1)
        drawn = {int(Sampler(1.0, top_p, generator)(logits)) for _ in range(3000)}
        order = p.argsort(descending=True).tolist()
        needed = next(n for n in range(1, 41) if float(p[order[:n]].sum()) >= top_p - 1e-6)
        assert drawn <= set(order[:needed])


def test_the_same_seed_gives_the_same_tokens() -> None:
    runs = []
    for seed in (0, 0, 1):
        sampler = Sampler(1.0, 0.9, torch.Generator().manual_seed(seed))
        runs.append([int(sampler(LOGITS)) for _ in range(50)])
    assert runs[0] == runs[1] != runs[2]


def test_refuses() -> None:
    for temperature in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be finite and not negative; got"):
            Sampler(temperature)
    for top_p in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\]; got"):
            Sampler(1.0, top_p)
    with pytest.raises(ValueError, match="logits are not finite"):
        Sampler()(torch.tensor([1.0, math.nan]))


def test_a_share_that_is_just_reached_is_enough_and_the_first_of_equals_come_first() -> None:
    choose = Sampler(temperature=1.0, top_p=0.5, generator=torch.Generator().manual_seed(0))
    assert {int(choose(torch.zeros(4))) for _ in range(40)} == {0, 1}


def test_probabilities_are_float32_whatever_the_logits_are(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.dtype] = []
    multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, *rest, **more: drawn.append(p.dtype) or multinomial(p, 1))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        Sampler(temperature=0.7, top_p=0.9)(torch.randn(9).to(dtype))
    assert drawn == [torch.float32] * 3


@pytest.mark.parametrize("temperature", [1e-6, 1e-37, 1e-38, 1e-45, 1e-320])
def test_a_temperature_of_almost_nothing_is_greedy(temperature: float) -> None:
    for logits in ([10.0, 9.0, -5.0], [-1e38, -2e38, -3e38], [3e38, -3e38, 0.0], [1e30, 1e30, 0.0]):
        chosen = {int(Sampler(temperature, top_p=p)(torch.tensor(logits))) for p in (1.0, 0.9) for _ in range(20)}
        assert chosen == ({0, 1} if logits[0] == logits[1] else {0})
