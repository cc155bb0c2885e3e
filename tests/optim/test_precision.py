"""Parameters and states of fewer bytes, and how far training with them is from training in float32."""

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast._dispatch import kernels_on_cpu
from llmfast.optim import FusedAdam, FusedAdamW, FusedOptimizer, FusedRMSprop, FusedSGD, optimizer_in_backward
from llmfast_kernels.launch import Choice
from llmfast_kernels.optimizer.step import PAIRED_TILE, TILE

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(20, 33), (5,), (), (0, 3), (2, 300)]


def train(
    dtype: torch.dtype = BF16,
    steps: int = 12,
    cls: Any = FusedAdamW,
    *,
    grad_dtype: torch.dtype | None = None,
    shapes: Any = SHAPES,
    **options: Any,
) -> tuple[FusedOptimizer, list[Tensor]]:
    """Train from the same bfloat16 values with the same gradients, for any dtypes."""
    torch.manual_seed(0)
    params = [torch.randn(shape).bfloat16().to(dtype).requires_grad_() for shape in shapes]
    optimizer = cls(params, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            g = (torch.randn(p.shape, generator=generator) + 0.5).bfloat16()
            if grad_dtype is not None:
                p.grad_dtype = grad_dtype
            p.grad = g.to(grad_dtype or dtype)
        optimizer.step()
    return optimizer, params


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def exact(optimizer: FusedOptimizer, params: list[Tensor]) -> Tensor:
    """Return the parameters with all bits that the optimizer keeps of them."""
    return flat([optimizer.master_value(p) for p in params])


@pytest.mark.parametrize("lr", [1e-2, 1e-5])
def test_a_float32_master_trains_as_float32(path: str, lr: float) -> None:
    """Compare up to one rounding per step; 16 + 16 bits match 32 bits exactly."""
    truth = flat(train(F32, lr=lr)[1])
    optimizer, params = train(master_weights="fp32", state_dtype=F32, lr=lr)
    torch.testing.assert_close(exact(optimizer, params), truth, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(flat(params), truth, rtol=2**-7, atol=1e-6)
    assert torch.equal(exact(*train(master_weights="split16", state_dtype=F32, lr=lr)), exact(optimizer, params))


@pytest.mark.parametrize(
    ("choice", "dtype", "options"),
    [
        (TILE, F32, {}),
        (TILE, BF16, {}),
        (PAIRED_TILE, BF16, {"master_weights": "split8", "state_dtype": "8bit"}),
    ],
)
def test_every_tile_takes_the_same_step(kernels: None, choice: Choice, dtype: torch.dtype, options: Any) -> None:
    """Each element is updated by itself, so the result has the same bits."""

    def result() -> Tensor:
        return exact(*train(dtype, 2, shapes=[(9000,), (5,)], **options))

    default = result()
    for tile in choice.tiles[1:]:
        with choice.trying(tile):
            assert torch.equal(result(), default)


def test_24_bits_are_as_good_as_they_say(path: str) -> None:
    truth = flat(train(F32, lr=1e-3)[1])
    optimizer, params = train(master_weights="split8", state_dtype=F32, lr=1e-3)
    torch.testing.assert_close(exact(optimizer, params), truth, rtol=12 * 2**-17, atol=1e-6)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_compensated_weights_move_where_rounded_ones_do_not(path: str, dtype: torch.dtype) -> None:
    """Take steps of 1e-5, which a bfloat16 near 1 would always round away."""
    options: dict[str, Any] = {"shapes": [(300,)], "lr": 1e-5, "weight_decay": 1.0}
    start = flat(train(dtype, steps=0, **options)[1])
    truth = flat(train(F32, **options)[1]) - start
    rounded = flat(train(dtype, state_dtype=F32, **options)[1]) - start
    optimizer, params = train(dtype, master_weights="kahan", state_dtype=F32, **options)
    kept = exact(optimizer, params) - start
    large = start.abs() > 0.1
    assert (rounded[large] == 0).double().mean() > 0.9
    assert (kept[large] - truth[large]).abs().max() < 0.1 * truth.abs().max()


def test_stochastic_weights_move_on_average(path: str) -> None:
    options: dict[str, Any] = {"shapes": [(8000,)], "lr": 1e-4, "steps": 10, "state_dtype": F32}
    start = flat(train(steps=0, shapes=[(8000,)])[1])
    truth = (flat(train(F32, lr=1e-4, steps=10, shapes=[(8000,)])[1]) - start).mean()
    moved = flat(train(master_weights="stochastic", **options)[1]) - start
    assert abs(moved.mean() - truth) < 5 * moved.std() / len(moved) ** 0.5
    assert abs(moved.mean()) > 0.5 * abs(truth)


def test_stochastic_rounding_depends_on_seed_step_and_element_alone(path: str) -> None:
    def run(**options: Any) -> Tensor:
        return flat(train(master_weights="stochastic", lr=1e-3, steps=3, **options)[1])

    assert torch.equal(run(seed=5), run(seed=5))
    assert not torch.equal(run(seed=5), run(seed=6))
    # Two parameters are rounded otherwise, the same values though they have.
    _, (a, b) = train(master_weights="stochastic", steps=0, shapes=[(2000,), (2000,)])
    with torch.no_grad():
        b.copy_(a)
    optimizer = FusedSGD([a, b], lr=1e-3, master_weights="stochastic")
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    assert not torch.equal(a, b)


def test_noise_depends_on_the_place_among_all_parameters(path: str) -> None:
    """Groups, and steps that are taken in backward, change nothing of it."""
    found = []
    for groups, in_backward in (((4,), False), ((1, 3), False), ((2, 2), True)):
        params = [torch.nn.Parameter(torch.ones(500, dtype=BF16)) for _ in range(4)]
        rest = iter(params)
        optimizer = FusedSGD([{"params": [next(rest) for _ in range(n)]} for n in groups], lr=1e-3, seed=3)
        optimizer.options.master_weights = "stochastic"
        if in_backward:
            optimizer_in_backward(torch.nn.ParameterList(params), optimizer)
        for _ in range(2):
            torch.stack([p.sum() for p in params]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach() for p in params])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found[0], 2))


