//! Registers, spills and shared memory that compilers report, and the occupancy they allow.

use anyhow::{Context, Result};
use tilefold_kernels::Vendor;

/// Sub-partitions of a multiprocessor, SIMDs of a compute unit.
const PARTS: u32 = 4;
/// Registers that one lane of a sub-partition has for all its warps, and the granule in which a warp gets them.
const LANE_REGISTERS: u32 = 512;
const REGISTER_GRANULE: u32 = 8;
/// Shared memory that NVIDIA's driver keeps of each block.
const RESERVED_SHARED_BYTES: u32 = 1024;

/// An architecture that kernels are compiled for, with what one multiprocessor or compute unit has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arch {
    pub(super) name: &'static str,
    pub(super) vendor: Vendor,
    /// Threads of a warp.
    pub(super) warp: u32,
    shared_kib: u32,
    reserved_shared_bytes: u32,
    max_warps: u32,
    max_blocks: u32,
}

const NVIDIA: Arch = Arch {
    name: "",
    vendor: Vendor::Nvidia,
    warp: 32,
    shared_kib: 0,
    reserved_shared_bytes: RESERVED_SHARED_BYTES,
    max_warps: 64,
    max_blocks: 32,
};
const AMD: Arch =
    Arch { vendor: Vendor::Amd, warp: 64, shared_kib: 64, reserved_shared_bytes: 0, max_warps: 32, ..NVIDIA };

/// From the CUDA programming guide's table of compute capabilities, and AMD's CDNA ISA documents.
pub(super) const ARCHS: [Arch; 5] = [
    Arch { name: "sm_80", shared_kib: 164, ..NVIDIA },
    Arch { name: "sm_86", shared_kib: 100, max_warps: 48, max_blocks: 16, ..NVIDIA },
    Arch { name: "sm_90", shared_kib: 228, ..NVIDIA },
    Arch { name: "gfx90a", ..AMD },
    Arch { name: "gfx942", ..AMD },
];

/// What one kernel takes, by the log of `--ptxas-options=-v` or the notes of a code object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Resources {
    /// Of a thread; AMD's include those for accumulators.
    pub(super) registers: u32,
    pub(super) spilled_bytes: u32,
    /// AMD's scalar registers that went to lanes of vector registers, not to memory.
    pub(super) spilled_scalars: u32,
    pub(super) stack_bytes: u32,
    pub(super) static_shared_bytes: u32,
}

impl Resources {
    /// Reads the log of a compilation of one kernel by NVRTC.
    pub(super) fn read(log: &str) -> Result<Self> {
        let before = |unit: &str| log.split(unit).next().and_then(|text| text.split_whitespace().next_back());
        let number = |unit: &str| log.contains(unit).then(|| before(unit).and_then(|word| word.parse().ok())).flatten();
        Ok(Self {
            registers: number(" registers").with_context(|| format!("ptxas states no registers:\n{log}"))?,
            spilled_bytes: number(" bytes spill stores").unwrap_or(0) + number(" bytes spill loads").unwrap_or(0),
            spilled_scalars: 0,
            stack_bytes: number(" bytes stack frame").unwrap_or(0),
            static_shared_bytes: number(" bytes smem").unwrap_or(0),
        })
    }

    /// Reads the notes of a code object with one kernel.
    pub(super) fn of_notes(notes: &str) -> Result<Self> {
        let number = |name: &str| {
            let value = notes.lines().find_map(|line| line.trim().trim_start_matches("- ").strip_prefix(name));
            let value = value.and_then(|rest| rest.strip_prefix(':')?.trim().parse::<u32>().ok());
            value.with_context(|| format!("the notes state no {name}:\n{notes}"))
        };
        Ok(Self {
            registers: number(".vgpr_count")?,
            spilled_bytes: 4 * number(".vgpr_spill_count")?,
            spilled_scalars: number(".sgpr_spill_count")?,
            stack_bytes: number(".private_segment_fixed_size")?,
            static_shared_bytes: number(".group_segment_fixed_size")?,
        })
    }

    /// Blocks that are resident on a multiprocessor at once.
    pub(super) fn resident_blocks(&self, arch: Arch, block_threads: u32, dynamic_shared_bytes: u32) -> u32 {
        let warps = block_threads.div_ceil(arch.warp);
        let warp_registers = self.registers.max(1).next_multiple_of(REGISTER_GRANULE);
        let by_registers = PARTS * (LANE_REGISTERS / warp_registers) / warps;
        let shared = self.static_shared_bytes + dynamic_shared_bytes + arch.reserved_shared_bytes;
        let by_shared = (arch.shared_kib * 1024).checked_div(shared).unwrap_or(u32::MAX);
        by_registers.min(by_shared).min(arch.max_blocks).min(arch.max_warps / warps)
    }

    /// Resident warps of a sub-partition, in quarters.
    pub(super) fn warps(&self, arch: Arch, block_threads: u32, dynamic_shared_bytes: u32) -> f64 {
        let blocks = self.resident_blocks(arch, block_threads, dynamic_shared_bytes);
        f64::from(blocks * block_threads.div_ceil(arch.warp)) / f64::from(PARTS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "ptxas info    : 0 bytes gmem\n\
        ptxas info    : Compiling entry function 'attention_forward' for 'sm_80'\n\
        ptxas info    : Function properties for attention_forward\n    \
        16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n\
        ptxas info    : Used 168 registers, used 1 barriers, 512 bytes smem, 1312 bytes cmem[0]\n";

    #[test]
    fn the_log_is_read() {
        let expected = Resources {
            registers: 168,
            spilled_bytes: 20,
            stack_bytes: 16,
            static_shared_bytes: 512,
            ..Resources::default()
        };
        assert_eq!(Resources::read(LOG).unwrap(), expected);
        assert!(Resources::read("").is_err());
    }

    const NOTES: &str = "amdhsa.kernels:\n  - .agpr_count:     16\n    .args:\n      - .offset:         0\n        .size:           1304\n    \
        .group_segment_fixed_size: 512\n    .name:           fill\n    .private_segment_fixed_size: 16\n    \
        .sgpr_spill_count: 1\n    .vgpr_count:     168\n    .vgpr_spill_count: 2\n";

    #[test]
    fn notes_are_read() {
        let expected = Resources {
            registers: 168,
            spilled_bytes: 8,
            spilled_scalars: 1,
            stack_bytes: 16,
            static_shared_bytes: 512,
        };
        assert_eq!(Resources::of_notes(NOTES).unwrap(), expected);
        assert!(Resources::of_notes("").is_err());
    }

    #[test]
    fn the_scarcest_resource_decides() {
        let uses = |registers| Resources { registers, ..Resources::default() };
        let [a100, rtx, .., mi300] = ARCHS;
        // 72 registers: 7 warps of a sub-partition; 168: 3 of them.
        assert_eq!(uses(72).resident_blocks(a100, 128, 0), 7);
        assert_eq!(uses(168).warps(a100, 128, 0), 3.0);
        assert_eq!(uses(32).resident_blocks(a100, 128, 40 * 1024), 4);
        assert_eq!(uses(32).resident_blocks(rtx, 128, 40 * 1024), 2);
        assert_eq!(uses(16).resident_blocks(rtx, 32, 0), 16);
        assert_eq!(uses(200).warps(mi300, 256, 20 * 1024), 2.0);
        assert_eq!(uses(100).warps(mi300, 256, 20 * 1024), 3.0);
    }
}
