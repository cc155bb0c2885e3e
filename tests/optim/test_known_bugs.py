"""Mistakes that other optimizers have made, one test each; issue numbers say whose, the numbers of lists are ours."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from llmfast.optim import FusedAdagrad, FusedAdamW, FusedSGD
from support.devices import DEVICE
from support.training import FULL, PLAIN, Case, gradients, parameters, scaled, values

NESTEROV = Case(FusedSGD, {"momentum": 0.9, "nesterov": True, "lr": 0.1})
MASTERS = ["fp32", "split16", "split8", "kahan", "stochastic"]
MOMENTUM: dict[str, Any] = {"momentum": 0.9, "dampening": 0.5, "lr": 0.1}


def test_an_overflow_in_the_first_step_of_all_leaves_no_garbage_in_momentum(path: str) -> None:
    # torch's fused SGD had made the buffer, and never wrote it: weights of 1e23 one step later.
    ours, theirs = (torch.ones(40, requires_grad=True) for _ in range(2))
    a, b = FusedSGD([ours], **MOMENTUM), torch.optim.SGD([theirs], **MOMENTUM, foreach=False)
    ours.grad = torch.full((40,), torch.inf)
    scaled(a, 4.0, found_inf=1.0)
    a.step()
    assert torch.equal(ours.detach(), torch.ones(40))
    assert not a.state_dict()["state"]
    for value in (1.0, 3.0):
        ours.grad, theirs.grad = torch.full((40,), 4 * value), torch.full((40,), value)
        scaled(a, 4.0)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs)


def test_a_first_gradient_later_than_another_parameters(path: str) -> None:
    # torch's fused SGD: TypeError.
    early, late = (torch.ones(4, requires_grad=True) for _ in range(2))
    optimizer = FusedSGD([early, late], **MOMENTUM)
    early.grad = torch.ones(4)
    optimizer.step()
    late.grad = torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(late.detach(), torch.full((4,), 0.9))  # a first gradient: not damped
    torch.testing.assert_close(early.detach(), torch.full((4,), 0.9 - 0.1 * (0.9 + 0.5)))


@pytest.mark.parametrize("case", [*FULL, NESTEROV], ids=str)
def test_gradients_are_left_as_they_are(path: str, case: Case) -> None:
    # torch's foreach SGD adds Nesterov's momentum to them.
    params = parameters()
    optimizer = case.make_ours(params)
    for step in (8, 9):
        gradients(step, params)
        before = [p.grad.clone() for p in params if p.grad is not None]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before) if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*FULL, NESTEROV], ids=str)
def test_a_gradient_in_another_memory_order_than_its_parameter(path: str, case: Case, dtype: torch.dtype) -> None:
    # torch's fused CPU kernels take its elements in the wrong order, and its other kernels compute in float16, in which
    # an eps of 1e-8 is 0.
    ours = torch.arange(300.0).view(20, 15).to(dtype).requires_grad_()
    exact = ours.detach().double().requires_grad_()
    a, b = case.make_ours([ours]), case.make_exact([exact])
    for step in range(3):
        g = torch.linspace(-1, 1, 300).view(15, 20).to(dtype).T
        g[step] = 0
        ours.grad, exact.grad = g, g.double().contiguous()
        a.step()
        b.step()
    bits = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), exact, rtol=4 * bits, atol=8 * bits)


@pytest.mark.parametrize("master", MASTERS)
def test_a_decay_of_a_thousandth_moves_weights_of_bfloat16(path: str, master: Any) -> None:
    # optimi rounds p * (1 - lr * weight_decay) to bfloat16 before it compensates: nothing moved, ever.
    p = torch.ones(512, dtype=torch.bfloat16, requires_grad=True)
    optimizer = FusedAdamW([p], lr=1e-2, weight_decay=0.1, master_weights=master)
    for _ in range(8):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert optimizer.master_value(p).float().mean().item() == pytest.approx(0.999**8, abs=1e-3)
    assert (p != 1).any()


@pytest.mark.parametrize("master", [None, *MASTERS])
def test_gains_of_1_move_at_a_small_learning_rate(path: str, master: Any) -> None:
    # AReaL#1292, Model-Optimizer#2322: gains of norms never left the 1 they began with.
    p = torch.ones(1024, dtype=torch.bfloat16, requires_grad=True)
    optimizer = FusedAdamW([p], lr=1e-5, weight_decay=0.0, master_weights=master)
    for _ in range(8):
        p.grad = torch.ones_like(p)
        optimizer.step()
    moved = 1 - optimizer.master_value(p).double().mean().item()
    # Steps of 1e-5 are rounded to 1.5e-5 in the 24 bits of split8; random ones have moved 21 or so of the 1024.
    expected = pytest.approx(8e-5, rel=0.6 if master in ("split8", "stochastic") else 0.05)
    assert moved == (0 if master is None else expected)


def test_float32_moments_of_bfloat16_parameters_have_the_bits_of_float32(path: str) -> None:
    # apex's capturable Adam stored them through the parameter's dtype.
    p = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    optimizer = FusedAdamW([p], state_dtype=torch.float32, master_weights="fp32")
    for g in (0.7, 0.3):
        p.grad = torch.full_like(p, g)
        optimizer.step()
    first, second = (torch.tensor(g, dtype=torch.bfloat16).double() for g in (0.7, 0.3))
    state = optimizer.state[p]
    expected = {"exp_avg": 0.09 * first + 0.1 * second, "exp_avg_sq": 0.000999 * first**2 + 0.001 * second**2}
    for name, value in expected.items():
        torch.testing.assert_close(state[name].double(), value.expand(8), rtol=1e-6, atol=0)
    assert (state["master_param"] != p).all()  # apex ignores master weights of bfloat16


@pytest.mark.parametrize("dtype", [None, "8bit"])
@pytest.mark.parametrize("master", MASTERS)
def test_not_a_number_is_never_rounded_to_zero(path: str, master: Any, dtype: Any) -> None:
    # Transformer Engine and torchao add to the bits of it: 0x7FFFFFFF, the NaN that GPUs make, became -0.0.
    p = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer = FusedSGD([p], momentum=0.9, master_weights=master, state_dtype=dtype)
    p.grad_dtype = torch.float32
    p.grad = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0], dtype=torch.int32).view(torch.float32)
    optimizer.step()
    assert p.isnan().tolist()[:3] == [True, True, True]
    assert optimizer.master_value(p).isnan().tolist()[:3] == [True, True, True]
    p.grad = torch.zeros(4)
    optimizer.step()
    assert p.isnan().tolist()[:3] == [True, True, True]


@pytest.mark.parametrize("master", MASTERS)
def test_infinity_stays_infinite(path: str, master: Any) -> None:
    p = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    optimizer = FusedSGD([p], weight_decay=0.1, master_weights=master)
    p.grad = torch.tensor([torch.inf, -torch.inf], dtype=torch.bfloat16)
    for _ in range(2):
        optimizer.step()
        p.grad.zero_()
    assert p.tolist() == [-torch.inf, torch.inf]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_every_parameter_counts_its_own_steps(path: str, case: Case) -> None:
    # DeepSpeed#8471: only the last parameter's counter moved, once for each dtype.
    params = [torch.ones(3, dtype=dtype, requires_grad=True) for dtype in (torch.float32, torch.bfloat16) * 2]
    optimizer = case.make_ours([{"params": params[:3]}, {"params": params[3:]}])
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = torch.ones_like(p) if i <= step else None
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [4, 3, 2, 1]


@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("sizes", [[5000, 0], [0, 3, 0], [0]], ids=str)
def test_empty_tensors_hide_no_others(path: str, case: Case, sizes: list[int]) -> None:
    # apex drops the pending launch if the last tensor is empty; pytorch#100701, TransformerEngine#3202.
    # They count their steps too.
    def run(make: Any) -> tuple[Tensor, Any]:
        params = [torch.ones(size, requires_grad=True) for size in sizes]
        optimizer = make(params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return values(params), optimizer

    found, optimizer = run(case.make_ours)
    torch.testing.assert_close(found, run(case.make_exact)[0])
    assert [state["step"].item() for state in optimizer.state.values()] == [1.0] * len(sizes)


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_steps_are_counted_past_256_whatever_the_default_dtype(path: str, case: Case, default_dtype: None) -> None:
    # torchao#4915: a counter of bfloat16 stays at 256.
    p = torch.ones(3, dtype=torch.float32, requires_grad=True)
    optimizer = case.make_ours([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["step"].dtype in (torch.float32, torch.float64)
    optimizer.state[p]["step"].fill_(256)
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 257


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_schedule_writes_into_a_learning_rate_that_is_a_tensor(path: str, case: Case) -> None:
    # pytorch#106802, #163103, torchao#2574: replaced by a float, or the same tensor as initial_lr.
    def run(lr: Any) -> tuple[Any, Tensor]:
        p = torch.ones(3, requires_grad=True)
        optimizer = case.make_ours([p], lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for _ in range(3):
            p.grad = torch.ones(3)
            optimizer.step()
            schedule.step()
        return optimizer, p.detach()

    lr = torch.tensor(0.25)
    (optimizer, ours), (_, expected) = run(lr), run(0.25)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 0.25 * 0.125
    assert optimizer.param_groups[0]["initial_lr"] == 0.25
    torch.testing.assert_close(ours, expected)


INDEPENDENT = Case(FusedAdamW, {"decay": "independent"})


@pytest.mark.parametrize("case", [*PLAIN, INDEPENDENT], ids=str)
def test_a_learning_rate_of_one_element_in_one_dimension(path: str, case: Case) -> None:
    p, q = (torch.tensor(1.0).requires_grad_() for _ in range(2))
    a, b = case.make_ours([p], lr=torch.tensor([0.25])), case.make_ours([q], lr=0.25)
    for t, optimizer in ((p, a), (q, b)):
        t.grad = torch.tensor(0.5)
        optimizer.step()
    assert p == q


@pytest.mark.parametrize("case", [c for c in FULL if c.ours in (FusedAdamW, FusedAdagrad)], ids=str)
def test_a_checkpoint_of_fused_torch_leaves_counters_on_their_device(path: str, case: Case) -> None:
    # pytorch#103256, #102619.
    p, q = (torch.ones(3, requires_grad=True) for _ in range(2))
    theirs, ours = case.make(case.torchs, [p], fused=True), case.make_ours([q])
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    ours.step()
    step = ours.state[q]["step"]
    assert (step.device, step.dtype, step.item()) == (q.device, torch.float32, 2)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_gradients_that_are_already_unscaled_are_not_again(path: str, case: Case) -> None:
    # pytorch#88258, #95781, #96755, #90752.
    def run(make: Any, scale: float | None) -> Tensor:
        p = torch.full((40,), 2.0, requires_grad=True)
        optimizer = make([p])
        scaler = torch.amp.GradScaler(DEVICE, init_scale=scale or 1.0, growth_interval=100, enabled=scale is not None)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale((p**2).sum() * (step + 1)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_([p], 10.0)
            scaler.step(optimizer)
            scaler.update()
        return p.detach()

    torch.testing.assert_close(run(case.make_ours, 1024.0), run(case.make_exact, None), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sgd_moves_whole_vectors_of_low_precision(path: str, dtype: torch.dtype) -> None:
    # pytorch#191763: the fused CPU kernel moves the last few elements alone, and reads its momentum as float32.
    p = torch.ones(100, dtype=dtype, requires_grad=True)
    optimizer = FusedSGD([p], **MOMENTUM)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 0.9 - 0.14), rtol=0.01, atol=0)


@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_of_zero_in_low_precision_is_no_nan(path: str, case: Case, dtype: torch.dtype) -> None:
    # In torch's fused CPU Adagrad an eps of 1e-10 is a float16, and so 0.
    p = torch.ones(100, dtype=dtype, requires_grad=True)
    optimizer = case.make_ours([p])
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert (p == 1).all()


def test_adagrad_of_a_group_that_was_added(path: str) -> None:
    # States are made in the constructor, which an added group has missed.
    p, q = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer = FusedAdagrad([p], lr=0.5, initial_accumulator_value=3.0)
    optimizer.add_param_group({"params": [q]})
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.75))
    torch.testing.assert_close(q, p)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_group_without_parameters_keeps_its_settings(path: str, case: Case) -> None:
    # pytorch#143828: the distributed checkpoint returns it without any, and torch's step raises KeyError.
    def made() -> tuple[torch.nn.Module, Any]:
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        optimizer = case.make_ours([{"params": model[0].parameters()}, {"params": [], "lr": 0.25}])
        optimizer.add_param_group({"params": [*model[1].parameters()], "lr": 0.03})
        return model, optimizer

    def step(model: torch.nn.Module, optimizer: Any) -> None:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = made()
    step(model, optimizer)
    again, loaded = made()
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, loaded, deepcopy(get_optimizer_state_dict(model, optimizer)))
    assert [group["lr"] for group in loaded.param_groups] == [group["lr"] for group in optimizer.param_groups]
    for each in ((model, optimizer), (again, loaded)):
        step(*each)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
