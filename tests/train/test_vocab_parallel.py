"""An output layer that is divided, with other ranks pretended; tests/train/test_ranks.py has them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmfast.train import vocab_parallel as module
from llmfast.train.settings import ConfigError
from llmfast.train.vocab_parallel import OfAllRanks, split_unembedding

RANK, SIZE = 1, 4
MESH: Any = SimpleNamespace(size=lambda: SIZE, get_local_rank=lambda: RANK)


@pytest.fixture(autouse=True)
def _alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that each rank sends what this one has, plus ten times its number less this one's."""

    def gathered(t: Tensor, dim: int, mesh: Any) -> Tensor:
        return torch.cat([t + 10 * (rank - RANK) for rank in range(SIZE)], dim)

    monkeypatch.setattr(module, "_gathered", gathered)

    def placed(t: Tensor, mesh: Any, placements: Any, run_check: bool) -> Tensor:
        assert (mesh, placements, run_check) == (MESH, [module.Replicate()], False)  # a check would send it again
        return t

    monkeypatch.setattr(module.DTensor, "from_local", placed)


class Plus(nn.Module):
    """A model whose hidden states are the tokens times a weight, (B, T, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.read: list[Any] = []

    def forward(self, tokens: Tensor, *, positions: Tensor) -> Tensor:
        self.read.append((tokens.tolist(), positions.tolist()))
        return (tokens * self.weight)[..., None]


class Total:
    """An objective that adds up the hidden states that it gets, each times its row's number."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def num_valid(self, batch: Any) -> Tensor:
        return torch.tensor([3])

    def logged(self, sums: Any, steps: int) -> dict[str, Any]:
        return {"steps": steps}

    def __call__(self, model: Any, batch: Any, num_valid: Tensor, step: int, detail: bool) -> Any:
        self.got.append((batch["x"].tolist(), num_valid.tolist(), step, detail))
        hidden = model(batch["x"], positions=batch["x"] + 1)
        loss = (hidden[..., 0] * torch.arange(len(hidden))[:, None]).sum()
        return loss, {"loss": loss.detach(), "other": torch.tensor([8.0])}


def test_each_rank_returns_its_share_of_a_loss_over_all_tokens() -> None:
    model, inner = Plus().train(), Total()
    objective = OfAllRanks(inner, MESH)
    batch = {"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    loss, sums = objective(model, batch, torch.tensor([9]), 5, True)
    rows = [[x + 10 * (rank - RANK) for x in row] for rank in range(SIZE) for row in ([1.0, 2.0], [3.0, 4.0])]
    assert inner.got == [(rows, [9], 5, True)]
    assert model.read == [(rows[2:4], [[x + 1 for x in row] for row in rows[2:4]])]  # its own
    hidden = [[2 * x + 10 * (rank - RANK) for x in row] for rank in range(SIZE) for row in rows[2:4]]
    total = sum(i * x for i, row in enumerate(hidden) for x in row)
    assert loss.item() == pytest.approx(total / SIZE) == sums["loss"].item() and sums["other"].tolist() == [2.0]
    loss.backward()
    # Of the whole loss, for this rank's tokens: rows 2 and 3 of all.
    assert model.weight.grad is not None and model.weight.grad.item() == 2 * (1 + 2) + 3 * (3 + 4)


def test_in_evaluation_nothing_is_gathered_and_nothing_divided() -> None:
    model, inner = Plus().eval(), Total()
    objective = OfAllRanks(inner, MESH)
    loss, sums = objective(model, {"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, torch.tensor([9]), 5, False)
    assert inner.got == [([[1, 2], [3, 4]], [9], 5, False)] and model.read[0][0] == [[1, 2], [3, 4]]
    assert loss.item() == sums["loss"].item() == 14 and sums["other"].tolist() == [8]
    assert objective.num_valid(None).tolist() == [3] and objective.logged({}, 7) == {"steps": 7}


def test_an_unembedding_that_cannot_be_split_is_named() -> None:
    class Made(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
            self.again = self.head if kind == "twice" else None
            self.kind = kind

        @property
        def unembedding(self) -> Any:
            return {"none": None, "computed": self.head.weight * 2, "tied": self.embedding.weight}.get(
                self.kind, self.head.weight
            )

    for kind, message in (
        ("none", "train.vocab_parallel needs unembedding, a parameter of the model; Made has none"),
        ("computed", "train.vocab_parallel needs unembedding, a parameter of the model; Made has none"),
        ("tied", "splits the unembedding, which is also something else: embedding.weight$"),
        ("twice", "splits the unembedding, which is also something else: head.weight, again.weight$"),
    ):
        with pytest.raises(ConfigError, match=message):
            split_unembedding(Made(kind), MESH)


def test_rows_of_the_unembedding_stay_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "distribute_tensor", lambda t, mesh, places: asked.append((mesh, places)) or t[:1])

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"head": nn.Linear(2, 4, bias=False)})

        @property
        def unembedding(self) -> Any:
            return self.inner["head"].weight

    model = Inner()
    head: Any = model.inner["head"]
    head.weight.requires_grad_(False)
    assert split_unembedding(model, MESH) == "inner.head.weight"
    assert head.weight.shape == (1, 2) and not head.weight.requires_grad and asked == [(MESH, [module.Shard(0)])]


def test_each_rank_takes_its_sequences_of_the_gradients_of_all_heads() -> None:
    class Heads(Plus):
        def forward(self, tokens: Tensor, *, positions: Tensor) -> Tensor:
            return super().forward(torch.stack([tokens, 100 * tokens]), positions=positions)  # (K, B, T, 1)

    def weighted(model: Any, batch: Any, *rest: Any) -> Any:
        hidden = model(batch, positions=batch)
        assert hidden.shape == (2, SIZE, 1, 1)
        return (hidden[..., 0, 0] * torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])).sum(), {}

    model, inner = Heads().train(), SimpleNamespace(num_valid=None, logged=None)
    objective = OfAllRanks(inner, MESH)  # type: ignore[arg-type]
    objective._objective = weighted  # type: ignore[assignment]
    objective(model, torch.tensor([[3.0]]), torch.tensor([1]), 0, True)[0].backward()
    assert model.weight.grad is not None and model.weight.grad.item() == 2 * 3 + 6 * 300
