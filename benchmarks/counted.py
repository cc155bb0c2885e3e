"""Counting jobs: one operation, in one implementation, at one size, in a process that interprets kernels.

    results = count([Job("linear_cross_entropy", "Liger", {"N": 1024, "D": 4096, "V": 128256})])

Each implementation takes its GPU path (see `evidence.pretend_cuda`), forward and backward, in bfloat16 unless the job
says otherwise. A dry job counts without computing, at any size; the others compute, and compare with float64.
"""

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evidence.launches import Specialization

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """Operation, implementation and size to count."""

    operation: str  # of llmfast.checkup.implementations
    way: str
    size: dict[str, Any]  # N, D, V and possibly K for a loss; "parameters" for an optimizer
    dry: bool = True
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Result:
    """Counts of a whole operation, in bytes and FLOPs."""

    job: Job
    dram: float  # distinct bytes per launch: see evidence.traffic
    moved: float  # all requested bytes
    by_name: dict[str, float]  # dram per kernel and operator, the largest first
    dot_flops: float
    calls: int
    syncs: int
    peak_bytes: int
    seconds: dict[str, float]  # modelled, by GPU
    counting_took: float  # seconds, on this machine
    errors: dict[str, float] = field(default_factory=dict)  # relative to float64, unless the job was dry
    kinds: list[Specialization] = field(default_factory=list)  # kinds of launches made

    @classmethod
    def from_json(cls, text: str) -> "Result":
        fields = json.loads(text)
        kinds = [Specialization(**kind) for kind in fields.pop("kinds")]
        return cls(**{**fields, "job": Job(**fields["job"]), "kinds": kinds})


def count(jobs: list[Job], *, workers: int = 2) -> list[Result]:
    """Run the jobs in worker processes; the results are in the order of the jobs.

    Raises:
        RuntimeError: A job failed; the message contains the job and its traceback.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(jobs)):
        waiting.put(index)
    results: dict[int, Result] = {}

    def work() -> None:
        with _worker() as ask:
            while True:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                answer = ask(json.dumps(asdict(jobs[index])))
                if not answer.startswith("{"):
                    raise RuntimeError(f"{jobs[index]} failed:\n{json.loads(answer)}")
                results[index] = Result.from_json(answer)

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work) for _ in range(min(workers, len(jobs)))]:
            future.result()
    return [results[index] for index in range(len(jobs))]


@contextmanager
def _worker() -> Iterator[Callable[[str], str]]:
    """Start a process that answers lines with lines."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",  # there is one worker per core
        "TORCHDYNAMO_DISABLE": "1",  # cut-cross-entropy compiles a helper, which dispatch modes forbid
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), str(_ROOT / "kernels"), *sys.path])),
    }
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.counted"]
    with subprocess.Popen(
        command, env=environment, cwd=_ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask(line: str) -> str:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise RuntimeError(f"the counting process died at {line}")
            return answer

        yield ask
        process.stdin.close()


# In the worker process.


def run(job: Job) -> Result:
    """Count in this process, which must interpret kernels."""
    import torch

    from evidence.interpreter import bfloat16_arithmetic
    from evidence.launches import Recorder
    from evidence.observers import observing
    from evidence.pretend_cuda import pretending_cuda
    from evidence.roofline import GPUS, seconds
    from evidence.traffic import counting
    from llmfast.checkup.implementations import implementations

    dtype = getattr(torch, job.dtype)
    way = implementations(job.operation, "counted", dtype)[job.way]
    recorder = Recorder()
    start = time.perf_counter()
    with bfloat16_arithmetic(), observing(recorder):
        operation = _OPERATIONS.get(job.operation, _optimizer)(way.run, job, dtype)
        with pretending_cuda(), counting(dry=job.dry) as counts:
            operation.run()
    # Preparing the inputs is not part of the operation.
    counts.traffic = [t for t in counts.traffic if t.name not in operation.ignored]
    total = counts.total()
    return Result(
        job,
        dram=total.dram,
        moved=total.moved,
        by_name={name: t.dram for name, t in counts.by_name().items()},
        dot_flops=total.dot_flops.total(),
        calls=total.calls,
        syncs=total.syncs,
        peak_bytes=counts.peak_bytes,
        seconds={gpu.name: seconds(gpu, counts.traffic) for gpu in GPUS},
        counting_took=time.perf_counter() - start,
        errors={} if job.dry else operation.errors(),
        kinds=list(recorder.kinds.values()),
    )


@dataclass
class _Operation:
    run: Callable[[], None]
    errors: Callable[[], dict[str, float]] = dict
    ignored: frozenset[str] = frozenset()


def _relative(ours: Any, truth: Any) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


def _cross_entropy(way: Callable[..., Any], job: Job, dtype: Any) -> _Operation:
    import torch
    import torch.nn.functional as F

    from evidence.dry_run import reserve

    N, V = job.size["N"], job.size["V"]
    leaf = (reserve(N, V, dtype=dtype) if job.dry else torch.randn(N, V).to(dtype)).requires_grad_()
    targets = torch.randint(0, V, (N,))
    made: dict[str, Any] = {}

    def run() -> None:
        logits = _Handed.apply(leaf)  # not a leaf, so it may be overwritten, like the last layer's output
        made["loss"] = way(logits, targets)
        made["loss"].backward()

    def errors() -> dict[str, float]:
        truth = leaf.detach().double().requires_grad_()
        loss = F.cross_entropy(truth, targets)
        loss.backward()
        return {"loss": _relative(made["loss"].detach(), loss.detach()), "logits": _relative(leaf.grad, truth.grad)}

    class _Handed(torch.autograd.Function):
        """Function that costs nothing, and keeps the leaf's values when the loss is computed in place."""

        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.detach() if job.dry else x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0]

    return _Operation(run, errors, frozenset() if job.dry else frozenset({"clone"}))


