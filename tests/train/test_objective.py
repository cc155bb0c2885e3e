"""Compare the minimised and logged losses with torch's own cross-entropy of each part."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfast.data import IGNORE_INDEX, Batch
from llmfast.train.objective import NextToken

V, D, T = 11, 6, 5
SOURCES = ["prose", "code", "maths"]


class Bigrams(nn.Module):
    """Hidden states that know the token alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(V, D, generator=generator))
        self.unembedding = nn.Parameter(torch.randn(V, D, generator=generator))

    def forward(self, tokens: Tensor, *, positions: Tensor, document_ids: Tensor) -> Tensor:
        return self.embedding[tokens]


def batch_of(sources: list[int], ignored: list[int], seed: int) -> Batch:
    """Return a row of each source, with the given numbers of ignored labels."""
    tokens = torch.randint(V, (len(sources), T), generator=torch.Generator().manual_seed(seed))
    labels = (tokens * 3 + 1) % V
    for row, count in enumerate(ignored):
        labels[row, :count] = IGNORE_INDEX
    positions, documents = torch.arange(T).expand_as(tokens), torch.zeros_like(tokens, dtype=torch.int32)
    valid = int((labels != IGNORE_INDEX).sum())
    return Batch(tokens, labels, documents, positions, valid, torch.tensor(sources))


@pytest.mark.parametrize("detail", [False, True])
def test_the_loss_of_each_source_is_the_mean_of_its_labels(detail: bool) -> None:
    """Sources differ in rows, in ignored labels, and in the micro-batches that they are in."""
    model, objective = Bigrams(), NextToken(SOURCES)
    batches = [batch_of([0, 1, 0], [1, 3, 0], seed=1), batch_of([1, 1], [T, 0], seed=2)]
    num_valid = torch.stack([objective.num_valid(batch) for batch in batches]).sum(0)
    assert num_valid.tolist() == [9 + 2 + 5]
    total, added = torch.zeros(()), {}
    for batch in batches:
        loss, sums = objective(model, batch, num_valid, 0, detail)
        total = total + loss
        added = {name: added.get(name, 0) + value for name, value in sums.items()}

    def mean(*rows: tuple[int, int]) -> Tensor:
        logits = torch.cat([model.embedding[batches[b].tokens[row]] @ model.unembedding.T for b, row in rows])
        return F.cross_entropy(logits, torch.cat([batches[b].labels[row] for b, row in rows]))

    whole = mean((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(added["loss"], whole.detach())
    logged = objective.logged(added, 1)
    if not detail:
        assert logged == {}
        return
    prose, code = mean((0, 0), (0, 2)).item(), mean((0, 1), (1, 0), (1, 1)).item()
    # There is nothing to say of maths.
    assert logged == {"source_loss": {"prose": pytest.approx(prose), "code": pytest.approx(code)}}


def test_one_source_is_not_logged_by_itself() -> None:
    batch = batch_of([0, 0], [0, 2], seed=1)
    objective = NextToken(["only"])
    _, sums = objective(Bigrams(), batch, objective.num_valid(batch), 0, True)
    assert list(sums) == ["loss"] and objective.logged(sums, 1) == {}
