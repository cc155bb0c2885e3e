"""Tests of a call's surroundings: autocast, CUDA graph capture, and tensors with shapes but no data."""

import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from evidence.pretend_cuda import pretending_cuda
from llmfast import _dispatch, losses
from llmfast.losses import (
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
from llmfast.losses.targets import on_device
from llmfast.train.objective import FurtherTokens
from support.devices import DEVICE
from support.launched import unrecorded

N, D, V = 7, 16, 200
Loss = Callable[..., Any]


def outcome(loss: Loss, *leaves: Tensor, within: Any = None) -> list[Tensor]:
    """Return the loss, other results and the gradients; backward runs inside `within` too."""
    leaves = tuple(t.detach().requires_grad_() for t in leaves)
    with within or torch.autocast(DEVICE, enabled=False):
        found = loss(*leaves)
        value, *stats = (found[0], *found[1][:3]) if isinstance(found, tuple) else [found]
        total = value.sum() + sum(t.sum() for t in stats[1:])
        return [value.detach(), *(t.detach() for t in stats), *torch.autograd.grad(total, leaves)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "none": {"reduction": "none"},
    "stats": {"return_stats": True},
    "smoothing with class weights": {"label_smoothing": 0.2, "class_weights": torch.rand(V) + 0.1},
    "everything": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "logit_scale": 1.3},
}


@pytest.mark.parametrize(
    ("options", "budget", "slab"),
    [
        (options, budget, slab)
        for i, options in enumerate(OPTIONS)
        for j, budget in enumerate(("auto", 100_000))
        for k, slab in enumerate((None, torch.float32))
        if (i + j + k) % 2 == 0
    ],
)
@unrecorded()
def test_autocast_rounds_the_inputs_and_nothing_else(path: str, options: str, budget: Any, slab: Any) -> None:
    """Inside, the results are those of bfloat16 inputs outside: no product of the loss's own is rounded again."""
    hidden, weight, targets = torch.randn(N, D), torch.randn(V, D), torch.randint(0, V, (N,))
    low = hidden.bfloat16(), weight.bfloat16()
    given = {**OPTIONS[options], "memory_budget": budget, "slab_dtype": slab}

    def linear(h: Tensor, w: Tensor) -> Any:
        return linear_cross_entropy(h, w, targets, **given)

    for got, want in zip(outcome(linear, *low, within=torch.autocast(DEVICE, torch.bfloat16)), outcome(linear, *low)):
        assert torch.equal(got, want)
    # Gradients of float32 parameters are as exact as their dtype allows; the values are the same.
    found = outcome(linear, hidden, weight, within=torch.autocast(DEVICE, torch.bfloat16))
    assert torch.equal(found[0], outcome(linear, *low)[0])
    # Backward in another autocast than forward.
    h, w = (t.clone().requires_grad_() for t in low)
    result = linear(h, w)
    value = result[0] if isinstance(result, tuple) else result
    with torch.autocast(DEVICE, torch.float16):
        gradients = torch.autograd.grad(value.sum(), (h, w))
    h2, w2 = (t.clone().requires_grad_() for t in low)
    again = linear(h2, w2)
    for got, want in zip(
        gradients, torch.autograd.grad((again[0] if isinstance(again, tuple) else again).sum(), (h2, w2))
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("options", OPTIONS)
def test_autocast_leaves_logits_alone(path: str, options: str) -> None:
    logits, targets = torch.randn(N, V), torch.randint(0, V, (N,))

    def loss(x: Tensor) -> Any:
        return cross_entropy(x, targets, **OPTIONS[options])

    for got, want in zip(outcome(loss, logits, within=torch.autocast(DEVICE, torch.bfloat16)), outcome(loss, logits)):
        assert torch.equal(got, want)


def test_unrounded_logits_inside_autocast(path: str) -> None:
    """On devices without products into float32 the slab is multiplied in float32, which autocast must not undo."""
    hidden, weight = torch.randn(N, 256).bfloat16(), torch.randn(V, 256).bfloat16()
    targets = torch.randint(0, V, (N,))
    want = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, targets)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, targets, slab_dtype=torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def refuses(*arguments: Any, **options: Any) -> Tensor:
    raise RuntimeError("not implemented on this device")


