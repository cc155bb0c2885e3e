"""Launches recorded in the interpreter and compiled for real, on kernels whose properties are known."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # as in the rest of the suite: the workers must cope

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from evidence import compiler, machine_code
from evidence.compiler import Compiled, compile_launches
from evidence.launches import Specialization, _encode, _encode_constant
from llmfast_kernels import cross_entropy as rows
from llmfast_kernels.ahead import compiling_for
from llmfast_kernels.terms import Targets, Terms
from support import sample_kernels as samples
from support.budgets import violations

recorded = samples.recorded


X = torch.zeros(65536)


def zeros(N: int) -> Targets:
    return Targets(torch.zeros(N, 1, dtype=torch.int64))


HALF = torch.zeros(64, 4096, dtype=torch.bfloat16)
TARGETS = ["sm_90", "gfx942"]


def row_launch(logits: Tensor) -> None:
    rows.cross_entropy(logits, zeros(len(logits)), Terms(logits.shape[1]))


LAUNCHES: dict[str, Callable[[], object]] = {
    "aligned": lambda: samples.add(4096),
    "unaligned bound": lambda: samples.add(4095),
    "unaligned pointer": lambda: samples.add(4096, offset=1),
    "loops": lambda: samples.rows_kernel[(8,)](X, X, 8, 4096, BLOCK=1024, num_warps=4),
    "fits": lambda: samples.spill_kernel[(1,)](X, X, BLOCK=1024, num_warps=2),
    "spills": lambda: samples.spill_kernel[(1,)](X, X, BLOCK=65536, num_warps=2),
    "function": lambda: samples.apply_kernel[(1,)](X, X, RULE=samples.square, KIND=tl.float32, BLOCK=tl.constexpr(16)),
    "record": lambda: samples.record_kernel[(4,)](samples.Vector(X, 3.0), X[4096:], BLOCK=128),
    "rows": lambda: row_launch(HALF),
    "matmul": lambda: samples.matmul_kernel[(1, 1)](HALF, HALF, HALF, 64, 64, 64, **samples.GEMM_TILE),
}


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], Compiled]:
    """Compile all at once, as starting the workers takes most of the time; return results by name and target."""
    kinds = {name: recorded(launch)[0] for name, launch in LAUNCHES.items()}
    # A launcher that promises 16-byte accesses for rows that do not start on 16 bytes.
    arguments = kinds["rows"].arguments
    lie = arguments | {"logits_ptr": arguments["logits_ptr"] | {"aligned": False}}
    kinds["planted"] = replace(kinds["rows"], arguments=lie)
    found = compile_launches(list(kinds.values()), TARGETS)
    return {(name, c.target): c for c in found for name, kind in kinds.items() if kind.key == c.kind.key}


def test_what_decides_the_binary_is_recorded():
    (kind,) = recorded(partial(samples.add, 4096))
    assert kind.kernel == "support.sample_kernels:add_kernel"
    pointer = {"dtype": "float32", "aligned": True, "below_2_gib": True}
    assert kind.arguments == {**dict.fromkeys(("x", "y", "total"), pointer), "count": 16, "BLOCK": {"constant": 1024}}
    assert kind.options == {}
    assert kind.first_test.endswith("test_compiler.py::test_what_decides_the_binary_is_recorded")
    assert str(kind) == "add_kernel(x=*float32:16, y=*float32:16, total=*float32:16, count=16, BLOCK=1024)"


def test_launches_of_one_kind_are_counted_together():
    def launch():
        for count in (4096, 8192, 4095, 1, 4097, 16):
            samples.add(count)
        samples.add(4096, offset=1)
        samples.add_kernel[(1,)](*[torch.zeros(16)] * 3, 16, BLOCK=1024, num_warps=8)

    kinds = recorded(launch)
    counts = {(k.arguments["count"], k.arguments["x"]["aligned"], k.options.get("num_warps")): k.count for k in kinds}
    assert counts == {
        (16, True, None): 3,
        (3, True, None): 2,
        (1, True, None): 1,
        (16, False, None): 1,
        (16, True, 8): 1,
    }


def test_sizes_that_triton_does_not_look_at_make_no_kinds():
    def launch():
        for V, ignore_index in ((1, 1), (17, 16), (33, 17)):
            rows.cross_entropy(HALF[:2, :V], zeros(2), Terms(V, ignore_index))

    (kind,) = recorded(launch)
    assert [kind.arguments[name] for name in ("V", "row_width", "ignore_index")] == [3, 3, 3] and kind.count == 3


def test_addresses_that_triton_does_not_look_at_make_no_kinds():
    def launch():
        for start in range(3):
            y = torch.zeros(5, 1, dtype=torch.int64)[start : start + 2]
            rows.cross_entropy(HALF[:2, :17], Targets(y, token_weights=torch.ones(5)[start : start + 2]), Terms(17))

    (kind,) = recorded(launch)
    assert not kind.arguments["targets_ptr"]["aligned"] and kind.arguments["logits_ptr"]["aligned"] and kind.count == 3


@pytest.mark.parametrize("target", TARGETS)
def test_aligned_sizes_are_accessed_by_vectors(compiled, target: str):
    facts = compiled["aligned", target].facts
    assert facts.code.access_bits == {128}
    assert sum(facts.code.load_bits.values()) == 2 * sum(facts.code.store_bits.values())
    assert facts.spill_bytes == facts.stack_bytes == facts.shared_bytes == facts.scalar_spills == 0
    assert 8 <= facts.registers <= 64 and facts.num_warps == 4 and facts.occupancy == 1
    assert facts.hot_loops == () and facts.code.tensor_cores == 0
    for name in ("unaligned bound", "unaligned pointer"):
        assert compiled[name, target].facts.code.access_bits == {32}


@pytest.mark.parametrize("target", TARGETS)
def test_innermost_loops_of_a_kernel(compiled, target: str):
    facts = compiled["loops", target].facts
    assert facts.shared_bytes > 0 and facts.code.barriers > 0 and facts.code.shuffles > 0
    first, second = facts.hot_loops
    assert first.store_bits == {}
    assert second.load_bits.keys() == second.store_bits.keys() == first.load_bits.keys() == {128}
    for loop in facts.hot_loops:
        assert loop.transcendentals > 0
        assert loop.shuffles == loop.barriers == 0
        assert loop.instructions == sum(loop.opcodes.values()) < facts.code.instructions


@pytest.mark.parametrize("target", TARGETS)
def test_tensor_cores_are_seen(compiled, target: str):
    assert compiled["matmul", target].facts.hot_loops[0].tensor_cores > 0


@pytest.mark.parametrize("target", TARGETS)
def test_spills_are_seen_and_break_the_budget(compiled, target: str):
    few, many = compiled["fits", target], compiled["spills", target]
    assert few.facts.spill_bytes == 0 < many.facts.spill_bytes
    assert not any("spills" in problem for problem in violations(few))
    assert any(problem.startswith(f"spills {many.facts.spill_bytes} bytes") for problem in violations(many))
    assert "does not say enable_fp_fusion=True" in list(violations(few))
    assert any(problem.startswith("has no budget") for problem in violations(few))


@pytest.mark.parametrize("target", TARGETS)
def test_an_unaligned_pointer_breaks_the_budget(compiled, target: str):
    assert list(violations(compiled["rows", target])) == []
    problems = list(violations(compiled["planted", target]))
    assert any("accesses {16} bits at a time in a loop, not 128" in problem for problem in problems)


@pytest.mark.parametrize("target", TARGETS)
def test_named_tuples_are_compiled_with_their_fields(compiled, target: str):
    one = compiled["record", target]
    assert one.kind.argument("x.scale") == 0.5 and one.kind.argument("x.bias_ptr") is None
    assert sum(one.facts.code.load_bits.values()) > 0


def test_functions_and_types_are_constants_too(compiled):
    one = compiled["function", "sm_90"]
    assert one.kind.arguments["RULE"] == {"constant": {"function": "support.sample_kernels:square"}}
    assert one.kind.arguments["KIND"] == {"constant": {"triton_type": "fp32"}}
    assert one.facts.code.opcodes["FMUL"] == 1


def test_a_warp_of_amd_has_64_threads(compiled):
    nvidia, amd = compiled["rows", "sm_90"], compiled["rows", "gfx942"]
    assert nvidia.kind.options["num_warps"] == nvidia.facts.num_warps == 2 * amd.facts.num_warps > 1
    assert nvidia.warp_size * nvidia.facts.num_warps == amd.warp_size * amd.facts.num_warps


def test_a_failure_names_the_launch_and_has_the_compilers_words():
    kinds = recorded(lambda: samples.never_compiles_kernel[(1,)](torch.zeros(1)))
    message = r"(?s)type stays consistent.*never_compiles_kernel\(x=\*float32:16\) for sm_90, launched by tests"
    with pytest.raises(RuntimeError, match=message):
        compile_launches(kinds, ["sm_90"])


def test_an_interpreting_process_cannot_compile():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), compiling_for("sm_90"):
        pass


def test_a_launch_that_cannot_be_recorded_is_named():
    with pytest.raises(TypeError, match="argument of type dict cannot be recorded"):
        recorded(lambda: samples.add_kernel[(1,)](*[torch.zeros(16)] * 3, {}, BLOCK=16))


# What workers do, without a compiler.


def test_a_worker_takes_jobs_in_batches_and_answers_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds, sizes = [Specialization("module:kernel", {"n": n}, {"num_warps": 4}, "a test", n) for n in range(5)], []
    (tmp_path / "jobs").write_text(json.dumps([(asdict(kind), f"sm_{kind.count}") for kind in kinds]))
    monkeypatch.setattr(compiler, "BATCH", 2)
    monkeypatch.setattr(compiler, "_compile", lambda kind, target: (kinds.index(kind), target))
    monkeypatch.setattr(compiler, "_facts", lambda kernels: sizes.append(len(kernels)) or list(kernels))
    compiler._work(str(tmp_path / "jobs"), str(tmp_path / "answer"))
    assert json.loads((tmp_path / "answer").read_text()) == [[n, f"sm_{n}"] for n in range(5)]
    assert sizes == [2, 2, 1]


def test_facts_are_read_once_per_kernel_and_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Fact:
        registers: int

    def read(kernels: list[Any]) -> list[Fact]:
        fresh.extend(kernel.hash for kernel in kernels)
        return [Fact(kernel.registers) for kernel in kernels]

    a, b, c = (SimpleNamespace(hash=name, registers=i) for i, name in enumerate("abc"))
    fresh: list[str] = []
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(machine_code, "facts", read)
    for kernels in ([b], [c, b, a], [a, c]):
        assert compiler._facts(kernels) == [{"registers": kernel.registers} for kernel in kernels]
    assert fresh == ["b", "c", "a"]
    (tmp_path / "reader.py").write_text("another reader")
    monkeypatch.setattr(machine_code, "__file__", str(tmp_path / "reader.py"))
    a.registers = 7
    assert compiler._facts([a]) == [{"registers": 7}]


@pytest.mark.parametrize("code", [0, 1])
def test_a_worker_compiles_and_is_quoted_with_its_last_words(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(command: list[str], **how: Any) -> Any:
        seen.update(how["env"])
        Path(command[-1]).write_text("[]")
        return SimpleNamespace(returncode=code, stderr="first " + 9000 * "." + " last")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SOME_SETTING", "kept")
    monkeypatch.setattr(compiler.subprocess, "run", run)
    kinds = [Specialization("module:kernel", {}, {})]
    with pytest.raises(RuntimeError, match=r"^compiling launches failed:\n\.+ last$") if code else nullcontext():
        compiler._run_worker([(kinds[0], "sm_90")])
    assert "TRITON_INTERPRET" not in seen and seen["SOME_SETTING"] == "kept"
    assert seen["PYTHONPATH"].split(os.pathsep)[0] == str(Path(compiler.__file__).parents[1])
    assert compiler._run_worker([]) == []


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 1, 16, 3, 2**40, 2**63, 0.5, (16, 3), (1, (None, 0.5))),
        *(torch.zeros(4), torch.zeros(4)[1:], torch.zeros(32, dtype=torch.int8)[1:], torch.zeros(9).bfloat16()[1:]),
        samples.Vector(X, 3.0),
    ],
    ids=str,
)
def test_stand_ins_are_of_the_kind_that_they_stand_for(value: Any) -> None:
    assert _encode(compiler._decode(_encode(value))) == _encode(value)


@pytest.mark.parametrize(
    "value",
    [1024, 0.5, "adam", None, tl.float32, (1, (2, tl.bfloat16)), samples.square],
    ids=["integer", "number", "string", "none", "type", "tuple", "function"],
)
def test_constants_come_back_as_they_were(value: Any) -> None:
    back = compiler._decode({"constant": _encode_constant(value)})
    assert _encode_constant(back) == _encode_constant(value) and type(back) is type(value)


@pytest.mark.parametrize("below", [False, True])
def test_a_stand_in_for_a_tensor_tells_amds_compiler_how_large_it_is(below: bool) -> None:
    pointer = compiler._decode({"dtype": "float16", "aligned": False, "below_2_gib": below})
    assert (pointer.ptr_range() < 2**31) == below
    assert pointer.dtype == torch.float16 and pointer.data_ptr() % 2 == 0 and pointer.data_ptr() % 16


def test_a_compiled_launch_says_for_what() -> None:
    kind = Specialization("module:kernel", {"n": 16}, {})
    for target, size in (("sm_100", 32), ("gfx950", 64)):
        one = Compiled(kind, target, None)  # type: ignore[arg-type]
        assert str(one) == f"kernel(n=16) for {target}" and one.warp_size == size
    assert {target[:3] for target in compiler.TARGETS} == {"sm_", "gfx"} and len(compiler.TARGETS) == 5
