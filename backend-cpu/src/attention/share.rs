//! Work items shared out over the pool, with the calling thread among the workers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use tilefold_core::{AttentionProblem, DeviceResult};

/// Below so many operations of the matrix products, waking a second thread takes longer than the work.
const SMALLEST_SHARED: usize = 4 << 20;

/// How many of `threads` may work on a problem: one on a small one.
pub(crate) fn workers(problem: &AttentionProblem, threads: usize) -> usize {
    let spec = problem.spec();
    let sizes = [spec.batch, spec.rows, spec.heads, spec.seqlen_q, spec.seqlen_k, spec.head_dim + spec.head_dim_v, 2];
    let operations = sizes.into_iter().fold(1, usize::saturating_mul);
    if operations < SMALLEST_SHARED { 1 } else { threads }
}

/// Runs `work` for each index below `count` on at most `workers` threads, the caller among them: it starts at once, while
/// threads of the pool may have to wake up.
///
/// # Errors
/// One of those that `work` returned; no further items are then started.
pub(crate) fn for_each(
    workers: usize,
    count: usize,
    work: impl Fn(usize) -> DeviceResult<()> + Sync,
) -> DeviceResult<()> {
    let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
    let take_items = || loop {
        let index = next.fetch_add(1, Ordering::Relaxed);
        if index >= count {
            return;
        }
        if let Err(error) = work(index) {
            next.store(count, Ordering::Relaxed);
            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    };
    rayon::in_place_scope(|scope| {
        for _ in 1..workers.min(count) {
            scope.spawn(|_| take_items());
        }
        take_items();
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use tilefold_core::DeviceError;

    use super::*;

    #[test]
    fn every_index_once_whatever_the_workers() {
        for workers in [1, 2, 7] {
            for count in [0, 1, 3, 100] {
                let seen: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                for_each(workers, count, |index| {
                    seen[index].fetch_add(1, Ordering::Relaxed);
                    Ok(())
                })
                .unwrap();
                assert!(seen.iter().all(|times| times.load(Ordering::Relaxed) == 1), "{workers} {count}");
            }
        }
    }

    #[test]
    fn an_error_is_returned_and_ends_the_work() {
        let started = AtomicUsize::new(0);
        let result = for_each(2, 1000, |index| {
            started.fetch_add(1, Ordering::Relaxed);
            if index == 3 { Err(DeviceError::OutOfMemory { asked: 1, free: 0 }) } else { Ok(()) }
        });
        assert!(matches!(result, Err(DeviceError::OutOfMemory { .. })), "{result:?}");
        assert!(started.load(Ordering::Relaxed) < 1000);
    }
}
