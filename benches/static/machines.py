"""The machines: throughput of each pipe by architecture, and the chips whose floors are given.

Sources, cited in brackets here and in `cost.py`:

* [G] CUDA C++ Programming Guide, "Throughput of native arithmetic instructions": results per clock of an SM of compute
  capability 8.0: fp32 64 (8.6 and 9.0: 128); integer add, compare, logic, shift, min, max 64; exp2 and its kin 16; other
  conversions 16; warp shuffle 32.
* [W] White papers. A100: 312 TFLOP/s dense = 108 SMs x 1.41 GHz x 1024 FMA, so a 16x8x16 product (2048 FMA) takes 8 cycles
  of a sub-partition; shared memory 128 B a clock of an SM; L2 reads 5120 B a clock of the chip. GA102: 71 TFLOP/s with
  f32 accumulation = 256 FMA. H100: 989 TFLOP/s = 2048 FMA with wgmma; mma.sync is charged the same rate although
  published microbenchmarks reach 62 % of it.
* [N] Nsight Compute guide, pipelines: ALU = bit, logic and integer except IMAD, and F2FP; FMA = fp32 and IMAD; XU =
  transcendentals and conversions; LSU = shared, global, shuffles, S2R.
* [M] Measured on an A100 (github cicuvc/nvidia-sass-document, notes/sm80): every ALU and every FMA operation 2.0 cycles;
  ALU and FMA are separate servers; IMAD.HI and .WIDE every 4 cycles; HMMA and packed half arithmetic share a pipe;
  predicated-off instructions keep their full cost.
* [L] LLVM's SISchedule.td, through llvm-mca: MFMA passes of 4 cycles; transcendentals and f16/f32/int conversions are
  quarter rate.
* [R] AMD's ISA and ROCm Compute Profiler documents: 4 SIMDs of 16 lanes (a wave64 vector operation takes 4 cycles), each
  of which may issue one VALU, SALU, LDS and VMEM instruction in 4 cycles, from different waves; LDS 128 B and vector L1
  64 B a clock of a CU.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Nvidia:
    """One SM. Cycles are those of a sub-partition for one warp instruction."""

    # Tensor-core multiply-adds of a sub-partition in a cycle, f16 and bf16 with f32 sums [W].
    matrix_fma: int
    fp32_cycles: int
    imad_cycles: int
    alu_cycles: int
    # Transcendentals and conversions [G].
    xu_cycles: int
    # f64 adds and multiply-adds [G].
    fp64_cycles: int
    # The pipe of packed half arithmetic.
    half_pipe: str
    shared_kib: int
    max_warps: int
    max_blocks: int
    # Bytes of L2 in a cycle, by SM; none where the vendor states none.
    l2_bytes: float | None


@dataclass(frozen=True)
class Amd:
    """One CU. Cycles are those of a SIMD for one wave instruction."""

    matrix_fma: int
    l1_bytes: int
    l2_bytes: float


ARCHS: dict[str, Nvidia | Amd] = {
    "sm_80": Nvidia(256, 2, 2, 2, 8, 4, "tensor", 164, 64, 32, 5120 / 108),
    "sm_86": Nvidia(64, 1, 2, 2, 8, 64, "fma", 100, 48, 16, None),
    "sm_90": Nvidia(512, 1, 2, 2, 8, 2, "fma", 228, 64, 32, 5120 / 132),
    "gfx90a": Amd(128, 64, 4096 / 110),
    "gfx942": Amd(256, 64, 2048 / 38),
}


@dataclass(frozen=True)
class Chip:
    """A product: its units in use, the clock that the vendor's peak figures assume, memory bandwidth in TB/s."""

    arch: str
    units: int
    clock_ghz: float
    memory_tb_s: float


CHIPS = {
    "a100": Chip("sm_80", 108, 1.410, 2.039),
    "a100-40g": Chip("sm_80", 108, 1.410, 1.555),
    "rtx3090": Chip("sm_86", 82, 1.695, 0.936),
    "h100": Chip("sm_90", 132, 1.830, 3.35),
    "mi250x-gcd": Chip("gfx90a", 110, 1.700, 1.638),
    "mi250x": Chip("gfx90a", 220, 1.700, 3.277),
    "mi300x": Chip("gfx942", 304, 2.100, 5.3),
}
DEFAULT_CHIP = {"sm_80": "a100", "sm_86": "rtx3090", "sm_90": "h100", "gfx90a": "mi250x", "gfx942": "mi300x"}

# SMs have four sub-partitions, CUs four SIMDs: what the whole unit shares costs each of them four times as much.
PARTS = 4
