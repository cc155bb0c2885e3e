"""The search for loops against small graphs, and the readers of assembly against lines of it."""

from types import SimpleNamespace

import pytest

from evidence.machine_code import (
    ORDERS,
    Instruction,
    _amd_bits,
    _amd_resources,
    _count_amd,
    _count_nvidia,
    _nvidia_occupancy,
    _parse_amd,
    _parse_sass,
    innermost_loops,
    takes,
)


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


LOOP = "rewriting loop, barrier, store"
TWO = "load, barrier, store, barrier, store"


@pytest.mark.parametrize(
    ("opcodes", "jumps", "orders"),
    [
        pytest.param("LDG BAR STG BAR STG EXIT", {}, [TWO], id="two barriers"),
        pytest.param("LDG BAR STG STG EXIT", {}, [], id="one left out"),
        pytest.param("BAR LDG STG BAR STG EXIT", {}, [], id="the other one left out"),
        pytest.param("LDG BAR STG BAR EXIT", {}, [], id="no store behind it"),
        pytest.param("LDG STG BRA BAR STG EXIT", {2: 0}, [LOOP], id="a barrier behind a loop"),
        pytest.param("LDG STG BRA STG EXIT", {2: 0}, [], id="none behind a loop"),
        pytest.param("LDG STG BAR BRA STG EXIT", {3: 0}, [], id="within a loop"),
        pytest.param("BAR STG LDG STG BRA STG EXIT", {4: 2}, [], id="before a loop"),
        pytest.param("LDG STG BRA BAR STG BRA EXIT", {2: 0, 5: 4}, [LOOP], id="the last store in a loop of its own"),
        pytest.param("LDG BRA BAR STG EXIT STG BAR STG EXIT", {1: 5}, [], id="on two ways that do not meet"),
    ],
)
def test_orders_on_the_way_through(opcodes, jumps, orders):
    code = [
        Instruction(opcode, jumps.get(index), falls_through=opcode != "EXIT")
        for index, opcode in enumerate(opcodes.split())
    ]
    assert [order for order in ORDERS if takes(code, order, _count_nvidia)] == sorted(orders)


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


@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared", "programs"),
    [
        (80, 4, 32, 0, 16),  # 2048 threads
        (80, 1, 32, 0, 32),  # no more programs than that
        (90, 1, 65, 0, 28),  # 72 registers of each thread, by 8; of 65 there would be room for 31
        (90, 8, 65, 0, 3),
        (90, 2, 32, 7 << 10, 28),  # and 1 KiB of each program is the system's: 28 of 8 KiB
        (90, 4, 32, 75 << 10, 3),
        (90, 4, 32, 76 << 10, 2),
        (80, 4, 32, 82 << 10, 1),
    ],
)
def test_occupancy_is_what_fits_together(arch, num_warps, registers, shared, programs):
    metadata = SimpleNamespace(target=SimpleNamespace(arch=arch), num_warps=num_warps, shared=shared)
    assert _nvidia_occupancy(metadata, registers) == programs * num_warps * 32 / 2048


AMD = """
copy_kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1: ; a loop
	global_load_dwordx4 v[0:3], v4, s[0:1]
	global_load_ushort v5, v4, s[0:1] offset:2
	v_exp_f32_e32 v0, v0
	v_mfma_f32_16x16x16_bf16 v[0:3], v[0:1], v[2:3], 0
	ds_bpermute_b32 v0, v1, v0
	s_barrier
	buffer_store_dwordx2 v[0:1], v4, s[0:3], 0 offen
	s_cbranch_scc1 .LBB0_1
	s_endpgm
.Lfunc_end0:
; Occupancy: 3
    .private_segment_fixed_size: 24
    .sgpr_spill_count: 2
    .vgpr_count: 72
    .vgpr_spill_count: 5
"""


def test_amds_assembly_is_read():
    kernel = SimpleNamespace(asm={"amdgcn": AMD}, metadata=SimpleNamespace(name="copy_kernel"))
    resources = dict(registers=72, spill_bytes=20, stack_bytes=24, scalar_spills=2, occupancy=3 / 8)
    assert _amd_resources(kernel, []) == resources
    instructions = _parse_amd(kernel)
    assert [i.opcode for i in instructions][-2:] == ["s_cbranch_scc1", "s_endpgm"]
    (loop,) = innermost_loops(instructions)
    assert len(instructions) == 10 and len(loop) == 8
    code = _count_amd(loop)
    assert (code.load_bits, code.store_bits) == ({128: 1, 16: 1}, {64: 1})
    assert (code.transcendentals, code.tensor_cores, code.shuffles, code.barriers) == (1, 1, 1, 1)
    assert not _count_amd(instructions[:1]).access_bits  # a scalar load is no thread's
