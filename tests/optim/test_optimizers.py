"""Steps of every optimizer, and what may happen between them."""

import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from evidence.pretend_cuda import pretending_cuda
from llmfast.optim import FusedAdamW, FusedLion, FusedRMSprop, FusedSGD, reference
from llmfast.optim.row import is_dense
from support.devices import DEVICE
from support.training import FULL, PLAIN, SCALAR, Case, gradients, parameters, scaled, values


def reference_call(case: Case, group: dict[str, Any]) -> tuple[Callable[..., None], int, float, dict[str, Any]]:
    """Return the rule in plain torch: function, number of states, their first value, and arguments for the group."""
    rule = getattr(reference, case.ours.rule.__name__)
    parameters = inspect.signature(rule).parameters
    arguments = {name: group[name] for name in parameters if name in group}
    arguments |= zip(("beta1", "beta2"), group.get("betas", ()))
    decoupled = group.get("decoupled_weight_decay")
    arguments |= {"decay": group["lr"] * group["weight_decay"]} if decoupled else {"l2": group["weight_decay"]}
    count = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values()) - 2
    return rule, count, group.get("initial_accumulator_value", 0.0), arguments


@pytest.mark.parametrize("case", FULL, ids=str)
def test_matches_the_reference_rule(path: str, case: Case) -> None:
    p = torch.randn(300, requires_grad=True)
    optimizer = case.make_ours([p])
    rule, count, first, arguments = reference_call(case, optimizer.param_groups[0])
    q, states = p.detach().double(), torch.full((count, 300), first, dtype=torch.float64)
    sign = -1.0 if optimizer.param_groups[0]["maximize"] else 1.0
    for step in range(1, 5):
        p.grad = torch.randn(300)
        optimizer.step()
        rule(q, sign * p.grad.double(), *states, step=step, **arguments)
    torch.testing.assert_close(p.detach().double(), q, rtol=3e-7, atol=1e-6)


def test_every_group_has_its_own_hyperparameters(path: str) -> None:
    def run(cls: type[torch.optim.AdamW]) -> Tensor:
        params = parameters()
        first = {"params": params[:1], "lr": 1e-2, "weight_decay": 0.0}
        optimizer = cls([first, {"params": params[1:], "betas": (0.5, 0.9), "eps": 1e-3}])
        for step in range(8, 12):
            gradients(step, params)
            optimizer.step()
        return values(params)

    torch.testing.assert_close(run(FusedAdamW), run(torch.optim.AdamW), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_moved_parameters_and_replaced_states_are_noticed(path: str, case: Case) -> None:
    ours, theirs = parameters(), parameters()
    optimizers = case.make_ours(ours), case.make_exact(theirs)
    for step in range(8, 11):
        for params, optimizer in zip((ours, theirs), optimizers):
            gradients(step, params)
            optimizer.step()
            for p in params:
                p.data = p.data.clone()  # as offloading or module.to() would
                state = optimizer.state[p]
                for i, (name, t) in enumerate(sorted(state.items())):
                    if name == "step":
                        state[name] = torch.tensor(float(t) + 1)
                    elif i % 2:
                        state[name] = t * 0.5
                    else:
                        t.data = t.data * 2
    torch.testing.assert_close(values(ours), values(theirs), rtol=1e-6, atol=1e-6)


def test_a_parameter_that_was_cut_short_in_place_is_noticed(path: str) -> None:
    def run(momentum: float) -> Tensor:
        p = torch.ones(64, requires_grad=True)
        whole, optimizer = p.data, FusedSGD([p], lr=0.5, momentum=momentum)
        p.grad = torch.ones(64)
        optimizer.step()
        p.grad = None
        p.data = whole[:3]
        p.grad = torch.ones(3)
        optimizer.step()
        return whole

    assert run(0.0).tolist() == [0.0] * 3 + [0.5] * 61
    with pytest.raises(ValueError, match=r"state momentum_buffer must .* its parameter, \(3,\).*got \(64,\)"):
        run(0.9)


def replace_parameter(optimizer: torch.optim.Optimizer, other: Tensor) -> None:
    optimizer.param_groups[0]["params"][0] = other


def append_parameter(optimizer: torch.optim.Optimizer, other: Tensor) -> None:
    optimizer.param_groups[0]["params"].append(other)


def remove_first_group(optimizer: torch.optim.Optimizer, other: Tensor) -> None:
    del optimizer.param_groups[0]


def forget_all_states(optimizer: torch.optim.Optimizer, other: Tensor) -> None:
    optimizer.state = defaultdict(dict)


def forget_one_state(optimizer: torch.optim.Optimizer, other: Tensor) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {}


@pytest.mark.parametrize(
    "change", [replace_parameter, append_parameter, remove_first_group, forget_all_states, forget_one_state]
)
def test_changes_behind_its_back_are_noticed(
    path: str, change: Callable[[torch.optim.Optimizer, Tensor], None]
) -> None:
    def run(cls: type[torch.optim.AdamW]) -> Tensor:
        params = [torch.ones(4, requires_grad=True) for _ in range(3)]
        optimizer = cls([{"params": [params[0]], "lr": 0.3}, {"params": [params[1]], "lr": 0.1}])
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = torch.full((4,), (-1.0) ** step * (i + 1))
            optimizer.step()
            if step == 1:
                change(optimizer, params[2])
        return values(params)

    torch.testing.assert_close(run(FusedAdamW), run(torch.optim.AdamW), rtol=1e-6, atol=1e-6)


def test_a_flag_that_adds_a_state_is_noticed(path: str) -> None:
    def run(cls: type[torch.optim.SGD]) -> Tensor:
        p = torch.ones(4, requires_grad=True)
        optimizer = cls([p], lr=0.1)
        for step in range(4):
            p.grad = torch.full((4,), float(step))
            optimizer.step()
            if step == 1:
                optimizer.param_groups[0]["momentum"] = 0.9
        return p.detach()

    torch.testing.assert_close(run(FusedSGD), run(torch.optim.SGD), rtol=1e-6, atol=1e-6)


def test_a_small_gradient_after_a_large_one(path: str) -> None:
    """Rounding must not leave anything of the large one in the average, since beta1 is 0."""
    p = torch.ones(3, requires_grad=True)
    optimizer = FusedAdamW([p], betas=(0.0, 0.99))
    for g in (1e6, 1e-3):
        p.grad = torch.full((3,), g)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((3,), 1e-3))


