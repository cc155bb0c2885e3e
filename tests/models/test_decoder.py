"""The small decoder: it is causal, keeps documents apart, and learns."""

from typing import Any

import pytest
import torch

from llmfast.losses import linear_cross_entropy
from llmfast.models import Decoder, DecoderConfig
from llmfast.models.decoder import rotate, rotation


def small(**options: Any) -> Decoder:
    return Decoder(DecoderConfig(50, **{"width": 32, "layers": 2, "heads": 2} | options))


def test_hidden_states_and_unembedding() -> None:
    for tied in (True, False):
        model = small(tie_embeddings=tied)
        assert model(torch.randint(0, 50, (3, 7))).shape == (3, 7, 32)
        assert model.unembedding.shape == (50, 32)
        assert (model.unembedding is model.embedding.weight) == tied


def test_the_future_is_not_seen() -> None:
    model, tokens = small(), torch.randint(0, 50, (2, 9))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.equal(a[:, 5:], b[:, 5:])


def test_packed_documents_are_computed_as_if_alone() -> None:
    model = small()
    first, second = torch.randint(0, 50, (1, 4)), torch.randint(0, 50, (1, 6))
    packed = model(
        torch.cat([first, second], 1),
        positions=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]),
        document_ids=torch.tensor([[0] * 4 + [1] * 6]),
    )
    torch.testing.assert_close(packed, torch.cat([model(first), model(second)], 1), rtol=1e-5, atol=1e-5)


def test_rotation_keeps_lengths_and_knows_only_distances() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i: int, j: int) -> torch.Tensor:
        at = [rotation(torch.tensor([[p]]), 8, 10_000.0) for p in (i, j)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate(q, rotation(torch.tensor([[5]]), 8, 10_000.0)).norm(), q.norm())


def test_starts_at_the_entropy_of_a_uniform_guess() -> None:
    model, tokens = small(), torch.randint(0, 50, (4, 16))
    loss = linear_cross_entropy(model(tokens), model.unembedding, torch.randint(0, 50, (4, 16)))
    assert abs(loss.item() - torch.tensor(50.0).log().item()) < 0.1


def test_generates() -> None:
    model = small().eval()
    start = torch.tensor([1, 2, 3])
    greedy = model.generate(start, 5, context=4, temperature=0)
    assert greedy.shape == (8,) and torch.equal(greedy[:3], start)
    assert torch.equal(greedy, model.generate(start, 5, context=4, temperature=0))
    sampled = [model.generate(start, 20, context=4, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30, "heads": 4}, "width must divide by 2"),
        ({"layers": 0}, "layers must be positive; got 0"),
        ({"ffn_width": -1}, "ffn_width must not be negative"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)
