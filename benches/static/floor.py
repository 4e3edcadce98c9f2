"""Floors that no code can beat: matrix work against exp2 against memory."""

from __future__ import annotations

from dataclasses import dataclass

from machines import ARCHS, CHIPS, PARTS, Amd

# Products of one score: q k and p v; backward also recomputes the first and has dp, dv, dq, dk.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


@dataclass(frozen=True)
class Workload:
    """Scores of a launch: rows x heads x seqlen_q x seqlen_k, half of them where causal."""

    rows: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    head_dim: int
    pair_bias: bool = True
    key_mask: bool = True
    causal: bool = False

    @property
    def scores(self) -> float:
        """Scores that are computed."""
        every = self.rows * self.heads * self.seqlen_q * self.seqlen_k
        return every / 2 if self.causal else every


def cycles(arch: str, head_dim: int, backward: bool) -> dict[str, float]:
    """Cycles of a sub-partition for 1024 scores, of matrix work and of exp2."""
    products = BACKWARD_PRODUCTS if backward else FORWARD_PRODUCTS
    machine = ARCHS[arch]
    # AMD: 16 lanes at quarter rate; NVIDIA: a warp in xu_cycles.
    exp = 1024 / 64 * 16 if isinstance(machine, Amd) else 1024 / 32 * machine.xu_cycles
    return {"matrix": products * head_dim * 1024 / machine.matrix_fma, "exp": float(exp)}


def milliseconds(chip: str, work: Workload, backward: bool) -> float:
    """The larger of compute and memory time, for half-precision operands that are read and written once."""
    of = CHIPS[chip]
    compute = max(cycles(of.arch, work.head_dim, backward).values()) * work.scores / 1024 / (of.units * PARTS)
    channels = work.rows * work.heads * work.head_dim
    # q and out follow the queries, k and v the keys; backward has the gradient of each beside them.
    moved = (2 * work.seqlen_q + 2 * work.seqlen_k) * channels * 2 * (2 if backward else 1)
    if work.pair_bias:
        moved += work.heads * work.seqlen_q * work.seqlen_k * (6 if backward else 2)
    if work.key_mask:
        moved += work.rows * work.seqlen_k
    moved += work.rows * work.heads * work.seqlen_q * 4
    return max(compute / (of.clock_ghz * 1e6), moved / (of.memory_tb_s * 1e9))