def test_other_devices_are_asked_for_products_into_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert not _dispatch.multiplies_into_float32(cpu, torch.bfloat16)
    with pretending_cuda():
        assert _dispatch.multiplies_into_float32(torch.device("cuda"), torch.bfloat16)
        monkeypatch.setattr(torch.version, "hip", "7.0")
        for answers in (True, False):
            _dispatch._works.cache_clear()
            with mock.patch.object(torch, "mm", (lambda *a, **o: a[0]) if answers else refuses):
                assert _dispatch.multiplies_into_float32(torch.device("cuda"), torch.bfloat16) == answers
            with mock.patch.object(torch, "addmm", (lambda *a, **o: a[0]) if answers else refuses):
                assert _dispatch.adds_into_float32(torch.device("cuda"), torch.bfloat16) == answers
    _dispatch._works.cache_clear()


# Capture. A graph replays what the device did; a copy from the host's pageable memory is nothing it could hold.


@pytest.mark.parametrize("shared", [False, True], ids=["heads", "shared"])
def test_numbers_of_the_host_are_no_copies(kernels: None, shared: bool) -> None:
    hiddens = torch.randn(*(() if shared else (3,)), 2, N, D)
    weight, labels = torch.randn(V, D), torch.randint(0, V, (2, N))
    given: dict[str, Any] = {"head_weights": [1, 0.5, 0.25], "num_valid": [40, 30, 20]}
    want = mtp_cross_entropy(hiddens, weight, labels, **{name: torch.tensor(value) for name, value in given.items()})
    with (
        pretending_cuda(),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        mock.patch.object(torch, "tensor", refuses),
        mock.patch.object(torch, "as_tensor", refuses),
    ):
        got = mtp_cross_entropy(hiddens, weight, labels, **given)
        linear_cross_entropy(hiddens, weight, labels if shared else labels.expand(3, 2, N), num_valid=7)
    torch.testing.assert_close(got, want)


def test_weights_of_a_schedule_are_no_copies() -> None:
    objective = FurtherTokens(3, lambda step: [1.0, 0.3, 0.1], shared=False, detached=False)
    model = mock.Mock(return_value=torch.randn(3, 2, N, D), unembedding=torch.randn(V, D))
    batch = mock.Mock(labels=torch.randint(0, V, (2, N)), document_ids=None)
    num_valid = torch.tensor([40, 30, 20])
    with mock.patch.object(torch, "tensor", refuses), mock.patch.object(torch, "as_tensor", refuses):
        loss, _ = objective(model, batch, num_valid, 0, True)
    assert loss.isfinite()


@pytest.mark.parametrize("name", ["num_valid", "head_weights"])
def test_a_tensor_of_the_host_is_refused_while_a_graph_is_captured(name: str) -> None:
    elsewhere = mock.Mock(spec=Tensor, device=torch.device("cpu"), dtype=torch.float32, shape=(2,))
    with (
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        pytest.raises(ValueError, match=f"{name} must be on cuda:0 while a CUDA graph is captured; got .* on cpu"),
    ):
        on_device(name, elsewhere, torch.device("cuda", 0))


def test_only_copies_to_an_accelerator_do_not_wait() -> None:
    """A copy to the host that is not waited for may be read before it has arrived."""
    for target, waits in (("cpu", True), ("cuda", False)):
        t = mock.Mock(spec=Tensor, device=torch.device("xpu"))
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False):
            on_device("num_valid", t, torch.device(target))
        assert t.to.call_args.kwargs == {"non_blocking": not waits}


# Shapes without data.


def shapes(loss: Loss, *leaves: Tensor) -> list[tuple[torch.Size, torch.dtype, str]]:
    return [(t.shape, t.dtype, t.device.type) for t in outcome(loss, *leaves)]


