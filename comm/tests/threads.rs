//! Ranks as threads of one process: what every engine must do, and what happens when a rank fails.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a panic in a test is a failed test")]

mod checks;

use std::time::{Duration, Instant};

use tilefold_comm::{CommError, Communicator, Error, Reduction, Result};
use tilefold_core::{ProblemError, TensorView};

const SOON: Duration = Duration::from_millis(300);

/// What each rank gives; `None` for one that panicked.
fn on_ranks<T: Send>(ranks: usize, work: impl Fn(&Communicator) -> T + Sync) -> Vec<Option<T>> {
    let results = tilefold_comm::on_threads(ranks, |comm| {
        comm.set_deadline(Duration::from_secs(20)).unwrap();
        work(&comm)
    });
    results.into_iter().map(|result| result.ok()).collect()
}

/// Errors of the ranks that gave one.
fn errors<T: Send>(ranks: usize, work: impl Fn(&Communicator) -> Result<T> + Sync) -> Vec<Error> {
    on_ranks(ranks, work).into_iter().flatten().filter_map(Result::err).collect()
}

fn small(comm: &Communicator) -> Result<()> {
    comm.all_reduce(&TensorView::from_slice(&[1_f32, 2.0], &[2])?, Reduction::Sum).map(|_| ())
}

#[test]
fn collectives_for_any_number_of_ranks() {
    for ranks in [1, 2, 3, 5, 8] {
        for result in on_ranks(ranks, checks::all) {
            assert_eq!(result, Some(Ok(())), "{ranks} ranks");
        }
    }
}

#[test]
fn a_panic_before_or_between_collectives_reaches_every_rank() {
    for before in [0, 1, 3] {
        let errors = errors(4, |comm| {
            for round in 0..5 {
                assert!(!(comm.rank() == 2 && round == before), "planted");
                small(comm)?;
            }
            Ok(())
        });
        assert_eq!(errors.len(), 3, "all but the one that panicked");
        for error in errors {
            assert!(matches!(error, Error::Comm(CommError::Lost { rank: 2, panicked: true, .. })), "{error}");
        }
    }
}

#[test]
fn a_panic_while_a_collective_is_under_way_reaches_every_rank() {
    let errors = errors(3, |comm| {
        let mine = [1_f32];
        let parcel = vec![std::sync::Arc::new(tilefold_core::Tensor::from_vec(mine.to_vec(), &[1])?)];
        let shift = comm.begin_shift("shift", comm.neighbour(1), parcel, comm.neighbour(-1))?;
        assert!(comm.rank() != 1, "planted");
        shift.finish()?;
        comm.barrier()
    });
    assert_eq!(errors.len(), 2);
    assert!(errors.iter().all(|error| matches!(error, Error::Comm(CommError::Lost { rank: 1, panicked: true, .. }))));
}

#[test]
fn a_panic_after_the_last_collective_harms_nobody() {
    let results = on_ranks(3, |comm| {
        let result = small(comm);
        assert!(comm.rank() != 0, "planted");
        result
    });
    assert_eq!(results, [None, Some(Ok(())), Some(Ok(()))]);
}

#[test]
fn a_rank_that_leaves_is_named() {
    let errors = errors(3, |comm| if comm.rank() == 0 { Ok(()) } else { comm.barrier() });
    assert_eq!(errors.len(), 2);
    let lost = CommError::Lost { rank: 0, panicked: false, operation: "barrier".into() };
    assert!(errors.iter().all(|error| *error == lost.clone().into()), "{errors:?}");
}

#[test]
fn a_late_rank_fails_every_rank_within_the_deadline() {
    let started = Instant::now();
    let results = on_ranks(3, |comm| {
        comm.set_deadline(SOON)?;
        if comm.rank() == 1 {
            std::thread::sleep(4 * SOON);
        }
        let first = small(comm);
        assert!(!comm.is_usable());
        let second = comm.barrier();
        assert!(matches!(second, Err(Error::Comm(CommError::Unusable { .. }))), "{second:?}");
        first
    });
    assert!(started.elapsed() < 20 * SOON);
    for result in results {
        let Some(Err(Error::Comm(CommError::Deadline { missing, deadline, .. }))) = result else {
            panic!("expected a deadline, got {result:?}")
        };
        assert_eq!((missing, deadline), (vec![1], SOON));
    }
}

#[test]
fn a_short_delay_is_waited_for() {
    let results = on_ranks(3, |comm| {
        std::thread::sleep(Duration::from_millis(50 * comm.rank() as u64));
        checks::all(comm)
    });
    assert!(results.iter().all(|result| *result == Some(Ok(()))), "{results:?}");
}

