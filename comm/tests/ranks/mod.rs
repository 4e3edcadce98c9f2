//! Ranks as threads of one process, each with the CPU as its device.

use std::time::Duration;

use tilefold_backend_cpu::CpuBackend;
use tilefold_comm::{Communicator, Rank};
use tilefold_core::Backend;

/// What each rank gives, by rank. A rank that panics fails the test once all have ended.
pub(crate) fn on_ranks<T: Send>(ranks: usize, deadline: Duration, work: impl Fn(&Rank<'_>) -> T + Sync) -> Vec<T> {
    let (work, device) = (&work, CpuBackend::new().unwrap());
    let device = &device;
    let results: Vec<_> = std::thread::scope(|scope| {
        let ends = Communicator::threads(ranks).into_iter();
        let threads: Vec<_> = ends
            .map(|comm| {
                scope.spawn(move || {
                    comm.set_deadline(deadline).unwrap();
                    let stream = device.stream().unwrap();
                    work(&Rank { comm: &comm, device, stream: &stream })
                })
            })
            .collect();
        threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    results.into_iter().map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
}
