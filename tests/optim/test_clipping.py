"""Clipping in the update: the norm, what comes of it, and what a norm that is not finite does."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from evidence.pretend_cuda import pretending_cuda
from llmfast.optim import FusedAdagrad, FusedAdamW, FusedOptimizer, FusedRMSprop, FusedSGD
from llmfast.optim.plain import undone_if
from llmfast_kernels.optimizer.norm import TILE

SHAPES = [(70, 80), (5,), (), (0, 4), (33, 7)]


def parameters(dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s).to(dtypes[i % len(dtypes)]).requires_grad_() for i, s in enumerate(SHAPES)]


def gradients(params: list[Tensor], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        p.grad = None if (i + step) % 4 == 1 else (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def norm(params: list[Tensor]) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in params if p.grad is not None))


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (FusedAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
        (FusedSGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
        (FusedRMSprop, torch.optim.RMSprop, {}),
        (FusedAdagrad, torch.optim.Adagrad, {}),
    ],
)
@pytest.mark.parametrize("max_norm", [1.0, 1e4])
def test_clips_as_clip_grad_norm_does(path: str, ours: Any, theirs: Any, options: Any, max_norm: float) -> None:
    a, b = parameters(), parameters()
    mine, other = ours(a, max_grad_norm=max_norm, **options), theirs(b, **options)
    for step in range(5):
        gradients(a, step), gradients(b, step)
        expected = torch.nn.utils.clip_grad_norm_(b, max_norm)
        before = norm(a)
        mine.step(), other.step()
        assert mine.grad_norm.dtype == torch.float32 and mine.grad_norm.shape == ()
        assert mine.grad_norm.item() == pytest.approx(before, rel=1e-6)
        torch.testing.assert_close(mine.grad_norm, expected, rtol=1e-6, atol=0)
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


def test_one_norm_over_all_groups_and_dtypes(path: str) -> None:
    """Also of parameters that go other ways: of float64, or with gradients in another memory order."""
    params = parameters((torch.float32, torch.bfloat16, torch.float64))
    odd = torch.randn(6, 8).requires_grad_()
    optimizer = FusedAdamW([{"params": params[:2]}, {"params": [*params[2:], odd]}], max_grad_norm=1e-3, lr=1e-2)
    gradients(params, 4)
    odd.grad = torch.randn(8, 6).T
    before = norm([*params, odd])
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_one_buffer_are_measured_wherever_they_begin(path: str, dtype: torch.dtype, offset: int) -> None:
    """DistributedDataParallel lays out gradients so that not all begin at a multiple of 16 bytes."""
    params = [torch.zeros(5000, dtype=dtype, requires_grad=True), torch.zeros(3001, dtype=dtype, requires_grad=True)]
    buffer = torch.cat([torch.full((offset,), 1e3), torch.randn(8001), torch.full((16,), 1e3)]).to(dtype)
    optimizer = FusedSGD(params, lr=1.0, max_grad_norm=math.inf)
    params[0].grad, params[1].grad = buffer[offset : offset + 5000], buffer[offset + 5000 : offset + 8001]
    optimizer.step()
    assert optimizer.grad_norm is not None and optimizer.grad_norm.item() == pytest.approx(norm(params), rel=1e-6)
    for p in params:
        torch.testing.assert_close(p, -p.grad)


def test_the_norm_of_a_sparse_gradient_is_that_of_its_sums(path: str) -> None:
    """An index may be there twice: the gradient of that row is the sum of both."""
    p = torch.zeros(5, 2, requires_grad=True)
    optimizer = FusedAdagrad([p], max_grad_norm=math.inf)
    p.grad = torch.sparse_coo_tensor(
        [[1, 3, 1]], torch.tensor([[3.0, 0.0], [0.0, 3.0], [1.0, 0.0]]), (5, 2), check_invariants=True
    )
    assert not p.grad.is_coalesced()
    optimizer.step()
    assert optimizer.grad_norm is not None and optimizer.grad_norm.item() == 5.0


@pytest.mark.parametrize("master", [None, "split16"])
@pytest.mark.parametrize(("found_inf", "odd"), [(1.0, 1.0), (0.0, math.inf), (1.0, math.inf), (0.0, 1.0)])
def test_found_inf_and_the_norm_each_skip_a_step(path: str, master: Any, found_inf: float, odd: float) -> None:
    p = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer: Any = FusedAdamW([p], lr=0.5, max_grad_norm=1.0, master_weights=master)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found_inf)
    p.grad = torch.tensor([1.0, odd, 1.0, 1.0], dtype=torch.bfloat16)
    optimizer.step()
    moves = found_inf == 0 and math.isfinite(odd)
    assert bool((p != 1).all() if moves else (p == 1).all())
    assert optimizer.state[p]["step"].item() == moves


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_changes_nothing(path: str, odd: float) -> None:
    params = parameters()
    optimizer = FusedAdamW(params, max_grad_norm=1.0, ema_decay=0.9)
    gradients(params, 4)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    states = [{name: t.clone() for name, t in optimizer.state[p].items()} for p in params]
    gradients(params, 4)
    params[-1].grad[2, 3] = odd
    optimizer.step()
    assert not optimizer.grad_norm.isfinite()
    for p, old, state in zip(params, before, states):
        assert torch.equal(p, old)
        assert all(torch.equal(t, state[name]) for name, t in optimizer.state[p].items())
    gradients(params, 4)
    optimizer.step()
    assert optimizer.grad_norm.isfinite() and not torch.equal(params[0], before[0])


def test_infinity_measures_and_clips_nothing(path: str) -> None:
    def run(**options: Any) -> tuple[FusedOptimizer, list[Tensor]]:
        params = parameters()
        optimizer = FusedAdamW(params, **options)
        gradients(params, 4)
        optimizer.step()
        return optimizer, params

    (measured, a), (_, b) = run(max_grad_norm=math.inf), run()
    assert measured.grad_norm is not None and measured.grad_norm > 0
    assert all(torch.equal(p, q) for p, q in zip(a, b))


def test_the_norm_is_of_unscaled_gradients(path: str) -> None:
    a, b = parameters(), parameters()
    mine, other = FusedAdamW(a, max_grad_norm=0.5), FusedAdamW(b, max_grad_norm=0.5)
    gradients(a, 4, scale=1024.0), gradients(b, 4)
    mine.grad_scale, mine.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    mine.step(), other.step()
    torch.testing.assert_close(mine.grad_norm, other.grad_norm, rtol=1e-6, atol=0)
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_the_limit_may_change_between_steps(path: str) -> None:
    p = torch.zeros(4, requires_grad=True)
    optimizer = FusedSGD([p], lr=1.0, max_grad_norm=1.0)
    for limit in (1.0, 0.5):
        optimizer.options.max_grad_norm = limit
        p.grad = torch.full((4,), 8.0)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), -0.75), rtol=1e-5, atol=0)


def test_gradients_stay_as_they_are(kernels: None) -> None:
    params = parameters()
    optimizer = FusedAdamW(params, max_grad_norm=1e-3)
    gradients(params, 4)
    before = [None if p.grad is None else p.grad.clone() for p in params]
    optimizer.step()
    assert all(g is None if p.grad is None else torch.equal(p.grad, g) for p, g in zip(params, before))


def test_the_host_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretending_cuda():
        params = parameters((torch.float32, torch.bfloat16))
        optimizer = FusedAdamW(params, max_grad_norm=1.0)
        gradients(params, 4)
        optimizer.step()
        gradients(params, 3)
        for name in ("item", "__bool__", "__float__", "__int__", "tolist", "nonzero", "cpu", "numpy"):
            monkeypatch.setattr(Tensor, name, None if name == "item" else _refuse(name, getattr(Tensor, name)))
        optimizer.step()


def _refuse(name: str, was: Any) -> Any:
    def refused(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        # What the table sends to a device it writes on the host first.
        if name == "numpy" and self.dtype == torch.int64:
            return was(self, *args, **kwargs)
        raise AssertionError(f"a step waits for the device in {name}")

    return refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tile_measures_the_same_norm(kernels: None, dtype: torch.dtype) -> None:
    p = torch.ones(9001, dtype=dtype, requires_grad=True)
    p.grad = torch.randn(9001).to(dtype)
    optimizer = FusedAdamW([p], max_grad_norm=1.0)
    with torch.no_grad():
        plan, gradients = optimizer.make_plan()
        optimizer.follow(plan, gradients)
    (table,) = plan.tables
    for tile in TILE.tiles:
        with TILE.trying(tile):
            torch.testing.assert_close(table.sum_squares(), p.grad.double().square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [0, 1, 2048, 5000, 8192, 8193, 40_001])
def test_many_chunks_are_added_up_by_many_programs(kernels: None, count: int) -> None:
    from llmfast_kernels.optimizer.norm import add_up

    numbers = torch.rand(count) + 0.5
    total = torch.full((), torch.nan, dtype=torch.float64)
    add_up(numbers, total)
    torch.testing.assert_close(total, numbers.double().sum(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("skip", [False, True])
def test_a_device_that_is_not_waited_for_undoes_what_it_skips(skip: bool) -> None:
    """Only the host's own flag decides before the work; another device's is looked at by the device."""
    tensors = [torch.ones(3), torch.ones(2, 1).expand(2, 4)]
    flag = torch.tensor(skip)
    with pretending_cuda(), undone_if(flag, tensors):
        for t in tensors:
            t[:, :1].fill_(5.0) if t.dim() == 2 else t.fill_(5.0)
    assert [set(t.flatten().tolist()) for t in tensors] == [{1.0}, {1.0}] if skip else [{5.0}, {5.0}]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("size", "limit"), [(1e-6, 1e-6), (3e-6, 1e-6), (1e-7, 1e-3), (0.0, 1.0)])
def test_a_tiny_norm_is_clipped_as_clip_grad_norm_does(path: str, size: float, limit: float, own: bool) -> None:
    """Torch adds 1e-6 to the norm by which it divides, so that a gradient of that size is halved."""
    p, q = (torch.zeros(4, requires_grad=True) for _ in range(2))
    for t in (p, q):
        t.grad = torch.full((4,), size / 2)
    torch.nn.utils.clip_grad_norm_([q], limit)
    assert q.grad is not None
    if size == limit:
        assert q.grad[0].item() == pytest.approx(size / 4, rel=1e-4)
    group, whole = ({"max_grad_norm": limit}, {}) if own else ({}, {"max_grad_norm": limit})
    optimizer = FusedSGD([{"params": [p], **group}], lr=1.0, **whole)  # type: ignore[arg-type]
    optimizer.step()
    torch.testing.assert_close(-p.detach(), q.grad, rtol=1e-5, atol=0)


def test_a_step_without_any_gradient_measures_zero(path: str) -> None:
    """The norm of the step before is not that of this one; without a limit there is none."""
    params = [torch.ones(4, requires_grad=True) for _ in range(2)]
    optimizer = FusedSGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.5, max_grad_norm=9.0)
    for own in ({}, {"max_grad_norm": 3.0}):
        optimizer.group_options[1].update(own)
        for p in params:
            p.grad = torch.ones(4)
        optimizer.step()
        assert optimizer.grad_norm is not None and optimizer.grad_norm.item() == pytest.approx(8**0.5)
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = None
        optimizer.step()
        assert optimizer.grad_norm is not None and optimizer.grad_norm.tolist() == 0.0
        assert all(torch.equal(p, old) for p, old in zip(params, before))
    optimizer.options.max_grad_norm, optimizer.group_options[1]["max_grad_norm"] = None, None
    params[0].grad = torch.ones(4)
    optimizer.step()
    assert optimizer.grad_norm is None


@pytest.mark.parametrize("own", [False, True])
def test_the_norm_is_zero_from_the_first_step_without_a_gradient_on(path: str, own: bool) -> None:
    params = [torch.ones(4, requires_grad=True) for _ in range(2)]
    groups: list[Any] = [{"params": params[:1], **({"max_grad_norm": 1.0} if own else {})}, {"params": params[1:]}]
    optimizer = FusedSGD(groups, lr=0.5, max_grad_norm=None if own else 1.0)
    for grads in ((False, False), (False, True), (False, False), (True, True)):
        for p, there in zip(params, grads):
            p.grad = torch.ones(4) if there else None
        optimizer.step()
        measured = sum(grads[:1] if own else grads)
        assert optimizer.grad_norm is not None and optimizer.grad_norm.dtype == torch.float32
        assert optimizer.grad_norm.tolist() == pytest.approx(2 * measured**0.5)
    plain = FusedSGD(params, lr=0.5)
    plain.step()
    assert plain.grad_norm is None


@pytest.mark.parametrize("order", ["same", "another"])
def test_a_norm_beyond_float16_is_finite(path: str, order: str) -> None:
    p = torch.zeros(20, 15, dtype=torch.float16, requires_grad=True)
    g = torch.full((15, 20), 6e4, dtype=torch.float16).T
    p.grad = g.contiguous() if order == "same" else g
    optimizer = FusedSGD([p], lr=1.0, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm is not None and optimizer.grad_norm.item() == pytest.approx(6e4 * 300**0.5, rel=1e-3)
    torch.testing.assert_close(p.detach(), torch.full_like(p, -(300**-0.5)), rtol=2e-3, atol=0)


def test_more_tensors_than_one_program_prepares(kernels: None) -> None:
    """Each has its own counter, group and gradient, and all have one norm."""
    from llmfast_kernels.optimizer.coefficients import prepare_tile

    count = 2 * prepare_tile()["BLOCK"] + 6
    params = [torch.ones(3, requires_grad=True) for _ in range(count)]
    rates = [0.5 if i < 50 else 0.25 for i in range(count)]
    optimizer = FusedSGD([{"params": params[:50], "lr": 0.5}, {"params": params[50:], "lr": 0.25}], max_grad_norm=1.0)
    wanted, steps = [1.0] * count, [0] * count
    for period in (1, 3):  # then every third has no gradient
        for i, p in enumerate(params):
            p.grad = torch.full((3,), float(i)) if period == 1 or i % period else None
        whole = norm(params)
        for i, p in enumerate(params):
            if p.grad is not None:
                wanted[i], steps[i] = wanted[i] - rates[i] * i / whole, steps[i] + 1
        optimizer.step()
        assert optimizer.grad_norm is not None and optimizer.grad_norm.item() == pytest.approx(whole, rel=1e-6)
        for p, value, number in zip(params, wanted, steps):
            torch.testing.assert_close(p.detach(), torch.full((3,), value), rtol=1e-5, atol=1e-6)
            assert optimizer.state[p]["step"] == number


# Gradients that reach the norm by different ways: dtype, factor, and how they are stored.
STORED: dict[str, tuple[torch.dtype, float, str]] = {
    "float32": (torch.float32, 1.0, "usual"),
    "another order": (torch.float32, 1.0, "transposed"),
    "one element for a row": (torch.float32, 1.0, "expanded"),
    "bfloat16": (torch.bfloat16, 1.0, "usual"),
    "float64 beyond the squares of float32": (torch.float64, 1e30, "usual"),
    "complex": (torch.complex64, 1.0, "usual"),
    "complex in float64": (torch.complex128, 1e30, "usual"),
    "sparse": (torch.float32, 1.0, "sparse"),
    "sparse float64": (torch.float64, 1e30, "sparse"),
}


@pytest.mark.parametrize(("scale", "skip"), [(None, False), (4.0, False), (4.0, True)])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", STORED)
def test_a_gradient_of_any_kind_is_clipped(path: str, name: str, own: bool, scale: float | None, skip: bool) -> None:
    """It is measured with another one of the same size, or alone; a skipped step changes neither."""
    dtype, size, how = STORED[name]
    params = [torch.zeros(4, 3, dtype=kind).requires_grad_() for kind in (dtype, torch.float64)]
    whole = [torch.randn(4, 3, dtype=dtype) * size, torch.randn(4, 3, dtype=torch.float64) * size]
    whole[0] = whole[0][:, :1].expand(4, 3) if how == "expanded" else whole[0]
    for p, g in zip(params, whole):
        p.grad = g * (scale or 1.0)
    if how == "transposed":
        params[0].grad = (whole[0] * (scale or 1.0)).T.contiguous().T
    elif how == "expanded":
        params[0].grad = (whole[0][:, :1] * (scale or 1.0)).expand(4, 3)
    elif how == "sparse":
        params[0].grad = (whole[0] * (scale or 1.0)).to_sparse()
    groups: list[Any] = [{"params": params[:1], **({"max_grad_norm": 0.5} if own else {})}, {"params": params[1:]}]
    optimizer: Any = FusedSGD(groups, lr=1.0, max_grad_norm=None if own else 0.5)
    if scale is not None:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(skip))
    optimizer.step()
    norms = [torch.linalg.vector_norm(g.to(torch.complex128)).item() for g in whole]
    norm = norms[0] if own else math.hypot(*norms)
    assert optimizer.grad_norm is not None and optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-5)
    for p, g, limit in zip(params, whole, (0.5, None if own else 0.5)):
        wanted = g * (0 if skip else 1 if limit is None else limit / norm)
        torch.testing.assert_close(-p.detach(), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-9)


@pytest.mark.parametrize("odd", ["complex", "sparse"])
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_what_goes_by_torch_waits_to_know_whether_it_is_skipped(path: str, odd: str, found_inf: float) -> None:
    """The kernels of a GPU read it there; torch's functions for these gradients cannot."""
    with pretending_cuda():
        kind = torch.complex64 if odd == "complex" else torch.float32
        params = [torch.ones(4, 2, dtype=kind, requires_grad=True), torch.ones(3, requires_grad=True)]
        optimizer: Any = FusedSGD(params, lr=0.5)
        for p in params:
            p.grad = torch.ones_like(p)
        if odd == "sparse":
            params[0].grad = torch.ones(4, 2).to_sparse()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(found_inf)
        optimizer.step()
        for p in params:
            assert torch.equal(p.detach(), torch.full_like(p, 1.0 if found_inf else 0.5))
            assert optimizer.state[p]["step"] == 1 - found_inf


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_step_that_the_device_skips_leaves_gradients_scaled(found_inf: float) -> None:
    """No kernel takes float64: the step is taken, and undone on the device, together with the division."""
    with pretending_cuda():
        p = torch.ones(3, dtype=torch.float64, requires_grad=True)
        p.grad = torch.full_like(p, 8.0)
        optimizer: Any = FusedAdamW([p], lr=0.5, eps=0.0, weight_decay=0.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(found_inf)
        optimizer.step()
        assert torch.equal(p.grad, torch.full_like(p, 8.0 if found_inf else 2.0))
        for t, wanted in ((p.detach(), 0.5), (optimizer.state[p]["exp_avg"], 0.2)):
            start = 1.0 if t.data_ptr() == p.data_ptr() else 0.0
            torch.testing.assert_close(t, torch.full_like(t, start if found_inf else wanted), rtol=1e-12, atol=0)