/// Rank 1 differs from the others in the operation, the dtype, the shape, the counts.
#[test]
fn calls_that_differ_are_errors_on_every_rank() {
    type Call = fn(&Communicator, bool) -> Result<()>;
    let calls: [(&str, Call); 6] = [
        ("letter", |comm, odd| {
            let operation = if odd { "keys" } else { "gradients" };
            comm.begin_shift(operation, comm.neighbour(1), Vec::new(), comm.neighbour(-1))?.finish()?;
            // A rank whose own letters have the same names may hear of it only now.
            comm.barrier()
        }),
        ("operation", |comm, odd| if odd { comm.barrier() } else { small(comm) }),
        ("dtype", |comm, odd| {
            if odd {
                comm.all_gather(&TensorView::from_slice(&[1_i32], &[1])?)?
            } else {
                comm.all_gather(&TensorView::from_slice(&[1_f32], &[1])?)?
            };
            Ok(())
        }),
        ("shape", |comm, odd| {
            let (data, columns) = ([0_f32; 6], if odd { 2 } else { 3 });
            comm.all_gather(&TensorView::from_slice(&data, &[6 / columns, columns])?).map(|_| ())
        }),
        ("count", |comm, odd| {
            let data = vec![0_f32; if odd { 4 } else { 5 }];
            comm.all_reduce(&TensorView::from_slice(&data, &[data.len()])?, Reduction::Sum).map(|_| ())
        }),
        ("counts", |comm, odd| {
            let data = [0_f32; 6];
            let counts = if odd { [3, 2, 1] } else { [2, 2, 2] };
            comm.reduce_scatter(&TensorView::from_slice(&data, &[6])?, &counts, Reduction::Sum).map(|_| ())
        }),
    ];
    for (name, call) in calls {
        let errors = errors(3, |comm| call(comm, comm.rank() == 1));
        assert_eq!(errors.len(), 3, "{name}");
        for error in errors {
            assert!(matches!(error, Error::Comm(CommError::Mismatch { .. })), "{name}: {error}");
        }
    }
}

#[test]
fn bad_arguments_of_one_rank_reach_the_others() {
    let data = [0_f32; 4];
    let view = || TensorView::from_slice(&data, &[2, 2]);
    type Call<'a> = &'a (dyn Fn(&Communicator) -> Result<()> + Sync);
    let calls: [(&str, Call<'_>); 4] = [
        ("strides", &|comm| comm.all_gather(&view()?.permute(&[1, 0])?).map(|_| ())),
        ("parts", &|comm| comm.all_to_all(&[view()?]).map(|_| ())),
        ("rank", &|comm| comm.send(3, Vec::new())),
        ("root", &|comm| comm.broadcast(comm.rank(), None).map(|_| ())),
    ];
    for (name, call) in calls {
        let results = on_ranks(3, |comm| if comm.rank() == 2 { call(comm) } else { comm.barrier() });
        let results: Vec<_> = results.into_iter().map(|result| result.and_then(Result::err)).collect();
        for told in &results[..2] {
            assert!(matches!(told, Some(Error::Comm(CommError::Refused { rank: 2, .. }))), "{name}: {told:?}");
        }
        let own = results[2].as_ref();
        let is_own = matches!(
            own,
            Some(
                Error::Problem(ProblemError::NotContiguous { .. } | ProblemError::Missing { .. })
                    | Error::Comm(CommError::Counts { .. } | CommError::NoSuchRank { .. })
            )
        );
        assert!(is_own, "{name}: {own:?}");
    }
}

#[test]
fn a_deadline_of_zero_is_refused() {
    let comm = Communicator::alone();
    assert_eq!(comm.set_deadline(Duration::ZERO), Err(CommError::ZeroDeadline.into()));
    assert_eq!(comm.deadline(), tilefold_comm::DEFAULT_DEADLINE);
}

#[test]
fn a_sum_beyond_i32_is_an_error_on_every_rank() {
    let errors = errors(3, |comm| {
        let mine = [1, i32::MAX, 2];
        comm.all_reduce(&TensorView::from_slice(&mine, &[3])?, Reduction::Sum).map(|_| ())
    });
    assert_eq!(errors.len(), 3, "{errors:?}");
    let own = errors.iter().filter(
        |error| matches!(error, Error::Comm(CommError::IntegerOverflow { sum, .. }) if *sum == 3 * i64::from(i32::MAX)),
    );
    assert_eq!(own.count(), 1, "{errors:?}");
}

#[test]
fn traffic_counts_what_leaves_a_rank() {
    let ranks = 4;
    for traffic in on_ranks(ranks, |comm| {
        comm.all_reduce(&TensorView::from_slice(&[0_f32; 40], &[40]).unwrap(), Reduction::Sum).unwrap();
        comm.traffic()["all_reduce"]
    }) {
        let traffic = traffic.unwrap();
        // Twice 3 of 4 parts of 10 elements.
        assert_eq!((traffic.calls, traffic.bytes_sent), (2, 2 * 3 * 40));
    }
}
