//! What each process does: rank 1 of three is the one that fails.

use std::process::Command;
use std::ptr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use std::{process, thread};

use tilefold_comm::{CommError, Communicator, Error, Reduction, Result, Shift};
use tilefold_core::{DType, Tensor, TensorView};

use crate::job::{Role, say};
use crate::{DEADLINE, checks, comm_error, world};

/// More than any MPI sends without the receiver's asking for it.
const LARGE: usize = 5_000_000;
/// Elements, and the bytes that a process has beyond what it uses: a quarter of what those take.
const HUGE: usize = 1 << 28;
const LATE: Duration = Duration::from_secs(1);
static RANK: OnceLock<usize> = OnceLock::new();
/// Stands before an error in a rank's word.
const ERROR: &str = "error: ";

pub(crate) fn play(role: Role) {
    if role == Role::Foreign {
        return after_another_start();
    }
    let comm = world();
    let rank = *RANK.get_or_init(|| comm.rank());
    match role {
        Role::Checks => {
            comm.set_deadline(Duration::from_secs(40)).unwrap();
            checks::all(&comm).unwrap();
        }
        Role::Faults => faults(&comm),
        Role::Farewell => farewell(comm),
        Role::Long => {
            if rank == 1 {
                // Longer than a deadline.
                thread::sleep(DEADLINE + LATE);
            }
        }
        Role::NoRoom => return no_room(&comm),
        _ => return die(role, &comm),
    }
    say(rank, "ok");
}

/// MPI is someone else's already: it is left alone.
fn after_another_start() {
    let (mut rank, mut provided) = (0, 0);
    // SAFETY: the first call of MPI; null stands for no arguments, by the standard; the places are valid.
    let statuses = unsafe {
        let funneled = mpi_sys::RSMPI_THREAD_FUNNELED;
        let started = mpi_sys::MPI_Init_thread(ptr::null_mut(), ptr::null_mut(), funneled, &raw mut provided);
        [started, mpi_sys::MPI_Comm_rank(mpi_sys::RSMPI_COMM_WORLD, &raw mut rank)]
    };
    assert_eq!(statuses, [0; 2]);
    for _ in 0..2 {
        let error = comm_error(Communicator::mpi().map(|_| ())).unwrap();
        let CommError::Driver { call: "MPI_Initialized", message, .. } = &error else { panic!("{error}") };
        assert!(message.contains("call Communicator::mpi before it does"), "{message}");
    }
    // SAFETY: this thread has started it.
    assert_eq!(unsafe { mpi_sys::MPI_Finalize() }, 0);
    say(usize::try_from(rank).unwrap(), "ok");
}

/// Rank 1's process has no memory for what rank 0 sends; nobody of the others waits for its deadline to hear of it.
fn no_room(comm: &Communicator) {
    small(comm).unwrap();
    if comm.rank() == 1 {
        let used = std::fs::read_to_string("/proc/self/statm").unwrap();
        let used: u64 = used.split(' ').next().unwrap().parse().unwrap();
        // SAFETY: a constant of the system.
        let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap();
        let most = used * page + HUGE as u64;
        // SAFETY: the place is valid.
        let status = unsafe { libc::setrlimit(libc::RLIMIT_AS, &libc::rlimit { rlim_cur: most, rlim_max: most }) };
        assert_eq!(status, 0);
    }
    small(comm).unwrap();
    let started = Instant::now();
    let work = || {
        if comm.rank() == 0 {
            comm.send(1, vec![Arc::new(Tensor::zeros(DType::F32, &[HUGE])?)])?;
        }
        comm.receive((comm.rank() + 2) % 3).map(|_| ())
    };
    let error = comm_error(work()).unwrap();
    assert!(started.elapsed() < DEADLINE, "{error}");
    assert!(!comm.is_usable());
    say(comm.rank(), &write_error(&error));
}

/// Rank 1's process ends between two collectives.
fn die(role: Role, comm: &Communicator) {
    let work = || {
        small(comm)?;
        let shift = || comm.begin_shift("shift", comm.neighbour(1), large()?, comm.neighbour(-1));
        let under_way = (role == Role::KillUnderWay).then(shift).transpose()?;
        if comm.rank() == 1 {
            match role {
                Role::Panic => panic!("planted"),
                Role::Exit => process::exit(3),
                Role::Kill | Role::KillUnderWay => signal("-KILL"),
                // Its other thread, too, falls silent.
                Role::Stop => signal("-STOP"),
                // For longer than the driver's limit.
                _ => thread::sleep(Duration::from_secs(600)),
            }
        }
        under_way.map(Shift::finish).transpose()?;
        small(comm)
    };
    let started = Instant::now();
    let error = comm_error(work()).unwrap();
    assert!(started.elapsed() < DEADLINE + LATE);
    assert!(!comm.is_usable());
    say(comm.rank(), &write_error(&error));
}

