//! Ranks as threads of one process, each with the CPU as its device.

use std::time::Duration;

use tilefold_backend_cpu::CpuBackend;
use tilefold_comm::{Rank, on_threads};
use tilefold_core::Backend;

/// What each rank gives, by rank. A rank that panics fails the test once all have ended.
pub(crate) fn on_ranks<T: Send>(ranks: usize, deadline: Duration, work: impl Fn(&Rank<'_>) -> T + Sync) -> Vec<T> {
    let device = CpuBackend::new().unwrap();
    let results = on_threads(ranks, |comm| {
        comm.set_deadline(deadline).unwrap();
        let stream = device.stream().unwrap();
        work(&Rank { comm: &comm, device: &device, stream: &stream })
    });
    results.into_iter().map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
}