LOSSES: dict[str, Loss] = {
    "logits": lambda y, **o: lambda h, w: cross_entropy(h @ w.T, y, **o),
    "in place": lambda y, **o: lambda h, w: cross_entropy(h @ w.T, y, inplace=True, **o),
    "linear": lambda y, **o: lambda h, w: linear_cross_entropy(h, w, y, **o),
    "linear in chunks": lambda y, **o: lambda h, w: linear_cross_entropy(h, w, y, memory_budget=100_000, **o),
}


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_stats": True}, {"num_valid": 5}], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_without_data_give_shapes(loss: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    def given(device: str) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.full((N,), -100, dtype=torch.int64, device=device)
        return torch.zeros(N, D, dtype=dtype, device=device), torch.zeros(V, D, dtype=dtype, device=device), y

    h, w, y = given("cpu")
    want = shapes(LOSSES[loss](y, **options), h, w)
    h, w, y = given("meta")
    got = shapes(LOSSES[loss](y, **options), h, w)
    assert [x[:2] for x in got] == [x[:2] for x in want]
    assert {x[2] for x in got} == {"meta"}
    with FakeTensorMode():
        h, w, y = given("cpu")
        assert shapes(LOSSES[loss](y, **options), h, w) == want
        if not {"return_stats", "num_valid"} & {*options}:  # torch itself looks for the device in indexing and autograd
            h, w, y = given("cuda")
            value = LOSSES[loss](y, **options)(h, w)
            assert (value.shape, value.dtype, value.device.type) == (*want[0][:2], "cuda")


@pytest.mark.parametrize("options", [{}, {"return_stats": True}], ids=str)
@pytest.mark.parametrize("K", [None, 3])
def test_log_probabilities_without_data_give_shapes(options: dict[str, Any], K: int | None) -> None:
    for from_logits in (False, True):

        def function(h: Tensor, w: Tensor, from_logits: bool = from_logits) -> Any:
            y = torch.full((N,) if K is None else (N, K), -100, dtype=torch.int64, device=h.device)
            return logprobs(h @ w.T, y, **options) if from_logits else linear_logprobs(h, w, y, **options)

        want = shapes(function, torch.zeros(N, D), torch.zeros(V, D))
        with FakeTensorMode():
            assert shapes(function, torch.zeros(N, D), torch.zeros(V, D)) == want
        got = shapes(function, torch.zeros(N, D, device="meta"), torch.zeros(V, D, device="meta"))
        assert [x[:2] for x in got] == [x[:2] for x in want] and {x[2] for x in got} == {"meta"}


@pytest.mark.parametrize("shared", [False, True], ids=["heads", "shared"])
def test_heads_without_data_give_shapes(shared: bool) -> None:
    def loss(h: Tensor, w: Tensor) -> Any:
        y = torch.zeros(2, N, dtype=torch.int64, device=h.device)
        return mtp_cross_entropy(h, w, y, head_weights=[1, 0.5, 0.25])

    shape = (2, N, D) if shared else (3, 2, N, D)
    with FakeTensorMode():
        got = shapes(loss, torch.zeros(shape), torch.zeros(V, D))
    assert got == [(torch.Size(s), torch.float32, DEVICE) for s in ((), shape, (V, D))]
    got = shapes(loss, torch.zeros(shape, device="meta"), torch.zeros(V, D, device="meta"))
    assert got == [(torch.Size(s), torch.float32, "meta") for s in ((), shape, (V, D))]


def test_what_needs_data_says_so() -> None:
    h, w = torch.zeros(N, D, device="meta"), torch.zeros(V, D, device="meta", requires_grad=True)
    y = torch.zeros(N, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="accumulate_into does not work with meta or fake tensors"):
        linear_cross_entropy(h, w, y, accumulate_into=torch.zeros(V, D, device="meta"))
    with pytest.raises(ValueError, match="accumulate_into does not work with meta or fake tensors"):
        linear_distillation(h, w, TeacherLogits(h @ w.T), accumulate_into=torch.zeros(V, D, device="meta"))
    group: Any = object()
    for loss in (
        lambda: linear_cross_entropy(h, w, y, process_group=group),
        lambda: cross_entropy(h, y, process_group=group),
    ):
        with pytest.raises(ValueError, match="process_group does not work with meta or fake tensors"):
            loss()


