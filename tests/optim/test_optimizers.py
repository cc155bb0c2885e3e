"""`FusedAdamW` against torch's own, on both paths."""

import copy
import io
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.optim import FusedAdamW, reference
from llmfast.optim.row import is_dense
from support.numerics import assert_no_worse

# One row each, an odd size, a scalar, nothing at all, several chunks with a tail, whole tiles.
SHAPES = [(7, 33), (5,), (), (0, 4), (9000,), (64, 32)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "betas": (0.8, 0.95), "lr": 1e-2, "eps": 1e-6},
    {"amsgrad": True},
    {"maximize": True, "weight_decay": 0.0},
    {"betas": (0.0, 0.0), "lr": torch.tensor(1e-3)},
]


def parameters(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def gradients(step: int, params: list[Tensor]) -> None:
    """The same for any optimizer; the third parameter gets its first gradient late, the second now and then."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if (i == 2 and step < 2) or (i == 1 and step % 3 == 1) else g


def values(params: list[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_trains_like_torch(path: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    ours, theirs, truth = parameters(dtype), parameters(dtype), [p.detach().double() for p in parameters(dtype)]
    if dtype == torch.float16:
        options = options | {"eps": 1e-3}  # its second moments underflow, and 1e-8 lets the update overflow
    # torch's unfused AdamW computes in the parameter's dtype; its fused one in float32, as we do.
    optimizers = [FusedAdamW(ours, **options), torch.optim.AdamW(theirs, fused=True, **options)]
    exact = torch.optim.AdamW(truth, foreach=False, **options)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 30) for o in [*optimizers, exact]]
    for step in range(8 if dtype == torch.float32 else 3):
        for params in (ours, theirs, truth):
            gradients(step, theirs)
            for p, q in zip(params, theirs):
                p.grad = None if q.grad is None else q.grad.to(p.dtype)
        for optimizer in [*optimizers, exact]:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    if dtype == torch.float32:
        assert_no_worse(values(ours), values(theirs), values(truth), scale=1.0)
    else:  # moments are rounded too; the update must stay within a rounding of the parameter
        torch.testing.assert_close(values(ours), values(theirs), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    for p, q in zip(ours, theirs):
        assert optimizers[0].state[p].keys() == optimizers[1].state[q].keys()
        assert optimizers[0].state[p]["step"] == optimizers[1].state[q]["step"]


def test_matches_the_reference_rule(path: str) -> None:
    p = torch.randn(300, requires_grad=True)
    q, m, v, vmax = p.detach().double(), *(torch.zeros(3, 300, dtype=torch.float64))
    optimizer = FusedAdamW([p], amsgrad=True)
    for step in range(1, 6):
        p.grad = torch.randn(300)
        optimizer.step()
        reference.adam(q, p.grad.double(), m, v, vmax, step=step, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, decay=1e-5)
    torch.testing.assert_close(p.detach().double(), q, rtol=3e-7, atol=3e-7)


def test_parameter_groups(path: str) -> None:
    def run(cls: type[torch.optim.AdamW]) -> Tensor:
        params = parameters()
        optimizer = cls([{"params": params[:2], "lr": 1e-2, "weight_decay": 0.0}, {"params": params[2:4]}])
        for step in range(6):
            if step == 3:
                optimizer.add_param_group({"params": params[4:], "lr": 3e-3, "betas": (0.5, 0.9)})
            gradients(step, params)
            optimizer.step()
        return values(params)

    torch.testing.assert_close(run(FusedAdamW), run(torch.optim.AdamW), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("other", [{}, {"fused": True}, {"foreach": True}])
def test_checkpoints_go_both_ways(path: str, amsgrad: bool, other: dict[str, Any]) -> None:
    def make(cls: type[torch.optim.AdamW], params: list[Tensor]) -> torch.optim.AdamW:
        return cls(params, amsgrad=amsgrad, **({} if cls is FusedAdamW else other))

    def run(classes: list[type[torch.optim.AdamW]]) -> Tensor:
        params = parameters()
        optimizer = make(classes[0], params)
        for step in range(9):
            if step and step % 3 == 0:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = make(classes[step // 3], params)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            gradients(step, params)
            optimizer.step()
        return values(params)

    plain = run([torch.optim.AdamW] * 3)
    torch.testing.assert_close(run([FusedAdamW, torch.optim.AdamW, FusedAdamW]), plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(run([torch.optim.AdamW, FusedAdamW, torch.optim.AdamW]), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_goes_on_alone(path: str, clone: Callable[[FusedAdamW], FusedAdamW]) -> None:
    params = parameters()
    optimizer = FusedAdamW(params)
    gradients(2, params)
    optimizer.step()
    before = values(params)
    twin = clone(optimizer)
    twin_params = [p for group in twin.param_groups for p in group["params"]]
    gradients(5, twin_params)
    twin.step()
    assert torch.equal(values(params), before)
    gradients(5, params)
    optimizer.step()
    assert torch.equal(values(params), values(twin_params))
    assert all(optimizer.state[p]["step"] == 2 for p in params)


def test_same_bits_every_time(path: str) -> None:
    def run() -> Tensor:
        params = parameters()
        optimizer = FusedAdamW(params)
        for step in range(4):
            gradients(step, params)
            optimizer.step()
        return values(params)

    assert torch.equal(run(), run())


def test_moved_parameters_and_replaced_states_are_noticed(path: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizers = FusedAdamW(ours), torch.optim.AdamW(theirs)
    for step in range(2, 6):
        for params, optimizer in zip((ours, theirs), optimizers):
            gradients(step, params)
            optimizer.step()
            for p in params:
                p.data = p.data.clone()  # as offloading or module.to() would
                optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"] * 0.5
                optimizer.state[p]["exp_avg_sq"].data = optimizer.state[p]["exp_avg_sq"].data * 2
                optimizer.state[p]["step"] = torch.tensor(float(optimizer.state[p]["step"]) + 1)
    torch.testing.assert_close(values(ours), values(theirs), rtol=1e-6, atol=1e-6)


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


def test_a_small_gradient_after_a_large_one(path: str) -> None:
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
    for i in range(3):
        gradients(i, ours), gradients(i, theirs)
        step(), optimizers[1].step()
    torch.testing.assert_close(values(ours), values(theirs), rtol=1e-6, atol=1e-6)


def test_a_checkpoint_of_another_model_is_refused(path: str) -> None:
    # Same strides, fewer rows: a kernel that trusted the address would write past the state's end.
    small, large = torch.ones(10, 8, requires_grad=True), torch.ones(2000, 8, requires_grad=True)
    source, target = FusedAdamW([small]), FusedAdamW([large])
    small.grad, large.grad = torch.ones_like(small), torch.ones_like(large)
    source.step()
    target.load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match=r"state exp_avg is \(10, 8\).*its parameter \(2000, 8\)"):
        target.step()
    assert torch.equal(large.detach(), torch.ones(2000, 8))


def test_a_state_left_on_another_device_is_named(path: str) -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = FusedAdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].to("meta")
    with pytest.raises(ValueError, match=r"state exp_avg is \(3,\) torch.float32 on meta, its parameter .* on cpu"):
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


def test_a_gradient_in_another_memory_order(path: str) -> None:
    # torch's fused CPU kernels read such a gradient in the wrong order, without a word.
    ours, theirs = (torch.arange(12.0).view(3, 4).requires_grad_() for _ in range(2))
    beside = torch.ones(5, requires_grad=True)
    optimizers = FusedAdamW([ours, beside]), torch.optim.AdamW([theirs], foreach=False)
    for step in range(4):
        g = torch.randn(4, 3)
        for p, optimizer in zip((ours, theirs), optimizers):
            p.grad = g.T if step % 2 else g.T.contiguous()
            beside.grad = torch.ones(5)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert optimizers[0].state[beside]["step"] == 4


def test_float32_gradients_of_bfloat16_parameters(path: str) -> None:
    p = torch.ones(2000, dtype=torch.bfloat16, requires_grad=True)
    p.grad_dtype = torch.float32
    p.grad = torch.linspace(-1, 1, 2000)
    q = torch.ones(2000, requires_grad=True)
    q.grad = p.grad.clone()
    FusedAdamW([p], lr=0.1).step()
    torch.optim.AdamW([q], lr=0.1).step()
    torch.testing.assert_close(p.float(), q.detach(), rtol=1e-2, atol=1e-2)


def test_float64_and_complex_take_torchs_own_update(path: str) -> None:
    for dtype in (torch.float64, torch.complex64):
        ours, theirs = (torch.ones(6, dtype=dtype).requires_grad_() for _ in range(2))
        beside = torch.ones(5, requires_grad=True)
        a, b = FusedAdamW([ours, beside]), torch.optim.AdamW([theirs], foreach=False)
        for p, o in ((ours, a), (theirs, b)):
            p.grad, beside.grad = torch.arange(6).to(dtype), torch.ones(5)
            o.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0)


@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_grad_scaler_protocol(path: str, loss_scale: float | None) -> None:
    ours, theirs = parameters(), parameters()
    a, b = FusedAdamW(ours), torch.optim.AdamW(theirs)
    for step in range(4):
        gradients(step + 2, ours)
        gradients(step + 2, theirs)
        overflow = step in (0, 2)
        for p in ours:
            if p.grad is not None:
                p.grad = p.grad * (loss_scale or 1.0)
                if overflow:
                    p.grad.fill_(torch.inf)
        a.grad_scale = None if loss_scale is None else torch.tensor(loss_scale)
        a.found_inf = torch.tensor(float(overflow))
        before = values(ours)
        a.step()
        if overflow:
            assert torch.equal(values(ours), before)
        else:
            b.step()
    torch.testing.assert_close(values(ours), values(theirs), rtol=1e-6, atol=1e-6)
    for p, q in zip(ours, theirs):
        assert a.state[p]["step"] == b.state[q]["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(a.state[p][name], b.state[q][name], rtol=1e-5, atol=1e-7)


def test_torchs_own_grad_scaler() -> None:
    def run(cls: type[torch.optim.AdamW]) -> Tensor:
        params = parameters(shapes=[(8, 3), (4,)])
        optimizer, scaler = cls(params), torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        for step in range(5):
            optimizer.zero_grad()
            factor = torch.inf if step == 2 else 1.0
            scaler.scale(sum(((p * factor) ** 2).sum() for p in params)).backward()
            scaler.step(optimizer)
            scaler.update()
        return values(params)

    torch.testing.assert_close(run(FusedAdamW), run(torch.optim.AdamW), rtol=1e-6, atol=1e-6)


def test_nan_and_infinity_survive(path: str) -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = FusedAdamW([p], amsgrad=True)
    p.grad = torch.tensor([torch.nan, torch.inf, 1.0])
    optimizer.step()
    assert p.isfinite().tolist() == [False, False, True]


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


def test_one_update_launch_a_dtype_signature(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmfast_kernels import optimizer as launcher

    launches: list[tuple[str, int]] = []
    for name in ("prepare_kernel", "update_kernel"):
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


def test_nothing_happens_without_gradients(path: str) -> None:
    params = parameters()
    optimizer = FusedAdamW(params)
    before = values(params)
    optimizer.step()
    assert torch.equal(values(params), before)
    assert len(optimizer.state) == 0


def test_a_sparse_gradient_is_refused_before_anything_changes(path: str) -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    beside = torch.ones(4, requires_grad=True)
    optimizer = FusedAdamW([beside, *embedding.parameters()])
    (embedding(torch.tensor([1, 2])).sum() + beside.sum()).backward()
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*sparse.*SparseAdam"):
        optimizer.step()
    assert torch.equal(beside.detach(), torch.ones(4))
    assert len(optimizer.state) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"eps": -1.0}, "Invalid epsilon"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0"),
        ({"weight_decay": -1.0}, "Invalid weight_decay"),
        ({"lr": torch.ones(2)}, "1-element"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedAdamW([torch.ones(2)], **options)


def test_existing_calls_keep_working() -> None:
    optimizer = FusedAdamW([torch.ones(2)], 1e-3, (0.9, 0.95), fused=True, foreach=None, capturable=True)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


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
