"""How far latency alone moves a kernel from the model's bound.

The hot loop is replayed on one SM: every resident warp issues in order and obeys the control bits that ptxas wrote (stall
count, write and read barriers, wait mask), cp.async groups and block barriers; each sub-partition issues one instruction
a cycle, to the warp that is furthest behind; pipes are busy as long as the model says; loads answer after a fixed
latency. There are no caches, bank conflicts or DRAM queue: the figure lies between the bound and the truth.

Latencies in cycles are A100 microbenchmarks (arXiv 2206.02874, arXiv 2208.11174): shared memory 23-30, ldmatrix 29-33,
MUFU and SHFL about 23, L2 200-260, DRAM 290-560. Meant for sm_80 and sm_86, whose scheduling they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import cost
from machine_code import Instruction, UnreadableCode
from machines import PARTS
from model import Model
from sass import Control

LATENCY = {
    "LDS": 26, "LDSM": 33, "STS": 20, "ATOMS": 60, "SHFL": 24, "MUFU": 22, "F2F": 22, "I2F": 22, "F2I": 22, "S2R": 25,
    "LDL": 40, "STL": 20,
}
LOADS = ("LDG", "LD", "LDGSTS", "ATOMG", "ATOM")
GLOBAL_LATENCY = 250.0
SHARED_LATENCY, XU_LATENCY, ALU_LATENCY = 30, 22, 6
# Cycles after which an instruction's operands have been read.
OPERANDS_READ = 10
# Cycles a taken branch and a block barrier take beside their stall.
BRANCH, BARRIER = 6, 12
# Instructions that may queue in front of a pipe, in its cycles.
XU_QUEUE, LSU_QUEUE = 16, 64
BARRIERS = 6
NO_BARRIER = 7
PIPES = ("tensor", "xu", "lsu", "fp64", "fma", "alu")


@dataclass(frozen=True)
class Step:
    """One instruction with its pipe, the pipe's cycles and its control bits."""

    instruction: Instruction
    pipe: str | None
    cycles: float
    control: Control
    groups_left: int | None  # DEPBAR: how many cp.async groups may stay under way

    @property
    def is_barrier(self) -> bool:
        """Whether the block meets here."""
        return self.instruction.op == "BAR" and "SYNC" in self.instruction.modifiers


@dataclass
class Warp:
    """A resident warp: where it is and what it waits for."""

    part: int
    block: int
    place: int = 0
    trip: int = 0
    ready: float = 0.0
    # First cycle at which nothing of its own holds up the next instruction.
    free: float = 0.0
    waiting: bool = False
    barriers: list[list[float]] = field(default_factory=lambda: [[] for _ in range(BARRIERS)])
    copies: list[float] = field(default_factory=list)
    groups: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def look(self, step: Step) -> None:
        """Sets `free` for the next instruction."""
        at = self.ready
        mask = step.control.wait_mask
        for number in range(BARRIERS):
            if mask >> number & 1 and self.barriers[number]:
                at = max(at, max(self.barriers[number]))
        if step.groups_left is not None and len(self.groups) > step.groups_left:
            at = max(at, max(self.groups[: len(self.groups) - step.groups_left]))
        self.free = at


def steps(model: Model, controls: dict[int, Control]) -> list[Step]:
    """The hot loop in program order; inner loops named in the model's trips unrolled, other branches not taken."""
    if model.loop is None:
        raise UnreadableCode(f"{model.kernel.name}: no loop to replay")
    body = list(model.loop.instructions)
    for inner in sorted((each for each in model.loop.inner if each.low in model.trips), key=lambda each: -each.low):
        at = next(place for place, each in enumerate(body) if each.address == inner.low)
        block = [each for each in body if inner.holds(each.address)]
        body[at : at + len(block)] = block * int(model.trips[inner.low])
    found = []
    for each in body:
        if each.idle:
            continue
        _, cycles = cost.of(each, model.arch)
        pipe = next((pipe for pipe in PIPES if pipe in cycles), None)
        found.append(
            Step(each, pipe, cycles.get(pipe, 0.0) if pipe else 0.0, controls.get(each.address, Control()), waits(each))
        )
    return found


def waits(instruction: Instruction) -> int | None:
    """Groups of cp.async that a DEPBAR on their scoreboard leaves under way."""
    if instruction.op != "DEPBAR" or "SB0" not in instruction.operands:
        return None
    found = re.search(r"SB0\s*,\s*(0x[0-9a-f]+|\d+)", instruction.operands)
    return int(found.group(1), 0) if found else 0


