"""What one instruction costs: cycles of each pipe, for one warp (wave) on one sub-partition (SIMD).

Units that the whole SM or CU shares (LSU, LDS, VMEM, L2) are charged four times their cost there: all four parts are taken
to run the same code at once. Sources in `machines.py`.
"""

from __future__ import annotations

import math
import re

from machine_code import Instruction
from machines import ARCHS, PARTS, Amd, Nvidia

WARP, WAVE = 32, 64

ALU = frozenset("""IADD3 IADD IADD32I LOP3 LOP LOP32I SHF SHL SHR PRMT SEL FSEL FMNMX FMNMX3 FSETP FSET ISETP IMNMX VIMNMX
 VIMNMX3 LEA ISCADD MOV MOV32I PLOP3 PSETP P2R R2P SGXT BMSK IABS I2I I2IP F2FP F2IP I2FP VABSDIFF VABSDIFF4 VOTE CS2R VIADD
 VIADDMNMX MOVM SCATTER GATHER VHMNMX""".split())
FMA = frozenset("FADD FADD32I FMUL FMUL32I FFMA FFMA32I FSWZADD IMAD IMUL IMUL32I IDP FHADD FHFMA FCHK".split())
HALF = frozenset("HADD2 HADD2_32I HMUL2 HMUL2_32I HFMA2 HFMA2_32I HMNMX2 HSET2 HSETP2".split())
FP64 = frozenset("DADD DMUL DFMA DSETP DMNMX".split())
XU = frozenset("MUFU F2F F2I I2F FRND POPC FLO BREV".split())
CONTROL = frozenset("""BRA BRX JMP JMX EXIT CALL RET BSSY BSYNC BREAK BMOV WARPSYNC YIELD NOP NANOSLEEP DEPBAR LDGDEPBAR BAR
 MEMBAR ERRBAR CCTL KILL BPT LEPC RPCMOV WARPGROUP ELECT SYNCS FENCE ACQBULK PREEXIT ENDCOLLECTIVE COLLECTIVE ARRIVES LDC
 USETMAXREG""".split())
GLOBAL = frozenset("LDG LD STG ST LDGSTS RED REDG ATOM ATOMG UTMALDG".split())
GLOBAL_WRITES = frozenset("STG ST RED REDG ATOM ATOMG".split())
GLOBAL_CLASS = {"LDGSTS": "cp.async", "LD": "ldg", "ST": "stg", "RED": "red", "REDG": "red", "ATOM": "red", "ATOMG": "red"}
UNIFORM = frozenset("R2UR S2UR VOTEU REDUX UP2UR".split())
MATRIX = frozenset("HMMA IMMA HGMMA QGMMA".split())

# Multiply-adds of one warp, by the shape in the opcode.
MATRIX_SHAPE = {"16816": 2048, "1688": 1024, "16832": 4096, "1684": 512, "884": 256}
ACCESS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}

