"""Multi-token prediction against a loop over heads in float64, with torch's own loss."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evidence.pretend_cuda import pretending_cuda
from evidence.traffic import Counts, counting
from llmfast._dispatch import kernels_on_cpu
from llmfast.losses import linear_cross_entropy, mtp, mtp_cross_entropy, mtp_valid_counts
from llmfast.losses.mtp import _chosen, _Heads, head_targets
from llmfast.losses.plan import BudgetError
from support.launched import unrecorded
from support.numerics import assert_close_in_norm
from support.plans import forced
from support.ranks import Ranks
from support.waiting import NoWaiting

B, T, D, V = 2, 11, 16, 300
WEIGHTS = [1.0, 0.5, 0.25, 2.0]
KINDS = "padded", "packed", "prompts"
FORMS = "tensor", "list", "shared"


def batch(kind: str) -> tuple[Tensor, Tensor | None]:
    """Return labels and documents of rows that are padded at the end, packed, or begin with a prompt."""
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    if kind == "padded":
        labels[0, 6:] = labels[1, 9:] = -100
        return labels, None
    if kind == "prompts":
        labels[0, :4] = labels[1, 2:5] = -100
        return labels, None
    documents = torch.tensor([[0] * 4 + [1] * 5 + [2] * 2, [0] * 11], dtype=torch.int32)
    labels[0, 3] = labels[0, 8] = -100  # the next token is another document's
    return labels, documents


def reference(
    hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor, documents: Tensor | None, weights: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """Loop over the heads; each mean is over the head's own valid tokens."""
    losses = []
    for k, hidden in enumerate(hiddens):
        target = torch.full_like(labels, -100)
        for b in range(labels.shape[0]):
            for t in range(labels.shape[1] - k):
                if documents is None or documents[b, t] == documents[b, t + k]:
                    target[b, t] = labels[b, t + k]
        losses.append(F.cross_entropy((hidden @ weight.T).flatten(0, 1), target.flatten()))
    return torch.stack([w * loss for w, loss in zip(weights, losses)]).sum(), losses


def leaves(K: int, shared: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    hiddens = torch.randn(*(() if shared else (K,)), B, T, D).to(dtype).requires_grad_()
    return hiddens, (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_()


CASES = [
    (K, form, kind, torch.float64)
    for i, K in enumerate((1, 2, 3, 4))
    for j, form in enumerate(FORMS)
    for k, kind in enumerate(KINDS)
    if (i + j + k) % 2 == 0  # any two meet
]
CASES += [(K, form, "packed", torch.float32) for K in (1, 4) for form in FORMS]
CASES += [(3, form, "prompts", dtype) for form in FORMS for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("K", "form", "kind", "dtype"), CASES)
@unrecorded()
def test_is_a_loop_over_heads(path: str, K: int, form: str, kind: str, dtype: torch.dtype) -> None:
    labels, documents = batch(kind)
    hiddens, weight = leaves(K, form == "shared", dtype)
    given = [*hiddens] if form == "list" else hiddens
    with forced(None):
        loss, stats = mtp_cross_entropy(
            given,
            weight,
            labels,
            document_ids=documents,
            head_weights=WEIGHTS[:K],
            return_stats=True,
            memory_budget=1 << 30,
        )
        loss.backward()

    exact, low = ([t.detach().to(d).requires_grad_() for t in (hiddens, weight)] for d in (torch.float64, dtype))
    for h, w in (exact, low):
        total, losses = reference([h] * K if form == "shared" else [*h], w, labels, documents, WEIGHTS[:K])
        total.backward()
        if h is exact[0]:
            truth = total, losses
    # Three roundings of a logit are what low precision costs a mean; float64 is exact.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(loss.double(), truth[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(stats.head_loss.double(), torch.stack(truth[1]).detach(), rtol=tolerance, atol=0)
    assert torch.equal(stats.num_valid, mtp_valid_counts(labels, K, documents))
    for ours, theirs, true in zip((hiddens, weight), low, exact):
        if dtype == torch.float64:
            torch.testing.assert_close(ours.grad, true.grad, rtol=1e-12, atol=1e-14)
        else:
            assert_close_in_norm(ours.grad, theirs.grad, true.grad)


@unrecorded()
def test_heads_of_either_kind_take_the_weights_of_tokens(path: str) -> None:
    labels, _ = batch("prompts")
    hiddens, weight = leaves(3, False, torch.float32)
    weights, found = torch.rand(B, T), []
    for detached in (False, [True, False, True]):
        loss = mtp_cross_entropy(hiddens, weight, labels, token_weights=weights, detach_unembedding=detached)
        found.append((loss.detach(), *torch.autograd.grad(loss, hiddens)))
    for one, some in zip(*found):
        torch.testing.assert_close(some, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "z_loss": 1e-3, "label_smoothing": 0.1, "num_valid": 30}])
