"""Sums of what instructions cost, and how many warps are resident."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable

import cost
from machine_code import Instruction, Resources
from machines import ARCHS, PARTS, Amd

# Counted inside another pipe, or shared with it: no part of a sum over pipes.
INSIDE_ANOTHER = ("issue", "fma-heavy", "transcendental", "l2")


class Tally:
    """Instruction classes and pipe cycles of some code, for one warp (wave)."""

    def __init__(self, arch: str, instructions: Iterable[Instruction] = ()) -> None:
        self.instructions = 0.0
        self.classes: Counter[str] = Counter()
        self.pipes: defaultdict[str, float] = defaultdict(float)
        self.matrix_fma = 0.0
        self.global_bytes = 0.0
        amd = isinstance(ARCHS[arch], Amd)
        for instruction in instructions:
            if instruction.idle:
                continue
            kind, cycles = cost.of(instruction, arch)
            self.instructions += 1
            self.classes[kind] += 1
            for pipe, taken in cycles.items():
                self.pipes[pipe] += taken
            if not amd:
                self.pipes["issue"] += 1
            self.matrix_fma += cost.matrix_fma(instruction)
            self.global_bytes += cost.global_bytes(instruction, arch)

    def add(self, other: Tally, times: float = 1.0) -> Tally:
        """Adds another tally so many times, in place."""
        self.instructions += other.instructions * times
        self.matrix_fma += other.matrix_fma * times
        self.global_bytes += other.global_bytes * times
        for kind, count in other.classes.items():
            self.classes[kind] += count * times
        for pipe, cycles in other.pipes.items():
            self.pipes[pipe] += cycles * times
        return self

    def bound(self) -> tuple[str, float]:
        """The busiest pipe and its cycles: all others perfectly overlapped."""
        pipes = {pipe: cycles for pipe, cycles in self.pipes.items() if pipe != "transcendental"}
        return max(pipes.items(), key=lambda item: item[1], default=("none", 0.0))

    def serial(self) -> float:
        """Cycles of all pipes in turn, nothing overlapped."""
        return sum(cycles for pipe, cycles in self.pipes.items() if pipe not in INSIDE_ANOTHER)

    def unpriced(self) -> list[str]:
        """Opcodes that no price is known of."""
        return sorted(kind.removeprefix("other:") for kind in self.classes if kind.startswith("other:"))


def occupancy(arch: str, resources: Resources, warps: int, shared_bytes: int) -> tuple[float, str]:
    """Resident warps (waves) of a sub-partition (SIMD), and what limits them."""
    machine = ARCHS[arch]
    if isinstance(machine, Amd):
        by_registers = min(8, 512 // max(8, round_up(resources.registers, 8)))
        limits: dict[str, float] = {"registers": by_registers}
        if shared_bytes:
            limits["shared"] = (65536 // shared_bytes) * warps / PARTS
        waves = min(limits.values())
        blocks = math.floor(waves * PARTS / warps)
        return (blocks * warps / PARTS if blocks else waves), min(limits, key=lambda name: limits[name])
    warp_registers = max(1, round_up(resources.registers, 8)) * cost.WARP
    blocks_by = {
        "registers": (PARTS * (16384 // warp_registers)) // warps,
        "blocks": machine.max_blocks,
        "warps": machine.max_warps // warps,
    }
    if shared_bytes:
        # The runtime keeps 1 KiB of each block for itself.
        blocks_by["shared"] = machine.shared_kib * 1024 // (shared_bytes + 1024)
    limit = min(blocks_by, key=lambda name: blocks_by[name])
    return blocks_by[limit] * warps / PARTS, limit


def round_up(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return math.ceil(number / step) * step
