"""Reads NVIDIA machine code: the text of `nvdisasm -c` (with `-hex`, the scheduling bits too) or `cuobjdump -sass`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from machine_code import Instruction, Kernel, UnreadableCode

LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)\s*([^;]*);"
)
SECTION = re.compile(r"^\s*\.section\s+\.text\.([^\s,]+)")
FUNCTION = re.compile(r"^\s*Function\s*:\s*(\S+)")
LABEL = re.compile(r"^(\.L[\w.]+|\$[\w.$]+):")
LABEL_OPERAND = re.compile(r"`\((\.L[\w.]+|\$[\w.$]+)\)")
REGISTERS = re.compile(r"SHI_REGISTERS=(\d+)")
ARCH = re.compile(r"EF_CUDA_SM(\d+)|\bsm_(\d+)|code for sm_(\d+)")
SECOND_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
BRANCHES = ("BRA", "JMP", "CALL")
SPILLS = ("LDL", "STL")


@dataclass(frozen=True)
class Control:
    """What ptxas wrote beside an instruction for the scheduler.

    `stall` cycles before the warp's next issue; the barrier that is cleared when the result is there (`write_barrier`)
    or when the operands have been read (`read_barrier`), 7 for none; and the barriers to wait for first, as bits.
    """

    stall: int = 1
    write_barrier: int = 7
    read_barrier: int = 7
    wait_mask: int = 0


def parse(text: str, arch: str | None = None) -> list[Kernel]:
    """All kernels of a disassembly. The architecture is read from the text unless it is given."""
    known = ARCH.search(text)
    arch = arch or (f"sm_{next(group for group in known.groups() if group)}" if known else None)
    if arch is None:
        raise UnreadableCode("the disassembly names no architecture: give one with --arch")
    kernels: list[Kernel] = []
    labels: dict[str, int | None] = {}
    for line in text.splitlines():
        if found := SECTION.match(line) or FUNCTION.match(line):
            if kernels:
                link(kernels[-1], labels)
            kernels.append(Kernel(found.group(1), arch, []))
            labels = {}
        elif not kernels:
            continue
        elif found := REGISTERS.search(line):
            kernels[-1].resources.registers = int(found.group(1))
        elif found := LABEL.match(line):
            labels[found.group(1)] = None
        elif found := LINE.match(line):
            address, predicate, op, operands = found.groups()
            for label in (label for label, place in labels.items() if place is None):
                labels[label] = int(address, 16)
            name, *modifiers = op.split(".")
            kernels[-1].instructions.append(
                Instruction(int(address, 16), name, tuple(modifiers), (predicate or "").strip(), operands.strip())
            )
    if kernels:
        link(kernels[-1], labels)
    return [kernel for kernel in kernels if kernel.instructions]


def link(kernel: Kernel, labels: dict[str, int | None]) -> None:
    """Gives branches their targets, and the kernel the resources that its code shows."""
    for place, instruction in enumerate(kernel.instructions):
        if instruction.op not in BRANCHES:
            continue
        if found := LABEL_OPERAND.search(instruction.operands):
            target = labels.get(found.group(1))
        else:
            found = re.search(r"0x([0-9a-f]+)", instruction.operands)
            target = int(found.group(1), 16) if found else None
        kernel.instructions[place] = replace(instruction, target=target)
    if not kernel.resources.registers:
        used = [int(n) for i in kernel.instructions for n in re.findall(r"\bR(\d+)\b", i.operands)]
        kernel.resources.registers = max(used, default=-1) + 1
    kernel.resources.spills = sum(instruction.op in SPILLS for instruction in kernel.instructions)


def controls(text: str) -> dict[int, Control]:
    """Scheduling bits by address, from the second 64-bit word that `nvdisasm -hex` prints below each instruction.

    The layout is that of Volta and later: bits 105 to 125 of the 128.
    """
    found: dict[int, Control] = {}
    address = None
    for line in text.splitlines():
        if at := LINE.match(line):
            address = int(at.group(1), 16)
        elif address is not None and (word := SECOND_WORD.match(line)):
            bits = int(word.group(1), 16) >> 41
            found[address] = Control(bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)
            address = None
    return found
