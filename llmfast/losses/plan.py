"""The choice of how a linear cross-entropy is computed: the fastest way within a budget. `ways.py` has the costs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch

from llmfast._gpus import BANDWIDTH_SHARE, H100, LAUNCH, Gpu
from llmfast._units import in_bytes
from llmfast.losses import plain
from llmfast.losses.ways import SCALARS, Call, Mode, Step, Way
from llmfast_kernels.terms import GROUP, Terms

# A larger slab saves next to nothing on a GPU: at Llama-3's vocabulary this one holds 4096 rows, and moving W and dW
# takes a ninth of the products' time (modelled: 459 / rows on an H100). On a CPU, where products are slower, 64 MiB do.
DEFAULT_SLAB_ON_CPU = 64 << 20
DEFAULT_SLAB_ELSEWHERE = 1 << 30


@dataclass(frozen=True, kw_only=True)
class LinearCrossEntropyPlan:
    """Plan for `linear_cross_entropy` of N tokens, width D and V classes (of this rank).

    Bytes assume that each launch reads and writes each of its matrices once, as our counters find: caches hold what is
    read again. Times are modelled, not measured: the sum over launches of
    max(bytes / 90 % of the bandwidth, FLOPs / 70 % of the tensor cores) + 2 us.
    """

    call: Call
    way: Way
    budget: int  # most bytes to hold beyond the inputs and the gradients that are returned
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
        accumulate_dtype: torch.dtype | None = None,
        device: torch.device | str = "cuda",
        memory_budget: int | Literal["auto"] = "auto",
        reduction: str = "mean",
        wants: tuple[bool, bool] = (True, True),
        mode: Mode | None = None,
        kernels: bool = True,
        filtered: bool = False,
        gpu: Gpu = H100,
        gpu_memory: int | None = None,
    ) -> "LinearCrossEntropyPlan":
        """Plan a linear cross-entropy of these shapes. The call need not be possible here: no GPU is needed.

        Args:
            N: Tokens.
            D: Hidden width.
            V: Classes of this rank.
            dtype: Dtype of the matrix products.
            slab_dtype: Dtype of the logits. None: `dtype`.
            weight_dtype: Dtype of the weight's gradient. None: `dtype`.
            accumulate_dtype: Dtype of the sums over chunks. None: float32.
            device: Where the call runs; it decides what "auto" is.
            memory_budget: Most bytes to hold beyond the inputs and the gradients that are returned, or "auto".
            reduction: Reduction of the loss.
            wants: Whether gradients of hidden and weight are needed.
            mode: None chooses by budget, reduction and `wants`.
            kernels: Whether the Triton kernels run, for which rows are padded.
            filtered: Whether there is a `grad_filter`.
            gpu: The GPU that times are modelled for.
            gpu_memory: Bytes of a GPU; "auto" takes at most a tenth. None: those of the GPU that is here, if any.

        Raises:
            ValueError: Every way holds more than the budget. The message says how much the least holds.
        """
        on_gpu = torch.device(device).type != "cpu"
        space: Any = {} if kernels else plain.space(Terms(V), stats=False)
        call = Call(
            N=N,
            D=D,
            V=V,
            dtype=dtype,
            slab_dtype=slab_dtype or dtype,
            hidden_dtype=dtype,
            weight_dtype=weight_dtype or dtype,
            accumulate_dtype=accumulate_dtype or torch.promote_types(dtype, torch.float32),
            wants=(*wants, False),
            row_width=row_width(V, dtype, kernels, filtered),
            per_token=reduction == "none",
            kernels=kernels,
            filtered=filtered,
            float32_products=on_gpu,
            float32_sums=on_gpu,
            **space,
        )
        return planned(call, memory_budget, torch.device(device), mode=mode, gpu=gpu, gpu_memory=gpu_memory)

    @property
    def mode(self) -> Mode:
        """The kind of way.

        *materialise* keeps all logits until backward. *chunk* makes all gradients in the forward pass. *two-stage*
        makes those of hidden there, and leaves some columns of the weight's gradient to backward. *recompute* leaves
        everything to backward.
        """
        return str(self.call.modes(self.way))  # type: ignore[return-value]

    def __iter__(self) -> Iterator[slice]:
        """Yield the chunks of rows."""
        N, rows = self.call.N, self.way.rows
        return (slice(start, min(start + rows, N)) for start in range(0, N, rows))

    @property
    def chunks(self) -> int:
        """Number of chunks of rows."""
        return -(-self.call.N // self.way.rows) if self.call.N else 0

    def column_slabs(self) -> Iterator[slice]:
        """Yield the columns whose logits the column stage makes, slab by slab."""
        V, columns = self.call.V, self.way.columns
        first = self.way.summed + self.way.kept
        return (slice(start, min(start + columns, V)) for start in range(first, V, columns))

    @property
    def keeps_all(self) -> bool:
        """Return whether one slab of all logits lives until backward."""
        return 0 < self.call.V <= int(self.way.kept)

    def narrowed(self, V: int) -> "LinearCrossEntropyPlan":
        """Return the plan for V of the classes it was made for."""
        call, way = self.call, self.way
        if V == call.V:
            return self
        summed = V if way.summed >= call.V else min(way.summed, V)
        kept = V if way.kept >= call.V else min(way.kept, V - summed)
        way = way._replace(summed=summed, kept=kept, columns=max(1, min(way.columns, V)))
        return replace(self, call=replace(call, V=V), way=way)

    # Every backward pass asks for these. They are worked out once, because plans are remembered.

    @cached_property
    def column_share(self) -> float:
        """Share of the columns that the column stage goes through."""
        return float(self.call.column_share(self.way))

    @cached_property
    def separate(self) -> bool:
        """True if sums over chunks have a buffer that is not the gradient itself."""
        return bool(self.call.separate(self.way))

    @cached_property
    def sum_dtype(self) -> torch.dtype:
        """The dtype of what the row stage makes of the weight's gradient."""
        return self.call.weight_dtype if self.call.single(self.way) else self.call.accumulate_dtype

    @cached_property
    def forgets(self) -> bool:
        """True if a chunk of rows leaves nothing but the sum of its losses."""
        return bool(self.call.forgets(self.way))

    @cached_property
    def sums_hidden(self) -> bool:
        """True if the column stage sums d_hidden in float32, in a buffer that is then cast."""
        return bool(self.call.hidden_sums(self.way) > 0)

    def padded(self, columns: int) -> int:
        """Return the columns of a buffer for so many classes: a multiple of GROUP, and so of any alignment."""
        return min(self.call.row_width, -(-columns // GROUP) * GROUP)

    @property
    def column_width(self) -> int:
        """Columns of the column stage's slab. If not all, they are a multiple of 16 anyway."""
        return self.call.row_width if self.way.columns >= self.call.V else self.way.columns

    @property
    def slab_bytes(self) -> int:
        """Bytes of the largest slab."""
        return int(max(self.call.slab_bytes(self.way)))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of hidden and weight."""
        call = self.call
        d_hidden = call.N * call.D * call.hidden_dtype.itemsize * call.wants[0]
        return d_hidden + call.V * call.D * call.weight_dtype.itemsize * (call.wants[1] and not call.into)

    @property
    def held_bytes(self) -> int:
        """Most bytes held at a time beyond the inputs and the gradients that are returned."""
        return int(self.call.held_bytes(self.way))

    @property
    def peak_bytes(self) -> int:
        """Most bytes held at a time beyond the inputs, gradients included."""
        return self.held_bytes + self.gradient_bytes

    @property
    def steps(self) -> list[Step]:
        """The launches, forward and backward."""
        return [step for step in self.call.steps(self.way) if step.calls > 0]

    @property
    def hbm_bytes(self) -> float:
        return float(sum(step.bytes for step in self.steps))

    @property
    def flops(self) -> float:
        """FLOPs of the matrix products."""
        return float(sum(step.flops for step in self.steps))

    @property
    def products(self) -> float:
        """Matrix products of N x D x V, in whole and in part."""
        return self.flops / (2.0 * self.call.N * self.call.D * self.call.V)

    @property
    def seconds(self) -> float:
        """Modelled time on `gpu`."""
        return float(seconds(self.call, self.way, self.gpu))

    @property
    def alternatives(self) -> "list[LinearCrossEntropyPlan]":
        """The same call in the other modes, as far as they keep to the budget."""
        found = (_best(self.call, self.budget, mode, self.gpu) for mode in get_args(Mode) if mode != self.mode)
        return [plan for plan in found if plan is not None]

    @property
    def curve(self) -> "list[LinearCrossEntropyPlan]":
        """The plans that other budgets lead to, from the least possible to the fastest."""
        ways = self.call.ways()
        held, time = self.call.held_bytes(ways), seconds(self.call, ways, self.gpu)
        plans, best = [], np.inf
        for i in np.lexsort((time, held)):
            if time[i] < best:
                best = time[i]
                plans.append(replace(self, way=ways.at(i), budget=int(held[i])))
        return plans

    def __str__(self) -> str:
        call = self.call
        lines = [
            f"linear cross-entropy of N={call.N} tokens, D={call.D}, V={call.V}, {_short(call.dtype)}"
            f" (logits {_short(call.slab_dtype)}), at most {in_bytes(self.budget)} beyond inputs and gradients:"
            f" {self.mode}, {self.chunks} slab(s) of {self.way.rows} rows",
            f"{'mode':<14}{'slab':>11}{'held':>11}{'peak':>11}{'HBM':>11}{'products':>10}"
            f"   modelled on {self.gpu.name}",
        ]
        for plan in [self, *self.alternatives]:
            lines.append(
                f"{plan.mode + (' *' if plan is self else ''):<14}{in_bytes(plan.slab_bytes):>11}"
                f"{in_bytes(plan.held_bytes):>11}{in_bytes(plan.peak_bytes):>11}{in_bytes(plan.hbm_bytes):>11}"
                f"{plan.products:>10.2f}   {plan.seconds * 1e3:.2f} ms"
            )
        return "\n".join(lines)


def row_width(V: int, dtype: torch.dtype, kernels: bool, filtered: bool) -> int:
    """Return the columns of a slab of whole rows.

    Multiples of 128 bytes are aligned for the row kernel's accesses of 16 bytes and for the products' loads. Plain
    torch wants no padding: its softmax would copy.
    """
    pad = GROUP if filtered else 128 // dtype.itemsize if kernels else 1
    return -(-V // pad) * pad


class BudgetError(ValueError):
    """A budget below the `least` bytes that a call takes."""

    def __init__(self, least: int, call: str, budget: object) -> None:
        super().__init__(f"memory_budget must be at least {least} bytes for {call}; got {budget}")
        self.least, self.call = least, call


def planned(
    call: Call,
    memory_budget: int | Literal["auto"],
    device: torch.device,
    *,
    mode: Mode | None = None,
    gpu: Gpu = H100,
    gpu_memory: int | None = None,
) -> LinearCrossEntropyPlan:
    """Return the fastest plan for a call within a budget, as `LinearCrossEntropyPlan.make` describes it."""
    on_cpu = device.type == "cpu"
    most = None if on_cpu else _tenth(device) if gpu_memory is None else gpu_memory // 10
    return _planned(call, None if memory_budget == "auto" else memory_budget, on_cpu, most, mode, gpu)


@lru_cache(maxsize=256)  # of a whole call, because comparing two of them takes the host a microsecond
def _planned(
    call: Call, budget: int | None, on_cpu: bool, most: int | None, mode: Mode | None, gpu: Gpu
) -> LinearCrossEntropyPlan:
    """Return the fastest plan within `budget`; None stands for "auto", at most `most`."""
    allowed = _default_budget(call, on_cpu, most) if budget is None else budget
    plan = _best(call, allowed, mode, gpu)
    if plan is not None:
        return plan
    ways = call.ways(mode)
    if len(ways.rows) == 0:
        raise ValueError(f"mode={mode!r} cannot compute this call")
    least = int(call.held_bytes(ways).min())
    plan = _best(call, least, mode, gpu)
    if budget is None and plan is not None:
        return plan
    raise BudgetError(least, f"N={call.N}, D={call.D}, V={call.V}", allowed)


def _default_budget(call: Call, on_cpu: bool, most: int | None) -> int:
    """Return the bytes that "auto" stands for: room for the usual slab, and for sums of the weight's gradient.

    On a GPU at most a tenth of its memory, not of what is free, because runs must not differ.
    """
    whole = Way(not call.per_token, 1, call.N, call.V, 0, 1)
    separate = bool(call.wants[1] and not call.per_token and call.separate(whole))
    sums = call.V * call.D * call.accumulate_dtype.itemsize * separate
    if on_cpu:
        rounded = call.V * call.D * call.dtype.itemsize * (separate and not call.float32_products)
        return call.held + DEFAULT_SLAB_ON_CPU + sums + rounded
    # The results of all rows, and those of a chunk before they are copied.
    sums += 2 * call.row_bytes * call.N + call.V * call.wide.itemsize + SCALARS
    budget = max(DEFAULT_SLAB_ELSEWHERE, sums)
    return call.held + (budget if most is None else min(budget, most))


def may_hold(bytes_: int, budget: int | None, device: torch.device) -> bool:
    """Return whether a buffer of so many bytes fits the budget, or what "auto" may stand for if that is None."""
    most = _tenth(device) if budget is None else budget
    return most is None or bytes_ <= most


def _tenth(device: torch.device) -> int | None:
    """Return a tenth of a GPU's memory, if there is one: a plan needs none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).total_memory // 10


def seconds(call: Call, way: Way, gpu: Gpu) -> Any:
    """Return the modelled time of each way on a GPU."""
    bandwidth, products = BANDWIDTH_SHARE * gpu.bandwidth, gpu.product_rate(call.dtype)
    total = 0.0 * way.rows
    for step in call.steps(way):
        total = total + step.calls * LAUNCH + np.maximum(step.bytes / bandwidth, step.flops / products)
    return total


def _best(call: Call, budget: int, mode: Mode | None, gpu: Gpu) -> LinearCrossEntropyPlan | None:
    """Return the fastest plan that keeps to the budget, and of equally fast ones the smallest; None if none does."""
    ways = call.ways(mode)
    held = call.held_bytes(ways)
    ways = ways.chosen(held <= budget)
    if len(ways.rows) == 0:
        return None
    best = np.lexsort((held[held <= budget], seconds(call, ways, gpu)))[0]
    return LinearCrossEntropyPlan(call=call, way=ways.at(int(best)), budget=budget, gpu=gpu)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
