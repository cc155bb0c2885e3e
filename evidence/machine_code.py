"""Read facts from a compiled Triton kernel: registers, spills, and the instructions of its loops.

NVIDIA binaries are disassembled (SASS); AMD kernels come with their assembly.
"""

import bisect
import dataclasses
import functools
import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from triton import knobs


@dataclasses.dataclass(frozen=True)
class Code:
    """Counts over a stretch of machine code: a whole kernel, or the body of a loop."""

    instructions: int
    load_bits: dict[int, int]  # width in bits of a thread's access to global memory -> instructions of that width
    store_bits: dict[int, int]
    transcendentals: int  # exp2, log2, reciprocal, square root, ... : MUFU on NVIDIA
    tensor_cores: int  # matrix multiply-adds
    shuffles: int
    barriers: int
    opcodes: dict[str, int]

    @property
    def access_bits(self) -> set[int]:
        """Return the widths of all global loads and stores."""
        return {*self.load_bits, *self.store_bits}


@dataclasses.dataclass(frozen=True)
class KernelFacts:
    """Facts read from a compiled kernel."""

    num_warps: int
    shared_bytes: int  # per program
    registers: int  # per thread; on AMD vector registers
    spill_bytes: int  # per thread, stored and loaded together; on AMD 4 for each spilled vector register
    occupancy: float  # share of a multiprocessor's maximum threads that fit there together
    stack_bytes: int  # per thread
    scalar_spills: int  # registers; always 0 on NVIDIA
    code: Code
    hot_loops: tuple[Code, ...]  # innermost loops, in the order of the code
    orders: tuple[str, ...]  # the members of ORDERS that some path through the code follows

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "KernelFacts":
        """Undo `dataclasses.asdict` and a round trip through JSON, which turns the widths into strings."""

        def code(counts: dict[str, Any]) -> Code:
            widths = {
                key: {int(bits): count for bits, count in counts[key].items()} for key in ("load_bits", "store_bits")
            }
            return Code(**{**counts, **widths})

        told = {"code": code(fields["code"]), "hot_loops": tuple(map(code, fields["hot_loops"]))}
        return cls(**{**fields, **told, "orders": tuple(fields["orders"])})