def _linear_cross_entropy(way: Callable[..., Any], job: Job, dtype: Any) -> _Operation:
    """Build the operation for one head, or for K heads that predict successive tokens if the size has K."""
    import torch
    import torch.nn.functional as F

    from evidence.dry_run import reserve

    N, D, V = (job.size[name] for name in ("N", "D", "V"))
    heads = (job.size["K"],) if "K" in job.size else ()
    torch.manual_seed(0)
    if job.dry:
        hidden, weight = reserve(*heads, N, D, dtype=dtype), reserve(V, D, dtype=dtype)
    else:
        hidden, weight = torch.randn(*heads, N, D).to(dtype), (torch.randn(V, D) * D**-0.5).to(dtype)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.randint(0, V, (N,))
    made: dict[str, Any] = {}

    def run() -> None:
        made["loss"] = way(hidden, weight, targets)
        made["loss"].backward()

    def errors() -> dict[str, float]:
        h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
        if job.way.endswith("shared logits"):
            loss = _summed(F.cross_entropy, h[:1].expand_as(h) @ w.T, targets)
        elif heads:
            loss = _summed(F.cross_entropy, h @ w.T, targets)
        else:
            loss = F.cross_entropy(h @ w.T, targets)
        loss.backward()
        return {
            "loss": _relative(made["loss"].detach(), loss.detach()),
            "hidden": _relative(hidden.grad, h.grad),
            "weight": _relative(weight.grad, w.grad),
        }

    return _Operation(run, errors)


def _matrices(job: Job, dtype: Any) -> "tuple[Any, Any]":
    """Return hidden states (N, D) and the weight of an output layer (V, D)."""
    import torch

    from evidence.dry_run import reserve

    N, D, V = (job.size[name] for name in ("N", "D", "V"))
    if job.dry:
        return reserve(N, D, dtype=dtype), reserve(V, D, dtype=dtype)
    return torch.randn(N, D).to(dtype), (torch.randn(V, D) * D**-0.5).to(dtype)


def _linear_logprobs(way: Callable[..., Any], job: Job, dtype: Any) -> _Operation:
    import torch

    torch.manual_seed(0)
    hidden, weight = (t.requires_grad_() for t in _matrices(job, dtype))
    ids, upstream = torch.randint(0, len(weight), (len(hidden),)), torch.randn(len(hidden))
    made: dict[str, Any] = {}

    def run() -> None:
        made["found"] = way(hidden, weight, ids)
        made["found"].backward(upstream.to(made["found"].dtype))

    def errors() -> dict[str, float]:
        h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
        truth = (h @ w.T).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        truth.backward(upstream.double())
        return {
            "loss": _relative(made["found"].detach(), truth.detach()),
            "hidden": _relative(hidden.grad, h.grad),
            "weight": _relative(weight.grad, w.grad),
        }

    return _Operation(run, errors)


def _linear_distillation(way: Callable[..., Any], job: Job, dtype: Any) -> _Operation:
    import torch

    from llmfast.losses import TeacherStates, reference

    torch.manual_seed(0)
    hidden, weight = (t.requires_grad_() for t in _matrices(job, dtype))
    teacher = _matrices(job, dtype)
    made: dict[str, Any] = {}

    def run() -> None:
        made["loss"] = way(hidden, weight, *teacher)
        made["loss"].backward()

    def errors() -> dict[str, float]:
        h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
        said = TeacherStates(*(t.double() for t in teacher))
        truth = reference.linear_distillation(h, w, said, kind="jsd")
        truth.backward()
        return {
            "loss": _relative(made["loss"].detach(), truth.detach()),
            "hidden": _relative(hidden.grad, h.grad),
            "weight": _relative(weight.grad, w.grad),
        }

    return _Operation(run, errors)


def _summed(loss: Callable[..., Any], logits: Any, labels: Any) -> Any:
    """Sum the losses of the heads; row t of head k predicts label t + k."""
    return sum(loss(z[: len(labels) - k], labels[k:]) for k, z in enumerate(logits))


def _optimizer(way: Callable[..., Any], job: Job, dtype: Any) -> _Operation:
    from evidence.dry_run import reserve
    from evidence.pretend_cuda import pretending_cuda
    from evidence.traffic import counting
    from llmfast.checkup.shapes import PARAMETERS

    parameters = [reserve(*shape, dtype=dtype).requires_grad_() for shape in PARAMETERS[job.size["parameters"]]]
    for p in parameters:
        p.grad = reserve(*p.shape, dtype=dtype)
    with pretending_cuda(), counting(dry=True):
        optimizer = way(parameters)
        optimizer.step()  # creates the states
    return _Operation(lambda: optimizer.step() and None)


# All others are optimizers.
_OPERATIONS: dict[str, Callable[[Callable[..., Any], Job, Any], _Operation]] = {
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "mtp_cross_entropy": _linear_cross_entropy,
    "linear_logprobs": _linear_logprobs,
    "linear_distillation": _linear_distillation,
}


def main() -> None:
    """Answer each line of standard input, a job, with a line: its result, or the traceback as a string."""
    import traceback

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of libraries must not be taken for an answer
    # Must run before the counted libraries are imported: they look up libdevice functions by name.
    from evidence import interpreter

    interpreter.install()
    for line in sys.stdin:
        try:
            answer = json.dumps(asdict(run(Job(**json.loads(line)))))
        except Exception:
            answer = json.dumps(traceback.format_exc())
        answers.write(answer + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
