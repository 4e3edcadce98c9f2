"""Loops, and the one among them that does the attention's work."""

from __future__ import annotations

from dataclasses import dataclass, field

import cost
from machine_code import Instruction, Kernel

# Waits on a barrier jump to themselves: no loop has so few instructions.
SHORTEST = 4


@dataclass
class Loop:
    """All addresses from a backward branch's target to the branch, both included."""

    low: int
    high: int
    instructions: list[Instruction] = field(repr=False)
    inner: list[Loop] = field(default_factory=list, repr=False)

    def holds(self, address: int) -> bool:
        """Whether an address is inside."""
        return self.low <= address <= self.high


def find(kernel: Kernel) -> list[Loop]:
    """Natural loops read off backward branches; two backward branches to one target are one loop."""
    spans: dict[int, int] = {}
    for instruction in kernel.instructions:
        target = instruction.target
        if target is not None and target < instruction.address and instruction.op != "CALL":
            spans[target] = max(spans.get(target, 0), instruction.address)
    loops = []
    for low, high in sorted(spans.items()):
        body = [instruction for instruction in kernel.instructions if low <= instruction.address <= high]
        if len(body) >= SHORTEST:
            loops.append(Loop(low, high, body))
    for loop in loops:
        loop.inner = [other for other in loops if other is not loop and loop.holds(other.low) and loop.holds(other.high)]
    return loops


def matrix_work(instructions: list[Instruction]) -> float:
    """Multiply-adds of the matrix instructions, for one warp."""
    return sum(cost.matrix_fma(instruction) for instruction in instructions)


def hottest(loops: list[Loop]) -> Loop | None:
    """The innermost loop with the most matrix work; where spans overlap, the shortest of those with all of it."""
    candidates = [loop for loop in loops if not any(matrix_work(inner.instructions) for inner in loop.inner)]
    return max(candidates, key=lambda loop: (matrix_work(loop.instructions), -len(loop.instructions)), default=None)