# Orders in which accesses to global memory and barriers may follow one another. A rewriting loop is an innermost loop
# that loads and stores; its stores count only as part of it, and its barriers are ignored.
ORDERS = ("load, barrier, store, barrier, store", "rewriting loop, barrier, store")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Machine instruction with its possible successors."""

    opcode: str
    target: int | None = None  # index of the instruction it may jump to
    falls_through: bool = True


def facts(kernels: Sequence[Any]) -> list[KernelFacts]:
    """Return the facts of kernels as Triton returns them from launches or from `triton.compile`.

    Takes many kernels at once, because NVIDIA's disassembler needs a third of a second to start and almost no time per
    kernel.
    """
    code: dict[int, list[Instruction]] = {}  # by the kernel's position
    for arch in {k.metadata.target.arch for k in kernels if _is_nvidia(k)}:
        places = [i for i, k in enumerate(kernels) if k.metadata.target.arch == arch]
        code |= zip(places, _disassembled([kernels[i] for i in places], arch))
    found = []
    for i, kernel in enumerate(kernels):
        instructions = code[i] if _is_nvidia(kernel) else _parse_amd(kernel)
        count, resources = (_count_nvidia, _nvidia_resources) if _is_nvidia(kernel) else (_count_amd, _amd_resources)
        found.append(
            KernelFacts(
                num_warps=kernel.metadata.num_warps,
                shared_bytes=kernel.metadata.shared,
                **resources(kernel, instructions),
                code=count(instructions),
                hot_loops=tuple(map(count, innermost_loops(instructions))),
                orders=tuple(order for order in ORDERS if takes(instructions, order, count)),
            )
        )
    return found


def _is_nvidia(kernel: Any) -> bool:
    return bool(kernel.metadata.target.backend == "cuda")


def innermost_loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """Return the bodies of loops that contain no other loop, in the order of the code.

    Compilers move unlikely code behind the kernel's end and jump back from there. Such a backward jump is not a loop,
    so the textbook definition is used: a jump to a block that every path to the jump has passed.
    """
    cuts = {0, len(instructions)}
    for index, instruction in enumerate(instructions):
        if instruction.target is not None:
            cuts |= {instruction.target, index + 1}
        elif not instruction.falls_through:
            cuts.add(index + 1)
    starts = sorted(cuts)
    number = {start: block for block, start in enumerate(starts)}
    successors: list[set[int]] = []
    for end in starts[1:]:
        last = instructions[end - 1]
        after = {number[last.target]} if last.target is not None else set()
        if last.falls_through and end < len(instructions):
            after.add(number[end])
        successors.append(after)

    reached = _closure({0}, successors)
    predecessors: list[set[int]] = [set() for _ in successors]
    for block in reached:
        for successor in successors[block]:
            predecessors[successor].add(block)

    loops: dict[int, set[int]] = {}
    for header in reached:
        before_header = _closure({0} - {header}, successors, without=header)
        jumps = {block for block in predecessors[header] if block not in before_header}
        if jumps:
            loops[header] = _closure(jumps, predecessors, without=header) | {header}
    innermost = [body for body in loops.values() if not any(other < body for other in loops.values())]
    return [
        [instruction for block in sorted(body) for instruction in instructions[starts[block] : starts[block + 1]]]
        for body in sorted(innermost, key=min)
    ]


def _closure(begin: Iterable[int], edges: Sequence[Iterable[int]], without: int | None = None) -> set[int]:
    """Return all blocks that can be reached from `begin` along `edges`, never entering `without`."""
    seen = set(begin) - {without}
    waiting = list(seen)
    while waiting:
        fresh = set(edges[waiting.pop()]) - seen - {without}
        seen |= fresh
        waiting += fresh
    return seen


def takes(instructions: Sequence[Instruction], order: str, count: Callable[[Sequence[Instruction]], Code]) -> bool:
    """Return True if some path through the code meets the items of `order` one after the other."""
    loops = [(loop, count(loop)) for loop in innermost_loops(instructions)]
    rewriting = {id(i) for loop, code in loops if code.load_bits and code.store_bits for i in loop}

    def name(instruction: Instruction) -> str:
        code = count([instruction])
        if id(instruction) in rewriting:
            return "rewriting loop" if code.store_bits else ""
        return "load" if code.load_bits else "store" if code.store_bits else "barrier" if code.barriers else ""

    names, wanted = [name(instruction) for instruction in instructions], order.split(", ")
    seen: set[tuple[int, int]] = set()  # an instruction, and how much of the order was met before it
    waiting = [(0, 0)]
    while waiting:
        at, met = waiting.pop()
        if at >= len(instructions) or (at, met) in seen:
            continue
        seen.add((at, met))
        met += names[at] == wanted[met]
        if met == len(wanted):
            return True
        if instructions[at].falls_through:
            waiting.append((at + 1, met))
        if (target := instructions[at].target) is not None:
            waiting.append((target, met))
    return False


# NVIDIA: SASS and resource usage, from the binary.

_SASS_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_SASS_JUMPS = ("BRA", "JMP", "CALL")
_SASS_ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL")
_SASS_WIDTH = re.compile(r"\.[US]?(8|16|32|64|128|256)(?=\.|$)")
_SASS_TENSOR_CORE = re.compile(r"(?:[HIQBDO]|UTC[HIQO])G?MMA$")
_SASS_LOCAL = ("LDL", "STL")  # per-thread memory, to which registers are spilled

# Limits per multiprocessor: threads, programs, KiB of shared memory. All have 65536 registers.
_NVIDIA_LIMITS = {80: (2048, 32, 164), 90: (2048, 32, 228), 100: (2048, 32, 228)}


def _disassembled(kernels: Sequence[Any], arch: int) -> list[list[Instruction]]:
    """Disassemble each kernel from a memory image that holds their code one after the other."""
    codes = [_section(kernel.asm["cubin"], f".text.{kernel.metadata.name}") for kernel in kernels]
    with tempfile.TemporaryDirectory() as folder:
        memory = Path(folder, "code.bin")
        memory.write_bytes(b"".join(codes))
        features = "a" if arch >= 90 else ""  # Triton compiles for all features of this architecture
        dump = _output_of(knobs.nvidia.nvdisasm.path, "--binary", f"SM{arch}{features}", "--no-dataflow", memory)
    ends = list(itertools.accumulate(map(len, codes)))
    lines: list[list[str]] = [[] for _ in kernels]
    for line in _SASS_LINE.finditer(dump):
        lines[bisect.bisect_right(ends, int(line[1], 16))].append(line[0])
    return [_parse_sass("\n".join(of_one)) for of_one in lines]


def _section(elf: bytes, name: str) -> bytes:
    """Return a section of a 64-bit little-endian ELF file (refspecs.linuxfoundation.org/elf/gabi4+)."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<3H", elf, 0x3A)
    sections = [struct.unpack_from("<2I4Q", elf, table + i * size) for i in range(count)]
    names = sections[names_at][4]
    for name_at, _, _, _, offset, length in sections:
        if elf.startswith(name.encode() + b"\0", names + name_at):
            return elf[offset : offset + length]
    raise RuntimeError(f"no section {name} in the binary")


