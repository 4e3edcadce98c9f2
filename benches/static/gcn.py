"""Reads AMD machine code: the text of `llvm-objdump -d` and, for resources, of `llvm-readelf --notes`."""

from __future__ import annotations

import re
from dataclasses import replace

from machine_code import Instruction, Kernel, Resources, UnreadableCode

SYMBOL = re.compile(r"^([0-9a-f]+) <([^>]+)>:")
LINE = re.compile(r"^\s+([a-z][a-z0-9_]+)\s*(.*?)\s*//\s*([0-9A-Fa-f]+):?(.*)$")
TARGET = re.compile(r"<([^>+]+)(?:\+0x([0-9a-f]+))?>")
ARCH = re.compile(r"amdhsa\.target:\s*\S*?(gfx\w+)")
LOCAL_LABELS = (".L", "BB", "L")


def parse(text: str, arch: str | None = None, notes: str = "") -> list[Kernel]:
    """All kernels of a disassembly, with the resources that the notes state."""
    stated = ARCH.search(notes)
    arch = arch or (stated.group(1) if stated else None)
    if arch is None:
        raise UnreadableCode("the disassembly names no architecture: give one with --arch")
    kernels: list[Kernel] = []
    bases: dict[str, int] = {}
    jumps: list[tuple[Kernel, int, str, int]] = []
    for line in text.splitlines():
        if found := SYMBOL.match(line):
            if not found.group(2).startswith(LOCAL_LABELS) or not kernels:
                kernels.append(Kernel(found.group(2), arch, []))
            bases[found.group(2)] = int(found.group(1), 16)
        elif kernels and (found := LINE.match(line)):
            op, operands, address, rest = found.groups()
            code = kernels[-1].instructions
            if op.startswith(("s_branch", "s_cbranch")) and (to := TARGET.search(f"{rest} {operands}")):
                jumps.append((kernels[-1], len(code), to.group(1), int(to.group(2) or "0", 16)))
            code.append(Instruction(int(address, 16), op, operands=operands))
    for kernel, place, symbol, offset in jumps:
        code = kernel.instructions
        code[place] = replace(code[place], target=bases.get(symbol, 0) + offset)
    resources = noted(notes)
    for kernel in kernels:
        kernel.resources = resources.get(kernel.name, kernel.resources)
    # Symbols of padding have a few instructions.
    return [kernel for kernel in kernels if len(kernel.instructions) > 3]


def noted(notes: str) -> dict[str, Resources]:
    """Resources by kernel, from the metadata of a code object."""
    found = {}
    for block in re.split(r"\n\s*- \.agpr_count:", notes)[1:]:
        block = ".agpr_count:" + block
        entries = dict(re.findall(r"\.(\w+):\s*([^\s]+)", block))
        # Arguments have names too, deeper in the tree.
        names = re.findall(r"\n    \.name:\s*(\S+)", block)
        if name := (names or [entries.get("name")])[-1]:
            number = lambda key: int(entries.get(key, 0))  # noqa: E731
            found[name] = Resources(
                number("vgpr_count"),
                number("agpr_count"),
                number("vgpr_spill_count") + number("sgpr_spill_count"),
                number("group_segment_fixed_size"),
            )
    return found