def test_states_of_two_dtypes(path: str) -> None:
    p = torch.ones(8, requires_grad=True)
    optimizer = FusedAdamW([p])
    p.grad = torch.ones(8)
    optimizer.step()
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].bfloat16()
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
    torch.testing.assert_close(p.detach(), torch.full((8,), (1 - 1e-5) ** 2 - 2e-3), rtol=1e-5, atol=0)


def test_a_compiled_step(path: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizers = FusedAdamW(ours), torch.optim.AdamW(theirs)
    step = torch.compile(optimizers[0].step, backend="eager")
    for i in range(6, 9):
        gradients(i, ours)
        gradients(i, theirs)
        step()
        optimizers[1].step()
    torch.testing.assert_close(values(ours), values(theirs), rtol=1e-6, atol=1e-6)


def test_a_state_left_on_another_device_is_named(path: str) -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = FusedAdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].to("meta")
    with pytest.raises(
        ValueError, match=rf"state exp_avg must .* its parameter, .* on {p.device}; got \(3,\) torch.float32 on meta"
    ):
        optimizer.step()


@pytest.mark.parametrize("view", ["misaligned", "transposed", "channels_last"])
def test_parameters_that_lie_oddly_in_memory(path: str, view: str) -> None:
    def make() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        storage = torch.randn(4 * 3 * 40 * 5 + 1)
        p = {
            "misaligned": lambda: storage[1:].view(12, 200),
            "transposed": lambda: storage[:-1].view(12, 200).T,
            "channels_last": lambda: storage[:-1].view(4, 3, 40, 5).contiguous(memory_format=torch.channels_last),
        }[view]()
        return p.detach().requires_grad_(), torch.randn(2400)

    (ours, g), (theirs, _) = make(), make()
    optimizers = FusedAdamW([ours]), torch.optim.AdamW([theirs], foreach=False)
    for _ in range(3):
        for p, optimizer in zip((ours, theirs), optimizers):
            p.grad = torch.empty_like(p).copy_(g.view(p.shape))
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_gradient_that_changes_its_memory_order(path: str) -> None:
    ours, theirs = (torch.arange(12.0).view(3, 4).requires_grad_() for _ in range(2))
    other = torch.ones(5, requires_grad=True)
    optimizers = FusedAdamW([ours, other]), torch.optim.AdamW([theirs], foreach=False)
    for step in range(4):
        g = torch.randn(4, 3)
        for p, optimizer in zip((ours, theirs), optimizers):
            p.grad = g.T if step % 2 else g.T.contiguous()
            other.grad = torch.ones(5)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert optimizers[0].state[other]["step"] == 4


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_float32_gradients_of_bfloat16_parameters(path: str, case: Case) -> None:
    p = torch.ones(600, dtype=torch.bfloat16, requires_grad=True)
    p.grad_dtype = torch.float32
    p.grad = torch.linspace(-1, 1, 600)
    q = torch.ones(600, requires_grad=True)
    q.grad = p.grad.clone()
    case.make_ours([p], lr=0.1).step()
    case.make_exact([q], lr=0.1).step()
    torch.testing.assert_close(p.float(), q.detach(), rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_grad_scaler_protocol(path: str, case: Case, loss_scale: float | None) -> None:
    ours, theirs = parameters(), parameters()
    a, b = case.make_ours(ours), case.make_exact(theirs)
    for step in range(6, 10):
        gradients(step, ours)
        gradients(step, theirs)
        overflow = step in (6, 8)
        for p in ours:
            if p.grad is not None:
                p.grad = p.grad * (loss_scale or 1.0)
                if overflow:
                    p.grad.fill_(torch.inf)
        scaled(a, loss_scale, found_inf=float(overflow))
        before = values(ours)
        a.step()
        if overflow:
            assert torch.equal(values(ours), before)
        else:
            b.step()
    torch.testing.assert_close(values(ours), values(theirs), rtol=1e-6, atol=1e-6)
    for p, q in zip(ours, theirs):
        for name, t in b.state[q].items():
            torch.testing.assert_close(a.state[p][name], t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_torchs_own_grad_scaler(path: str, case: Case) -> None:
    def run(make: Callable[..., Any]) -> Tensor:
        params = parameters()[SCALAR:]
        optimizer, scaler = make(params), torch.amp.GradScaler(DEVICE, init_scale=256.0, growth_interval=2)
        for step in range(4):
            optimizer.zero_grad()
            factor = torch.inf if step == 1 else 1.0
            scaler.scale(torch.stack([((p * factor) ** 2).sum() for p in params]).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return values(params)

    torch.testing.assert_close(run(case.make_ours), run(case.make_exact), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [FusedAdamW, FusedLion])
def test_hyperparameters_that_are_tensors_stay_on_the_device(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host does not read learning rate and betas, so that code on the device may change them."""
    with pretending_cuda():
        params = [torch.ones(600, requires_grad=True) for _ in range(2)]
        lr, betas = torch.tensor(0.1), (torch.tensor(0.5), torch.tensor(0.75))
        optimizers = make(params[:1], lr=0.1, betas=(0.5, 0.75)), make(params[1:], lr=lr, betas=betas)
        for p in params:
            p.grad = torch.linspace(-1, 1, 600)
        optimizers[0].step()
        monkeypatch.setattr(Tensor, "__float__", None)
        optimizers[1].step()
        lr.mul_(2), betas[0].mul_(0.5)
        optimizers[1].step()
        monkeypatch.undo()
        optimizers[0].param_groups[0].update(lr=0.2, betas=(0.25, 0.75))
        optimizers[0].step()
    torch.testing.assert_close(params[1], params[0], rtol=1e-6, atol=1e-7)


def test_tensors_of_several_groups_reach_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some groups have numbers, and others have tensors, which the device reads at every step."""
    with pretending_cuda():
        rates, betas = [0.1, 0.2, 0.4, 0.8], [(0.5, 0.75), (0.25, 0.5), (0.75, 0.5), (0.0, 0.25)]
        found = []
        for tensors in (False, True):
            params = [torch.ones(8, requires_grad=True) for _ in rates]
            groups = [{"params": [p], "lr": lr, "betas": pair} for p, lr, pair in zip(params, rates, betas)]
            if tensors:
                groups[1]["lr"] = torch.tensor(rates[1])
                groups[3] |= {"lr": torch.tensor(rates[3]), "betas": (0.0, torch.tensor(betas[3][1]))}
            optimizer = FusedAdamW(groups)
            for step in range(3):
                for p in params:
                    p.grad = torch.linspace(-1, 1, 8) + step
                for group in optimizer.param_groups:
                    if step == 1 and isinstance(group["lr"], Tensor):
                        group["lr"].mul_(2)
                    elif step == 1:
                        group["lr"] *= 2
                with monkeypatch.context() as patch:
                    if tensors:
                        patch.setattr(Tensor, "__float__", None)
                    optimizer.step()
            found.append(params)
    for p, q in zip(*found):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def gradients_after_a_scaled_step(
    make: Callable[..., Any], dtype: torch.dtype, max_norm: float | None = None, factor: float = 1.0
) -> list[Tensor | None]:
    """Return the gradients that a step under GradScaler leaves: in `dtype`, in float64, and in another layout."""
    params = [
        *parameters(dtype),
        torch.ones(6, 4).requires_grad_(),
        torch.ones(3, dtype=torch.float64).requires_grad_(),
    ]
    optimizer, scaler = make(params), torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    gradients(4, params)
    params[-2].grad = torch.ones(4, 6).T
    for p in params:
        if p.grad is not None:
            p.grad.mul_(1024.0 * factor)
    if max_norm is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, max_norm)
    scaler.step(optimizer)
    return [p.grad for p in params]


@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_step_leaves_gradients_divided(path: str, case: Case, dtype: torch.dtype) -> None:
    """Code that reads gradients after a step relies on it: torch's optimizers leave them unscaled on every path."""
    ours = gradients_after_a_scaled_step(case.make_ours, dtype)
    theirs = gradients_after_a_scaled_step(case.make_exact, dtype)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    clipped = gradients_after_a_scaled_step(lambda params: case.make_ours(params, max_grad_norm=0.5), dtype)
    theirs = gradients_after_a_scaled_step(case.make_exact, dtype, max_norm=0.5)
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-7  # torch rounds unscaled gradients before it clips them
    torch.testing.assert_close(clipped, theirs, rtol=tolerance, atol=1e-6)


def test_a_skipped_step_leaves_gradients_alone(path: str) -> None:
    found = gradients_after_a_scaled_step(FusedAdamW, torch.float32, factor=torch.inf)
    assert all(g is None or not g.isfinite().any() for g in found) and found[-1] is not None


def test_a_scaled_step_may_leave_zeros(path: str) -> None:
    found = gradients_after_a_scaled_step(lambda params: FusedAdamW(params, zero_grads=True), torch.float32)
    assert all(g is None or not g.any() for g in found)


@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_of_every_kind_are_left_divided(path: str, maximize: bool) -> None:
    params = [torch.ones(4, requires_grad=True), torch.ones(3, dtype=torch.complex64, requires_grad=True)]
    params += [torch.ones(4, 2, requires_grad=True), torch.ones(4, 2, dtype=torch.float16, requires_grad=True)]
    optimizer = FusedSGD(params, lr=0.1, maximize=maximize)
    params[0].grad, params[1].grad = torch.full((4,), 8.0), torch.full((3,), 8j)
    params[2].grad = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.full((2, 2), 8.0), (4, 2))
    params[3].grad = torch.tensor(8.0).half().expand(4, 2)  # one element for all
    scaled(optimizer, 4.0)
    optimizer.step()
    wanted = [torch.full((4,), 2.0), torch.full((3,), 2j), torch.zeros(4, 2), torch.full((4, 2), 2.0).half()]
    wanted[2][1] = 4.0
    for p, g in zip(params, wanted):
        assert p.grad is not None
        torch.testing.assert_close(p.grad.to_dense() if p.grad.is_sparse else p.grad, g)
        torch.testing.assert_close(p.detach(), torch.ones_like(g) + (0.1 if maximize else -0.1) * g)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_one_element_for_all_is_divided_where_the_host_does_not_wait(path: str, found_inf: float) -> None:
    """On a GPU, whether the step is skipped is known only there, and what must not change is written back."""
    with pretending_cuda():
        p = torch.ones(4, 2, requires_grad=True)
        p.grad = torch.tensor(8.0).expand(4, 2)
        optimizer = FusedSGD([p], lr=0.1)
        scaled(optimizer, 4.0, found_inf)
        optimizer.step()
        assert torch.equal(p.grad, torch.full((4, 2), 8.0 if found_inf else 2.0))
        torch.testing.assert_close(p.detach(), torch.full((4, 2), 1.0 if found_inf else 0.8))


@pytest.mark.parametrize("case", FULL, ids=str)
def test_nan_and_infinity_survive(path: str, case: Case) -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = case.make_ours([p])
    p.grad = torch.tensor([torch.nan, torch.inf, 1.0])
    optimizer.step()
    assert p.isfinite().tolist() == [False, False, True]


def test_a_variance_below_zero_by_rounding_is_zero(path: str) -> None:
    """Equal gradients have none: what is left of the difference is rounding, of which torch takes a root."""
    (ours, theirs), g = (torch.zeros(1000, requires_grad=True) for _ in range(2)), torch.linspace(0.1, 3, 1000)
    options: dict[str, Any] = {"lr": 1.0, "alpha": 0.5, "eps": 1.0, "centered": True}
    optimizers = FusedRMSprop([ours], **options), torch.optim.RMSprop([theirs], foreach=False, **options)
    for _ in range(60):
        before = ours.detach().clone()
        for p, optimizer in zip((ours, theirs), optimizers):
            p.grad = g.clone()
            optimizer.step()
    assert theirs.isnan().any() and not theirs.isnan().all()
    torch.testing.assert_close(before - ours.detach(), g, rtol=2e-3, atol=0)


def test_a_maximum_of_nan_is_nan(kernels: None) -> None:
    """The CPU kernel of torch loses some NaNs in the elements that do not fill a vector."""
    p = torch.ones(1030, requires_grad=True)
    optimizer = FusedAdamW([p], amsgrad=True)
    for value in (1.0, torch.nan, 1.0):
        p.grad = torch.ones(1030)
        p.grad[::2] = value
        optimizer.step()
    assert torch.equal(optimizer.state[p]["max_exp_avg_sq"].isnan(), torch.arange(1030) % 2 == 0)


def test_closure_and_hooks(path: str) -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = FusedAdamW([p])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    assert calls == ["before", "after"]
    assert p.max() < 1


def test_one_update_launch_per_dtype_signature(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmfast_kernels.optimizer import coefficients, step

    launches: list[tuple[str, int]] = []
    for launcher, name in ((coefficients, "prepare_kernel"), (step, "update_kernel")):
        kernel = getattr(launcher, name)

        class Counted:
            def __init__(self, kernel: Any, name: str) -> None:
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid: tuple[int]) -> Any:
                launches.append((self.name, grid[0]))
                return self.kernel[grid]

        monkeypatch.setattr(launcher, name, Counted(kernel, name))
    params = [torch.ones(3 + i, requires_grad=True) for i in range(20)]
    params += [torch.ones(3 + i, dtype=torch.bfloat16, requires_grad=True) for i in range(7)]
    for p in params:
        p.grad = torch.ones_like(p)
    FusedAdamW([{"params": params[:10], "lr": 0.1}, {"params": params[10:]}]).step()
    assert launches == [("prepare_kernel", 1), ("update_kernel", 20), ("prepare_kernel", 1), ("update_kernel", 7)]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_nothing_happens_without_gradients(path: str, case: Case) -> None:
    params = parameters()
    optimizer = case.make_ours(params)
    before, states = values(params), len(optimizer.state)
    optimizer.step()
    assert torch.equal(values(params), before)
    assert len(optimizer.state) == states


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(FusedAdamW, {"lr": -1.0}), "Invalid learning rate"),
        (Case(FusedAdamW, {"eps": -1.0}), "Invalid epsilon"),
        (Case(FusedAdamW, {"betas": (1.0, 0.9)}), "Invalid beta parameter at index 0"),
        (Case(FusedAdamW, {"weight_decay": -1.0}), "Invalid weight_decay"),
        (Case(FusedAdamW, {"lr": torch.ones(2)}), "1-element"),
        (Case(FusedSGD, {"nesterov": True}), "Nesterov momentum requires"),
        (Case(FusedRMSprop, {"alpha": -1.0}), "Invalid alpha"),
    ],
    ids=str,
)
def test_refuses_what_torch_refuses(case: Case, message: str) -> None:
    for make in (case.make_ours, case.make_exact):
        with pytest.raises(ValueError, match=message):
            make([torch.ones(2)])


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_existing_calls_keep_working(case: Case) -> None:
    optimizer = case.make_ours([torch.ones(2)])
    assert isinstance(optimizer, case.torchs)
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (case.ours, case.torchs))
    extras = {"extras", "decay"}
    assert [name for name in ours if name not in extras] == sorted(theirs, key=list(ours).index)
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name


LAYOUT = torch.zeros(4, 6, 5)


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (LAYOUT, True),
        (LAYOUT.permute(2, 0, 1), True),
        (LAYOUT[1:3], True),
        (LAYOUT[:, ::2], False),
        (LAYOUT[:, :1], False),
        (torch.zeros(3, 1).expand(3, 4), False),
        (torch.tensor(1.0), True),
        (torch.zeros(0, 3), True),
    ],
)
def test_density(tensor: Tensor, dense: bool) -> None:
    assert is_dense(tensor) == dense


def test_a_scaler_without_gradients_says_0(path: str) -> None:
    """It sets the integer, not a tensor, where no parameter had a gradient to look at."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([p], lr=0.5)
    p.grad = torch.ones(3)
    optimizer.step()
    before = p.detach().clone()
    p.grad, optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(2.0), 0
    optimizer.step()
    assert torch.equal(p, before)
