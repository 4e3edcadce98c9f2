"""The model of one compiled kernel: its hot loop, what a trip of it costs, and times no launch can beat."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import loops
from floor import Workload
from loops import Loop
from machine_code import Kernel, UnreadableCode
from machines import ARCHS, CHIPS, DEFAULT_CHIP, PARTS, Amd
from tally import Tally, occupancy


@dataclass(frozen=True)
class Shape:
    """What the source says of the kernel, and the code does not.

    `tile` is (queries, keys) whose scores a block handles in one trip of the source's loop; `products` the matrix
    products of each score in that loop (forward 2) and `head_dim` their padded depth, which together tell how far the
    compiler unrolled; `over` what the loop walks: keys `k`, queries `q`, or rows `n`. `rows` is how many rows of the
    batch share a block's tile.
    """

    tile: tuple[int, int] | None = None
    warps: int = 4
    products: float | None = None
    head_dim: int | None = None
    over: str = "k"
    rows: int = 1
    shared_bytes: int | None = None
    unroll: int | None = None


@dataclass
class Choice:
    """Corrections by hand: the hot loop's address, trips of inner loops, addresses the steady state jumps over."""

    loop: int | None = None
    trips: dict[int, float] = field(default_factory=dict)
    skip: tuple[tuple[int, int], ...] = ()


class Model:
    """One compiled kernel with its shape."""

    def __init__(self, kernel: Kernel, shape: Shape, choice: Choice | None = None) -> None:
        choice = choice or Choice()
        self.kernel, self.shape, self.arch = kernel, shape, kernel.arch
        if choice.skip:
            kernel.instructions = [
                each for each in kernel.instructions if not any(low <= each.address < high for low, high in choice.skip)
            ]
        self.loops = loops.find(kernel)
        self.trips = choice.trips
        self.loop = self._choose(choice.loop)
        if self.loop:
            self.body = self._tally(self.loop)
            self.rest = Tally(self.arch, [i for i in kernel.instructions if not self.loop.holds(i.address)])
        else:
            self.body, self.rest = Tally(self.arch, kernel.instructions), Tally(self.arch)
        shared = shape.shared_bytes if shape.shared_bytes is not None else kernel.resources.shared_bytes
        self.shared_bytes = shared
        self.occupancy, self.limit = occupancy(self.arch, kernel.resources, shape.warps, shared)
        self._count_scores()

    def _choose(self, address: int | None) -> Loop | None:
        if address is None:
            return loops.hottest(self.loops)
        for loop in self.loops:
            if loop.low == address:
                return loop
        raise UnreadableCode(f"{self.kernel.name}: no loop starts at {address:#x}")

    def _tally(self, loop: Loop) -> Tally:
        """Instructions of inner loops named in `trips` count that often, all others once."""
        inner = [each for each in loop.inner if each.low in self.trips]
        by_times = defaultdict(list)
        for each in loop.instructions:
            by_times[math.prod(self.trips[i.low] for i in inner if i.holds(each.address))].append(each)
        total = Tally(self.arch)
        for times, instructions in by_times.items():
            total.add(Tally(self.arch, instructions), times)
        return total

    def _count_scores(self) -> None:
        """Scores of one warp in one trip of the compiled loop, which may be several of the source's."""
        self.unroll, self.scores, self.redundancy = 1, None, None
        if not self.shape.tile:
            return
        source_trip = self.shape.tile[0] * self.shape.tile[1] / self.shape.warps
        needed = source_trip * (self.shape.products or 0) * (self.shape.head_dim or 0)
        if self.shape.unroll:
            self.unroll = self.shape.unroll
        elif needed:
            self.unroll = max(1, round(self.body.matrix_fma / needed))
        self.scores = source_trip * self.unroll
        if needed:
            self.redundancy = self.body.matrix_fma / (needed * self.unroll)

    @property
    def per_1024(self) -> float:
        """Compiled trips for 1024 scores."""
        if self.scores is None:
            raise UnreadableCode(f"{self.kernel.name}: scores need a tile")
        return 1024 / self.scores

    def wave_issue(self) -> float:
        """AMD: a wave issues at most one instruction in 4 cycles, so few resident waves cannot fill the ports."""
        if not isinstance(ARCHS[self.arch], Amd):
            return 0.0
        return 4 * self.body.instructions / max(1, min(5, self.occupancy))

    def bound(self) -> tuple[str, float]:
        """The binding pipe, and its cycles for 1024 scores of a sub-partition, by the loop alone."""
        pipe, cycles = self.body.bound()
        if (issue := self.wave_issue()) > cycles:
            pipe, cycles = "wave-issue", issue
        return pipe, cycles * self.per_1024

    def launch(self, work: Workload, chip: str | None = None) -> LaunchFloor:
        """A time that no launch of this code over this work can beat: prologue and epilogue too, all else overlapped."""
        if not self.shape.tile:
            raise UnreadableCode(f"{self.kernel.name}: a launch's time needs a tile")
        queries, keys = self.shape.tile
        over_q, over_k = math.ceil(work.seqlen_q / queries), math.ceil(work.seqlen_k / keys)
        rows = math.ceil(work.rows / self.shape.rows)
        trips = {"k": over_k * self.shape.rows, "q": over_q * self.shape.rows, "n": work.rows}[self.shape.over]
        blocks = {"k": over_q * rows, "q": over_k * rows, "n": over_q * over_k}[self.shape.over] * work.heads
        if work.causal:
            trips /= 2
        whole = Tally(self.arch).add(self.rest).add(self.body, trips / self.unroll)
        pipe, cycles = whole.bound()
        of = CHIPS[chip or DEFAULT_CHIP[self.arch]]
        # Warp-cycles that the chip offers in a millisecond.
        offered = of.units * PARTS * of.clock_ghz * 1e6
        spread = cycles * blocks * self.shape.warps / offered
        # Some unit gets ceil(blocks / units) of them, and one of its parts its share of their warps, rounded up.
        share = math.ceil(math.ceil(blocks / of.units) * self.shape.warps / PARTS)
        slots = of.units * max(1.0, self.occupancy * PARTS / self.shape.warps)
        return LaunchFloor(max(spread, cycles * share / (of.clock_ghz * 1e6)), pipe, blocks, blocks / slots)


@dataclass(frozen=True)
class LaunchFloor:
    """The static floor of a launch, the pipe that sets it, blocks, and how many times they fill the chip."""

    milliseconds: float
    pipe: str
    blocks: int
    waves: float