def _nvidia_resources(kernel: Any, instructions: Sequence[Instruction]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.asm["cubin"])
        said = _output_of(knobs.nvidia.cuobjdump.path, "-res-usage", binary)
    used = re.search(rf"Function {re.escape(kernel.metadata.name)}:\s+REG:(\d+) STACK:(\d+)", said)
    if used is None:
        raise RuntimeError(f"no use of resources by {kernel.metadata.name} in what cuobjdump says:\n{said[:2000]}")
    registers, stack = map(int, used.groups())
    spilled = [_sass_bits(i.opcode) // 8 for i in instructions if i.opcode.split(".")[0] in _SASS_LOCAL]
    return dict(
        registers=registers,
        spill_bytes=sum(spilled),
        stack_bytes=stack,
        scalar_spills=0,
        occupancy=_nvidia_occupancy(kernel.metadata, registers),
    )


def _nvidia_occupancy(metadata: Any, registers: int) -> float:
    threads, programs, shared_kib = _NVIDIA_LIMITS[metadata.target.arch]
    registers_per_warp = -(-registers * 32 // 256) * 256
    fit = min(
        programs,
        threads // (32 * metadata.num_warps),
        65536 // (registers_per_warp * metadata.num_warps),
        (shared_kib << 10) // (metadata.shared + 1024),  # the system reserves 1 KiB per program
    )
    return float(fit * 32 * metadata.num_warps / threads)


def _sass_bits(opcode: str) -> int:
    width = _SASS_WIDTH.search(opcode)
    return int(width[1]) if width else 32


def _output_of(*command: str | Path) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout


def _parse_sass(code: str) -> list[Instruction]:
    lines = [(int(at, 16), guard, opcode, operands.strip()) for at, guard, opcode, operands in _SASS_LINE.findall(code)]
    index_of = {address: index for index, (address, *_) in enumerate(lines)}
    instructions = []
    for _, guard, opcode, operands in lines:
        family = opcode.split(".")[0]
        target, falls_through = None, bool(guard) or family not in _SASS_ENDS
        if family in _SASS_JUMPS and (address := re.search(r"0x[0-9a-f]+", operands)):
            target = index_of.get(int(address[0], 16))
            # A bare address is an unconditional jump; `BRA.DIV UR4, 0x..` and similar ones may fall through.
            falls_through = bool(guard) or family == "CALL" or operands != address[0]
        if family in ("BRA", "JMP") and target is None:
            raise RuntimeError(f"cannot tell where {opcode} {operands} goes")
        instructions.append(Instruction(opcode, target, falls_through))
    if not instructions:
        raise RuntimeError("no instruction found in the SASS")
    return instructions


def _count_nvidia(instructions: Sequence[Instruction]) -> Code:
    opcodes = Counter(instruction.opcode.split(".")[0] for instruction in instructions)
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for instruction in instructions:
        family = instruction.opcode.split(".")[0]
        if family in ("LDG", "LDGSTS", "STG"):
            (stores if family == "STG" else loads)[_sass_bits(instruction.opcode)] += 1
    return Code(
        instructions=len(instructions),
        load_bits=dict(loads),
        store_bits=dict(stores),
        transcendentals=opcodes["MUFU"],
        tensor_cores=sum(count for name, count in opcodes.items() if _SASS_TENSOR_CORE.match(name)),
        shuffles=opcodes["SHFL"],
        barriers=opcodes["BAR"],
        opcodes=dict(opcodes),
    )


# AMD: everything is in the assembly.

_AMD_WAVES = 8  # per SIMD of CDNA 3 and 4
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)")
_AMD_WIDTHS = (
    (r"dwordx(\d)", lambda digits: 32 * int(digits)),
    (r"dword()", lambda digits: 32),
    (r"b(\d+)", int),
    (r"(?:[us]?short|[ui]16|d16)", lambda digits: 16),
    (r"(?:[us]?byte|[ui]8)", lambda digits: 8),
)
_AMD_TRANSCENDENTAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_AMD_TENSOR_CORE = re.compile(r"v_s?mfma|v_wmma")
_AMD_SHUFFLE = re.compile(r"ds_b?permute|ds_swizzle|v_permlane|\w+_dpp$")


def _amd_resources(kernel: Any, instructions: Sequence[Instruction]) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"^\s+\.{name}:\s+(\d+)", text, flags=re.MULTILINE)
        if found is None:
            raise RuntimeError(f"no {name} in the kernel's metadata")
        return int(found[1])

    waves = re.search(r"^; Occupancy: (\d+)", text, flags=re.MULTILINE)  # limited by registers and shared memory
    if waves is None:
        raise RuntimeError(f"no occupancy of {kernel.metadata.name} in the assembly")
    return dict(
        registers=field("vgpr_count"),
        spill_bytes=4 * field("vgpr_spill_count"),
        stack_bytes=field("private_segment_fixed_size"),
        scalar_spills=field("sgpr_spill_count"),
        occupancy=min(1.0, int(waves[1]) / _AMD_WAVES),
    )