fn signal(signal: &str) {
    Command::new("kill").args([signal, &process::id().to_string()]).status().unwrap();
}

fn write_error(error: &CommError) -> String {
    match error {
        CommError::Lost { rank, panicked, .. } => format!("{ERROR}lost {rank} {panicked}"),
        CommError::Deadline { missing, .. } => {
            let missing: Vec<_> = missing.iter().map(usize::to_string).collect();
            format!("{ERROR}deadline {}", missing.join(" "))
        }
        other => format!("{ERROR}driver {other}"),
    }
}

/// The error that a rank has written, as far as the driver looks at it.
pub(crate) fn read_error(word: &str) -> Option<CommError> {
    let words: Vec<&str> = word.strip_prefix(ERROR)?.split(' ').collect();
    let operation = String::new();
    match *words.first()? {
        "lost" => {
            Some(CommError::Lost { rank: words.get(1)?.parse().ok()?, panicked: words.get(2)? == &"true", operation })
        }
        "deadline" => {
            let missing = words[1..].iter().map(|rank| rank.parse().ok()).collect::<Option<_>>()?;
            Some(CommError::Deadline { operation, deadline: DEADLINE, missing })
        }
        _ => Some(CommError::Driver { call: "a call", status: 0, message: word.to_owned() }),
    }
}

fn small(comm: &Communicator) -> Result<()> {
    comm.all_reduce(&TensorView::from_slice(&[1_f32, 2.0], &[2])?, Reduction::Sum).map(|_| ())
}

fn large() -> Result<Vec<Arc<Tensor>>> {
    Ok(vec![Arc::new(Tensor::zeros(DType::F32, &[LARGE])?)])
}

/// Everybody but the last rank is at the exit already when it asks for what was sent.
fn farewell(comm: Communicator) {
    match comm.rank() {
        1 => comm.send(2, large().unwrap()).unwrap(),
        2 => {
            thread::sleep(LATE);
            assert_eq!(comm.receive(1).unwrap()[0].shape(), [LARGE]);
            // Who has left by then is known.
            let error = comm_error(comm.receive(0).map(|_| ())).unwrap();
            assert!(matches!(error, CommError::Lost { rank: 0, panicked: false, .. }), "{error}");
        }
        _ => {}
    }
}