@unrecorded()
def test_one_head_is_the_linear_loss_bit_for_bit(path: str, options: dict[str, Any]) -> None:
    labels, _ = batch("prompts")
    results = []
    for by_heads in (True, False):
        hiddens, weight = leaves(1, False, torch.float32)
        if by_heads:
            given = {**options, **({"num_valid": [options["num_valid"]]} if "num_valid" in options else {})}
            loss = mtp_cross_entropy(hiddens, weight, labels, memory_budget=1 << 15, **given)
        else:
            loss = linear_cross_entropy(hiddens[0], weight, labels, memory_budget=1 << 15, **options)
        results.append([loss.detach(), *torch.autograd.grad(loss, (hiddens, weight))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("shared", [False, True])
@unrecorded()
def test_the_losses_of_heads_are_weighted_by_token(path: str, shared: bool) -> None:
    labels, documents = batch("packed")
    hiddens, weight = leaves(3, shared, torch.float32)
    token_weights = torch.rand(B, T)
    _, stats = mtp_cross_entropy(
        hiddens,
        weight,
        labels,
        document_ids=documents,
        head_weights=WEIGHTS[:3],
        token_weights=token_weights,
        return_stats=True,
    )
    for k in range(3):
        mean = linear_cross_entropy(
            hiddens if shared else hiddens[k],
            weight,
            labels,
            shift=k,
            document_ids=documents if k else None,
            token_weights=F.pad(token_weights[:, k:], (0, k)),
        )
        torch.testing.assert_close(stats.head_loss[k], mean.detach(), rtol=1e-5, atol=1e-6)


@unrecorded()
def test_options_reach_every_head(path: str) -> None:
    labels, documents = batch("packed")
    hiddens, weight = leaves(3, False, torch.float64)
    token_weights, class_weights = torch.rand(B, T).double(), torch.rand(V).double()
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {
        "softcap": 4.0,
        "logit_scale": 0.7,
        "z_loss": 1e-2,
        "label_smoothing": 0.1,
        "class_weights": class_weights,
    }
    loss = mtp_cross_entropy(
        hiddens,
        weight,
        labels,
        document_ids=documents,
        head_weights=torch.tensor(WEIGHTS[:3]),
        bias=bias,
        token_weights=token_weights,
        num_valid=[7, 8.0, 9],
        **options,
    )
    found = torch.autograd.grad(loss, (hiddens, weight, bias))
    total = torch.zeros((), dtype=torch.float64)
    for k in range(3):
        # Weights of labels move with them.
        moved = F.pad(token_weights[:, k:], (0, k))
        total = total + WEIGHTS[k] / (7 + k) * linear_cross_entropy(
            hiddens[k],
            weight,
            labels,
            bias=bias,
            shift=k,
            document_ids=documents if k else None,
            reduction="sum",
            token_weights=moved,
            **options,
        )
    torch.testing.assert_close(loss, total, rtol=1e-12, atol=0)
    for a, b in zip(found, torch.autograd.grad(total, (hiddens, weight, bias))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "detached", [True, [False, True, True], [True, False, False], [False, True, False], [True, False, True]]
)
@unrecorded()
def test_heads_that_leave_the_unembedding_alone(path: str, detached: Any) -> None:
    labels, _ = batch("padded")
    hiddens, weight = leaves(3, False, torch.float64)
    loss, stats = mtp_cross_entropy(hiddens, weight, labels, detach_unembedding=detached, return_stats=True)
    found = torch.autograd.grad(loss, (hiddens, weight), allow_unused=True)
    each = [detached] * 3 if isinstance(detached, bool) else detached
    parts = []
    for k in range(3):
        w = weight.detach() if each[k] else weight
        parts.append(linear_cross_entropy(hiddens[k], w, labels, shift=k))
    torch.testing.assert_close(loss, sum(parts), rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.head_loss, torch.stack(parts).detach(), rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(sum(parts), (hiddens, weight), allow_unused=True)
    for a, b in zip(found, wanted):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@unrecorded()
def test_a_head_of_no_weight_is_measured_and_changes_nothing(path: str) -> None:
    labels, _ = batch("padded")
    hiddens, weight = leaves(2, False, torch.float32)
    weights = torch.tensor([1.0, 0.0])
    loss, stats = mtp_cross_entropy(hiddens, weight, labels, head_weights=weights, return_stats=True)
    alone, second = (linear_cross_entropy(hiddens[k], weight, labels, shift=k) for k in range(2))
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(stats.head_loss[1], second.detach())
    d_hiddens, _ = torch.autograd.grad(loss, (hiddens, weight))
    assert d_hiddens[1].abs().max() < 1e-19


@unrecorded()
def test_heads_without_a_token(path: str) -> None:
    hiddens, weight = leaves(3, False, torch.float32)
    labels = torch.full((B, T), -100)
    labels[:, 0] = 3  # only head 0 can predict it
    loss, stats = mtp_cross_entropy(hiddens, weight, labels, return_stats=True)
    torch.testing.assert_close(loss, linear_cross_entropy(hiddens[0], weight, labels))
    assert stats.head_loss[1:].isnan().all() and stats.num_valid.tolist() == [2, 0, 0]
    nothing = mtp_cross_entropy(hiddens, weight, torch.full((B, T), -100))
    assert nothing.isnan()
    assert all((g == 0).all() for g in torch.autograd.grad(nothing, (hiddens, weight)))
    empty = mtp_cross_entropy(hiddens[:, :, :0], weight, labels[:, :0])
    assert empty.isnan()


def test_accuracy(path: str) -> None:
    weight = torch.eye(6)
    labels = torch.tensor([[1, 2, 3, 4]])
    hiddens = torch.stack([F.one_hot(torch.tensor([[1, 2, 3, 0]]), 6), F.one_hot(torch.tensor([[2, 0, 0, 5]]), 6)])
    _, stats = mtp_cross_entropy(hiddens.float(), weight, labels, return_stats=True)
    torch.testing.assert_close(stats.accuracy, torch.tensor([3 / 4, 1 / 3]))
    _, stats = mtp_cross_entropy(hiddens[0].float(), weight, labels, head_weights=[1, 1], return_stats=True)
    torch.testing.assert_close(stats.accuracy, torch.tensor([3 / 4, 0.0]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("K", [1, 3])
def test_another_ignore_index_reaches_every_statistic(path: str, K: int, form: str) -> None:
    labels, documents = batch("prompts")
    hiddens, weight = leaves(K, form == "shared", torch.float32)
    given = [*hiddens] if form == "list" else hiddens
    options: dict[str, Any] = {"document_ids": documents, "head_weights": WEIGHTS[:K], "return_stats": True}
    if form != "shared" and K == 1:
        del options["head_weights"]
    assert labels.eq(-100).any()
    want = mtp_cross_entropy(given, weight, labels, **options)
    got = mtp_cross_entropy(given, weight, labels.masked_fill(labels == -100, 5000), ignore_index=5000, **options)
    torch.testing.assert_close(got[0], want[0])
    for a, b in zip(got[1], want[1]):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_counts_of_valid_tokens() -> None:
    labels, documents = batch("packed")
    assert mtp_valid_counts(labels, 4, documents).tolist() == [20, 16, 12, 9]
    assert mtp_valid_counts(labels, 2).tolist() == [20, 18]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiddens": torch.randn(2, B, T + 1, D)}, r"hiddens must be \(K, \*\(2, 11\), D\)"),
        ({"hiddens": [torch.randn(B, T, D), torch.randn(B, T, D + 1)]}, r"hiddens\[1\] must be"),
        ({"hiddens": []}, "at least one head"),
        ({"hiddens": torch.randn(B, T, D)}, "head_weights must say how many"),
        ({"head_weights": [1.0]}, "head_weights must be 2 numbers, one per head; got 1"),
        ({"head_weights": torch.ones(1)}, r"head_weights must be \(2,\), one number per head"),
        ({"num_valid": torch.ones(3)}, r"num_valid must be \(2,\)"),
        ({"detach_unembedding": [True]}, "detach_unembedding must be a bool or 2"),
        ({"document_ids": torch.zeros(B, T)}, r"document_ids must be \(2, 11\) integers"),
        ({"reduction": "sum"}, "reduction must be left out"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    labels, _ = batch("padded")
    given: dict[str, Any] = {"hiddens": torch.randn(2, B, T, D), "weight": torch.randn(V, D), "labels": labels}
    with pytest.raises((ValueError, TypeError), match=message):
        mtp_cross_entropy(**(given | change))


@unrecorded()
def test_a_whole_graph_without_recompilation(path: str) -> None:
    labels, documents = batch("packed")
    compiles = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal compiles
        compiles += 1
        return graph

    def loss(h: Tensor, w: Tensor, weights: Tensor, y: Tensor, d: Tensor) -> Tensor:
        return mtp_cross_entropy(h * 1.0, w, y, document_ids=d, head_weights=weights, memory_budget=20000)

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for weights in (torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.1]), torch.tensor([0.3, 0.3])):
        hiddens, weight = leaves(2, False, torch.float32)
        assert documents is not None
        ours = compiled(hiddens, weight, weights, labels, documents)
        plain = loss(hiddens, weight, weights, labels, documents)
        torch.testing.assert_close(ours, plain)
        for a, b in zip(torch.autograd.grad(ours, (hiddens, weight)), torch.autograd.grad(plain, (hiddens, weight))):
            torch.testing.assert_close(a, b)
    assert compiles == 1


@pytest.mark.parametrize("shared", [False, True])
def test_the_host_waits_for_nothing(shared: bool) -> None:
    labels, documents = batch("packed")
    with pretending_cuda():
        hiddens, weight = leaves(3, shared, torch.bfloat16)
        with NoWaiting():
            loss, _ = mtp_cross_entropy(
                hiddens,
                weight,
                labels,
                document_ids=documents,
                head_weights=torch.tensor([1.0, 0.3, 0.1]),
                num_valid=torch.tensor([20, 16, 12]),
                return_stats=True,
            )
            loss.backward()


def gradients(rank: int, world: int, ranks: int, micro: int, dtype: torch.dtype) -> list[Tensor]:
    """Return gradients of 8 rows divided over some ranks and micro-batches, summed over all."""
    torch.manual_seed(3)
    K, rows = 3, 8
    labels = torch.randint(0, V, (rows, T))
    labels[0, 2:5] = labels[3] = labels[5, 1:] = -100  # all but evenly spread
    documents = (torch.arange(T) > 6).int().expand(rows, T)
    hiddens = torch.randn(K, rows, T, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    counts = torch.zeros(K, dtype=torch.int64)
    mine = range(rank, rows, ranks) if rank < ranks else []
    pieces = [list(mine)[i::micro] for i in range(micro)]
    for piece in pieces:
        counts += mtp_valid_counts(labels[piece], K, documents[piece])
    torch.distributed.all_reduce(counts)
    for piece in pieces:
        if piece:
            mtp_cross_entropy(
                hiddens[:, piece],
                weight,
                labels[piece],
                document_ids=documents[piece],
                num_valid=counts,
                head_weights=[1.0, 0.3, 0.1],
            ).backward()
    found = [torch.zeros_like(t) if t.grad is None else t.grad for t in (hiddens, weight)]
    for g in found:
        torch.distributed.all_reduce(g)
    return found


def test_any_split_of_a_batch_gives_the_same_gradients(tmp_path: Path) -> None:
    group = Ranks(4, tmp_path)
    try:
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            whole = group.run(gradients, 1, 1, dtype)[0]
            for ranks, micro in ((1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)):
                for mine in group.run(gradients, ranks, micro, dtype):
                    for a, b in zip(mine, whole):
                        assert (a - b).abs().max() <= tolerance * b.abs().max()
    finally:
        group.close()


n, d, v = 1024, 128, 8192


class Unembedding(TorchDispatchMode):
    """Bytes that torch's operators move of matrices of the unembedding's size."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in ("empty", "empty_like", "detach", "t"):
            given = [*args, *(kwargs or {}).values()]
            tensors = {id(t): t for t in (*given, made) if isinstance(t, Tensor) and t.numel() == v * d}
            self.moved += sum(t.nbytes for t in tensors.values())
            read_and_written = func.overloadpacket.__name__ == "addmm"
            self.moved += sum(t.nbytes for t in tensors.values() if read_and_written and t.dtype == torch.float32)
        return made


def counted(K: int, shared: bool = False, apart: bool = False, rows: int = n // 4) -> tuple[Counts, float]:
    """Count a bfloat16 call on a pretended GPU whose slab is a quarter of one head's logits, and bytes of W and dW."""
    with pretending_cuda():
        hiddens = torch.randn(*(() if shared else (K,)), 1, n, d, dtype=torch.bfloat16).requires_grad_()
        weight = torch.randn(v, d, dtype=torch.bfloat16).requires_grad_()
        labels = torch.randint(0, v, (1, n))
        with forced("chunk", rows=rows), counting(dry=True) as counts, Unembedding() as unembedding:
            if apart:
                parts = [linear_cross_entropy(hiddens[k], weight, labels, shift=k) for k in range(K)]
                torch.stack(parts).sum().backward()
            else:
                mtp_cross_entropy(hiddens, weight, labels, head_weights=[1.0] * K).backward()
    return counts, unembedding.moved + sum(t.dram for t in counts.traffic if t.name == "scale_kernel")


def test_one_gradient_leaves_room_for_fewer_chunks() -> None:
    """Calls of their own hold a float32 gradient of the unembedding each; in that room, one call reads W less often."""
    apart, moved_apart = counted(4, apart=True)
    room = 3 * 4 * v * d - (1 << 18)
    together, moved = counted(4, rows=n // 4 + room // (v * 2))
    assert together.peak_bytes <= apart.peak_bytes
    assert 2 * moved <= moved_apart, (moved, moved_apart)


def test_memory_does_not_grow_with_heads() -> None:
    own = {K: counted(K)[0].peak_bytes - 2 * K * 1024 * 128 for K in (1, 2, 4)}  # beyond the hidden states' gradients
    assert own[4] <= 1.03 * own[1], own
    assert counted(4, shared=True)[0].peak_bytes <= 1.03 * counted(1, shared=True)[0].peak_bytes


def test_products_of_heads() -> None:
    one = 6 * 1024 * 128 * 8192
    for K in (1, 2, 4):
        assert sum(counted(K)[0].total().dot_flops.values()) == K * one
        assert sum(counted(K, shared=True)[0].total().dot_flops.values()) == one


def test_kernels_take_part(kernels: None) -> None:
    """Record every form once."""
    labels, documents = batch("packed")
    for dtype in (torch.float32, torch.bfloat16):
        for shared in (False, True):
            hiddens, weight = leaves(3, shared, dtype)
            with kernels_on_cpu():
                mtp_cross_entropy(hiddens, weight, labels, document_ids=documents, head_weights=[1, 1, 1]).backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("token_weights", [False, True])
@pytest.mark.parametrize("divided", [False, True])
def test_statistics_with_every_option_that_changes_them(form: str, token_weights: bool, divided: bool) -> None:
    """Softcap, scale and bias; weights of which an ignored label's is NaN; a head's divisor; gradients off."""
    labels, documents = batch("packed")
    hiddens, weight = leaves(3, form == "shared", torch.float64)
    given = torch.rand(B, T, generator=torch.Generator().manual_seed(2)).double()
    given[labels == -100] = torch.nan
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"bias": bias, "softcap": 4.0, "logit_scale": 0.7, "document_ids": documents}
    options |= {"token_weights": given} if token_weights else {}
    options |= {"num_valid": torch.tensor([20, 18, 16])} if divided else {}
    loss, stats = mtp_cross_entropy(
        [*hiddens] if form == "list" else hiddens,
        weight,
        labels,
        head_weights=WEIGHTS[:3],
        return_stats=True,
        **options,
    )
    wanted = []
    for k in range(3):
        hidden = hiddens if form == "shared" else hiddens[k]
        logits = 4.0 * (0.7 * (hidden @ weight.T + bias) / 4.0).tanh()
        target = head_targets(labels, 3, documents, -100)[k]
        each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        weights = F.pad(given[:, k:], (0, k)).flatten() if token_weights else torch.ones(B * T).double()
        weights = torch.where(target.flatten() == -100, 0.0, weights)
        divisor = (20.0, 18.0, 16.0)[k] if divided else weights.sum()
        wanted.append((torch.where(weights == 0, 0.0, each * weights)).sum() / divisor)
    torch.testing.assert_close(loss, sum(w * one for w, one in zip(WEIGHTS, wanted)))
    torch.testing.assert_close(stats.head_loss, torch.stack(wanted).detach())
    assert stats.num_valid.tolist() == mtp_valid_counts(labels, 3, documents).tolist()
    assert not any(t.requires_grad for t in stats)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("divided", [False, True])
@unrecorded()
def test_the_losses_of_heads_are_weighted_by_class(path: str, shared: bool, divided: bool) -> None:
    labels, documents = batch("packed")
    hiddens, weight = leaves(3, shared, torch.float32)
    class_weights, divisors = torch.rand(V) + 0.5, torch.tensor([20.0, 18.0, 16.0])
    options: dict[str, Any] = {"document_ids": documents, "class_weights": class_weights}
    options |= {"num_valid": divisors} if divided else {}
    _, stats = mtp_cross_entropy(hiddens, weight, labels, head_weights=WEIGHTS[:3], return_stats=True, **options)
    for k, target in enumerate(head_targets(labels, 3, documents, -100)):
        logits, wide = (hiddens if shared else hiddens[k]).double() @ weight.double().T, class_weights.double()
        wanted = F.cross_entropy(logits.flatten(0, 1), target.flatten(), wide, reduction="sum").detach()
        wanted /= divisors[k] if divided else wide[target[target != -100]].sum()
        torch.testing.assert_close(stats.head_loss[k].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("detached", [False, True])
def test_a_detached_unembedding_takes_its_bias_along(shared: bool, detached: bool) -> None:
    labels, _ = batch("padded")
    hiddens, weight = leaves(2, shared, torch.float64)
    bias = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    loss = mtp_cross_entropy(
        hiddens, weight, labels, bias=bias, head_weights=[1.0, 0.5], detach_unembedding=[detached] * 2
    )
    found = torch.autograd.grad(loss, (hiddens, weight, bias), allow_unused=True)
    assert found[0] is not None and [g is None for g in found[1:]] == [detached] * 2
    one = mtp_cross_entropy(
        hiddens[None] if shared else hiddens[:1], weight, labels, bias=bias, detach_unembedding=True
    )
    found = torch.autograd.grad(one, (hiddens, weight, bias), allow_unused=True)
    assert found[0] is not None and found[1] is found[2] is None


@pytest.mark.parametrize("heads", [[0], [1, 2], [0, 2], [3, 1], [0, 1, 2, 3]])
def test_some_heads_are_a_view_where_they_follow_each_other(heads: list[int]) -> None:
    t = torch.randn(4, 2, 3)
    found = _chosen(t, heads)
    assert torch.equal(found, t[heads])
    assert (found.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()) == (heads not in ([0, 2], [3, 1]))


@pytest.mark.parametrize("copied", [0, 1000])
def test_bytes_that_heads_hold(copied: int) -> None:
    targets = torch.zeros(3, 2, 5, dtype=torch.int64)
    heads = _Heads(targets, targets == 0, torch.ones(3), torch.ones(()), None, copied)
    assert heads.held == copied + 30 * (8 + 1)
    weighted = replace(heads, token_weights=torch.ones(3, 2, 5))
    assert weighted.held == copied + 30 * (8 + 1 + 4)
    part = weighted.chosen([2])
    assert part.targets.shape == (1, 2, 5) and part.copied == 0 and part.held == 10 * 13


@pytest.mark.parametrize(("hiddens", "copied"), [(1, 0), (3, 3)])
@pytest.mark.parametrize("form", ["list", "tensor"])
def test_the_copy_of_a_list_counts_towards_the_budget(
    hiddens: int, copied: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    ready = mtp.made_ready
    monkeypatch.setattr(
        mtp, "made_ready", lambda bytes_held, *rest: held.append(bytes_held) or ready(bytes_held, *rest)
    )
    labels, _ = batch("padded")
    given: Any = torch.randn(hiddens, B, T, D)
    loss = mtp_cross_entropy(
        [*given] if form == "list" else given, torch.randn(V, D), labels, head_weights=[1] * hiddens
    )
    assert loss.isfinite()
    copy = copied * B * T * D * 4 if form == "list" else 0
    assert held == [hiddens * B * T * (8 + 1) + copy]


def test_each_kind_of_heads_takes_half_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detached heads and others are computed in two calls, whose copies and joined gradients count too."""
    given: list[tuple[int, Any]] = []
    ready = mtp.made_ready

    def noted(held: int, hidden: Tensor, weight: Tensor, targets: Tensor, stats: bool, options: Any) -> Any:
        given.append((held - len(targets) * B * T * 9, options["memory_budget"]))
        return ready(held, hidden, weight, targets, stats, options)

    monkeypatch.setattr(mtp, "made_ready", noted)
    labels, _ = batch("padded")
    one = B * T * D * 4
    for grad in (False, True):
        hiddens, weight = torch.randn(3, B, T, D, requires_grad=grad), torch.randn(V, D, requires_grad=True)
        joined = 3 * one if grad else 0
        for detached, copies in (([False, True, True], (0, 0)), ([True, False, True], (0, 2))):
            for form, copied in ((hiddens, 0), ([*hiddens], 3 * one // 2)):
                given.clear()
                mtp_cross_entropy(form, weight, labels, detach_unembedding=detached, memory_budget=1 << 20)
                assert given == [(copied + joined + c * one, 1 << 19) for c in copies]
    with pytest.raises(BudgetError) as caught:
        mtp_cross_entropy(hiddens, weight, labels, detach_unembedding=[True, False, False], memory_budget=1)
    least = caught.value.least
    mtp_cross_entropy(hiddens, weight, labels, detach_unembedding=[True, False, False], memory_budget=least)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor(1), "hiddens": torch.randn(2, D)}, "labels must have a token axis"),
        ({"hiddens": torch.randn(0, B, T, D)}, r"hiddens must be \(K, "),
        ({"shift": 1}, "shift must be left out: each head has a mean"),
        ({"target_weights": torch.ones(B, T)}, "target_weights must be left out"),
        ({"head_weights": torch.ones(2, requires_grad=True)}, "head_weights gets no gradient here; detach it"),
        ({"num_valid": torch.ones(2, requires_grad=True)}, "num_valid gets no gradient here; detach it"),
        ({"document_ids": torch.zeros(B, T - 1, dtype=torch.int64)}, r"document_ids must be \(2, 11\) integers"),
        (
            {"hiddens": torch.randn(B, T, D), "head_weights": [1, 1], "detach_unembedding": [True, False]},
            "detach_unembedding must be the same for heads that share their logits",
        ),
    ],
)
def test_refuses_more(change: dict[str, Any], message: str) -> None:
    labels, _ = batch("padded")
    given: dict[str, Any] = {"hiddens": torch.randn(2, B, T, D), "weight": torch.randn(V, D), "labels": labels}
    with pytest.raises((ValueError, TypeError), match=message):
        mtp_cross_entropy(**(given | change))


def test_counts_by_other_arguments() -> None:
    labels = torch.tensor([[1, 0, 7, 7, 2]])
    assert mtp_valid_counts(labels, 2, ignore_index=7).tolist() == [3, 2]
    assert mtp_valid_counts(labels, 2).tolist() == [5, 4] and mtp_valid_counts(labels, 7).tolist()[4:] == [1, 0, 0]
    for heads in (0, -1):
        with pytest.raises(ValueError, match=f"heads must be positive; got {heads}"):
            mtp_valid_counts(labels, heads)
    with torch.device("meta"):
        assert mtp_valid_counts(labels, 2, torch.tensor([[0, 0, 1, 1, 1]], device="cpu")).tolist() == [5, 3]


def test_a_head_of_no_weight_is_measured_as_well_as_others() -> None:
    """Its sum is divided by its factor again, which must not be lost among the others'."""
    labels, _ = batch("padded")
    hiddens, weight = leaves(3, False, torch.float32)
    _, of_all = mtp_cross_entropy(hiddens, weight, labels, return_stats=True)
    loss, stats = mtp_cross_entropy(hiddens, weight, labels, head_weights=[1e3, 0.0, 1.0], return_stats=True)
    torch.testing.assert_close(stats.head_loss, of_all.head_loss, rtol=1e-6, atol=0)
    wanted = 1e3 * of_all.head_loss[0].double() + of_all.head_loss[2].double()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_an_ignored_label_is_no_hit_though_its_number_is_a_class(path: str, shared: bool) -> None:
    labels = torch.tensor([[2, 2, 1, 2, 1]])
    hidden = F.one_hot(torch.full((1, 5), 2), 4).float()  # says class 2 everywhere
    hiddens = hidden if shared else torch.stack([hidden, hidden])
    _, stats = mtp_cross_entropy(
        hiddens, torch.eye(4), labels, ignore_index=2, head_weights=[1.0, 1.0], return_stats=True
    )
    assert stats.num_valid.tolist() == [2, 2] and stats.accuracy.tolist() == [0, 0]
    _, stats = mtp_cross_entropy(
        hiddens, torch.eye(4), labels, ignore_index=1, head_weights=[1.0, 1.0], return_stats=True
    )
    assert stats.num_valid.tolist() == [3, 2] and stats.accuracy.tolist() == [1, 1]


def test_numbers_of_heads_go_to_the_labels_device(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, torch.device]] = []

    def on_device(name: str, t: Tensor, device: torch.device) -> Tensor:
        moved.append((name, device))
        return t

    monkeypatch.setattr(mtp, "on_device", on_device)
    labels, _ = batch("padded")
    given = {"head_weights": torch.ones(2), "num_valid": torch.tensor([5, 6])}
    mtp_cross_entropy(torch.randn(2, B, T, D), torch.randn(V, D), labels, **given)
    assert moved == [("head_weights", labels.device), ("num_valid", labels.device)]


@pytest.mark.parametrize("shared", [False, True])
def test_a_head_whose_tokens_weigh_nothing_adds_nothing(path: str, shared: bool) -> None:
    labels, token_weights = torch.tensor([[3, 4]]), torch.tensor([[2.0, 0.0]])  # head 1 predicts the second alone
    hiddens, weight = torch.randn(*([] if shared else [2]), 1, 2, D), torch.randn(V, D)
    leaf = hiddens.clone().requires_grad_()
    loss = mtp_cross_entropy(leaf, weight, labels, token_weights=token_weights, head_weights=[1.0, 1.0])
    first = hiddens if shared else hiddens[0]
    torch.testing.assert_close(loss.detach(), linear_cross_entropy(first, weight, labels, token_weights=token_weights))
    loss.backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


@pytest.mark.parametrize(("K", "shared"), [(1, False), (1, True), (2, False), (2, True)])
def test_statistics_need_no_gradient(path: str, K: int, shared: bool) -> None:
    labels, _ = batch("padded")
    hiddens, weight = leaves(K, shared, torch.float32)
    given: dict[str, Any] = {"head_weights": [1.0] * K} if shared else {}
    loss, stats = mtp_cross_entropy(hiddens, weight, labels, return_stats=True, **given)
    assert loss.requires_grad and not any(t.requires_grad for t in stats)
    assert [t.shape for t in stats] == [(K,)] * 3 and stats.num_valid.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_logit_of_a_shared_target_is_not_rounded(path: str, dtype: torch.dtype) -> None:
    n_ones = 2049 if dtype == torch.float16 else 257  # which the dtype does not hold
    weight = torch.stack([torch.ones(n_ones), torch.zeros(n_ones)]).to(dtype)
    hidden = torch.full((1, 2, n_ones), 1 / 16).to(dtype)
    given: dict[str, Any] = {"head_weights": [1.0, 1.0], "slab_dtype": torch.float32, "return_stats": True}
    _, stats = mtp_cross_entropy(hidden, weight, torch.zeros(1, 2).long(), **given)
    wanted = torch.tensor(-n_ones / 16).exp().log1p()
    torch.testing.assert_close(stats.head_loss, wanted.expand(2), rtol=1e-4, atol=1e-6)


def test_heads_that_share_their_logits_hold_their_targets_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    ready = mtp.made_ready
    monkeypatch.setattr(mtp, "made_ready", lambda own, *rest: held.append(own) or ready(own, *rest))
    labels, _ = batch("padded")
    mtp_cross_entropy(torch.randn(B, T, D), torch.randn(V, D), labels, head_weights=[1.0, 1.0, 1.0])
    assert held == [3 * B * T * (8 + 1 + 8)]  # by head, and by row


def test_statistics_of_shared_logits_need_every_class() -> None:
    labels, _ = batch("padded")
    given: dict[str, Any] = {"head_weights": [1.0, 1.0], "process_group": object()}
    with pytest.raises(ValueError, match="return_stats of shared logits needs every class's unembedding"):
        mtp_cross_entropy(torch.randn(B, T, D), torch.randn(V, D), labels, return_stats=True, **given)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("given", [None, [4, 4, 4], [4.0] * 3, torch.full((3,), 4), torch.full((3,), 4.0).double()])
def test_statistics_have_their_dtypes_whatever_is_given(
    path: str, given: Any, dtype: torch.dtype, shared: bool
) -> None:
    """Test it with a last head that has no valid token."""
    hidden, weight = torch.randn(5, 8).to(dtype), torch.randn(30, 8).to(dtype)
    labels = torch.tensor([-100, 3, -100, -100, -100])
    hiddens = hidden if shared else hidden.expand(3, 5, 8)
    _, stats = mtp_cross_entropy(hiddens, weight, labels, head_weights=[1.0] * 3, num_valid=given, return_stats=True)
    wide = torch.promote_types(dtype, torch.float32)
    assert [t.dtype for t in stats] == [wide, wide, torch.int64] and stats.num_valid.tolist() == [1, 1, 0]
    assert stats.accuracy[2].isnan() and not stats.accuracy[:2].isnan().any()
    assert stats.head_loss[2].isnan() if given is None else stats.head_loss[2] == 0
    rows = torch.nn.functional.cross_entropy(hidden[:2].double() @ weight.double().T, labels[[1, 1]], reduction="none")
    torch.testing.assert_close(stats.head_loss[:2].double(), rows.flip(0) / (given is None or 4), rtol=2e-2, atol=0)