def _parse_amd(kernel: Any) -> list[Instruction]:
    name, text = kernel.metadata.name, kernel.asm["amdgcn"]
    body = re.search(rf"^{re.escape(name)}:(.*?)^\.Lfunc_end", text, flags=re.MULTILINE | re.DOTALL)
    if body is None:
        raise RuntimeError(f"no code of {name} in the assembly")
    labels: dict[str, int] = {}
    lines: list[list[str]] = []
    for line in body[1].splitlines():
        words = line.split(";")[0].split()
        if words and words[0].endswith(":"):
            labels[words[0][:-1]] = len(lines)
        elif words and re.match(r"[a-z]", words[0]):  # directives begin with a dot
            lines.append(words)
    return [
        Instruction(
            opcode=words[0],
            target=labels[words[1]] if re.match(r"s_c?branch", words[0]) else None,
            falls_through=words[0] not in ("s_branch", "s_endpgm", "s_setpc_b64"),
        )
        for words in lines
    ]


def _count_amd(instructions: Sequence[Instruction]) -> Code:
    opcodes = Counter(instruction.opcode for instruction in instructions)
    widths: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for opcode, count in opcodes.items():
        if access := _AMD_ACCESS.match(opcode):
            widths[access[1]][_amd_bits(access[2])] += count

    def total(pattern: re.Pattern[str]) -> int:
        return sum(count for opcode, count in opcodes.items() if pattern.match(opcode))

    return Code(
        instructions=len(instructions),
        load_bits=dict(widths["load"]),
        store_bits=dict(widths["store"]),
        transcendentals=total(_AMD_TRANSCENDENTAL),
        tensor_cores=total(_AMD_TENSOR_CORE),
        shuffles=total(_AMD_SHUFFLE),
        barriers=opcodes["s_barrier"],
        opcodes=dict(opcodes),
    )


@functools.cache
def _amd_bits(suffix: str) -> int:
    for pattern, bits in _AMD_WIDTHS:
        if found := re.match(pattern, suffix):
            return bits(found[1] if found.re.groups else "")
    raise RuntimeError(f"unknown width of an access: {suffix}")