class Sm:
    """Pipes of one SM and the warps on it."""

    def __init__(self, program: list[Step], warps: list[Warp], block_warps: int, global_latency: float) -> None:
        self.program, self.warps, self.block_warps, self.global_latency = program, warps, block_warps, global_latency
        self.pipes = [dict.fromkeys(PIPES, 0.0) for _ in range(PARTS)]
        self.lsu = 0.0
        self.issue = [0.0] * PARTS
        self.meeting: dict[tuple[int, int, int], list[Warp]] = {}

    def earliest(self, warp: Warp) -> float:
        """First cycle at which a warp can issue."""
        step = self.program[warp.place]
        at = max(warp.free, self.issue[warp.part])
        if step.pipe == "lsu":
            return max(at, self.lsu - LSU_QUEUE)
        if step.pipe == "xu":
            return max(at, self.pipes[warp.part]["xu"] - XU_QUEUE)
        return max(at, self.pipes[warp.part][step.pipe]) if step.pipe else at

    def run(self, trips: int) -> None:
        """Issues until every warp has made so many trips."""
        live = list(self.warps)
        for warp in live:
            warp.look(self.program[0])
        length = len(self.program)
        while live:
            best, best_key = None, (0.0, 0)
            for warp in live:
                if warp.waiting:
                    continue
                key = (self.earliest(warp), warp.trip * length + warp.place)
                if best is None or key < best_key:
                    best, best_key = warp, key
            if best is None:
                raise UnreadableCode("every warp waits at a barrier: the loop's path is not what the replay took")
            self.step(best, best_key[0])
            if best.place == 0 and best.trip == trips:
                live.remove(best)

    def step(self, warp: Warp, now: float) -> None:
        """Issues a warp's next instruction."""
        step = self.program[warp.place]
        op, control = step.instruction.op, step.control
        self.issue[warp.part] = now + 1
        start, done = self.occupy(warp, step, now)
        if op == "LDGSTS":
            warp.copies.append(done)
        warp.barriers = [[at for at in barrier if at > now] for barrier in warp.barriers]
        if control.write_barrier != NO_BARRIER:
            warp.barriers[control.write_barrier].append(done)
        if control.read_barrier != NO_BARRIER:
            warp.barriers[control.read_barrier].append(start + OPERANDS_READ)
        if op == "LDGDEPBAR":
            warp.groups.append(max(warp.copies, default=now))
            warp.copies = []
        back = op == "BRA" and step.instruction.target is not None and step.instruction.target <= step.instruction.address
        warp.ready = now + max(1, control.stall) + (BRANCH if back else 0)
        self.meet(warp, step, now)
        warp.place += 1
        if warp.place == len(self.program):
            warp.place = 0
            warp.trip += 1
            warp.ends.append(now)
        warp.look(self.program[warp.place])

    def occupy(self, warp: Warp, step: Step, now: float) -> tuple[float, float]:
        """Takes the pipe; when the operands start to be read and when the result is there."""
        op, pipes = step.instruction.op, self.pipes[warp.part]
        if step.pipe == "lsu":
            start = max(now, self.lsu)
            self.lsu = start + step.cycles / PARTS
            return start, self.lsu + (self.global_latency if op in LOADS else LATENCY.get(op, SHARED_LATENCY))
        if step.pipe == "xu":
            start = max(now, pipes["xu"])
            pipes["xu"] = start + step.cycles
            return start, start + LATENCY.get(op, XU_LATENCY)
        if step.pipe:
            pipes[step.pipe] = now + step.cycles
        return now, now + ALU_LATENCY

    def meet(self, warp: Warp, step: Step, now: float) -> None:
        """Block barriers: the last warp to arrive frees the others."""
        if not step.is_barrier or self.block_warps == 1:
            return
        key = (warp.block, warp.trip, warp.place)
        arrived = self.meeting.setdefault(key, [])
        arrived.append(warp)
        if len(arrived) < self.block_warps:
            warp.waiting = True
            return
        for other in self.meeting.pop(key):
            other.waiting = False
            other.ready = max(other.ready, now + BARRIER)
            if other is not warp:
                other.look(self.program[other.place])


def replay(
    model: Model, controls: dict[int, Control], trips: int = 6, global_latency: float = GLOBAL_LATENCY
) -> tuple[float, float]:
    """Cycles of a sub-partition for 1024 scores in the steady state, and resident warps of a sub-partition."""
    if trips < 4:
        raise ValueError("a replay needs 4 trips or more: the first two and the last are not counted")
    block_warps = model.shape.warps
    count = max(1, int(model.occupancy * PARTS / block_warps)) * block_warps
    warps = [Warp(part=number % PARTS, block=number // block_warps) for number in range(count)]
    Sm(steps(model, controls), warps, block_warps, global_latency).run(trips)
    first = sorted(warp.ends[1] for warp in warps)[count // 2]
    last = sorted(warp.ends[-2] for warp in warps)[count // 2]
    # A trip of all resident warps, shared by the warps of a sub-partition.
    cycles = (last - first) / (trips - 3) / (count / PARTS)
    return cycles * model.per_1024, count / PARTS