/// Groups fail, each in its own way; `steady`, of the same processes, does not.
fn faults(steady: &Communicator) {
    steady.set_deadline(Duration::from_secs(40)).unwrap();
    type Fault = (&'static str, fn());
    let all: [Fault; 10] = [
        ("panics before and between collectives", panics),
        ("a panic under way", panic_under_way),
        ("a panic after the end", panic_after_the_end),
        ("a rank leaves", leaves),
        ("a rank is late", late),
        ("calls differ", calls_differ),
        ("arguments are refused", refused),
        ("a deadline of zero", zero_deadline),
        ("a group of a group fails", subgroup_fails),
        ("a shift overlaps", overlap),
    ];
    for (name, fault) in all {
        fault();
        steady.barrier().unwrap_or_else(|error| panic!("after {name}: {error}"));
    }
    assert!(steady.is_usable());
}

/// What a rank has, in a new group of all; `None` when it panicked.
fn on_this_rank(work: impl FnOnce(&Communicator) -> Result<()> + Send) -> Option<Result<()>> {
    let comm = world();
    thread::scope(|scope| {
        let work = scope.spawn(move || {
            let result = work(&comm);
            if result.is_err() {
                assert!(!comm.is_usable());
                let again = comm.barrier();
                assert!(matches!(again, Err(Error::Comm(CommError::Unusable { .. }))), "{again:?}");
            }
            result
        });
        work.join().ok()
    })
}

fn rank() -> usize {
    RANK.get().copied().unwrap()
}

/// The error of this rank, which must have one.
fn error(work: impl FnOnce(&Communicator) -> Result<()> + Send) -> Error {
    on_this_rank(work).unwrap().unwrap_err()
}

fn expect_panic_of_rank_1(work: impl FnOnce(&Communicator) -> Result<()> + Send) {
    let result = on_this_rank(work);
    if rank() == 1 {
        assert_eq!(result, None);
        return;
    }
    let Some(Err(Error::Comm(CommError::Lost { rank: 1, panicked: true, .. }))) = result else {
        panic!("expected the loss of rank 1, got {result:?}")
    };
}

fn panics() {
    for before in [0, 1, 3] {
        expect_panic_of_rank_1(|comm| {
            for round in 0..5 {
                assert!(!(comm.rank() == 1 && round == before), "planted");
                small(comm)?;
            }
            Ok(())
        });
    }
}

fn panic_under_way() {
    expect_panic_of_rank_1(|comm| {
        let shift = comm.begin_shift("shift", comm.neighbour(1), large()?, comm.neighbour(-1))?;
        assert!(comm.rank() != 1, "planted");
        shift.finish()?;
        comm.barrier()
    });
}

fn panic_after_the_end() {
    let result = on_this_rank(|comm| {
        let result = small(comm);
        assert!(comm.rank() != 1, "planted");
        result
    });
    assert_eq!(result, (rank() != 1).then_some(Ok(())));
}

fn leaves() {
    let result = on_this_rank(|comm| if comm.rank() == 1 { Ok(()) } else { comm.barrier() });
    let lost = CommError::Lost { rank: 1, panicked: false, operation: "barrier".into() };
    assert_eq!(result, Some(if rank() == 1 { Ok(()) } else { Err(lost.into()) }));
}

fn late() {
    let error = error(|comm| {
        // All begin at the same time.
        comm.barrier()?;
        comm.set_deadline(LATE)?;
        if comm.rank() == 1 {
            thread::sleep(2 * LATE);
        }
        let started = Instant::now();
        let result = small(comm);
        assert!(started.elapsed() < 2 * LATE);
        result
    });
    let Error::Comm(CommError::Deadline { missing, deadline, .. }) = error else { panic!("{error}") };
    assert_eq!((missing, deadline), (vec![1], LATE));
}

/// Rank 1 differs from the others in the operation, the dtype, the shape, the counts.
fn calls_differ() {
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
            let dtype = if odd { DType::I32 } else { DType::F32 };
            comm.all_gather(&Tensor::zeros(dtype, &[1])?.view()).map(|_| ())
        }),
        ("shape", |comm, odd| {
            let columns = if odd { 2 } else { 3 };
            comm.all_gather(&Tensor::zeros(DType::F32, &[6 / columns, columns])?.view()).map(|_| ())
        }),
        ("count", |comm, odd| {
            let values = Tensor::zeros(DType::F16, &[if odd { 4 } else { 5 }])?;
            comm.all_reduce(&values.view(), Reduction::Sum).map(|_| ())
        }),
        ("counts", |comm, odd| {
            let counts = if odd { [3, 2, 1] } else { [2, 2, 2] };
            comm.reduce_scatter(&Tensor::zeros(DType::F32, &[6])?.view(), &counts, Reduction::Sum).map(|_| ())
        }),
    ];
    for (name, call) in calls {
        let error = error(|comm| call(comm, comm.rank() == 1));
        assert!(matches!(error, Error::Comm(CommError::Mismatch { .. })), "{name}: {error}");
    }
}

/// Rank 1's arguments are wrong by themselves.
fn refused() {
    let error = error(|comm| if comm.rank() == 1 { comm.send(3, Vec::new()) } else { comm.barrier() });
    let own = CommError::NoSuchRank { parameter: "to", world_size: 3, got: 3 };
    let told = CommError::Refused { operation: "send".into(), rank: 1, message: own.to_string() };
    assert_eq!(error, if rank() == 1 { own } else { told }.into());
}

fn zero_deadline() {
    let comm = world();
    assert_eq!(comm.set_deadline(Duration::ZERO), Err(CommError::ZeroDeadline.into()));
    assert_eq!(comm.deadline(), DEADLINE);
}

/// Ranks 1 and 2 of all; the group they are of does not notice.
fn subgroup_fails() {
    let whole = world();
    let group = whole.split(u32::from(whole.rank() > 0), 0).unwrap();
    let result = thread::scope(|scope| {
        let work = scope.spawn(move || {
            assert!(rank() != 1, "planted");
            small(&group)
        });
        work.join().ok()
    });
    match whole.rank() {
        0 => assert_eq!(result, Some(Ok(()))),
        1 => assert_eq!(result, None),
        _ => {
            let lost = CommError::Lost { rank: 0, panicked: true, operation: "all_reduce sum f32 [2]".into() };
            assert_eq!(result, Some(Err(lost.into())));
        }
    }
    small(&whole).unwrap();
}

/// What rank 0 has begun to send arrives although rank 0 makes no call.
fn overlap() {
    let comm = world();
    comm.barrier().unwrap();
    if comm.rank() == 0 {
        let shift = comm.begin_shift("shift", 1, large().unwrap(), 1).unwrap();
        thread::sleep(2 * LATE);
        shift.finish().unwrap();
    } else if comm.rank() == 1 {
        comm.set_deadline(LATE).unwrap();
        comm.begin_shift("shift", 0, Vec::new(), 0).unwrap().finish().unwrap();
    }
}
