"""All options of both losses, in combinations, against the float64 reference."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmfast.losses import (
    LossStats,
    TeacherLogits,
    cross_entropy,
    linear_cross_entropy,
    linear_distillation,
    linear_logprobs,
    logprobs,
    mtp_cross_entropy,
    mtp_logprobs,
    reference,
)
from support.launched import unrecorded
from support.plans import SIZES, forced

Options = dict[str, Any]
# Options that change the code of the row kernels. It is compiled with each of them, and with all.
TERMS = ("label_smoothing", "z_loss", "softcap", "logit_scale", "class_weights", "token_weights", "target_weights")
NAMES = (*TERMS, "shift", "document_ids", "num_valid", "ignore_index")


def draw(names: list[str], shape: tuple[int, ...], V: int, K: int) -> tuple[Tensor, Options]:
    """Draw targets, about a fifth of them ignored, and values for the named options."""
    full = (*shape, K) if K > 1 else shape
    targets = torch.randint(0, V, full)
    values: Options = {
        "label_smoothing": 0.2,
        "z_loss": 0.03,
        "softcap": 0.7 if V % 2 else 5.0,
        "logit_scale": 1.7,
        "class_weights": torch.rand(V) + 0.1,
        "token_weights": torch.rand(shape),
        "target_weights": torch.rand(full if V % 3 else K),
        "shift": 1 + V % 2,
        "document_ids": torch.arange(shape[-1]).div(3, rounding_mode="floor").expand(shape),
        "num_valid": torch.tensor(7),
        "ignore_index": V - 1,
    }
    options = {name: values[name] for name in names}
    if K == 1:
        options.pop("target_weights", None)
    if "shift" not in options:
        options.pop("document_ids", None)
    targets[torch.rand(full) < 0.2] = options.get("ignore_index", -100)
    return targets, options


def in_float64(options: Options) -> Options:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}


def objective(loss: Callable[..., Any], inputs: list[Tensor], stats: bool, upstream: list[Tensor]) -> list[Tensor]:
    """Return the loss and other results, then the gradients of a weighted sum of all that are differentiable."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    result = loss(*leaves)
    value, told = result if stats else (result, None)
    total = (value * upstream[0].to(value.dtype).expand_as(value)).sum()
    if told is not None:
        assert isinstance(told, LossStats)
        total = total + (told.lse * upstream[1]).sum() + (told.entropy * upstream[2]).sum()
    gradients = torch.autograd.grad(total, leaves)
    return [value.detach(), *([] if told is None else [told.token_loss, told.lse, told.entropy]), *gradients]


def compare(
    ours: list[Tensor], plain: list[Tensor], truth: list[Tensor], dtype: torch.dtype, logits: torch.dtype
) -> None:
    """Compare; `plain` is the reference in the inputs' own dtype, `logits` what those are rounded to."""
    if truth[0].isnan().any():  # nothing to average
        assert ours[0].isnan().all()
        assert all(t.isfinite().all() for t in ours[1:])
        return
    for a, b, c in zip(ours, plain, truth):
        assert a.shape == c.shape
        error, allowed = (a - c).detach().double().norm(), (b - c).detach().double().norm()
        # A rounding of the result and some of what it is made from, which torch can be lucky with.
        slack = 4 * torch.finfo(a.dtype if logits == torch.float32 and a.dtype != dtype else dtype).eps * (c.norm() + 1)
        assert error <= 1.5 * allowed + slack, f"error {error:.3g}, torch's {allowed:.3g}, slack {slack:.3g}"


