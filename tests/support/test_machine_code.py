"""The facts against kernels whose properties are known, and the search for loops against small graphs."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # as in the rest of the suite: the workers must cope

import pytest

from support.machine_code import (
    Instruction,
    KernelFacts,
    _amd_bits,
    _count_nvidia,
    _parse_sass,
    capture,
    compile_in_subprocess,
    innermost_loops,
)


@pytest.fixture(scope="module")
def additions() -> dict[tuple[str, str], dict]:
    records = compile_in_subprocess("support.sample_launches:add_launches", ["sm_90", "gfx942", "sm_100"])
    return {(record["target"], record["label"]): record for record in records}


def test_records_describe_the_launches(additions):
    names = [
        (target, f"add/{name}")
        for target in ("sm_90", "gfx942", "sm_100")
        for name in ("aligned", "unaligned", "again")
    ]
    assert list(additions) == names
    record = additions["sm_90", "add/aligned"]
    assert record["kernel"] == "add_kernel"
    assert record["grid"] == (4,)
    assert record["constants"] == {"BLOCK": 1024}
    assert record["signature"] == dict.fromkeys(("x", "y", "total"), "*fp32:16") | {
        "count": "i32:16",
        "BLOCK": "constexpr",
    }
    assert record["options"]["num_warps"] == 4
    assert additions["sm_90", "add/unaligned"]["signature"]["count"] == "i32"
    # Same specialisation, so the same kernel, reported under both names.
    assert additions["sm_90", "add/again"]["facts"] == record["facts"]


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942"])
def test_aligned_sizes_are_accessed_by_vectors(additions, target):
    facts = additions[target, "add/aligned"]["facts"]
    assert isinstance(facts, KernelFacts)
    assert facts.code.access_bits == {128}
    assert sum(facts.code.load_bits.values()) == 2 * sum(facts.code.store_bits.values())
    assert facts.spill_bytes == facts.stack_bytes == facts.shared_bytes == facts.scalar_spills == 0
    assert 8 <= facts.registers <= 64
    assert facts.hot_loops == ()


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942"])
def test_an_unaligned_bound_means_scalar_accesses(additions, target):
    code = additions[target, "add/unaligned"]["facts"].code
    assert code.access_bits == {32}
    assert code.load_bits[32] == 2 * code.store_bits[32]


def test_innermost_loops_of_a_kernel():
    records = compile_in_subprocess("support.sample_launches:loop_launches", ["sm_90", "gfx942"])
    assert [record["target"] for record in records] == ["sm_90", "gfx942"]
    for record in records:
        assert record["options"]["enable_fp_fusion"] is False
        facts = record["facts"]
        assert facts.shared_bytes > 0
        assert facts.code.barriers > 0
        assert facts.code.shuffles > 0
        first, second = facts.hot_loops
        assert first.store_bits == {}
        assert second.load_bits.keys() == second.store_bits.keys() == first.load_bits.keys() == {128}
        for loop in facts.hot_loops:
            assert loop.transcendentals > 0
            assert loop.shuffles == loop.barriers == 0
            assert loop.instructions == sum(loop.opcodes.values()) < facts.code.instructions


def test_spills_are_reported():
    records = compile_in_subprocess("support.sample_launches:spill_launches", ["sm_90", "gfx942"])
    spilled = {(record["target"], record["label"]): record["facts"].spill_bytes for record in records}
    for target in ("sm_90", "gfx942"):
        assert spilled[target, "1024"] == 0
        assert spilled[target, "65536"] > 0


def test_a_failure_in_the_worker_comes_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)failing_launches.*ValueError: planted failure"):
        compile_in_subprocess("support.sample_launches:failing_launches", ["sm_90"])


def test_capture_refuses_an_interpreting_process():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), capture("sm_90"):
        pass


def graph(*lines: tuple[int | None, bool]) -> list[Instruction]:
    return [Instruction(str(index), target, falls_through) for index, (target, falls_through) in enumerate(lines)]


NEXT, END = (None, True), (None, False)


@pytest.mark.parametrize(
    ("instructions", "loops"),
    [
        pytest.param(graph(NEXT, NEXT, (1, True), END), ["12"], id="one"),
        pytest.param(graph(NEXT, (1, True), END), ["1"], id="of one instruction"),
        pytest.param(graph((0, True), END), ["0"], id="at the entry"),
        pytest.param(graph(NEXT, NEXT, (2, True), (1, True), END), ["2"], id="nested"),
        pytest.param(graph(NEXT, (1, True), NEXT, (3, True), (0, True), END), ["1", "3"], id="two in one"),
        pytest.param(graph(NEXT, (4, True), (1, True), (1, True), END), ["123"], id="two jumps to one header"),
        # 1 jumps out to 5, which jumps back to 2: backwards, and not a loop.
        pytest.param(graph(NEXT, (5, True), NEXT, NEXT, END, (2, False)), [], id="unlikely code behind the end"),
        # The same inside a loop of 1 to 3, which the unlikely code belongs to.
        pytest.param(graph(NEXT, (5, True), NEXT, (1, True), END, (2, False)), ["1235"], id="unlikely code in a loop"),
        # 0 jumps to the test at 3, behind its body.
        pytest.param(graph((3, False), NEXT, NEXT, (1, True), END), ["123"], id="test at the bottom"),
        pytest.param(graph(END, (1, False)), [], id="padding behind the end"),
    ],
)
def test_innermost_loops(instructions, loops):
    assert ["".join(instruction.opcode for instruction in loop) for loop in innermost_loops(instructions)] == loops


def test_sass_is_parsed():
    code = _parse_sass("""
        /*0000*/                   LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64] ;       /* 0x0000000402087981 */
                                                                                   /* 0x000ea8000c1e9d00 */
        /*0010*/              @!P1 LDG.E.U16.CONSTANT R7, desc[UR4][R2.64] ;       /* 0x0 */
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], [R2.64] ;     /* 0x0 */
        /*0030*/                   STG.E desc[UR4][R2.64], R7 ;                    /* 0x0 */
        /*0040*/               @P0 BRA 0x10 ;                                      /* 0x0 */
        /*0050*/                   BRA.DIV UR4, 0x0 ;                              /* 0x0 */
        /*0060*/                   EXIT ;                                          /* 0x0 */
        /*0070*/                   BRA 0x70;                                       /* 0x0 */
    """)
    assert [instruction.target for instruction in code] == [None, None, None, None, 1, 0, None, 7]
    assert [instruction.falls_through for instruction in code] == [True] * 6 + [False] * 2
    counts = _count_nvidia(code)
    assert counts.load_bits == {256: 1, 16: 1, 128: 1}
    assert counts.store_bits == {32: 1}


@pytest.mark.parametrize(
    ("suffix", "bits"),
    [
        ("dwordx4", 128),
        ("dword", 32),
        ("ushort", 16),
        ("short_d16_hi", 16),
        ("ubyte", 8),
        ("b128", 128),
        ("d16_b16", 16),
    ],
)
def test_amd_widths(suffix, bits):
    assert _amd_bits(suffix) == bits
