"""`logprobs` and `linear_logprobs` on both paths, against `log_softmax(...).gather`."""

import importlib
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evidence.pretend_cuda import pretending_cuda
from evidence.traffic import counting
from llmfast.losses import (
    cross_entropy,
    linear_cross_entropy,
    linear_logprobs,
    logprobs,
    mtp_cross_entropy,
    mtp_logprobs,
    mtp_valid_counts,
    reference,
)
from llmfast.losses.linear_cross_entropy import made_ready
from support.launched import unrecorded
from support.numerics import assert_close_in_norm, assert_no_worse
from support.plans import SIZES, forced

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
D = 6
ROUNDINGS = {BF16: 1, F32: 4, F64: 16}  # the truth in float64 is rounded itself
OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 0.7},
    {"logit_scale": -1.3, "temperature": 0.6},
    {"softcap": 5.0, "logit_scale": 1.7, "temperature": 1.6, "ignore_index": 0},
]


def draw_ids(tokens: tuple[int, ...], K: int | None, V: int, ignore_index: int = -100) -> Tensor:
    """Draw ids, of which some are equal and about a fifth are ignored."""
    shape = tokens if K is None else (*tokens, K)
    ids = torch.randint(0, V, shape)
    if K is not None and K > 1:
        ids[..., K // 2] = ids[..., 0]
    ids[torch.rand(shape) < 0.2] = ignore_index
    return ids


def outcome(function: Callable[..., Any], inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Return log-probabilities and statistics, if there are some, then the gradients of their weighted sum."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    found = function(*leaves)
    values, stats = found if isinstance(found, tuple) else (found, None)
    total = (values * upstream[0].to(values.dtype)).sum()
    if stats is not None:
        total = total + (stats.lse * upstream[1]).sum() + (stats.entropy * upstream[2]).sum()
        assert not stats.argmax.requires_grad and (stats.rank is None or not stats.rank.requires_grad)
    gradients = torch.autograd.grad(total, leaves)
    return [values.detach(), *([] if stats is None else [stats.lse.detach(), stats.entropy.detach()]), *gradients]


def upstream_of(ids: Tensor, tokens: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(ids.shape), torch.randn(tokens), torch.randn(tokens)]


def compare(ours: list[Tensor], plain: list[Tensor], truth: list[Tensor], eps: float, K: int | None) -> None:
    """Compare, allowing some roundings with which torch can be lucky: of sums of K random numbers, which may cancel."""
    for a, b, c in zip(ours, plain, truth, strict=True):
        assert a.shape == c.shape and a.dtype == b.dtype
        error, allowed = (a - c).double().norm(), (b - c).double().norm()
        slack = 8 * eps * (c.norm() + (K or 1) ** 0.5)
        assert error <= 1.5 * allowed + slack, f"error {error:.3g}, torch's {allowed:.3g}, slack {slack:.3g}"


def drawn(case: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a case, with a temperature for each token where it says so."""
    options: dict[str, Any] = dict(case["options"])
    if case["per_token"]:
        options["temperature"] = torch.rand(case["tokens"]).to(case["per_token"]) * 2 + 0.5
    return options


cases = {
    "K": st.sampled_from([None, 1, 8, 64]),
    "tokens": st.sampled_from([(1,), (9,), (3, 4), (2, 1, 3), (), (0,)]),
    "V": st.sampled_from([1, 2, 127, 128, 1000, 1025, 3001]),
    "dtype": st.sampled_from([F32, BF16, F64]),
    "options": st.sampled_from(OPTIONS),
    "per_token": st.sampled_from([None, F32, F64]),  # temperatures
    "stats": st.sampled_from([{}, {"return_stats": True}, {"return_stats": True, "return_rank": True}]),
    "seed": st.integers(0, 1000),
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(**cases)
@unrecorded()
def test_logits_match_float64(path: str, **case: Any) -> None:
    torch.manual_seed(case["seed"])
    tokens, V, dtype, stats, options = case["tokens"], case["V"], case["dtype"], case["stats"], drawn(case)
    ids = draw_ids(tokens, case["K"], V, options.get("ignore_index", -100))
    logits = (torch.randn(*tokens, V) * 2).to(dtype)
    upstream = upstream_of(ids, tokens)

    def run(function: Any, x: Tensor) -> list[Tensor]:
        return outcome(lambda x: function(x, ids, **stats, **options), [x], upstream)

    eps = torch.finfo(dtype).eps * ROUNDINGS[dtype]
    ours, plain = run(logprobs, logits), run(reference.logprobs, logits)
    compare(ours, plain, run(reference.logprobs, logits.double()), eps, case["K"])
    if "return_rank" in stats:
        options = {**options, **stats}
        found, truth = (
            f(logits.detach().to(t), ids, **options)[1] for f, t in ((logprobs, dtype), (reference.logprobs, F64))
        )
        assert torch.equal(found.rank, truth.rank)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(**cases, bias=st.booleans(), slab_dtype=st.sampled_from([None, F32]), size=st.sampled_from([*SIZES]))
@unrecorded()
def test_hidden_states_match_float64(path: str, **case: Any) -> None:
    torch.manual_seed(case["seed"])
    tokens, V, dtype, options = case["tokens"], case["V"], case["dtype"], drawn(case)
    ids = draw_ids(tokens, case["K"], V, options.get("ignore_index", -100))
    inputs = [torch.randn(*tokens, D).to(dtype), torch.randn(V, D).to(dtype)]
    inputs += [torch.randn(V).to(dtype)] if case["bias"] else []
    upstream = upstream_of(ids, tokens)

    def run(function: Any, inputs: list[Tensor], **more: Any) -> list[Tensor]:
        def call(h: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
            return function(h, w, ids, bias=b, **case["stats"], **options, **more)

        return outcome(call, inputs, upstream)

    slab = None if dtype == F64 else case["slab_dtype"]
    with forced(None, case["size"]):
        ours = run(linear_logprobs, inputs, slab_dtype=slab)
    truth = run(reference.linear_logprobs, [t.double() for t in inputs])
    eps = torch.finfo(dtype).eps * ROUNDINGS[dtype]
    compare(ours, run(reference.linear_logprobs, inputs), truth, eps, case["K"])


@pytest.mark.parametrize("mode", ["materialise", "recompute"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("K", "stats"), [(1, False), (1, True), (8, False), (64, False)])
def test_modes_at_a_real_vocabulary(path: str, mode: str, dtype: torch.dtype, K: int, stats: bool) -> None:
    """Take three whole tiles and a tail; these launches are compiled too."""
    N, V = 4, 50257  # a multiple of the chunks, because some CPUs round the product of a single row ten times more
    hidden, weight, ids = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype), draw_ids((N,), K, V)
    ids[1, 0] = 16384  # the first column of a tile
    upstream = upstream_of(ids, (N,))

    def run(function: Any, *inputs: Tensor) -> list[Tensor]:
        return outcome(lambda h, w: function(h, w, ids, return_stats=stats), [*inputs], upstream)

    # The code for 8 ids has nothing that the codes for 1 and 64 do not have.
    with forced(mode, rows=2 if mode == "recompute" else N), unrecorded() if K == 8 else nullcontext():
        ours = run(linear_logprobs, hidden, weight)
    theirs, truth = (run(reference.linear_logprobs, hidden.to(t), weight.to(t)) for t in (dtype, F64))
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert_close_in_norm(a, b, c, factor=2.5)


def test_one_id_is_the_loss(path: str) -> None:
    hidden, weight, ids = torch.randn(9, D), torch.randn(300, D), draw_ids((9,), None, 300)
    one = [torch.ones(9)]
    ours = outcome(lambda h, w: linear_logprobs(h, w, ids), [hidden, weight], one)
    losses = outcome(lambda h, w: linear_cross_entropy(h, w, ids, reduction="none"), [hidden, weight], one)
    for a, b in zip(ours, losses, strict=True):
        torch.testing.assert_close(a, -b, rtol=1e-6, atol=1e-6)
    x = hidden @ weight.T
    torch.testing.assert_close(logprobs(x, ids), -cross_entropy(x, ids, reduction="none"))


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e8])
def test_no_digits_are_lost_to_an_offset(path: str, offset: float) -> None:
    logits, ids = torch.randn(24, 1100) * 2 + offset, draw_ids((24,), 3, 1100)
    upstream = [torch.randn(ids.shape)]
    ours, theirs, truth = (
        outcome(lambda x, of=of: of(x, ids), [logits.to(dtype)], upstream)  # type: ignore[misc]
        for of, dtype in ((logprobs, F32), (reference.logprobs, F32), (reference.logprobs, F64))
    )
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert_no_worse(a, b, c, scale=10.0)


def test_confident_tokens_keep_their_digits(path: str) -> None:
    """Lose no more than the rounding of a sum near 1, however far apart the logits are."""
    logits = torch.zeros(3, 300)
    logits[:, 7] = torch.tensor([10.0, 18.0, 25.0])
    found = logprobs(logits, torch.tensor([[7, 0]] * 3))
    truth = logits.double().log_softmax(1)[:, [7, 0]]
    assert ((found - truth).abs() <= 4e-7 + 6e-8 * truth.abs()).all()


def test_ids_without_a_chance(path: str) -> None:
    """Give an id whose logit is -inf a log-probability of -inf, and leave the others as they are."""
    logits = torch.randn(2, 1500)
    logits[:, 1000:] = -torch.inf
    ids = torch.tensor([[3, 1200], [1499, 0]])
    found = logprobs(logits, ids)
    torch.testing.assert_close(found, logits.log_softmax(1).gather(1, ids))
    assert found.isinf().tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("K", [None, 3])
def test_ignored_ids_have_no_gradient(path: str, K: int | None) -> None:
    hidden, weight = torch.randn(5, D), torch.randn(200, D)
    ids = torch.full((5,) if K is None else (5, K), -100)
    for some in (False, True):
        upstream = torch.full(ids.shape, torch.inf)
        if some:
            ids.view(-1)[0], upstream.view(-1)[0] = 7, 1.0
        for size in SIZES:
            h, w = (t.clone().requires_grad_() for t in (hidden, weight))
            with forced(None, size):
                found = linear_logprobs(h, w, ids)
                found.backward(upstream)
            assert found.view(-1)[1:].eq(0).all()
            assert h.grad is not None and w.grad is not None
            assert h.grad[1:].eq(0).all() and h.grad.isfinite().all() and w.grad.isfinite().all()
            assert bool(w.grad.any()) == some
        x = (hidden @ weight.T).requires_grad_()
        (d_logits,) = torch.autograd.grad(logprobs(x, ids), x, upstream)
        assert d_logits[1:].eq(0).all() and bool(d_logits.any()) == some


def test_an_id_out_of_range_is_nan(kernels: None) -> None:
    """On a GPU nobody looks; the other ids of its token keep their values."""
    x, ids = torch.randn(3, 70).requires_grad_(), torch.tensor([[1, 2], [70, 5], [-100, 3]])
    with pretending_cuda():
        found = logprobs(x, ids)
        assert found.isnan().tolist() == [[False, False], [True, False], [False, False]]
        (d_logits,) = torch.autograd.grad(found.nansum(), x)
        for unknown in (70, -1):
            ids[1, 0] = unknown
            stats = logprobs(x, ids, return_stats=True, return_rank=True)[1]
            assert stats.rank.ge(0).tolist() == [[True, True], [False, True], [False, True]]
    assert d_logits.isnan().all(1).tolist() == [False, True, False]


def test_upstream_of_any_layout(path: str) -> None:
    x, ids = torch.randn(4, 60), draw_ids((4,), 3, 60)
    upstream = torch.randn(4, 3)
    want = outcome(lambda x: logprobs(x, ids), [x], [upstream])
    got = outcome(lambda x: logprobs(x.T.contiguous().T, ids.T.contiguous().T), [x], [upstream.T.contiguous().T])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    one = outcome(lambda x: logprobs(x, ids), [x], [torch.ones(()).expand(4, 3)])
    torch.testing.assert_close(one[1], outcome(lambda x: reference.logprobs(x, ids), [x], [torch.ones(4, 3)])[1])


@pytest.mark.parametrize("size", SIZES)
def test_backward_works_twice(path: str, size: str) -> None:
    h, w = torch.randn(7, D, requires_grad=True), torch.randn(300, D, requires_grad=True)
    with forced(None, size):
        total = linear_logprobs(h, w, draw_ids((7,), 2, 300)).square().sum()
        first = torch.autograd.grad(total, (h, w), retain_graph=True)
        second = torch.autograd.grad(2 * total, (h, w))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_statistics_alone(path: str) -> None:
    """Log-probabilities that nobody uses leave the gradient to the others."""
    h, w, ids = torch.randn(5, D, requires_grad=True), torch.randn(90, D, requires_grad=True), draw_ids((5,), 2, 90)
    found = []
    for function in (linear_logprobs, reference.linear_logprobs):
        values, stats = function(h, w, ids, return_stats=True)  # type: ignore[operator]
        assert values.requires_grad and not stats.argmax.requires_grad
        found.append((stats.argmax, *torch.autograd.grad(stats.entropy.sum() + stats.lse.sum(), (h, w))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("K", [1, 8, 64])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_ranks_at_a_real_vocabulary(path: str, dtype: torch.dtype, K: int) -> None:
    """Take whole tiles and a tail, more ids than a program counts for, and ids that repeat."""
    hidden, weight = torch.randn(3, D).to(dtype), torch.randn(50257, D).to(dtype)
    bias = torch.randn(50257).to(dtype) if K == 1 else None
    ids = draw_ids((3,), K, 50257)
    logits = hidden @ weight.T
    for mode, logit_scale in (("materialise", None), ("recompute", -1.3)):
        options: dict[str, Any] = {"return_stats": True, "return_rank": True, "logit_scale": logit_scale}
        exact = logits.double() if bias is None else logits.double() + bias.double()
        want = reference.logprobs(exact, ids, **options)[1].rank
        with forced(mode, rows=2 if mode == "recompute" else 3):
            found = linear_logprobs(hidden, weight, ids, bias=bias, **options)[1].rank
        assert torch.equal(found, want)


def test_equal_logits_share_a_rank(path: str) -> None:
    """Give the most probable class rank 0, also where softcap rounds it and others to the same number."""
    x = torch.full((2, 1300), 3.0)
    x[0, 700:] = 500.0
    x[0, 1299] = 600.0
    x[1, :5] = -torch.inf
    ids = torch.tensor([[0, 699, 700, 1299], [0, 5, 1299, -100]])
    for softcap, compute in itertools.product((None, 2.0), (logprobs, reference.logprobs)):
        stats = compute(x, ids, softcap=softcap, return_stats=True, return_rank=True)[1]
        assert stats.rank.tolist() == [[600, 600, 1, 0], [1295, 0, 0, -1]]
    stats = logprobs(x, ids, logit_scale=-1.0, return_stats=True, return_rank=True)[1]
    assert stats.rank.tolist() == [[0, 0, 700, 1299], [0, 5, 5, -1]]
    stats = logprobs(x[:1], ids[:1], ignore_index=699, return_stats=True, return_rank=True)[1]
    assert stats.rank[0].tolist() == [600, -1, 1, 0]
    assert logprobs(x, ids, return_stats=True)[1].rank is None


def test_temperature_is_a_samplers(path: str) -> None:
    """It divides what softcap has made, as in vLLM and transformers."""
    x, ids = torch.randn(5, 40) * 9, torch.randint(0, 40, (5,))
    found = logprobs(x, ids, softcap=7.0, temperature=0.5)
    want = (7 * torch.tanh(x / 7) / 0.5).log_softmax(1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 7.0])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_temperatures_of_tokens(path: str, dtype: torch.dtype, softcap: float | None) -> None:
    """Give each token what it would get alone, in all modes; these launches are compiled too."""
    N, V = 3, 2 * 8192 + 17  # two whole tiles with softcap, four otherwise, and a tail
    hidden, weight = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype)
    ids, temperature = draw_ids((N,), 3, V), torch.tensor([0.3, 1.0, 2.5])
    upstream = upstream_of(ids, (N,))

    def run(**temperature: Any) -> list[Tensor]:
        def of(h: Tensor, w: Tensor) -> Any:
            return linear_logprobs(h, w, ids, softcap=softcap, logit_scale=1.4, return_stats=True, **temperature)

        return outcome(of, [hidden, weight], upstream)

    want = [run(temperature=float(t)) for t in temperature]
    for mode in ("materialise", "recompute"):
        with forced(mode, rows=2 if mode == "recompute" else N):
            found = run(temperature=temperature)
        for i, each in enumerate(found[:4]):  # all but the weight's gradient
            own = torch.stack([one[i][n] for n, one in enumerate(want)])
            rounded = i == 3 and dtype == BF16
            torch.testing.assert_close(each, own, rtol=2e-2 if rounded else 1e-5, atol=2e-2 if rounded else 1e-4)


def test_a_temperature_of_an_ignored_token_may_be_anything(kernels: None) -> None:
    x, ids = torch.randn(3, 40), torch.tensor([5, -100, 7])
    with pretending_cuda():  # on a CPU it would be refused
        found = logprobs(x, ids, temperature=torch.tensor([1.0, torch.nan, 0.5]))
    assert found[1] == 0
    torch.testing.assert_close(found[2], logprobs(x, ids, temperature=0.5)[2])


@pytest.mark.parametrize(("budget", "K"), [(None, 3), ("auto", None), (12_000, 3)])
@unrecorded()
def test_whole_graphs(path: str, budget: Any, K: int | None) -> None:
    N = 12
    hidden, weight, ids = torch.randn(N, 8), torch.randn(300, 8), draw_ids((N,), K, 300)
    options: dict[str, Any] = {"return_stats": True, "return_rank": True, "softcap": 9.0}
    options["temperature"] = torch.linspace(0.5, 2, N) if K else 1.5

    def of(h: Tensor, w: Tensor) -> Any:
        if budget is None:
            return logprobs((h * 1.0) @ w.T, ids, **options)
        return linear_logprobs(h * 1.0, w, ids, memory_budget=budget, **options)

    torch._dynamo.reset()
    upstream = upstream_of(ids, (N,))
    compiled = torch.compile(of, backend="aot_eager", fullgraph=True)
    for a, b in zip(outcome(compiled, [hidden, weight], upstream), outcome(of, [hidden, weight], upstream)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(compiled(hidden, weight)[1].rank, of(hidden, weight)[1].rank)


def test_the_logits_are_read_once_in_forward_and_once_in_backward() -> None:
    """Read them once more for ranks."""
    N, V, K = 64, 16384, 64
    for return_rank in (False, True):
        with pretending_cuda():
            logits = torch.randn(N, V, dtype=BF16).requires_grad_()
            ids = torch.randint(0, V, (N, K))
            with counting(dry=True) as counts:
                logprobs(logits, ids, return_stats=True, return_rank=return_rank)[0].sum().backward()
        passes = (3.0 + return_rank) * logits.nbytes
        assert passes <= sum(t.dram for t in counts.traffic if "kernel" in t.name) <= 1.05 * passes
        assert counts.total().syncs == 0


def test_a_gradient_is_added_to_the_callers(path: str) -> None:
    h, w, ids = torch.randn(7, D), torch.randn(300, D).requires_grad_(), draw_ids((7,), 2, 300)
    upstream = torch.randn(ids.shape)
    (want,) = torch.autograd.grad(linear_logprobs(h, w, ids), w, upstream)
    for size in SIZES:
        main = torch.ones(300, D)
        with forced(None, size):
            linear_logprobs(h, w, ids, accumulate_into=main).backward(upstream)
        assert w.grad is None
        torch.testing.assert_close(main, want + 1, rtol=1e-5, atol=1e-5)


def test_reference_is_what_torch_means() -> None:
    x, ids = torch.randn(9, 40, dtype=F64), torch.randint(0, 40, (9,))
    torch.testing.assert_close(reference.logprobs(x, ids), -F.cross_entropy(x, ids, reduction="none"))
    _, stats = reference.logprobs(x, ids, return_stats=True)
    torch.testing.assert_close(stats.entropy, torch.distributions.Categorical(logits=x).entropy())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"ids must have shape \(4,\), .*; got \(3,\)"),
        ({"ids": torch.zeros(4)}, TypeError, "ids must be int64 or int32"),
        ({"ids": torch.tensor([0, 1, 2, 9])}, ValueError, r"ids must be in \[0, 9\).*found 9"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number, .*; got 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must be \(4,\) on cpu; got \(3,\)"),
        ({"temperature": torch.ones(4).long()}, TypeError, "temperature must be floating point"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0, 2.0])}, ValueError, r"positive for each token; found \[0.0\]"),
        ({"temperature": torch.ones(4).requires_grad_()}, ValueError, "temperature gets no gradient here"),
        ({"softcap": -3.0, "temperature": 2.0}, ValueError, "softcap must be positive; got -3.0"),
        ({"label_smoothing": 0.1}, TypeError, r"logprobs\(\) got an unexpected keyword argument 'label_smoothing'"),
        ({"reduction": "sum"}, TypeError, "unexpected keyword argument 'reduction'"),
        ({"z_loss": 0.1}, TypeError, "unexpected keyword argument 'z_loss'"),
        ({"grad_filter": 0.1}, TypeError, "unexpected keyword argument 'grad_filter'"),
        ({"return_rank": True}, ValueError, "return_rank needs return_stats=True"),
        ({"temprature": 2.0}, TypeError, "Did you mean 'temperature'"),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"ids": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        logprobs(torch.zeros(4, 9), **given)
    with pytest.raises(error, match=message):
        linear_logprobs(torch.zeros(4, 5), torch.zeros(9, 5), **given)


@pytest.mark.parametrize("form", ["separate", "list", "shared"])
@pytest.mark.parametrize("documents", [False, True])
def test_heads_have_their_own_log_probabilities(path: str, form: str, documents: bool) -> None:
    """Match each head alone, with its labels moved by a loop."""
    K, T, V = 3, 7, 90
    hiddens, weight = torch.randn(1 if form == "shared" else K, 2, T, D), torch.randn(V, D)
    labels, document_ids = draw_ids((2, T), None, V), torch.arange(T).div(4, rounding_mode="floor").expand(2, T)
    upstream = torch.randn(K, 2, T)
    options: dict[str, Any] = {"temperature": 0.8, "return_stats": True, "return_rank": True}

    def expected(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        values, ranks = [], []
        for k in range(K):
            ids = torch.full_like(labels, -100)
            for t in range(T - k):
                if not documents or t // 4 == (t + k) // 4:
                    ids[:, t] = labels[:, t + k]
            value, stats = reference.linear_logprobs(h[k % len(h)], w, ids, **options)
            values.append(value)
            ranks.append(stats.rank)
        return torch.stack(values), torch.stack(ranks)

    def found(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        given: Any = [*h] if form == "list" else h[0] if form == "shared" else h
        more: dict[str, Any] = {"heads": K} if form == "shared" else {}
        more |= {"document_ids": document_ids} if documents else {}
        value, stats = mtp_logprobs(given, w, labels, **options, **more)
        return value, stats.rank

    results = []
    for function in (found, expected):
        leaves = [t.clone().requires_grad_() for t in (hiddens, weight)]
        value, rank = function(*leaves)
        results.append((value, rank, *torch.autograd.grad(value, leaves, upstream)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert mtp_logprobs(hiddens[:1], weight, labels).shape == (1, 2, T)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 5])
@unrecorded()
def test_statistics_of_heads_are_those_of_their_rows(path: str, ignore_index: int, shared: bool) -> None:
    """Take a token that has no label, and rows past whose end no head has one."""
    K, T, V = 2, 4, 30
    hiddens, weight, bias = torch.randn(1 if shared else K, T, D), torch.randn(V, D), torch.randn(V)
    labels = torch.tensor([7, ignore_index, 29, 0])
    moved = torch.stack([labels, torch.tensor([ignore_index, 29, 0, ignore_index])])
    options: dict[str, Any] = {"bias": bias, "softcap": 3.0, "logit_scale": 0.7, "ignore_index": ignore_index}
    options |= {"return_stats": True, "return_rank": True, "temperature": 1.3}
    given = hiddens[0] if shared else hiddens
    values, stats = mtp_logprobs(given, weight, labels, heads=K if shared else None, **options)
    if shared:
        want, of_rows = reference.linear_logprobs(hiddens[0], weight, moved.T, **options)
        want, of_rows = want.T, of_rows._replace(rank=of_rows.rank.T)
    else:
        want, of_rows = reference.linear_logprobs(hiddens, weight, moved, **options)
    assert [t.shape for t in stats] == [*[(T,) if shared else (K, T)] * 3, (K, T)]
    torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(stats, of_rows, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("form", "copies"), [("tensor", 0), ("list", 3), ("list of one", 0), ("shared", 0)])
def test_what_heads_copy_counts_towards_the_budget(form: str, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold the ids of all heads, and the hidden states that were a list."""
    held: list[int] = []
    module = importlib.import_module("llmfast.losses.logprobs")
    ready = module.ready_from_hidden
    noted = lambda own, *rest, **more: held.append(own) or ready(own, *rest, **more)  # noqa: E731
    monkeypatch.setattr(module, "ready_from_hidden", noted)
    hiddens, weight, labels = torch.randn(3, 2, 5, D), torch.randn(30, D), torch.zeros(2, 5).long()
    given: Any = {"tensor": hiddens, "list": [*hiddens], "list of one": [hiddens[0]], "shared": hiddens[0]}[form]
    heads = 1 if form == "list of one" else 3
    mtp_logprobs(given, weight, labels, **({"heads": heads} if form == "shared" else {}))
    assert held == [heads * 2 * 5 * 8 + copies * 2 * 5 * D * 4]


@pytest.mark.parametrize("path", ["plain"], indirect=True)
def test_copies_of_ids_and_temperatures_count_towards_the_budget(path: str) -> None:
    """On a CPU the rows that have an id are copied, with all that belongs to them; their results are spread again."""
    n, V, K = 6, 20, 2
    weight, hidden, ids = torch.zeros(V, D), torch.zeros(n, D), torch.zeros(n, K).long()

    def held(ids: Tensor = ids, **options: Any) -> int:
        given: Any = {"reduction": "none", **options}
        return int(made_ready(0, hidden, weight, ids, False, given, logprobs=True).arguments[0].held)

    assert held() == held(temperature=torch.ones(n)) == 0
    assert held(temperature=torch.ones(n, dtype=BF16)) == n * 4
    assert held(ids=torch.zeros(K, n).long().T) == n * K * 8
    some = ids.index_fill(0, torch.tensor([1, 4]), -100)
    rows = 2 * 4 * D * 4 + 4 * K * 8 + n * K * 4
    assert held(ids=some) == rows and held(ids=some, temperature=torch.ones(n)) == rows + 4 * 4
    dense = torch.zeros(V, n).T
    loss = made_ready(7, hidden, weight, dense, False, {}).arguments[0]
    assert loss.held == 7 + n * V * 4 + n * 8  # and a number that stands for each row's class


def test_heads_that_do_not_fit() -> None:
    hiddens, weight, labels = torch.zeros(2, 4, D), torch.zeros(9, D), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"hiddens must be \(K, \*\(3,\), D\)"):
        mtp_logprobs(hiddens, weight, labels[:3])
    with pytest.raises(ValueError, match="heads must be given if hidden states are shared, only then; got 2"):
        mtp_logprobs(hiddens, weight, labels, heads=2)
    with pytest.raises(ValueError, match="heads must be given if hidden states are shared, only then; got None"):
        mtp_logprobs(hiddens[0], weight, labels)
    for heads in (0, -1):
        with pytest.raises(ValueError, match=f"^heads must be positive; got {heads}$"):
            mtp_logprobs(hiddens[0], weight, labels, heads=heads)
    with pytest.raises(ValueError, match=r"^labels must have a token axis$"):
        mtp_logprobs(hiddens[0, 0], weight, labels[0], heads=2)
    with pytest.raises(TypeError, match=r"mtp_logprobs\(\) got an unexpected keyword argument 'head_weights'"):
        mtp_logprobs(hiddens, weight, labels, head_weights=[1.0, 2.0])  # type: ignore[call-arg]


@pytest.mark.parametrize("document_ids", [torch.zeros(3).long(), torch.zeros(2, 4).long(), torch.zeros(4)], ids=str)
def test_documents_that_do_not_fit_are_refused_wherever_heads_are(document_ids: Tensor) -> None:
    hiddens, weight, labels = torch.zeros(2, 4, D), torch.zeros(9, D), torch.zeros(4, dtype=torch.int64)
    message = r"^document_ids must be \(4,\) integers on \w+(:\d)?; got "
    for heads in (hiddens, hiddens[:1]):
        for function in (mtp_logprobs, mtp_cross_entropy):
            with pytest.raises(ValueError, match=message):
                function(heads, weight, labels, document_ids=document_ids)
    with pytest.raises(ValueError, match=message):
        mtp_logprobs(hiddens[0], weight, labels, heads=2, document_ids=document_ids)
    with pytest.raises(ValueError, match=message):
        mtp_valid_counts(labels, 2, document_ids)
