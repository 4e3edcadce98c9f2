//! Registers, spills and shared memory that ptxas reports, and the occupancy they allow.

use anyhow::{Context, Result};

/// Threads of a warp.
const WARP: u32 = 32;
/// Sub-partitions of a multiprocessor.
const PARTS: u32 = 4;
/// Registers of a sub-partition, and the granule in which a thread gets them.
const PART_REGISTERS: u32 = 16384;
const REGISTER_GRANULE: u32 = 8;
/// Shared memory that the driver keeps of each block.
const RESERVED_SHARED_BYTES: u32 = 1024;

/// An architecture that kernels are compiled for, with what one multiprocessor has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arch {
    pub(super) name: &'static str,
    shared_kib: u32,
    max_warps: u32,
    max_blocks: u32,
}

/// From the CUDA programming guide's table of compute capabilities.
pub(super) const ARCHS: [Arch; 3] = [
    Arch { name: "sm_80", shared_kib: 164, max_warps: 64, max_blocks: 32 },
    Arch { name: "sm_86", shared_kib: 100, max_warps: 48, max_blocks: 16 },
    Arch { name: "sm_90", shared_kib: 228, max_warps: 64, max_blocks: 32 },
];

/// What one kernel takes, by the log of `--ptxas-options=-v`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Resources {
    pub(super) registers: u32,
    pub(super) spilled_bytes: u32,
    pub(super) stack_bytes: u32,
    pub(super) static_shared_bytes: u32,
}

impl Resources {
    /// Reads the log of a compilation of one kernel.
    pub(super) fn read(log: &str) -> Result<Self> {
        let before = |unit: &str| log.split(unit).next().and_then(|text| text.split_whitespace().next_back());
        let number = |unit: &str| log.contains(unit).then(|| before(unit).and_then(|word| word.parse().ok())).flatten();
        Ok(Self {
            registers: number(" registers").with_context(|| format!("ptxas states no registers:\n{log}"))?,
            spilled_bytes: number(" bytes spill stores").unwrap_or(0) + number(" bytes spill loads").unwrap_or(0),
            stack_bytes: number(" bytes stack frame").unwrap_or(0),
            static_shared_bytes: number(" bytes smem").unwrap_or(0),
        })
    }

    /// Blocks that are resident on a multiprocessor at once.
    pub(super) fn resident_blocks(&self, arch: Arch, block_threads: u32, dynamic_shared_bytes: u32) -> u32 {
        let warps = block_threads.div_ceil(WARP);
        let warp_registers = self.registers.max(1).next_multiple_of(REGISTER_GRANULE) * WARP;
        let by_registers = PARTS * (PART_REGISTERS / warp_registers) / warps;
        let shared = self.static_shared_bytes + dynamic_shared_bytes + RESERVED_SHARED_BYTES;
        let by_shared = arch.shared_kib * 1024 / shared;
        by_registers.min(by_shared).min(arch.max_blocks).min(arch.max_warps / warps)
    }

    /// Resident warps of a sub-partition, in quarters.
    pub(super) fn warps(&self, arch: Arch, block_threads: u32, dynamic_shared_bytes: u32) -> f64 {
        let blocks = self.resident_blocks(arch, block_threads, dynamic_shared_bytes);
        f64::from(blocks * block_threads.div_ceil(WARP)) / f64::from(PARTS)
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
        let expected = Resources { registers: 168, spilled_bytes: 20, stack_bytes: 16, static_shared_bytes: 512 };
        assert_eq!(Resources::read(LOG).unwrap(), expected);
        assert!(Resources::read("").is_err());
    }

    #[test]
    fn the_scarcest_resource_decides() {
        let uses = |registers| Resources { registers, ..Resources::default() };
        let [a100, rtx, _] = ARCHS;
        // 72 registers: 7 warps of a sub-partition; 168: 3 of them.
        assert_eq!(uses(72).resident_blocks(a100, 128, 0), 7);
        assert_eq!(uses(168).warps(a100, 128, 0), 3.0);
        assert_eq!(uses(32).resident_blocks(a100, 128, 40 * 1024), 4);
        assert_eq!(uses(32).resident_blocks(rtx, 128, 40 * 1024), 2);
        assert_eq!(uses(16).resident_blocks(rtx, 32, 0), 16);
    }
}
