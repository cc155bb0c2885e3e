"""The search for loops against small graphs, and the readers of assembly against lines of it."""

import dataclasses
import json
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from evidence import machine_code
from evidence.machine_code import (
    ORDERS,
    Code,
    Instruction,
    KernelFacts,
    _amd_bits,
    _amd_resources,
    _count_amd,
    _count_nvidia,
    _nvidia_occupancy,
    _nvidia_resources,
    _output_of,
    _parse_amd,
    _parse_sass,
    _section,
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


@pytest.mark.parametrize(
    ("opcode", "falls_through"),
    [
        *(("EXIT", False), ("RET.REL.NODEC", False), ("BRX", False), ("JMX", False), ("KILL", False)),
        *(("IADD3", True), ("BAR.SYNC", True)),
    ],
)
def test_sass_ends_at_what_does_not_return(opcode, falls_through):
    for guard, goes_on in (("", falls_through), ("@P0 ", True), ("@!UP2 ", True)):
        (found,) = _parse_sass(f"        /*0000*/   {guard}{opcode} R2 ;\n")
        assert (found.opcode, found.target, found.falls_through) == (opcode, None, goes_on)


@pytest.mark.parametrize(
    ("line", "target", "falls_through"),
    [
        ("BRA 0x10", 1, False),
        ("@P1 BRA 0x10", 1, True),
        ("BRA.U UP0, 0x10", 1, True),
        ("JMP 0x0", 0, False),
        ("CALL.REL.NOINC 0x10", 1, True),
        ("CALL.ABS.NOINC R4", None, True),
        ("CALL.REL.NOINC 0x900", None, True),  # a function outside of the kernel
    ],
)
def test_jumps_of_sass(line, target, falls_through):
    _, found = _parse_sass(f"        /*0000*/  MOV R1, R2 ;\n        /*0010*/  {line} ;\n")
    assert (found.target, found.falls_through) == (target, falls_through)


@pytest.mark.parametrize("line", ["BRA R4", "JMP 0x900"])
def test_jumps_that_cannot_be_followed_are_refused(line):
    with pytest.raises(RuntimeError, match=f"cannot tell where {line} goes"):
        _parse_sass(f"        /*0000*/  {line} ;\n")
    with pytest.raises(RuntimeError, match="no instruction found"):
        _parse_sass("nothing")


def code_of(opcodes: str) -> list[Instruction]:
    return [Instruction(opcode) for opcode in opcodes.split()]


@pytest.mark.parametrize(
    ("opcodes", "counted"),
    [
        ("LDG.E LDG.E.64 LDGSTS.E.BYPASS.128", {"load_bits": {32: 1, 64: 1, 128: 1}}),
        ("STG.E.U8 STG.E.S16 STG.E.128 STG.E.128", {"store_bits": {8: 1, 16: 1, 128: 2}}),
        ("LDS.128 STS.64 LDL STL LDC.64", {}),  # no memory of the tensors
        ("MUFU.EX2 MUFU.RCP FMUL", {"transcendentals": 2}),
        ("HMMA.16816 IMMA QMMA.X BMMA DMMA OMMA HGMMA.64 UTCHMMA UTCQMMA UTCIMMA UTCOMMA", {"tensor_cores": 11}),
        ("HMUL2 FFMA HADD2.MMA", {}),
        ("SHFL.BFLY BAR.SYNC BAR.RED", {"shuffles": 1, "barriers": 2}),
    ],
)
def test_sass_is_counted(opcodes, counted):
    found = _count_nvidia(code_of(opcodes))
    nothing = dict(load_bits={}, store_bits={}, transcendentals=0, tensor_cores=0, shuffles=0, barriers=0)
    assert {name: getattr(found, name) for name in nothing} == nothing | counted
    assert found.instructions == len(opcodes.split()) == sum(found.opcodes.values())
    assert found.access_bits == {*found.load_bits, *found.store_bits}


@pytest.mark.parametrize(
    ("opcodes", "counted"),
    [
        (" ".join(f"v_{name}_f32_e32" for name in ("exp", "log", "rcp", "rsq", "sqrt", "sin", "cos")), [7, 0, 0, 0]),
        ("v_mfma_f32_32x32x8_f16 v_smfmac_f32_16x16x32_bf16 v_wmma_f32_16x16x16_f16", [0, 3, 0, 0]),
        ("ds_bpermute_b32 ds_permute_b32 ds_swizzle_b32 v_permlane32_swap_b32_e32 v_add_f32_dpp", [0, 0, 5, 0]),
        ("s_barrier s_barrier s_waitcnt ds_read_b128 v_fma_f32 s_load_dwordx4 scratch_load_dword", [0, 0, 0, 2]),
    ],
)
def test_amds_instructions_are_counted(opcodes, counted):
    found = _count_amd(code_of(opcodes))
    assert [found.transcendentals, found.tensor_cores, found.shuffles, found.barriers] == counted
    assert not found.access_bits and found.instructions == len(opcodes.split())


@pytest.mark.parametrize(
    ("opcode", "load", "store"),
    [
        ("global_load_dwordx4", {128: 1}, {}),
        ("buffer_load_dword", {32: 1}, {}),
        ("flat_load_ubyte", {8: 1}, {}),
        ("global_load_lds_dwordx4", {128: 1}, {}),
        ("buffer_store_short", {}, {16: 1}),
        ("global_store_byte_d16_hi", {}, {8: 1}),
    ],
)
def test_amds_accesses_are_told_by_width_and_direction(opcode, load, store):
    found = _count_amd(code_of(opcode))
    assert (found.load_bits, found.store_bits) == (load, store)


def test_widths_that_are_not_known_are_refused():
    with pytest.raises(RuntimeError, match="unknown width of an access: tfloat"):
        _amd_bits("tfloat")


@pytest.mark.parametrize(
    ("line", "falls_through"),
    [
        *(("s_branch .LBB0_0", False), ("s_cbranch_vccnz .LBB0_0", True), ("s_setpc_b64 s[2:3]", False)),
        *(("s_endpgm", False), ("v_mov_b32_e32 v0, v1", True)),
    ],
)
def test_ways_through_amds_code(line, falls_through):
    text = f"k:\n.LBB0_0:\n\ts_nop 0 ; s_branch\n\t.p2align 8\n\t{line}\n.Lfunc_end0:\n\tv_nop\n"
    kernel = SimpleNamespace(asm={"amdgcn": text}, metadata=SimpleNamespace(name="k"))
    first, found = _parse_amd(kernel)
    assert first.opcode == "s_nop" and found.opcode == line.split()[0]
    assert (found.target, found.falls_through) == (0 if "branch" in line else None, falls_through)
    kernel.metadata.name = "other"
    with pytest.raises(RuntimeError, match="no code of other"):
        _parse_amd(kernel)


@pytest.mark.parametrize(("waves", "share"), [(1, 0.125), (8, 1.0), (10, 1.0)])
def test_amds_occupancy_is_a_share_of_eight_waves(waves, share):
    text = AMD.replace("Occupancy: 3", f"Occupancy: {waves}")
    kernel = SimpleNamespace(asm={"amdgcn": text}, metadata=SimpleNamespace(name="copy_kernel"))
    assert _amd_resources(kernel, [])["occupancy"] == share
    for missing in ("Occupancy", ".vgpr_count", ".sgpr_spill_count"):
        kernel.asm = {"amdgcn": AMD.replace(missing, "-")}
        with pytest.raises(RuntimeError, match=r"no occupancy of copy_kernel|no .* in the kernel's metadata"):
            _amd_resources(kernel, [])


def test_spills_of_sass_are_the_bytes_stored_and_loaded(monkeypatch):
    said = "Function other:\n REG:9 STACK:8\n Function my.kernel:\n  REG:40 STACK:16 SHARED:0\n"
    monkeypatch.setattr(machine_code, "_output_of", lambda *command: said)
    metadata = SimpleNamespace(name="my.kernel", target=SimpleNamespace(arch=90), num_warps=4, shared=0)
    kernel = SimpleNamespace(asm={"cubin": b""}, metadata=metadata)
    found = _nvidia_resources(kernel, code_of("LDL.64 STL.128 STL LDG.E.128 STG.E LDS"))
    assert found == dict(registers=40, spill_bytes=8 + 16 + 4, stack_bytes=16, scalar_spills=0, occupancy=12 * 4 / 64)
    metadata.name = "missing"
    with pytest.raises(RuntimeError, match="no use of resources by missing in what cuobjdump says:\nFunction other"):
        _nvidia_resources(kernel, [])


@pytest.mark.parametrize(
    ("arch", "shared", "programs"),
    [(80, 0, 16), (90, 0, 16), (100, 0, 16), (80, 40 << 10, 4), (90, 40 << 10, 5), (100, 40 << 10, 5)],
)
def test_limits_of_each_architecture(arch, shared, programs):
    metadata = SimpleNamespace(target=SimpleNamespace(arch=arch), num_warps=4, shared=shared)
    assert _nvidia_occupancy(metadata, 32) == programs * 4 * 32 / 2048


def test_facts_come_back_from_json_as_they_were():
    counts = {"instructions": 3, "transcendentals": 4, "tensor_cores": 5, "shuffles": 6, "barriers": 7}
    code = Code(**counts, load_bits={128: 2}, store_bits={16: 1}, opcodes={"LDG": 2})
    resources = {"num_warps": 4, "shared_bytes": 1024, "registers": 40, "spill_bytes": 8, "stack_bytes": 16}
    facts = KernelFacts(**resources, scalar_spills=2, occupancy=0.75, code=code, hot_loops=(code, code), orders=ORDERS)
    assert KernelFacts.from_json(json.loads(json.dumps(dataclasses.asdict(facts)))) == facts


def test_a_section_of_a_binary_is_found_by_its_whole_name():
    """Three sections: their names, and two of which one's name begins with the other's."""
    names, first, second = b"\0.text.kernel_2\0.text.kernel\0.names\0", b"one", b"other"
    at = 64 + len(names) + len(first) + len(second)
    header = bytearray(64)
    struct.pack_into("<Q", header, 0x28, at)
    struct.pack_into("<3H", header, 0x3A, 64, 3, 2)
    table = b""
    offset = 64
    for name, length in ((b".text.kernel_2", len(first)), (b".text.kernel", len(second)), (b".names", len(names))):
        start = offset if name != b".names" else 64 + len(first) + len(second)
        entry = struct.pack("<2I4Q", names.index(b"\0" + name + b"\0") + 1, 1, 0, 0, start, length)
        table += entry + bytes(64 - len(entry))
        offset += length
    elf = bytes(header) + first + second + names + table
    assert _section(elf, ".text.kernel_2") == first and _section(elf, ".text.kernel") == second
    with pytest.raises(RuntimeError, match=r"no section \.text\.kern in the binary"):
        _section(elf, ".text.kern")


def test_tools_that_fail_are_quoted():
    assert _output_of("echo", "said") == "said\n"
    with pytest.raises(RuntimeError, match=r"(?s)^sh -c echo why >&2; exit 3 failed:\nwhy\n$"):
        _output_of("sh", "-c", "echo why >&2; exit 3")


@pytest.mark.parametrize(("arch", "target"), [(80, "SM80"), (90, "SM90a"), (100, "SM100a")])
def test_kernels_that_are_disassembled_together_are_told_apart(arch, target, monkeypatch):
    """Let eleven instructions of the first kernel come before two of the second, whose addresses go on."""
    commands = []

    def output_of(*command):
        commands.append(command)
        assert Path(command[-1]).read_bytes() == b"a" * 16 * 11 + b"b" * 16 * 2
        lines = [
            f"        /*{16 * i:04x}*/  {'LDG.E' if i < 11 else 'STG.E'} R2, desc[UR4][R2.64] ;" for i in range(12)
        ]
        return "\n".join([*lines, "        /*00c0*/  BRA 0xb0 ;"])

    monkeypatch.setattr(machine_code, "_output_of", output_of)
    monkeypatch.setattr(machine_code, "_section", lambda elf, name: elf * 16 * {".text.a": 11, ".text.b": 2}[name])
    metadata = dict(target=SimpleNamespace(arch=arch, backend="cuda"), num_warps=4, shared=24)
    kernels = [
        SimpleNamespace(asm={"cubin": name.encode()}, metadata=SimpleNamespace(name=name, **metadata)) for name in "ab"
    ]
    first, second = machine_code._disassembled(kernels, arch)
    assert [one.opcode for one in first] == ["LDG.E"] * 11 and [one.opcode for one in second] == ["STG.E", "BRA"]
    assert second[1].target == 0 and target in commands[0]
    monkeypatch.setattr(machine_code, "_nvidia_resources", lambda kernel, code: RESOURCES | {"registers": len(code)})
    monkeypatch.setattr(machine_code, "_is_nvidia", lambda kernel: True)
    for order in ([0, 1], [1, 0]):
        monkeypatch.setattr(
            machine_code, "_disassembled", lambda ones, arch: [{"a": first, "b": second}[k.metadata.name] for k in ones]
        )
        found = machine_code.facts([kernels[i] for i in order])
        assert [facts.registers for facts in found] == [[11, 2][i] for i in order]
        assert [facts.code for facts in found] == [_count_nvidia([first, second][i]) for i in order]
        assert [(facts.num_warps, facts.shared_bytes) for facts in found] == [(4, 24)] * 2


RESOURCES = {"spill_bytes": 0, "stack_bytes": 0, "scalar_spills": 0, "occupancy": 1.0}