def test_kernels_round_stochastically_as_plain_torch_does() -> None:
    def run(kernels: bool) -> Tensor:
        with kernels_on_cpu() if kernels else contextlib.nullcontext():
            return flat(train(master_weights="stochastic", cls=FusedSGD, lr=1e-3, steps=4)[1])

    assert torch.equal(run(False), run(True))


def test_kernels_and_plain_torch_draw_the_same_noise_for_every_state_and_seed() -> None:
    """All bits of a seed count; a code may differ where rounding in the rule decides."""
    found: dict[int, list[Tensor]] = {}
    for seed in (0, 1, 1 + (1 << 32), (1 << 53) - 1):
        runs = []
        for kernels in (False, True):
            with kernels_on_cpu() if kernels else contextlib.nullcontext():
                options: dict[str, Any] = {"state_dtype": "8bit", "master_weights": "stochastic", "seed": seed}
                optimizer, (p,) = train(steps=2, shapes=[(3000,)], lr=0.01, **options)
                codes = [optimizer.state[p][f"{name}_code"] for name in ("exp_avg", "exp_avg_sq")]
                runs.append([p.detach(), *codes])
        for a, b in zip(*runs):
            assert (a != b).double().mean() < 0.01
        found[seed] = runs[0]
    for one, other in itertools.combinations(found.values(), 2):
        assert all((a != b).double().mean() > 0.1 for a, b in zip(one, other))


@pytest.mark.parametrize(("cls", "dtype"), [(FusedRMSprop, F32), (FusedAdamW, BF16)])
def test_8_bit_states_train_nearly_as_well(path: str, cls: Any, dtype: torch.dtype) -> None:
    """On a noisy quadratic bowl, where the second moment decides how far a step goes."""

    def distance(**options: Any) -> float:
        torch.manual_seed(3)
        p = torch.randn(1000).to(dtype).requires_grad_()
        curvature = 10 ** torch.empty(1000).uniform_(-2, 1)
        optimizer = cls([p], lr=3e-2, **options)
        for _ in range(40):
            p.grad = (curvature * (p.detach().float() + 0.1 * torch.randn(1000))).to(dtype)
            optimizer.step()
        return p.detach().float().abs().mean().item()

    master: dict[str, Any] = {} if dtype == F32 else {"master_weights": "split16"}
    assert distance(state_dtype="8bit", **master) < 1.1 * distance(state_dtype=F32, **master)


def test_an_8_bit_average_moves_by_less_than_a_code_per_step(path: str) -> None:
    """Rounding to nearest would never move the average."""
    p = torch.zeros(2048, requires_grad=True)
    optimizer = FusedAdam([p], lr=0.0, betas=(0.9, 0.999), state_dtype="8bit")
    for size, steps in ((1.0, 1), (0.0, 40)):
        for _ in range(steps):
            p.grad = torch.full_like(p, size)
            p.grad[::128] = 1.0  # one of each group keeps the scale where it is
            optimizer.step()
    state = optimizer.torch_state_dict()["state"][0]
    others = torch.arange(2048) % 128 != 0
    truth = 1e-3 * 0.999**40
    assert abs(state["exp_avg_sq"][others].mean() - truth) < 0.02 * truth


