"""The GPU's way through the library, walked on a CPU."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, for a run of this file without a conftest

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from evidence import interpreter, pretend_cuda
from evidence.launches import Recorder
from evidence.observers import observing
from evidence.pretend_cuda import pretending_cuda
from evidence.sanitizer import sanitizing
from llmfast.losses import cross_entropy, linear_cross_entropy
from llmfast.optim import FusedAdamW
from support.numerics import assert_close_in_norm
from support.plans import forced

interpreter.install()


def test_tensors_say_cuda_and_stay_where_they_are() -> None:
    x = torch.zeros(3, requires_grad=True)
    with pretending_cuda():
        assert x.is_cuda and x.device == torch.device("cuda", 0)
        for y in (torch.empty(3, device="cuda"), x.new_zeros(3), x.to("cuda:0"), torch.ones_like(x, device=x.device)):
            assert y.is_cuda and y.is_cpu
        assert torch.cuda.get_device_capability() == (9, 0)
        (2 * x).sum().backward()
    assert not x.is_cuda and x.device.type == "cpu" and x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_into_float32(dtype: torch.dtype) -> None:
    a, b, c = torch.randn(3, 4).to(dtype), torch.randn(4, 5).to(dtype), torch.randn(3, 5)
    product = a.float() @ b.float()
    with pretending_cuda():
        found = [
            torch.mm(a, b, out_dtype=torch.float32),
            torch.mm(a, b, out_dtype=torch.float32, out=torch.empty(3, 5)),
            torch.addmm(c, a, b, out_dtype=torch.float32) - c,
            torch.addmm(c, a, b, out_dtype=torch.float32, out=torch.empty(3, 5)) - c,
        ]
    for result in found:
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, product)


def gradients(*inputs: Tensor) -> list[Tensor]:
    return [t.grad for t in inputs if t.grad is not None]


LAUNCHED = {
    "materialise": {"cross_entropy_kernel", "cross_entropy_backward_kernel"},
    "chunk": {"cross_entropy_kernel", "scale_kernel"},
    "two-stage": {"cross_entropy_kernel", "cross_entropy_backward_kernel", "scale_kernel"},
    "recompute": {"cross_entropy_kernel", "cross_entropy_backward_kernel"},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mode", LAUNCHED)
def test_the_linear_loss_as_a_gpu_runs_it(dtype: torch.dtype, mode: str) -> None:
    N, D, V = 24, 32, 300
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,))
    recorder = Recorder()
    with pretending_cuda(), sanitizing(), observing(recorder), forced(mode):
        linear_cross_entropy(hidden, weight, targets).backward()
    assert {kind.name for kind in recorder.kinds.values()} == LAUNCHED[mode]

    h64, w64 = (t.detach().double().requires_grad_() for t in (hidden, weight))
    F.cross_entropy(h64 @ w64.T, targets).backward()
    h, w = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    F.cross_entropy(h @ w.T, targets).backward()
    for ours, theirs, truth in zip(gradients(hidden, weight), gradients(h, w), gradients(h64, w64), strict=True):
        assert_close_in_norm(ours, theirs, truth)


def test_training_as_a_gpu_runs_it() -> None:
    """Loss and optimizer through the code that only GPUs reach, against torch."""

    def train(pretend: bool) -> list[float]:
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 300)
        optimizer = FusedAdamW(model.parameters(), lr=1e-2) if pretend else torch.optim.AdamW(model.parameters(), 1e-2)
        x, y = torch.randn(8, 16), torch.randint(0, 300, (8,))
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y) if pretend else F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    with pretending_cuda():
        ours = train(True)
    torch.testing.assert_close(ours, train(False), rtol=1e-5, atol=0)


@triton.autotune([triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 64})], key=["n"])
@triton.jit
def tuned_kernel(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, i, mask=i < n)


def test_an_autotuned_kernel_takes_its_first_configuration() -> None:
    x = torch.zeros(100, dtype=torch.int32)
    recorder = Recorder()
    with pretending_cuda(), observing(recorder):
        tuned_kernel[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, 100)
    assert x.tolist() == list(range(100))
    (kind,) = recorder.kinds.values()
    assert kind.arguments["BLOCK"] == {"constant": 32}


def test_every_factory_and_method_takes_the_gpu_for_the_cpu() -> None:
    x = torch.zeros(2, 3)
    given = {
        **{name: (2, 3) for name in ("empty", "ones", "rand", "randn", "zeros")},
        **{f"{name}_like": (x,) for name in ("empty", "ones", "rand", "randn", "zeros")},
        **{"arange": (3,), "as_tensor": ([1],), "empty_strided": ((2, 3), (3, 1)), "full": ((2,), 1), "tensor": ([1],)},
        **{"full_like": (x, 1), "randint": (5, (2,)), "scalar_tensor": (1,)},
    }
    methods = {name: ((2, 3),) for name in ("new_empty", "new_ones", "new_zeros")}
    methods |= {"to": (), "new_empty_strided": ((2, 3), (3, 1)), "new_full": ((2,), 1), "new_tensor": ([1],)}
    assert given.keys() == set(pretend_cuda._FACTORIES) and methods.keys() == set(pretend_cuda._METHODS)
    with pretending_cuda():
        for device in ("cuda", "cuda:0", torch.device("cuda", 0)):
            made = [getattr(torch, name)(*args, device=device) for name, args in given.items()]
            made += [getattr(x, name)(*args, device=device) for name, args in methods.items()]
            assert all(t.is_cuda and t.is_cpu for t in made)
        assert torch.empty(2, device="cuda", pin_memory=True).is_cpu
        assert torch.empty(2, device="meta").is_meta and torch.empty(2, device="cpu").is_cuda


def test_the_card_is_an_h100() -> None:
    before = {name: vars(torch.Tensor).get(name) for name in ("device", "is_cuda")}
    with pretending_cuda():
        properties, cuda = torch.cuda.get_device_properties(0), torch.cuda
        assert cuda.is_available() and cuda.device_count() == 1 and cuda.current_device() == 0
        assert cuda.is_bf16_supported() and not cuda.is_current_stream_capturing() and cuda.synchronize() is None
        assert cuda.get_device_name() == properties.name and "H100" in properties.name
        assert (properties.total_memory, properties.multi_processor_count) == (80 * 2**30, 132)
        assert (properties.major, properties.minor) == cuda.get_device_capability() == (9, 0)
        driver = triton.runtime.driver.active
        assert driver.get_current_target().arch == 90 and driver.get_current_target().warp_size == properties.warp_size
        told = driver.utils.get_device_properties(driver.get_current_device())
        assert told == {"multiprocessor_count": 132, "max_shared_mem": 227 * 1024}
        first, second = (driver.get_benchmarker()(print, quantiles=(0.5, 0.2, 0.8)) for _ in range(2))
        assert len(first) == len(second) == 3 and first < second
    assert {name: vars(torch.Tensor).get(name) for name in ("device", "is_cuda")} == before


def test_factors_of_a_product_into_float32() -> None:
    a, b, c = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16(), torch.randn(3, 5)
    product = a.float() @ b.float()
    with pretending_cuda():
        found = torch.addmm(c, a, b, beta=0.5, alpha=3.0, out_dtype=torch.float32)
        torch.testing.assert_close(found, 0.5 * c + 3.0 * product)
        out = torch.empty(3, 5)
        assert torch.addmm(c, a, b, alpha=2.0, out_dtype=torch.float32, out=out) is out
        torch.testing.assert_close(out, c + 2.0 * product)
        assert torch.equal(torch.addmm(c, a.float(), b.float()), torch.addmm(c, a.float(), b.float(), beta=1))
