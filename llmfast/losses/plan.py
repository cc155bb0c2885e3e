"""Cutting a linear cross-entropy into slabs, and what that costs: bytes, FLOPs, peak memory and modelled time.

There are three modes. *materialise* keeps the logits of all rows from forward to backward. *chunk* reuses one slab for
chunks of rows and makes the gradients in the forward pass. *recompute* keeps only logsumexp, and makes the logits again
in backward, a slab of vocabulary at a time, so that each part of the weight's gradient is written once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from llmfast._gpus import BANDWIDTH_SHARE, H100, LAUNCH, Gpu
from llmfast._units import in_bytes
from llmfast_kernels.terms import GROUP

Mode = Literal["materialise", "chunk", "recompute"]

# A slab larger than this saves nothing on a GPU: at Llama-3's vocabulary it holds 4096 rows, and the traffic of W and
# dW is a ninth of the GEMMs' time (modelled: 459 / rows on an H100). On a CPU the GEMMs are slower, so fewer rows do.
DEFAULT_BUDGET = {"cpu": 64 << 20}
DEFAULT_BUDGET_ELSEWHERE = 1 << 30


def default_budget(device: torch.device) -> int:
    """Return bytes. On a GPU at most a tenth of its memory, not of what is free: runs must not differ."""
    budget = DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET_ELSEWHERE)
    if device.type == "cuda" and torch.cuda.is_available():  # a plan can be asked for where there is no GPU
        budget = min(budget, torch.cuda.get_device_properties(device).total_memory // 10)
    return budget


class Step(NamedTuple):
    """A kind of launch. Bytes of DRAM and FLOPs are those of all its calls."""

    name: str
    bytes: float
    flops: float = 0.0
    calls: int = 1


@dataclass(frozen=True)
class LinearCrossEntropyPlan:
    """Plan for `linear_cross_entropy` of N tokens, width D and V classes (of this rank).

    Bytes assume that each launch reads and writes each of its matrices once, as our counters find: caches hold what is
    read again. Times are modelled, not measured: the sum over launches of
    max(bytes / 90 % of the bandwidth, FLOPs / 70 % of the tensor cores) + 2 us.
    """

    mode: Mode
    N: int
    D: int
    V: int
    dtype: torch.dtype  # of the matrix products
    slab_dtype: torch.dtype  # of the logits
    weight_dtype: torch.dtype  # of the parameter
    wants: tuple[bool, bool]  # gradients of hidden, of weight
    row_width: int  # columns of a forward slab, V padded so that rows start aligned
    budget: int  # bytes for slabs
    rows: int = 1  # of a slab in forward
    columns: int = 1  # of a slab in backward
    float32_products: bool = True  # matrix products of low precision into float32: on CUDA, not on CPUs or ROCm
    gpu: Gpu = H100

    @staticmethod
    def make(
        N: int,
        D: int,
        V: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        slab_dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype | None = None,
        device: torch.device | str = "cuda",
        memory_budget: int | Literal["auto"] = "auto",
        reduction: str = "mean",
        wants: tuple[bool, bool] = (True, True),
        mode: Mode | None = None,
        kernels: bool = True,
        filtered: bool = False,
        widest: int = 0,
        float32_products: bool = True,
        gpu: Gpu = H100,
    ) -> "LinearCrossEntropyPlan":
        """Plan a linear cross-entropy of these shapes.

        If all rows fit the budget, a GPU materialises them: a second softmax costs less than adding up a weight
        gradient in float32. Not float16 ones, whose gradients must not be divided by a count before they are summed.
        The gradients of losses per token are not known in the forward pass, so these materialise or recompute.

        Args:
            N: Tokens.
            D: Hidden width.
            V: Classes of this rank.
            dtype: Of the matrix products.
            slab_dtype: Of the logits. None: `dtype`.
            weight_dtype: Of the parameter. None: `dtype`.
            device: Where the call runs; it decides what "auto" is.
            memory_budget: Bytes of logits at a time, or "auto".
            reduction: Of the loss.
            wants: Whether gradients of hidden and weight are needed.
            mode: None chooses by budget, reduction and `wants`.
            kernels: Whether the Triton kernels run, for which rows are padded.
            filtered: Whether there is a `grad_filter`.
            widest: Most classes of any rank, where they are split: all ranks must take the same number of chunks.
            float32_products: Whether the device multiplies low precision into float32.
            gpu: The one that times are modelled for.
        """
        # Rows of a multiple of 128 bytes: aligned for the row kernel's 16-byte accesses and for the GEMMs' loads.
        # Plain torch wants no padding: its softmax would copy.
        pad = GROUP if filtered else 128 // dtype.itemsize if kernels else 1
        plan = LinearCrossEntropyPlan(
            mode=mode or "chunk",
            N=N,
            D=D,
            V=V,
            dtype=dtype,
            slab_dtype=slab_dtype or dtype,
            weight_dtype=weight_dtype or dtype,
            wants=wants,
            row_width=-(-max(V, widest) // pad) * pad,
            budget=default_budget(torch.device(device)) if memory_budget == "auto" else memory_budget,
            float32_products=float32_products,
            gpu=gpu,
        )
        if mode is None:
            fits = plan._most_rows() >= plan.N
            if not any(wants):
                mode = "chunk"
            elif reduction == "none":
                mode = "materialise" if fits else "recompute"
            else:
                mode = "materialise" if fits and kernels and not filtered and dtype != torch.float16 else "chunk"
        return plan.cut(mode)

    def cut(self, mode: Mode) -> "LinearCrossEntropyPlan":
        """Cut the rows into as few slabs as fit the budget, nearly equal, in multiples of 16 rows where possible."""
        most = self._most_rows()
        chunks = max(1, -(-self.N // most))
        rows = max(1, -(-self.N // chunks))
        rounded = -(-rows // 16) * 16
        rows = rounded if rounded <= most else rows
        if mode == "materialise":
            rows = max(1, self.N)
        columns = self.V
        if mode == "recompute":
            columns = min(self.V, max(128, self.budget // max(1, self.N * self._element()) // 128 * 128))
        return replace(self, mode=mode, rows=rows, columns=max(1, columns))

    def _element(self) -> int:
        """Return the bytes of a logit, plus those of its gradient if that has another dtype."""
        return self.slab_dtype.itemsize + (self.dtype.itemsize if self.slab_dtype != self.dtype else 0)

    def _most_rows(self) -> int:
        return max(1, self.budget // max(1, self.row_width * self._element()))

    def __iter__(self) -> Iterator[slice]:
        """Yield the chunks of rows."""
        return (slice(start, min(start + self.rows, self.N)) for start in range(0, self.N, self.rows))

    def column_slabs(self) -> Iterator[slice]:
        return (slice(start, min(start + self.columns, self.V)) for start in range(0, self.V, self.columns))

    def padded(self, columns: int) -> int:
        """Return the columns of a buffer for so many classes: a multiple of GROUP, and so of any alignment."""
        return min(self.row_width, -(-columns // GROUP) * GROUP)

    @property
    def backward_width(self) -> int:
        """Columns of a backward slab. If not all, they are a multiple of GROUP anyway."""
        return self.row_width if self.columns >= self.V else self.columns

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def weight_gradient_dtype(self) -> torch.dtype:
        """Dtype of the buffer that the products go to. If it is written only once, it may be rounded."""
        once = self.mode != "chunk" or (self.rows >= self.N and not self.float32_products)
        if once and self.weight_dtype == self.dtype:
            return self.dtype
        return self.accumulate_dtype

    @property
    def slab_bytes(self) -> int:
        """Bytes of the largest slab."""
        forward = min(self.rows, self.N) * self.row_width * self._element()
        backward = self.N * self.backward_width * self._element() if self.mode == "recompute" and any(self.wants) else 0
        return max(forward, backward)

    @property
    def peak_bytes(self) -> int:
        """Most bytes held at a time beyond the inputs, gradients included."""
        d_hidden = self.wants[0] * self.N * self.D * self.dtype.itemsize
        d_weight = self.wants[1] * self.V * self.D * self.weight_dtype.itemsize
        if self.mode == "chunk" and self.weight_gradient_dtype != self.weight_dtype:
            summed = self.wants[1] * self.V * self.D * self.weight_gradient_dtype.itemsize
            return d_hidden + summed + max(self.slab_bytes, d_weight)
        if self.mode == "recompute":
            summed = self.wants[0] * self.N * self.D * self.accumulate_dtype.itemsize
            return d_weight + summed + max(self.slab_bytes, d_hidden if self.accumulate_dtype != self.dtype else 0)
        return d_hidden + d_weight + self.slab_bytes

    @property
    def steps(self) -> list[Step]:
        """The launches, forward and backward."""
        e, s = self.dtype.itemsize, self.slab_dtype.itemsize
        wide = self.accumulate_dtype.itemsize
        W, H, L = self.V * self.D, self.N * self.D, self.N * self.V
        product = 2.0 * self.N * self.D * self.V
        chunks = -(-self.N // self.rows)
        slabs = -(-self.V // self.columns)
        backward = any(self.wants)
        in_forward = backward and self.mode == "chunk"
        steps = [
            Step("logits", chunks * W * e + H * e + L * s, product, chunks),
            Step("rows", L * s + (L * e if in_forward else 0), 0, chunks),
        ]
        if self.mode == "recompute" and backward:
            steps.append(Step("logits again", W * e + slabs * H * e + L * s, product, slabs))
        if self.mode != "chunk" and backward:
            steps.append(Step("rows backward", L * s + L * e, 0, slabs))
        parts = slabs if self.mode == "recompute" else chunks
        if self.wants[0]:
            if self.mode == "recompute":
                steps.append(Step("d_hidden", L * e + W * e + (2 * slabs - 1) * H * wide, product, slabs))
                steps.append(Step("cast d_hidden", H * (wide + e)))
            else:
                steps.append(Step("d_hidden", L * e + chunks * W * e + H * e, product, chunks))
        if self.wants[1]:
            g, w = self.weight_gradient_dtype.itemsize, self.weight_dtype.itemsize
            if self.mode == "chunk":
                steps.append(Step("d_weight", L * e + H * e + (2 * chunks - 1) * W * g, product, chunks))
                steps.append(Step("scale d_weight", W * (g + w)))
            else:
                steps.append(Step("d_weight", L * e + parts * H * e + W * g, product, parts))
        if self.mode == "chunk" and self.wants[0]:
            steps.append(Step("scale d_hidden", 2 * H * e))
        return steps

    @property
    def hbm_bytes(self) -> float:
        return sum(step.bytes for step in self.steps)

    @property
    def flops(self) -> float:
        """FLOPs of the matrix products."""
        return sum(step.flops for step in self.steps)

    @property
    def seconds(self) -> float:
        """Modelled time on `gpu`."""
        bandwidth, products = BANDWIDTH_SHARE * self.gpu.bandwidth, self.gpu.product_rate(self.dtype)
        return sum(step.calls * LAUNCH + max(step.bytes / bandwidth, step.flops / products) for step in self.steps)

    @property
    def alternatives(self) -> "list[LinearCrossEntropyPlan]":
        """The same call in the other modes."""
        modes: tuple[Mode, ...] = ("materialise", "chunk", "recompute")
        return [self.cut(mode) for mode in modes if mode != self.mode]

    def __str__(self) -> str:
        chunks = -(-self.N // self.rows) if self.N else 0
        lines = [
            f"linear cross-entropy of N={self.N} tokens, D={self.D}, V={self.V}, {_short(self.dtype)}"
            f" (logits {_short(self.slab_dtype)}): {self.mode}, {self.rows} rows a slab, {chunks} slab(s)",
            f"{'mode':<14}{'slab':>10}{'peak':>10}{'HBM':>10}{'FLOPs':>9}   modelled on {self.gpu.name}",
        ]
        for plan in [self, *self.alternatives]:
            lines.append(
                f"{plan.mode + (' *' if plan is self else ''):<14}{in_bytes(plan.slab_bytes):>10}"
                f"{in_bytes(plan.peak_bytes):>10}{in_bytes(plan.hbm_bytes):>10}{plan.flops / 1e12:>8.2f}T"
                f"   {plan.seconds * 1e3:.2f} ms"
            )
        return "\n".join(lines)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