MIXES = [
    (F32, BF16, F32),
    (F32, F16, BF16),
    (F32, None, F16),
    (BF16, F32, F32),
    (BF16, F16, BF16),
    (BF16, None, F32),
    (F16, F32, F32),
    (F16, BF16, F16),
    (F16, None, BF16),
]


@pytest.mark.parametrize(("dtype", "state_dtype", "grad_dtype"), MIXES)
def test_any_mix_of_dtypes(path: str, dtype: Any, state_dtype: Any, grad_dtype: Any) -> None:
    if not hasattr(Tensor, "grad_dtype") and grad_dtype != dtype:
        pytest.skip("this torch has gradients in the parameter's dtype alone")
    truth = flat(train(F32, 5, lr=1e-2, eps=1e-3)[1])
    optimizer, params = train(dtype, 5, lr=1e-2, eps=1e-3, state_dtype=state_dtype, grad_dtype=grad_dtype)
    coarse = max(torch.finfo(t).eps for t in (dtype, state_dtype or dtype, BF16))
    torch.testing.assert_close(flat(params), truth, rtol=4 * torch.finfo(dtype).eps, atol=0.05 * coarse + 1e-6)
    assert all(optimizer.state[p]["exp_avg"].dtype == (state_dtype or dtype) for p in params)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"master_weights": "fp32"},
        {"master_weights": "split16"},
        {"master_weights": "split8"},
        {"master_weights": "kahan"},
        {"master_weights": "stochastic"},
        {"state_dtype": "8bit"},
        {"state_dtype": "8bit", "master_weights": "stochastic"},
        {"ema_decay": 0.9},
    ],
)
def test_nan_and_infinity_survive(path: str, options: dict[str, Any]) -> None:
    p = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0, 2.0] + [0.5] * 300, dtype=BF16).requires_grad_()
    optimizer = FusedAdamW([p], **options)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p[0] == torch.inf and p[1] == -torch.inf and p[2].isnan() and p[3:].isfinite().all()
    p.grad = torch.ones_like(p)
    p.grad[3], p.grad[4] = torch.nan, torch.inf
    optimizer.step()
    assert not p[3].isfinite() and not p[4].isfinite()
    assert p[200:].isfinite().all()


def test_what_overflows_float16_stays_infinite(path: str) -> None:
    """The rounding error of a finite value that becomes infinite is infinite too, and would make it NaN."""
    p = torch.tensor([65504.0, -65504.0, 1.0], dtype=F16).requires_grad_()
    optimizer = FusedSGD([p], lr=100.0, master_weights="kahan")
    for size in (1.0, 0.0):
        p.grad = torch.tensor([-size, size, 0.0], dtype=F16)
        optimizer.step()
        assert p.tolist() == [torch.inf, -torch.inf, 1.0] and optimizer.state[p]["kahan_comp"].tolist() == [0.0] * 3


def test_an_average_of_the_weights(path: str) -> None:
    def run(**options: Any) -> tuple[FusedOptimizer, Tensor, Tensor]:
        p = torch.linspace(-1, 1, 700).requires_grad_()
        optimizer = FusedAdamW([p], lr=1e-2, **options)
        average = p.detach().clone()
        for step in range(6):
            p.grad = torch.cos(torch.arange(700.0) + step)
            optimizer.step()
            average.lerp_(p.detach(), 0.1)
        return optimizer, p, average

    optimizer, p, average = run(ema_decay=0.9)
    assert torch.equal(p, run()[1])
    torch.testing.assert_close(optimizer.state[p]["ema_param"], average, rtol=1e-6, atol=1e-7)
    before = p.detach().clone()
    with optimizer.ema_weights():
        torch.testing.assert_close(p.detach(), average, rtol=1e-6, atol=1e-7)
    assert torch.equal(p, before)
    with pytest.raises(KeyboardInterrupt), optimizer.ema_weights():  # the weights are there afterwards all the same
        raise KeyboardInterrupt
    assert torch.equal(p, before)


def test_an_average_in_float32_of_bfloat16_weights(path: str) -> None:
    optimizer, params = train(master_weights="split16", ema_decay=0.999, lr=1e-3)
    for p in params:
        average = optimizer.state[p]["ema_param"]
        assert average.dtype == F32 and average.shape == p.shape
    with pytest.raises(ValueError, match="ema_decay"), train(steps=0)[0].ema_weights():
        pass


def test_gradients_are_zeroed_on_the_way(path: str) -> None:
    """Zero the gradients of a skipped step too, in all chunks of a large tensor."""
    params = [torch.ones(shape, requires_grad=True) for shape in [*SHAPES, (9001,)]]
    optimizer = FusedSGD(params, lr=0.1, zero_grads=True)
    for found_inf in (0.0, 1.0):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        for p in params:
            assert p.grad is not None and (p.grad == 0).all()
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, 0.9))
