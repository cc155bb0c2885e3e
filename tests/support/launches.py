"""Every kind of launch the library makes, for the compiler: run by the workers of `support.machine_code`.

Real launchers and real tile choices, on tensors that are never read. Add a launch here when a kernel gains a variant;
`test_machine_code.py` fails for a kernel that is not launched here at all.
"""

import torch

from llmfast._dispatch import kernels_on_cpu
from llmfast.losses.linear_cross_entropy import linear_cross_entropy
from llmfast.optim import FusedAdamW
from llmfast_kernels import cross_entropy as rows
from llmfast_kernels import scale
from support.machine_code import label

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def all_launches() -> None:
    row_launches()
    linear_loss_launches()
    scale_launches()
    adamw_launches()


def row_launches() -> None:
    """Logits as users have them: rows of V, contiguous."""
    for name, dtype in DTYPES.items():
        for V in (1000, 32000, 50257):
            logits = torch.empty(2, V, dtype=dtype)
            for targets in (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)):
                if targets.dtype == torch.int32 and (V, name) != (32000, "bfloat16"):
                    continue
                index = str(targets.dtype).removeprefix("torch.")
                with label(f"rows {name} V={V} {index}"):
                    with label("forward"):
                        loss, lse = rows.cross_entropy(logits, targets, ignore_index=-100)
                    with label("fused"):
                        inverse = None if dtype == torch.float16 else torch.ones(())
                        rows.cross_entropy(logits, targets, ignore_index=-100, d_logits=logits, grad_scale=inverse)
                    with label("backward"):
                        rows.cross_entropy_backward(
                            logits, targets, lse, loss, ignore_index=-100, d_logits=torch.empty_like(logits)
                        )


def linear_loss_launches() -> None:
    """The same kernels over the library's own slab, through the public function."""
    for name, dtype in DTYPES.items():
        for V in (32000, 50257):
            hidden = torch.zeros(3, 8, dtype=dtype, requires_grad=True)
            weight = torch.zeros(V, 8, dtype=dtype, requires_grad=True)
            targets = torch.zeros(3, dtype=torch.int64)
            for reduction in ("mean", "none"):
                with kernels_on_cpu(), label(f"slab {name} V={V} {reduction}"):
                    linear_cross_entropy(
                        hidden, weight, targets, reduction=reduction, memory_budget=2 * V * 4
                    ).sum().backward()


def scale_launches() -> None:
    for x, out in (
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
    ):
        for numel in (1 << 20, 1001):
            with label(f"scale {x} {out} {numel}"):
                buffer = None if out is None else torch.empty(numel, dtype=out)
                scale.scale(torch.empty(numel, dtype=x), torch.ones(()), out=buffer)


def adamw_launches() -> None:
    for name, dtype in DTYPES.items():
        for amsgrad in (False, True):
            parameters = [torch.zeros(n, dtype=dtype, requires_grad=True) for n in (10_000, 7)]
            for p in parameters:
                p.grad = torch.zeros_like(p)
            optimizer = FusedAdamW(parameters, amsgrad=amsgrad)
            with kernels_on_cpu(), label(f"adamw {name} amsgrad={amsgrad}"):
                optimizer.step()
                if not amsgrad:
                    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
                    optimizer.step()
