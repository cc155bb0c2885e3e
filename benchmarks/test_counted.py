"""Count bytes, FLOPs and memory of every implementation, and check properties of the counts.

No GPU is needed and nothing is timed: the counting processes show what a GPU would have to move and compute.
"""

import pytest
import torch

from benchmarks.conftest import Add
from benchmarks.counted import Job, Result
from evidence.compiler import compile_launches
from llmfast.checkup.implementations import OPTIMIZERS, implementations
from llmfast.checkup.shapes import HEADS, MODELS, PARAMETERS, SMALL, SMALL_HEADS, TOKENS

pytestmark = pytest.mark.usefixtures("benchmark")

COMPARED = [
    Job("linear_cross_entropy", way, SMALL, dry=False) for way in implementations("linear_cross_entropy", "counted")
]
COMPARED += [
    Job("cross_entropy", way, {"N": 256, "V": 16384}, dry=False) for way in implementations("cross_entropy", "counted")
]
COMPARED += [
    Job("mtp_cross_entropy", way, SMALL_HEADS, dry=False) for way in implementations("mtp_cross_entropy", "counted")
]
OF_TOKENS = ("linear_logprobs", "linear_distillation")
COMPARED += [
    Job(operation, way, SMALL, dry=False) for operation in OF_TOKENS for way in implementations(operation, "counted")
]
SIZES = [{"N": N, "D": D, "V": V} for D, V in MODELS.values() for N in TOKENS]
SIZES += [{"N": 16384, "D": 4096, "V": V} for V in (8192, 32768, 262144)]  # with Llama-3's size, a sweep over V
LINEAR = [
    Job("linear_cross_entropy", way, size)
    for size in SIZES
    for way in implementations("linear_cross_entropy", "counted")
]
MTP = [Job("mtp_cross_entropy", way, size) for size in HEADS for way in implementations("mtp_cross_entropy", "counted")]
OTHERS = [
    Job(operation, way, {"N": 8192, "D": D, "V": V})
    for operation in OF_TOKENS
    for D, V in (MODELS[name] for name in ("Llama-3", "Gemma-2", "Qwen-3"))
    for way in implementations(operation, "counted")
]
# A program of its kernels processes a fixed share of a tensor, so large tensors take minutes to interpret.
SMALL_ONLY = ("FlashOptim, 8-bit states",)
ADAMW = [
    Job("adamw", way, {"parameters": size}, dtype=str(dtype).removeprefix("torch."))
    for dtype in (torch.float32, torch.bfloat16)
    for size in PARAMETERS
    for way in implementations("adamw", "counted", dtype)
    if size == "124M" or way not in SMALL_ONLY
]


OPTIMIZER_JOBS = [
    Job(operation, way.name, {"parameters": "124M"}, dtype=str(way.dtypes[0]).removeprefix("torch."))
    for operation in OPTIMIZERS
    for dtype in (torch.float32, torch.bfloat16)
    for way in implementations(operation, "counted", dtype).values()
]


def name(job: object) -> str:
    assert isinstance(job, Job)
    return "-".join([job.operation, job.way, *(f"{key}={value}" for key, value in job.size.items()), job.dtype])


def record(add: Add, section: str, result: Result) -> None:
    job = result.job
    add(
        section,
        operation=job.operation,
        way=job.way,
        size=job.size,
        dtype=job.dtype,
        dram=result.dram,
        moved=result.moved,
        by_name=result.by_name,
        dot_flops=result.dot_flops,
        calls=result.calls,
        syncs=result.syncs,
        peak_bytes=result.peak_bytes,
        seconds=result.seconds,
        errors=result.errors,
    )


@pytest.mark.parametrize("job", COMPARED, ids=name)
def test_same_inputs(add: Add, counted: dict[Job, Result], job: Job) -> None:
    record(add, "compared", counted[job])


@pytest.mark.parametrize("job", LINEAR + MTP + OTHERS, ids=name)
def test_real_sizes(add: Add, counted: dict[Job, Result], job: Job) -> None:
    record(add, "real sizes", counted[job])


@pytest.mark.parametrize("job", ADAMW + OPTIMIZER_JOBS, ids=name)
def test_optimizers(add: Add, counted: dict[Job, Result], job: Job) -> None:
    record(add, "optimizers", counted[job])


