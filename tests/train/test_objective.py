"""Compare the minimised and logged losses with torch's own cross-entropy of each part."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfast.data import IGNORE_INDEX, Batch
from llmfast.losses import linear_cross_entropy
from llmfast.train.objective import FurtherTokens, NextToken, Summed

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


@pytest.mark.parametrize("as_mapping", [False, True])
def test_a_function_of_ones_own_is_divided_by_the_valid_labels(as_mapping: bool) -> None:
    batch = batch_of([0, 0], [2, 1], seed=3)
    given = {"labels": batch.labels} if as_mapping else batch
    objective = Summed(lambda model, got: model.unembedding.sum() if got is given else pytest.fail("another batch"))
    assert objective.num_valid(given).tolist() == [7]
    model = Bigrams()
    loss, sums = objective(model, given, torch.tensor([4]), 0, True)
    torch.testing.assert_close(loss, model.unembedding.sum() / 4)
    assert torch.equal(sums["loss"], loss) and not sums["loss"].requires_grad
    assert objective.logged(sums, 3) == {}


class Heads(Bigrams):
    """Hidden states of K heads that know the token alone, or of one for all targets."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.tables = nn.Parameter(torch.randn(heads, V, D, generator=torch.Generator().manual_seed(5)))

    def forward(self, tokens: Tensor, *, positions: Tensor, document_ids: Tensor, all_heads: bool = False) -> Tensor:
        assert all_heads and document_ids is not None and positions.shape == tokens.shape
        return self.tables[:, tokens]


@pytest.mark.parametrize("detached", [False, True])
def test_further_tokens_are_the_weighted_losses_of_the_heads(detached: bool) -> None:
    """Two documents in a row, ignored labels, two steps of a schedule, and counts of a larger step."""
    K, model = 3, Heads(3)
    batch = batch_of([0, 0], [1, 0], seed=4)
    batch.document_ids[:, 3:] = 1
    weights_at = [[1.0, 0.5, 0.25], [1.0, 0.3, 0.0]]
    objective = FurtherTokens(K, weights_at.__getitem__, shared=False, detached=detached)
    own = objective.num_valid(batch)
    # Head k: labels[t + k] in the document of row t; the first label of the first row is ignored.
    assert own.tolist() == [9, 6, 2]
    num_valid, added = own + torch.tensor([1, 2, 3]), {}
    for step in range(2):
        loss, sums = objective(model, batch, num_valid, step, False)
        parts, right = [], []
        for k in range(K):
            rows = [
                (b, t)
                for b in range(2)
                for t in range(T - k)
                if batch.labels[b, t + k] != IGNORE_INDEX and (t < 3) == (t + k < 3)
            ]
            hidden = torch.stack([model.tables[k, batch.tokens[row]] for row in rows])
            targets = torch.stack([batch.labels[b, t + k] for b, t in rows])
            head = model.unembedding.detach() if detached and k else model.unembedding
            logits = hidden @ head.T
            parts.append(F.cross_entropy(logits, targets, reduction="sum") / num_valid[k])
            right.append(float((logits.argmax(1) == targets).sum() / num_valid[k]))
        wanted = sum(w * part for w, part in zip(weights_at[step], parts))
        torch.testing.assert_close(loss, wanted)
        found = torch.autograd.grad(loss, [model.unembedding, model.tables])
        for got, want in zip(found, torch.autograd.grad(wanted, [model.unembedding, model.tables])):
            torch.testing.assert_close(got, want)
        assert not any(t.requires_grad for t in sums.values())
        added = {name: added.get(name, 0) + value for name, value in sums.items()}
    torch.testing.assert_close(added["loss"], 2 * parts[0].detach())
    logged = objective.logged(added, 2)
    assert logged.keys() == {"objective", "head_loss", "head_accuracy", "head_weights"}
    assert logged["head_loss"] == pytest.approx([part.item() for part in parts])
    assert logged["head_accuracy"] == pytest.approx(right)
    shares = (own / num_valid).tolist()
    assert logged["head_weights"] == pytest.approx([share * w for share, w in zip(shares, [1.0, 0.4, 0.125])])
    both = [sum(w * part.item() for w, part in zip(weights, parts)) for weights in weights_at]
    assert logged["objective"] == pytest.approx(sum(both) / 2)


def test_a_head_without_a_valid_label_counts_for_nothing() -> None:
    batch = batch_of([0], [0], seed=4)
    batch.document_ids[:] = torch.arange(T, dtype=torch.int32)
    objective = FurtherTokens(2, lambda step: [1.0, 0.5], shared=False, detached=False)
    assert objective.num_valid(batch).tolist() == [T, 0]
    _, sums = objective(Heads(2), batch, torch.tensor([T, 1]), 0, False)
    assert sums["head_accuracy"][1] == 0 == sums["head_loss"][1] == sums["head_weights"][1]
    assert sums["head_weights"][0] == 1


def test_one_target_alone_is_the_next_tokens_loss_to_the_last_bit() -> None:
    """A weight of 1 would be multiplied with, so none is given."""
    batch, count = batch_of([0], [1], seed=4), torch.tensor([3])
    model = Heads(1)
    alone = FurtherTokens(1, lambda step: [0.5], shared=False, detached=True)(model, batch, count, 0, False)[0]
    hidden = model.tables[0, batch.tokens]
    assert torch.equal(alone, linear_cross_entropy(hidden, model.unembedding, batch.labels, num_valid=count[0]))
    shared = FurtherTokens(1, lambda step: [0.5], shared=True, detached=False)(model, batch, count, 0, False)[0]
    torch.testing.assert_close(shared, 0.5 * alone)


def test_rows_that_do_not_say_their_source_have_one_loss() -> None:
    batch = replace(batch_of([0, 1], [1, 2], seed=1), sources=None)
    objective, model = NextToken(SOURCES), Bigrams()
    loss, sums = objective(model, batch, objective.num_valid(batch), 0, True)
    wanted = F.cross_entropy(
        (model.embedding[batch.tokens] @ model.unembedding.T).flatten(0, 1), batch.labels.flatten()
    )
    torch.testing.assert_close(loss, wanted)
    assert list(sums) == ["loss"] and objective.logged(sums, 1) == {}