# (M, N, K) of f16 and bf16 -> passes of 4 cycles on (gfx90a, gfx942) [L].
MFMA_PASSES = {
    (16, 16, 16): (8, 4), (32, 32, 8): (16, 8), (4, 4, 4): (2, 2), (16, 16, 4): (8, 8), (32, 32, 4): (16, 16),
    (16, 16, 8): (8, 4), (16, 16, 32): (4, 4), (32, 32, 16): (8, 8),
}
MFMA_PASSES_F32 = {(16, 16, 4): 8, (32, 32, 2): 16, (4, 4, 1): 2, (16, 16, 1): 8, (32, 32, 1): 16}
AMD_ACCESS_BYTES = (
    ("x4", 16), ("b128", 16), ("x3", 12), ("b96", 12), ("x2", 8), ("b64", 8), ("short", 2), ("byte", 1), ("b16", 2),
    ("b8", 1), ("u16", 2), ("i16", 2), ("u8", 1), ("i8", 1),
)
TRANSCENDENTAL = re.compile(r"^v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
QUARTER_RATE = re.compile(r"^v_cvt_(f16_f32|f32_f16|f32_[iu]|[iu]\d+_f|f16_[iu]|f32_ubyte|f32_bf8|f32_fp8)")

# A class for people, and cycles by pipe.
Cost = tuple[str, dict[str, float]]


def of(instruction: Instruction, arch: str) -> Cost:
    """Class and cycles by pipe. A class that starts with `other:` is an instruction nobody has priced."""
    machine = ARCHS[arch]
    if isinstance(machine, Amd):
        return amd(instruction, machine, arch)
    return nvidia(instruction, machine)


def matrix_fma(instruction: Instruction) -> float:
    """Multiply-adds that one warp (wave) contributes; 0 for all but matrix instructions."""
    op = instruction.op
    if op in ("HMMA", "IMMA"):
        return next((MATRIX_SHAPE[part] for part in instruction.modifiers if part in MATRIX_SHAPE), 2048)
    if op in ("HGMMA", "QGMMA"):  # of a group of four warps
        shape = re.match(r"(\d+)x(\d+)x(\d+)", instruction.modifiers[0]) if instruction.modifiers else None
        return math.prod(int(size) for size in shape.groups()) // 4 if shape else 0
    if op.startswith("v_mfma") and (shape := mfma_shape(op)):
        blocks = re.search(r"_(\d+)b(?:_|$)", op)
        return math.prod(shape) * (int(blocks.group(1)) if blocks else 1)
    return 0


def global_bytes(instruction: Instruction, arch: str) -> int:
    """Bytes that one warp moves from or to global memory."""
    op = instruction.op
    if isinstance(ARCHS[arch], Nvidia):
        return access_bytes(instruction) * WARP if op in GLOBAL else 0
    return amd_access_bytes(op) * WAVE if op.startswith(("global_", "buffer_", "flat_")) else 0


def access_bytes(instruction: Instruction) -> int:
    """Bytes of one lane's access."""
    return next((ACCESS_BYTES[part] for part in instruction.modifiers if part in ACCESS_BYTES), 4)


def nvidia(instruction: Instruction, sm: Nvidia) -> Cost:
    """Class and cycles of one warp instruction, without its issue slot."""
    op, modifiers = instruction.op, instruction.modifiers
    if (op.startswith("U") and op not in ("USETMAXREG", "UTMALDG")) or op in UNIFORM:
        return "uniform", {}
    if op in MATRIX:
        rate = sm.matrix_fma * (0.5 if "TF32" in modifiers else 2 if op == "IMMA" else 1)
        shape = next((part for part in modifiers if part in MATRIX_SHAPE), "?")
        return (op if op in ("HGMMA", "QGMMA") else f"{op}.{shape}"), {"tensor": matrix_fma(instruction) / rate}
    if op in FMA:
        if not op.startswith(("IMAD", "IMUL")):
            return "fp32", {"fma": sm.fp32_cycles}
        cycles = sm.imad_cycles * (2 if "WIDE" in modifiers or "HI" in modifiers else 1)
        # Where fp32 has two pipes, integers have one of them.
        return "int-fma", {"fma": cycles if sm.fp32_cycles == 2 else cycles / 2, "fma-heavy": cycles}
    if op in HALF:
        if sm.half_pipe == "fma":
            return "half2", {"fma": 1}
        return "half2", {} if "MMA" in modifiers else {"tensor": 2}
    if op in FP64:
        return "fp64", {"fp64": sm.fp64_cycles}
    if op in ALU:
        return ("cvt-pack" if op == "F2FP" else "alu"), {"alu": sm.alu_cycles}
    if op in XU:
        kind = "cvt-xu" if op != "MUFU" else "ex2" if "EX2" in modifiers else "mufu"
        return kind, {"xu": sm.xu_cycles}
    if op in CONTROL:
        return "ctrl", {}
    return nvidia_memory(instruction, sm)


def nvidia_memory(instruction: Instruction, sm: Nvidia) -> Cost:
    """Class and cycles of what goes through the LSU: memory, shuffles, special registers."""
    op, modifiers = instruction.op, instruction.modifiers
    words = max(1, access_bytes(instruction) // 4)
    if op in ("LDSM", "STSM"):
        matrices = int(modifiers[-1]) if modifiers and modifiers[-1] in ("2", "4") else 1
        return "ldsm", {"lsu": PARTS * matrices}
    if op in ("LDS", "STS", "ATOMS"):
        return op.lower(), {"lsu": PARTS * words}
    if op in ("LDL", "STL"):
        return "spill", {"lsu": PARTS * words}
    if op in ("SHFL", "S2R"):
        return ("shfl" if op == "SHFL" else "ctrl"), {"lsu": PARTS}
    if op in GLOBAL:
        transfer = access_bytes(instruction) * WARP
        cycles = {"lsu": PARTS * max(1, math.ceil(transfer / 128))}
        # Only what L1 cannot serve counts against L2: cp.async.cg, .cg and strong loads, stores, reductions.
        if sm.l2_bytes and (op in GLOBAL_WRITES or "BYPASS" in modifiers or "STRONG" in modifiers):
            cycles["l2"] = PARTS * transfer / sm.l2_bytes
        return GLOBAL_CLASS.get(op, op.lower()), cycles
    return f"other:{op}", {}


def mfma_shape(op: str) -> tuple[int, int, int] | None:
    """M, N and K of an MFMA mnemonic."""
    found = re.search(r"_(\d+)x(\d+)x(\d+)", op)
    return (int(found.group(1)), int(found.group(2)), int(found.group(3))) if found else None


def mfma_passes(op: str, arch: str) -> int:
    """Passes of 4 cycles."""
    shape = mfma_shape(op) or (0, 0, 0)
    if re.search(r"(?<!b)(?<!x)f32$", op):
        return MFMA_PASSES_F32.get(shape, 8)
    return MFMA_PASSES.get(shape, (8, 4))[arch != "gfx90a"]


def amd_access_bytes(op: str) -> int:
    """Bytes of one lane's access."""
    return next((size for part, size in AMD_ACCESS_BYTES if part in op), 4)


def amd(instruction: Instruction, cu: Amd, arch: str) -> Cost:
    """Class and cycles of one wave instruction."""
    op = instruction.op
    if op.startswith("v_mfma"):
        m, n, k = mfma_shape(op) or (0, 0, 0)
        return f"MFMA.{m}x{n}x{k}", {"mfma": 4 * mfma_passes(op, arch), "valu": 4}
    if op.startswith("v_"):
        return amd_vector(op, arch)
    if op.startswith(("ds_bpermute", "ds_permute", "ds_swizzle")):
        return "lds-shuffle", {"lds": 8}
    if op.startswith("ds_"):
        transfer = amd_access_bytes(op) * (2 if "read2" in op or "write2" in op else 1) * WAVE
        kind = "lds-write" if "write" in op or "store" in op else "lds-read"
        return kind, {"lds": PARTS * max(1, math.ceil(transfer / 128))}
    if op.startswith("scratch_"):
        return "spill", {"vmem": 16}
    if op.startswith(("global_", "buffer_", "flat_")):
        if "wbl2" in op or "inv" in op:
            return "ctrl", {}
        transfer = amd_access_bytes(op) * WAVE
        cycles = {"vmem": PARTS * max(4.0, transfer / cu.l1_bytes)}
        kind = "atomic" if "atomic" in op else "store" if "store" in op else "load"
        if kind != "load":
            cycles["l2"] = PARTS * transfer / cu.l2_bytes
        return f"vmem-{kind}", cycles
    if op.startswith(("s_load", "s_buffer_load", "s_store")):
        return "smem", {}
    if op.startswith(("s_waitcnt", "s_nop", "s_sleep", "s_barrier", "s_setprio", "s_endpgm", "s_branch", "s_cbranch",
                      "s_code_end", "s_sched", "s_icache")):
        return "ctrl", {}
    return ("salu", {"salu": 4}) if op.startswith("s_") else (f"other:{op}", {})


def amd_vector(op: str, arch: str) -> Cost:
    """Class and cycles of one VALU instruction."""
    if op.startswith("v_accvgpr"):
        return "accvgpr", {"valu": 4}
    if op in ("v_readlane_b32", "v_writelane_b32", "v_readfirstlane_b32"):
        return "lane", {"valu": 4}
    if TRANSCENDENTAL.match(op):
        # Taken to hold the vector ALU meanwhile, which no document settles; also counted on its own.
        return ("ex2" if op.startswith("v_exp") else "transcendental"), {"valu": 16, "transcendental": 16}
    if QUARTER_RATE.match(op):
        return "cvt-quarter", {"valu": 16}
    if "_f64" in op and "_u64" not in op:
        return "valu", {"valu": 8 if arch == "gfx90a" else 4}
    return ("pk-f32" if op.startswith("v_pk_") and "f32" in op else "valu"), {"valu": 4}