def test_machine_code(add: Add, counted: dict[Job, Result]) -> None:
    """Compile every kind of launch that was counted, by all libraries, for five GPUs."""
    used_by: dict[str, set[str]] = {}
    kinds = {}
    for result in counted.values():
        for kind in result.kinds:
            kinds[kind.key] = kind
            used_by.setdefault(kind.key, set()).add(result.job.way)
    for compiled in compile_launches(list(kinds.values())):
        facts = compiled.facts
        add(
            "machine code",
            kernel=compiled.kind.name,
            launch=str(compiled.kind),
            target=compiled.target,
            ways=sorted(used_by[compiled.kind.key]),
            registers=facts.registers,
            spill_bytes=facts.spill_bytes,
            shared_bytes=facts.shared_bytes,
            warps=facts.num_warps,
            occupancy=facts.occupancy,
            loops=[
                {
                    "instructions": loop.instructions,
                    "access_bits": sorted(loop.access_bits),
                    "tensor_cores": loop.tensor_cores,
                }
                for loop in facts.hot_loops
            ],
            access_bits=sorted(facts.code.access_bits),
        )


# Properties that the counts must have.


def least_linear_bytes(N: int, D: int, V: int) -> int:
    """Return the bytes of three bfloat16 matrix products that read and write each of their matrices once."""
    return 2 * (3 * N * V + 3 * N * D + 3 * V * D)


def ours(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if job.way == "llmfast"]


@pytest.mark.parametrize(
    "job", ours(LINEAR) + ours(COMPARED[: len(implementations("linear_cross_entropy", "counted"))]), ids=name
)
def test_ours_multiplies_no_more_than_it_must(counted: dict[Job, Result], job: Job) -> None:
    N, D, V = (job.size[axis] for axis in "NDV")
    assert counted[job].dot_flops == 6 * N * D * V
    assert counted[job].syncs == 0


@pytest.mark.parametrize("job", [job for job in MTP if job.way in ("llmfast", "llmfast, shared logits")], ids=name)
def test_heads_multiply_no_more_than_they_must(counted: dict[Job, Result], job: Job) -> None:
    K, N, D, V = (job.size[axis] for axis in "KNDV")
    assert counted[job].dot_flops == (K if job.way == "llmfast" else 1) * 6 * N * D * V
    assert counted[job].syncs == 0


@pytest.mark.parametrize("job", ours(MTP), ids=name)
def test_heads_in_one_call_take_less_time_and_memory_than_head_by_head(counted: dict[Job, Result], job: Job) -> None:
    apart = counted[Job(job.operation, "llmfast, head by head", job.size)]
    assert counted[job].peak_bytes < 0.6 * apart.peak_bytes
    assert all(counted[job].seconds[gpu] < apart.seconds[gpu] for gpu in apart.seconds)


@pytest.mark.parametrize("job", [job for job in ours(LINEAR) if job.size["N"] >= 16384], ids=name)
def test_ours_takes_little_longer_than_its_matrix_products(counted: dict[Job, Result], job: Job) -> None:
    """Compare times modelled on an H100."""
    from evidence.roofline import H100, seconds
    from evidence.traffic import Traffic

    N, D, V = (job.size[axis] for axis in "NDV")
    product = Traffic("mm", "torch", unique_loaded=least_linear_bytes(N, D, V) / 3)
    product.dot_flops["bfloat16"] = 2 * N * D * V
    assert counted[job].seconds[H100.name] < 1.35 * seconds(H100, [product] * 3)


@pytest.mark.parametrize("job", ours(ADAMW), ids=name)
def test_our_adamw_moves_each_value_once(counted: dict[Job, Result], job: Job) -> None:
    numel = sum(torch.Size(shape).numel() for shape in PARAMETERS[job.size["parameters"]])
    itemsize = getattr(torch, job.dtype).itemsize
    # Only a sample of programs runs; the tests count exactly.
    assert 7 * itemsize <= counted[job].dram / numel < 1.01 * 7 * itemsize
    assert counted[job].calls == 2


def rivals(*names: str) -> list[Job]:
    return [job for job in COMPARED if job.operation == "linear_cross_entropy" and job.way in ("llmfast", *names)]


@pytest.mark.parametrize("jobs", [rivals("Liger"), rivals("torch linear_cross_entropy")], ids=lambda j: j[-1].way)
def test_ours_moves_at_least_five_times_fewer_bytes(counted: dict[Job, Result], jobs: list[Job]) -> None:
    if len(jobs) < 2:
        pytest.skip("not installed")
    mine, other = (counted[job] for job in jobs)
    assert 5 * mine.dram < other.dram
    assert mine.errors["weight"] < other.errors["weight"]
