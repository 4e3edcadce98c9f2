"""The model of one compiled kernel: its hot loop, what a trip of it costs, and times no launch can beat."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import loops
import path
from floor import Workload
from loops import Loop
from machine_code import Kernel, UnreadableCode
from machines import ARCHS, CHIPS, DEFAULT_CHIP, PARTS, Amd
from tally import Tally, occupancy


@dataclass(frozen=True)
class Shape:
    """What the source says of the kernel, and the code does not.

    `tile` is (queries, keys) whose scores a block handles in one step; `products` the matrix products of each score
    (forward 2) and `head_dim` their padded depth, which together tell how many steps the compiler put into a trip of its
    loop. `walk` is what a block walks over: `keys`, `queries`, or `rows`.
    """

    tile: tuple[int, int] | None = None
    warps: int = 4
    products: float | None = None
    head_dim: int | None = None
    walk: str = "keys"
    shared_bytes: int | None = None
    unroll: float | None = None


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
        self.left_out = 0
        if choice.skip:
            kernel.instructions = [
                each for each in kernel.instructions if not any(low <= each.address < high for low, high in choice.skip)
            ]
        self.loops = loops.find(kernel)
        self.trips = choice.trips
        self.loop = self._choose(choice.loop)
        self._keep_to_the_steady_path()
        if self.loop:
            self.body = self._tally(self.loop)
            inside = {each.address for each in self.loop.instructions}
            self.rest = Tally(self.arch, [each for each in kernel.instructions if each.address not in inside])
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

    def _needed(self) -> float:
        """Multiply-adds of one warp in one step; 0 where that is not known."""
        if not self.shape.tile:
            return 0.0
        scores = self.shape.tile[0] * self.shape.tile[1] / self.shape.warps
        return scores * (self.shape.products or 0) * (self.shape.head_dim or 0)

    def _keep_to_the_steady_path(self) -> None:
        """Takes what few trips run out of the hot loop and out of the kernel."""
        if not self.loop or not (needed := self._needed()):
            return
        # Every lane raises 2 to its scores, in some code more often.
        tile, lanes = self.shape.tile or (0, 0), 64 if isinstance(ARCHS[self.arch], Amd) else 32
        exponentials = tile[0] * tile[1] // self.shape.warps // lanes
        if not (found := path.steady(self.kernel, self.loop, (needed, exponentials))):
            return
        kept, whole = found
        left_out = whole - {each.address for each in kept}
        self.left_out = len(left_out)
        self.kernel.instructions = [each for each in self.kernel.instructions if each.address not in left_out]
        self.loop.instructions = kept

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
        """Scores of one warp in one trip of the compiled loop: those of several steps, or of a part of one."""
        self.unroll, self.scores, self.redundancy = 1.0, None, None
        if not self.shape.tile:
            return
        needed = self._needed()
        ratio = self.body.matrix_fma / needed if needed else 1.0
        if self.shape.unroll:
            self.unroll = self.shape.unroll
        elif ratio > 0:
            # Several steps in a trip, or several trips for a step.
            self.unroll = float(round(ratio)) if ratio >= 0.75 else 1 / round(1 / ratio)
        self.scores = self.shape.tile[0] * self.shape.tile[1] / self.shape.warps * self.unroll
        if needed:
            self.redundancy = ratio / self.unroll

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
        shape = self.shape
        queries, keys = shape.tile
        over_q, outer = math.ceil(work.seqlen_q / queries), work.rows * work.heads
        if shape.walk == "rows":
            blocks = over_q * math.ceil(work.seqlen_k / keys) * work.heads
            steps = float(work.rows)
        else:
            over_k = math.ceil(work.seqlen_k / keys)
            blocks, steps = (over_q * outer, over_k) if shape.walk == "keys" else (over_k * outer, over_q)
        if work.causal:
            steps /= 2
        whole = Tally(self.arch).add(self.rest).add(self.body, steps / self.unroll)
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
