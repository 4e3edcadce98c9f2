//! The CPU as a device of `tilefold`: the whole attention contract, forward and backward.
//!
//! Work is shared out with rayon over independent (batch, row, head, tile) items; the kernels use the widest instruction
//! set the machine has, or the one that `TILEFOLD_CPU_ARCH` names. Results are the same bits for any number of threads.

#![allow(
    clippy::needless_range_loop,
    reason = "in vector code, closures of iterator adaptors are not always inlined and then lose the instruction set"
)]

mod accumulate;
mod arch;
mod attention;
mod device;
mod memory;
mod merge;
mod past_caches;
mod relayout;
mod rope;
mod walk;

pub use arch::Arch;
pub use device::CpuBackend;
pub use memory::{HostMemory, host_memory};
