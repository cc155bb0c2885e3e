"""Rows so far apart that their offsets pass 2^31, in memory that is promised and, but for the rows, never touched."""

import mmap
import sys

import pytest
import torch

from llmfast._dispatch import kernels_on_cpu
from llmfast_kernels import cross_entropy as rows
from llmfast_kernels.distillation import distillation, distillation_backward
from llmfast_kernels.filtered_matmul import filtered_matmul
from llmfast_kernels.places import count_above
from llmfast_kernels.teaching import Divergence, TeacherRows
from llmfast_kernels.terms import Targets, Terms, Upstream

STRIDE = 1 << 30  # fits 32 bits; three of them do not
V = 70
NORESERVE = 0x4000  # Linux; the module has a name for it since Python 3.13


pytestmark = [
    pytest.mark.cpu("lets kernels read memory that exists only as a promise"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not reserved"),
]


def far_rows(N: int = 4, width: int = V, stride: int = STRIDE) -> torch.Tensor:
    """Make rows that lie far apart."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, 2 * ((N - 1) * stride + 4096), flags=flags), dtype=torch.bfloat16)
    return memory.as_strided((N, width), (stride, 1))


def test_places_of_ids() -> None:
    near, keys, far = torch.randn(4, V).bfloat16(), torch.randn(4, 3), far_rows()
    far.copy_(near)
    with kernels_on_cpu():
        found = count_above(far, keys, Terms(V), V=V)
    assert torch.equal(found, (near.float()[:, None] > keys[..., None]).sum(-1))


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_pairs_of_rows(beta: float) -> None:
    """Take a teacher and a student whose rows lie far apart, and write gradients as far."""
    student, teacher = torch.randn(2, 4, V).bfloat16()
    far, far_teacher = far_rows(), far_rows()
    targets, terms, loss = Targets(torch.tensor([[0], [V - 1], [-100], [7]])), Terms(V), Divergence(beta, 1.0, 1.0, 0.5)
    found = []
    for own, said in ((student.clone(), teacher), (far, far_teacher)):
        own.copy_(student)
        said.copy_(teacher)
        rows_said = TeacherRows(terms, logits=said)
        with kernels_on_cpu():
            result = distillation(own, targets, terms, rows_said, loss)
            upstream = Upstream(torch.ones(4))
            distillation_backward(own, targets, terms, rows_said, loss, result.softmax, upstream, d_logits=own)
        found.append([result.loss, own.clone()])
    torch.testing.assert_close(found[1], found[0])


def test_offsets_past_two_to_the_31() -> None:
    far, near = far_rows(), torch.randn(4, V).bfloat16()
    targets, terms = Targets(torch.tensor([[0], [V - 1], [-100], [7]])), Terms(V, softcap=3.0)
    with kernels_on_cpu():
        want = rows.cross_entropy(near, targets, terms, stats=True)
        d_near = torch.empty_like(near)
        rows.cross_entropy_backward(near, targets, terms, want.softmax, Upstream(torch.ones(4)), d_logits=d_near)

        far.copy_(near)
        got = rows.cross_entropy(far, targets, terms, stats=True)
        rows.cross_entropy_backward(far, targets, terms, got.softmax, Upstream(torch.ones(4)), d_logits=far)
        torch.testing.assert_close(far, d_near, rtol=2e-2, atol=1e-5)
        far.copy_(near)
        rows.cross_entropy(far, targets, terms, d_logits=far)
        torch.testing.assert_close(far, d_near, rtol=2e-2, atol=1e-5)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_of_matrices(transposed: bool) -> None:
    """Let the second block of rows, of each matrix, begin past 2^31; within a block offsets fit 32 bits."""
    a, b, alive = torch.randn(256, 256).bfloat16(), torch.randn(256, 64).bfloat16(), torch.ones(2, 2, dtype=torch.int8)
    far_a, far_b, far_out = (far_rows(256, width, 1 << 24) for width in (256, 64, 64))
    far_a.copy_(a)
    far_b.copy_(b)
    out = torch.empty(256, 64).bfloat16()
    with kernels_on_cpu():
        filtered_matmul(a.T if transposed else a, b, alive, out=out)
        filtered_matmul(far_a.T if transposed else far_a, far_b, alive, out=far_out)
    assert torch.equal(far_out, out)