cases = {
    "names": st.lists(st.sampled_from(NAMES), unique=True),
    "shape": st.sampled_from([(1,), (9,), (3, 4), (2, 2, 3)]),
    "V": st.sampled_from([1, 2, 5, 127, 128, 1000, 1025]),
    "K": st.sampled_from([1, 1, 3]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "reduction": st.sampled_from(["mean", "sum", "none"]),
    "stats": st.booleans(),
    "seed": st.integers(0, 1000),
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(**cases, inplace=st.booleans())
@unrecorded()
def test_cross_entropy(
    path: str,
    names: list[str],
    shape: tuple[int, ...],
    V: int,
    K: int,
    dtype: torch.dtype,
    reduction: str,
    stats: bool,
    seed: int,
    inplace: bool,
) -> None:
    torch.manual_seed(seed)
    targets, options = draw(names, shape, V, K)
    if reduction != "mean":
        options.pop("num_valid", None)
    logits = (torch.randn(*shape, V) * 2).to(dtype)
    upstream = [
        torch.randn(shape) if reduction == "none" else torch.tensor(1.5),
        torch.randn(shape),
        torch.randn(shape),
    ]
    settings = {"reduction": reduction, "return_stats": stats}

    def run(loss: Callable[..., Any], x: Tensor, options: Options) -> list[Tensor]:
        return objective(lambda x: loss(x, targets, **settings, **options), [x], stats, upstream)

    def ours(x: Tensor, *arguments: Any, **options: Any) -> Any:
        return cross_entropy(x * 1.0 if inplace else x, *arguments, inplace=inplace, **options)

    compare(
        run(ours, logits, options),
        run(reference.cross_entropy, logits, options),
        run(reference.cross_entropy, logits.double(), in_float64(options)),
        dtype,
        torch.float32,
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    **cases,
    bias=st.booleans(),
    rows=st.integers(1, 12),
    slab_dtype=st.sampled_from([None, torch.float32]),
)
@unrecorded()
def test_linear_cross_entropy(
    path: str,
    names: list[str],
    shape: tuple[int, ...],
    V: int,
    K: int,
    dtype: torch.dtype,
    reduction: str,
    stats: bool,
    seed: int,
    bias: bool,
    rows: int,
    slab_dtype: torch.dtype | None,
) -> None:
    torch.manual_seed(seed)
    targets, options = draw(names, shape, V, K)
    if reduction != "mean":
        options.pop("num_valid", None)
    hidden, weight = torch.randn(*shape, 6).to(dtype), torch.randn(V, 6).to(dtype)
    inputs = [hidden, weight, torch.randn(V).to(dtype)] if bias else [hidden, weight]
    upstream = [
        torch.randn(shape) if reduction == "none" else torch.tensor(1.5),
        torch.randn(shape),
        torch.randn(shape),
    ]
    settings = {"reduction": reduction, "return_stats": stats}

    def run(loss: Callable[..., Any], inputs: list[Tensor], options: Options) -> list[Tensor]:
        def call(h: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
            return loss(h, w, targets, bias=b, **settings, **options)

        return objective(call, inputs, stats, upstream)

    def ours(*arguments: Any, **options: Any) -> Any:
        with forced(None, [*SIZES][rows % len(SIZES)]):
            return linear_cross_entropy(*arguments, memory_budget=1 << 30, slab_dtype=slab_dtype, **options)

    compare(
        run(ours, inputs, options),
        run(reference.linear_cross_entropy, inputs, options),
        run(reference.linear_cross_entropy, [t.double() for t in inputs], in_float64(options)),
        dtype,
        slab_dtype or dtype,
    )


@pytest.mark.parametrize(
    ("names", "dtype"),
    [(names, torch.bfloat16) for names in ([], *([name] for name in TERMS), TERMS)]
    + [(names, torch.float32) for names in ([], TERMS)],
    ids=str,
)
def test_machine_code_of_each_term_alone_and_all_together(kernels: None, names: list[str], dtype: torch.dtype) -> None:
    """Make launches that are compiled after the tests; random combinations are not."""
    targets, options = draw(list(names), (3,), 1024, 3 if "target_weights" in names else 1)
    inputs = [torch.randn(3, 8).to(dtype), torch.randn(1024, 8).to(dtype)]
    many = len(names) > 1
    if many:
        inputs.append(torch.randn(1024))
    upstream = [torch.ones(()), torch.ones(3), torch.ones(3)]

    def call(h: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
        with forced("chunk", rows=1):
            return linear_cross_entropy(h, w, targets, bias=b, return_stats=many, **options)

    def without_stats(h: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
        return linear_cross_entropy(h, w, targets, bias=b, memory_budget=1 << 20, **options)

    found = objective(call, inputs, many, upstream)
    again = objective(without_stats, inputs, False, upstream)
    torch.testing.assert_close(found[0], again[0])


@pytest.mark.parametrize("K", [1, 3])
def test_argmax_and_accuracy(path: str, K: int) -> None:
    logits = torch.randn(2, 5, 40)
    targets = torch.randint(0, 40, (2, 5, K) if K > 1 else (2, 5))
    targets[0, 0] = logits[0, 0].argmax()
    targets[1, 1] = -100
    _, stats = cross_entropy(logits, targets, return_stats=True)
    _, truth = reference.cross_entropy(logits, targets, return_stats=True)
    assert torch.equal(stats.argmax, truth.argmax)
    torch.testing.assert_close(stats.accuracy, truth.accuracy)
    assert stats.argmax[1, 1] == -1


@pytest.mark.parametrize(
    ("reduction", "compiled"), [("mean", False), ("sum", False), ("none", False), ("sum", True), ("none", True)]
)
@unrecorded()
def test_statistics_without_a_gradient_say_so(path: str, reduction: Any, compiled: bool) -> None:
    """Otherwise a gradient through them could be requested and would silently be zero."""
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(0, 50, (6,))
    ways: list[Callable[..., Any]] = [
        lambda h, w, **o: cross_entropy(h @ w.T, targets, **o),
        lambda h, w, **o: cross_entropy(h @ w.T, targets, inplace=True, **o),
        lambda h, w, **o: linear_cross_entropy(h, w, targets, **o),
        lambda h, w, **o: linear_cross_entropy(h, w, targets, memory_budget=6000, **o),
    ]
    for way in ways:
        torch._dynamo.reset()
        run = torch.compile(way, backend="aot_eager", fullgraph=True) if compiled else way
        loss, stats = run(hidden, weight, reduction=reduction, return_stats=True)
        assert loss.requires_grad
        found = {name: t.requires_grad for name, t in stats._asdict().items()}
        assert found == {"token_loss": False, "lse": True, "entropy": True, "argmax": False, "accuracy": False}


def test_the_first_of_equal_logits_is_the_argmax(path: str) -> None:
    logits = torch.zeros(3, 5000)
    logits[1, [700, 4000]] = 1.0
    logits[2] = -torch.inf
    logits[2, 4999] = -3.0
    _, stats = cross_entropy(logits, torch.zeros(3, dtype=torch.int64), return_stats=True, reduction="sum")
    assert stats.argmax.tolist() == [0, 700, 4999]


@pytest.mark.parametrize("softcap", [0.7, 5.0, 30.0])
@pytest.mark.parametrize("logit_scale", [None, 1.7])
def test_there_is_an_argmax_wherever_there_are_logits(path: str, softcap: float, logit_scale: float | None) -> None:
    """Compute softcap in two places of a kernel, which a compiler may round differently."""
    logits, targets = torch.randn(60, 700) * 10, torch.randint(0, 700, (60,))
    options: Options = {"softcap": softcap, "logit_scale": logit_scale, "return_stats": True}
    _, stats = cross_entropy(logits, targets, **options)
    capped = softcap * torch.tanh((logit_scale or 1.0) * logits.double() / softcap)
    found = capped.gather(1, stats.argmax[:, None])[:, 0]
    torch.testing.assert_close(found, capped.amax(1), rtol=1e-6, atol=0)
    assert stats.argmax.ge(0).all() and stats.argmax.lt(700).all()


def test_argmax_when_two_places_round_differently(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel's second look at the row give other numbers than the first."""
    from llmfast_kernels import row

    exact, calls = row.read_logits, itertools.count()

    def rounded(*arguments: Any) -> Any:  # a row of 700 is read for its target, as a tile, and for the argmax
        return exact(*arguments) * (1.0 - 1e-6 * (next(calls) % 3 == 2))

    logits = torch.rand(4, 700) + 1
    monkeypatch.setattr(row, "read_logits", rounded)
    _, stats = cross_entropy(logits, torch.zeros(4, dtype=torch.int64), return_stats=True)
    assert next(calls) % (3 * 4) == 0
    assert torch.equal(stats.argmax, logits.argmax(1))


def test_argmax_of_rows_without_a_finite_logit(path: str) -> None:
    logits = torch.full((4, 1500), -torch.inf)
    logits[1] = -1e8
    logits[2] = torch.nan
    logits[3, 1200] = torch.nan
    loss, stats = cross_entropy(logits, torch.full((4,), 3), return_stats=True, reduction="none")
    assert isinstance(loss, Tensor)
    assert stats.argmax.ge(0).all() and stats.argmax.lt(1500).all()
    assert loss.isnan().tolist() == [True, False, True, True]
    torch.testing.assert_close(loss[1], torch.tensor(1500.0).log())


@pytest.mark.parametrize("inplace", [False, True])
def test_statistics_of_a_masked_vocabulary(path: str, inplace: bool) -> None:
    logits, targets = torch.randn(5, 3000), torch.tensor([7, 0, 99, -100, 50])
    logits[:, 100:] = -torch.inf
    upstream = [torch.tensor(1.5), torch.randn(5), torch.randn(5)]
    options: Options = {"z_loss": 0.1, "return_stats": True}

    def ours(x: Tensor) -> Any:
        return cross_entropy(x * 1.0 if inplace else x, targets, inplace=inplace, **options)

    found = objective(ours, [logits], True, upstream)
    truth = objective(lambda x: reference.cross_entropy(x, targets, **options), [logits.double()], True, upstream)
    for a, b in zip(found, truth):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    assert found[-1][:, 100:].eq(0).all()


@pytest.mark.parametrize("masked", [slice(0, 3), slice(97, None), slice(50, 60)], ids=str)
def test_smoothing_over_masked_classes_is_infinite_as_in_torch(path: str, masked: slice) -> None:
    """The loss is not NaN, wherever in the row they are, and the gradient is finite."""
    logits, targets = torch.randn(4, 100), torch.tensor([7, 90, -100, 43])
    logits[:, masked] = -torch.inf
    for weights in (None, torch.rand(100) + 0.1):
        found = []
        for loss in (cross_entropy, torch.nn.functional.cross_entropy):
            x = logits.clone().requires_grad_()
            given = {"class_weights" if loss is cross_entropy else "weight": weights}
            losses = loss(x, targets, label_smoothing=0.1, reduction="none", **given)
            found.append((losses.detach(), *torch.autograd.grad(losses.sum(), x)))
        assert found[0][0].tolist() == [torch.inf, torch.inf, 0.0, torch.inf]
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_shift_is_what_slicing_does(path: str) -> None:
    logits, tokens = torch.randn(2, 7, 30), torch.randint(0, 30, (2, 7))
    for shift in (1, 3):
        got = cross_entropy(logits, tokens, shift=shift)
        want = torch.nn.functional.cross_entropy(logits[:, :-shift].reshape(-1, 30), tokens[:, shift:].reshape(-1))
        torch.testing.assert_close(got, want)
    assert cross_entropy(logits, tokens, shift=7, reduction="sum") == 0
    assert cross_entropy(logits, tokens, shift=9, reduction="sum") == 0


def test_a_shift_does_not_cross_documents(path: str) -> None:
    logits, tokens = torch.randn(6, 30), torch.randint(0, 30, (6,))
    ids = torch.tensor([4, 4, 4, 9, 9, 4])
    losses = cross_entropy(logits, tokens, shift=1, document_ids=ids, reduction="none")
    assert losses.ne(0).tolist() == [True, True, False, True, False, False]
    losses = cross_entropy(logits, tokens, shift=2, document_ids=ids, reduction="none")
    assert losses.ne(0).tolist() == [True, False, False, False, False, False]


def test_several_targets_of_a_token_move_together_within_its_document(path: str) -> None:
    logits, targets = torch.randn(2, 6, 30), torch.randint(0, 30, (2, 6, 3))
    ids = torch.tensor([[4, 4, 4, 9, 9, 4], [1, 1, 2, 2, 2, 2]])
    for shift in (1, 2, 3, 6):  # as many tokens are left as there are targets, too
        given: dict[str, Any] = {"shift": shift, "document_ids": ids, "reduction": "none"}
        each = [cross_entropy(logits, targets[..., k], **given) for k in range(3)]
        torch.testing.assert_close(cross_entropy(logits, targets, **given), torch.stack(each).sum(0))
        for t, other in itertools.product(range(2), range(6)):
            same = other + shift < 6 and ids[t, other] == ids[t, other + shift]
            assert bool(each[0][t, other] != 0) == same


def test_softcap_below_one_with_padding(path: str) -> None:
    # cut-cross-entropy and Liger-Kernel count padded columns as logits of -softcap.
    hidden, weight = torch.randn(4, 8), torch.randn(130, 8)
    targets = torch.randint(0, 130, (4,))
    got = linear_cross_entropy(hidden, weight, targets, softcap=0.5)
    want = reference.linear_cross_entropy(hidden.double(), weight.double(), targets, softcap=0.5)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_z_loss_sees_neither_class_weights_nor_the_number_of_targets(path: str) -> None:
    logits, targets = torch.randn(4, 20), torch.randint(0, 20, (4, 3))
    weights = torch.rand(20)
    plain = cross_entropy(logits, targets, class_weights=weights, reduction="none")
    added = cross_entropy(logits, targets, class_weights=weights, z_loss=0.5, reduction="none")
    torch.testing.assert_close(added - plain, 0.5 * logits.logsumexp(1) ** 2)


def test_a_mean_divides_all_of_the_loss_by_the_same_number(path: str) -> None:
    """The z-loss too, so that parts of a batch that are divided by the whole's sum of weights add up to the whole."""
    logits, targets, weights = torch.randn(12, 20), torch.randint(0, 20, (12,)), torch.rand(20) + 0.1
    options: Options = {"class_weights": weights, "z_loss": 0.3}
    want = torch.nn.functional.cross_entropy(logits, targets, weights)
    want = want + 0.3 * logits.logsumexp(1).square().sum() / weights[targets].sum()
    torch.testing.assert_close(cross_entropy(logits, targets, **options), want)
    total = weights[targets].sum()
    parts = [cross_entropy(logits[i : i + 4], targets[i : i + 4], num_valid=total, **options) for i in (0, 4, 8)]
    torch.testing.assert_close(torch.stack(parts).sum(), want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]; got 1.5"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"shift": -1}, ValueError, "shift must not be negative"),
        ({"document_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, "document_ids need shift > 0; got shift=0"),
        ({"shift": 1, "document_ids": torch.zeros(4)}, TypeError, "document_ids must be integers"),
        ({"class_weights": torch.ones(8)}, ValueError, r"class_weights must be \(9,\)"),
        ({"class_weights": torch.ones(9, dtype=torch.int64)}, TypeError, "class_weights must be floating point"),
        ({"token_weights": torch.ones(4, 1)}, ValueError, r"token_weights must be \(4,\)"),
        ({"token_weights": torch.ones(4, requires_grad=True)}, ValueError, "token_weights gets no gradient here"),
        ({"target_weights": torch.ones(1)}, ValueError, "target_weights need targets of shape"),
        ({"vocab_size": 10}, ValueError, "vocab_size=10 needs a process_group"),
    ],
)
def test_refuses(change: Options, error: type[Exception], message: str) -> None:
    targets = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(error, match=message):
        cross_entropy(torch.zeros(4, 9), targets, **change)
    with pytest.raises(error, match=message):
        linear_cross_entropy(torch.zeros(4, 5), torch.zeros(9, 5), targets, **change)


def test_weights_that_learn_elsewhere_may_weigh_an_evaluation() -> None:
    """They get no gradient here, which is refused only where one would be wanted."""
    hidden, weight, targets = torch.randn(4, 5), torch.randn(9, 5), torch.randint(0, 9, (4,))
    given = {"class_weights": torch.rand(9).requires_grad_(), "token_weights": torch.rand(4).requires_grad_()}
    with pytest.raises(ValueError, match="class_weights gets no gradient here; detach it"):
        linear_cross_entropy(hidden, weight, targets, **given)
    with torch.no_grad():
        found = linear_cross_entropy(hidden, weight, targets, **given)
        detached = {name: t.detach() for name, t in given.items()}
        assert torch.equal(found, linear_cross_entropy(hidden, weight, targets, **detached))
        torch.testing.assert_close(found, cross_entropy(hidden @ weight.T, targets, **given))


@pytest.mark.parametrize("function", [cross_entropy, logprobs])
@pytest.mark.parametrize("name", ["colour", "memory_budget"])
def test_an_unknown_option_of_logits_is_refused_in_the_functions_name(function: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{function.__name__}\(\) got an unexpected keyword argument '{name}'"):
        function(torch.zeros(4, 9), torch.arange(4), **{name: 1})


@pytest.mark.parametrize(
    "function", [linear_cross_entropy, linear_distillation, linear_logprobs, mtp_cross_entropy, mtp_logprobs]
)
@pytest.mark.parametrize("name", ["colour", "inplace"])
def test_an_unknown_option_of_hidden_states_is_refused_in_the_functions_name(function: Any, name: str) -> None:
    hidden = torch.zeros(2, 4, 5) if function.__name__.startswith("mtp") else torch.zeros(4, 5)
    third: Any = TeacherLogits(torch.zeros(4, 9)) if function is linear_distillation else torch.arange(4)
    with pytest.raises(TypeError, match=rf"^{function.__name__}\(\) got an unexpected keyword argument '{name}'"):
        function(hidden, torch.zeros(9, 5), third, **{name: 1})