def test_a_target_out_of_range_is_nan_where_classes_have_weights(kernels: None) -> None:
    """On a GPU, targets are not checked; weights must not be read at a target that is out of range."""
    with pretending_cuda():
        logits, targets, weights = torch.randn(4, 9), torch.tensor([1, 9, -100, -1]), torch.rand(9) + 0.1
        loss = cross_entropy(logits, targets, class_weights=weights, reduction="none")
        assert loss.isnan().tolist() == [False, True, False, True]
        assert cross_entropy(logits, targets, class_weights=weights).isnan()
        assert cross_entropy(logits[::2], targets[::2], class_weights=weights).isfinite()


H, W, Y = torch.randn(4, 6), torch.randn(9, 6), torch.arange(4)
# Every public loss, as a scalar function of hidden states and targets.
EVERY: dict[str, Loss] = {
    "cross_entropy": lambda h, y, **more: cross_entropy(h @ W.to(h).T, y, **more),
    "linear_cross_entropy": lambda h, y, **more: linear_cross_entropy(h, W.to(h), y, **more),
    "linear_distillation": lambda h, y, **more: linear_distillation(
        h, W.to(h), TeacherLogits(h @ W.to(h).T), y, **more
    ),
    "logprobs": lambda h, y, **more: logprobs(h @ W.to(h).T, y, **more).sum(),
    "linear_logprobs": lambda h, y, **more: linear_logprobs(h, W.to(h), y, **more).sum(),
    "mtp_cross_entropy": lambda h, y, **more: mtp_cross_entropy(h[None], W.to(h), y, **more),
    "mtp_logprobs": lambda h, y, **more: mtp_logprobs(h[None], W.to(h), y, **more).sum(),
}
TRANSFORMS: dict[str, Callable[[Loss], Any]] = {
    "grad": lambda loss: torch.func.grad(loss)(H, Y),
    "vjp": lambda loss: torch.func.vjp(lambda h: loss(h, Y), H),
    "jvp": lambda loss: torch.func.jvp(lambda h: loss(h, Y), (H,), (H,)),
    "hessian": lambda loss: torch.func.hessian(lambda h: loss(h, Y))(H),
    "vmap": lambda loss: torch.func.vmap(loss)(H.expand(2, 4, 6), Y.expand(2, 4)),
    "gradients per sample": lambda loss: torch.func.vmap(torch.func.grad(loss))(H[:, None], Y[:, None]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", EVERY)
def test_transforms_of_torch_func_are_refused_in_one_sentence(name: str, transform: str) -> None:
    """The answer is the same for all options and dtypes, and the sentence names a function that works."""
    other = name.replace("mtp", "linear")
    for options, dtype in (({}, None), ({"softcap": 5.0}, None), ({}, torch.float64)):

        def loss(h: Tensor, y: Tensor, options: Any = options, dtype: Any = dtype) -> Any:
            return EVERY[name](h if dtype is None else h.to(dtype), y, **options)

        with pytest.raises(
            TypeError, match=rf"^{name} must be called outside of .*; inside, use .*\.reference\.{other}$"
        ):
            TRANSFORMS[transform](loss)
    assert {*EVERY} == {name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))} - {
        "mtp_valid_counts"
    }


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy", "linear_logprobs", "linear_distillation"])
def test_the_definitions_work_inside_transforms(name: str, transform: str) -> None:
    defined = getattr(reference, name)

    def loss(h: Tensor, y: Tensor) -> Any:
        if name == "linear_distillation":
            return defined(h, W, TeacherLogits(h.detach() @ W.T), y, softcap=5.0)
        return defined(h @ W.T if name == "cross_entropy" else h, *(() if name == "cross_entropy" else (W,)), y).sum()

    TRANSFORMS[transform](loss)


def test_gradients_are_not_made_inside_transforms() -> None:
    hidden = H.clone().requires_grad_()
    for loss in (cross_entropy(hidden @ W.T, Y, softcap=5.0), linear_logprobs(hidden, W, Y).sum()):

        def gradient(upstream: Tensor, loss: Tensor = loss) -> Tensor:
            return torch.autograd.grad(loss, hidden, upstream)[0]

        with pytest.raises(TypeError, match=r"^gradients of this loss must be made outside of torch\.func's "):
            torch.func.vmap(gradient)(torch.ones(3))
