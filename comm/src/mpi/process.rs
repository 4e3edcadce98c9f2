//! What the ranks of this process and the pump share, and how MPI starts and ends.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::ffi::driver;
use super::pump;
use super::wire::{Header, Said};
use super::{Group, for_one};
use crate::communicator::DEFAULT_DEADLINE;
use crate::error::CommError;
use crate::transport::{Parcel, Transport};

/// The most bytes of one message: counts of MPI are below 2³¹.
const CHUNK_BYTES: usize = 1 << 30;

/// Another number than [`CHUNK_BYTES`], for tests.
const CHUNK_VARIABLE: &str = "TILEFOLD_MPI_CHUNK_BYTES";

/// How much longer than the pump's own patience an exit waits for the pump.
const GRACE: Duration = Duration::from_secs(5);

/// How long an exit waits for `MPI_Abort`. It may call `exit` in turn, and hang there.
const ABORT_LIMIT: Duration = Duration::from_secs(1);

/// Exit status of a process that gives up waiting; launchers end a job at any but 0.
const GAVE_UP: i32 = 1;

/// How long an exit waits for `MPI_Finalize`, for which every process is ready then. MPICH 4.0 over TCP hangs in it now and
/// then, as it does in programs of C: one process waits there for what another, there too, no longer sends.
const FINISH_LIMIT: Duration = Duration::from_secs(10);

static PROCESS: OnceLock<Process> = OnceLock::new();

/// This process, as one of an MPI job.
#[derive(Debug)]
pub(super) struct Process {
    desk: Mutex<Desk>,
    /// There is something for the pump to do.
    work: Condvar,
    /// The phase is another.
    phase: Condvar,
    /// Ranks that wait for others.
    waiting: AtomicUsize,
    chunk_bytes: usize,
}

/// What passes between ranks and pump.
#[derive(Debug, Default)]
pub(super) struct Desk {
    pub(super) phase: Phase,
    pub(super) outbox: Vec<Outgoing>,
    seats: HashMap<String, Seat>,
    /// Processes that have said goodbye.
    pub(super) left: BTreeSet<usize>,
    /// Processes that kept others waiting for longer than a deadline, and have not been heard of since.
    suspects: BTreeSet<usize>,
    /// The longest of those deadlines.
    patience: Duration,
    /// The longest deadline that a rank of this process has waited with.
    longest_wait: Duration,
    /// MPI itself has failed.
    broken: Option<CommError>,
    /// Groups of all processes made so far.
    worlds: u64,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum Phase {
    #[default]
    Idle,
    Starting,
    Running {
        rank: usize,
        world_size: usize,
    },
    /// The process is about to exit.
    Leaving,
    /// All processes are, and MPI ends.
    Finishing,
    /// Not all are: the job ends.
    Aborting,
    Ended(Option<CommError>),
}

/// A message for the pump to send.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) to: usize,
    pub(super) header: Vec<u8>,
    pub(super) parcel: Parcel,
}

/// One group as this process has it.
#[derive(Debug, Default)]
struct Seat {
    group: Option<Arc<Group>>,
    /// Words of ranks that have made the group earlier than this process.
    early: Vec<(Header, Parcel)>,
    /// Whether this process has dropped it, and of how many ranks.
    closed: Option<usize>,
    /// Other ranks that have dropped it.
    gone: usize,
}

/// Makes the pump look for messages more often while it lives.
#[derive(Debug)]
pub(super) struct Waiting(&'static Process);

impl Process {
    /// The one of this process, with MPI started.
    pub(super) fn get() -> Result<&'static Self, CommError> {
        let process = PROCESS.get_or_init(Self::new);
        let mut desk = process.lock();
        if desk.phase == Phase::Idle {
            desk.phase = Phase::Starting;
            if let Err(error) = process.start_pump() {
                desk.phase = Phase::Ended(Some(error));
            }
        }
        let end = Instant::now() + DEFAULT_DEADLINE;
        while desk.phase == Phase::Starting {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let (operation, deadline) = ("MPI_Init_thread".to_owned(), DEFAULT_DEADLINE);
                return Err(CommError::Deadline { operation, deadline, missing: Vec::new() });
            }
            desk = process.phase.wait_timeout(desk, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(process)
    }

    fn new() -> Self {
        let chunk_bytes = std::env::var(CHUNK_VARIABLE).ok().and_then(|bytes| bytes.parse().ok());
        let chunk_bytes = chunk_bytes.map_or(CHUNK_BYTES, |bytes: usize| bytes.clamp(1, CHUNK_BYTES));
        let (desk, work, phase) = (Mutex::default(), Condvar::new(), Condvar::new());
        Self { desk, work, phase, waiting: AtomicUsize::new(0), chunk_bytes }
    }

    fn start_pump(&'static self) -> Result<(), CommError> {
        let pump = thread::Builder::new().name("tilefold-mpi".into()).spawn(move || pump::run(self));
        pump.map_err(|error| driver("thread::spawn", error.raw_os_error().unwrap_or(-1), &error.to_string()))?;
        // SAFETY: the function takes nothing and is there until the process ends.
        let status = unsafe { libc::atexit(at_exit) };
        if status == 0 { Ok(()) } else { Err(driver("atexit", status, "no room for another function")) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn chunk_bytes(&self) -> usize {
        self.chunk_bytes
    }

    /// This process's rank among all, their number, and how many groups of all there are already.
    pub(super) fn next_world(&self) -> Result<(usize, usize, u64), CommError> {
        let mut desk = self.lock();
        match &desk.phase {
            &Phase::Running { rank, world_size } => {
                desk.worlds += 1;
                Ok((rank, world_size, desk.worlds - 1))
            }
            Phase::Ended(Some(error)) => Err(error.clone()),
            _ => Err(driver("MPI_Finalize", 0, "the process is about to exit")),
        }
    }

    /// Takes a place in a group, and what has come for it already.
    pub(super) fn open(&self, group: &Arc<Group>) {
        let mut desk = self.lock();
        let (broken, left) = (desk.broken.clone(), desk.left.clone());
        let seat = desk.seats.entry(group.name.clone()).or_default();
        seat.group = Some(Arc::clone(group));
        for (header, parcel) in std::mem::take(&mut seat.early) {
            group.hear(header, parcel);
        }
        left.into_iter().for_each(|process| group.process_left(process));
        if let Some(error) = broken {
            group.failed(error);
        }
    }

    /// Gives it up; what still comes is dropped.
    pub(super) fn close(&self, group: &Group) {
        let mut desk = self.lock();
        if let Some(seat) = desk.seats.get_mut(&group.name) {
            *seat = Seat { closed: Some(group.members.len()), gone: seat.gone, ..Seat::default() };
        }
        desk.forget(&group.name);
    }

    pub(super) fn hand_over(&self, messages: impl IntoIterator<Item = Outgoing>) {
        self.lock().outbox.extend(messages);
        self.work.notify_all();
    }

    /// Remembers who may be dead.
    pub(super) fn suspect(&self, group: &Group, error: &CommError) {
        if let CommError::Deadline { deadline, missing, .. } = error {
            let mut desk = self.lock();
            desk.patience = desk.patience.max(*deadline);
            desk.suspects.extend(missing.iter().filter_map(|&rank| group.members.get(rank)));
        }
    }

    pub(super) fn is_waited_for(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.lock().phase = phase;
        self.phase.notify_all();
    }

    /// Sleeps until there is work, for `most` at most.
    pub(super) fn rest(&self, most: Duration) {
        let desk = self.lock();
        if desk.outbox.is_empty() {
            drop(self.work.wait_timeout(desk, most));
        }
    }

    /// Waits for the end of MPI.
    fn leave(&self) {
        let mut desk = self.lock();
        if !matches!(desk.phase, Phase::Running { .. }) {
            return;
        }
        desk.phase = Phase::Leaving;
        self.work.notify_all();
        // The pump ends the job by itself when its patience does; the rest is for one that is stuck in a call.
        let started = Instant::now();
        while desk.phase == Phase::Leaving {
            let waited = started.elapsed().saturating_sub(GRACE);
            if desk.patience_left(waited).is_some_and(|left| left.is_zero()) {
                give_up();
            }
            desk = self.phase.wait_timeout(desk, GRACE).unwrap_or_else(PoisonError::into_inner).0;
        }
        if desk.phase == Phase::Aborting {
            drop(desk);
            thread::sleep(ABORT_LIMIT);
            give_up();
        }
        let finishing = |desk: &mut Desk| desk.phase == Phase::Finishing;
        let waited = self.phase.wait_timeout_while(desk, FINISH_LIMIT, finishing);
        if waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
            tracing::error!("MPI_Finalize does not return; all work is done");
        }
    }
}

impl Desk {
    /// Brings what a process has sent to its group.
    pub(super) fn bring(&mut self, source: usize, header: Header, parcel: Parcel) {
        self.suspects.remove(&source);
        if header.said == Said::Bye {
            self.left.insert(source);
            let groups = self.seats.values().filter_map(|seat| seat.group.as_ref());
            groups.for_each(|group| group.process_left(source));
            return;
        }
        let name = header.group.clone();
        let seat = self.seats.entry(name.clone()).or_default();
        seat.gone += usize::from(matches!(header.said, Said::Gone { .. }));
        match &seat.group {
            Some(group) => group.hear(header, parcel),
            None if seat.closed.is_none() => seat.early.push((header, parcel)),
            None => {}
        }
        self.forget(&name);
    }

    /// Forgets a group that everybody has dropped.
    fn forget(&mut self, name: &str) {
        if self.seats.get(name).is_some_and(|seat| seat.closed.is_some_and(|ranks| seat.gone + 1 == ranks)) {
            self.seats.remove(name);
        }
    }

    /// MPI has failed: so have all groups. Their other ranks are told, for as long as it still sends.
    pub(super) fn break_down(&mut self, error: &CommError) {
        if self.broken.is_none() {
            self.broken = Some(error.clone());
        }
        for group in self.seats.values().filter_map(|seat| seat.group.as_ref()) {
            let failure = group.place.fail(error.clone());
            if !group.told.swap(true, Ordering::Relaxed) {
                self.outbox.extend(group.to_others(&Said::Failed(failure)));
            }
        }
    }

    fn patience(&self) -> Duration {
        let known = [self.patience, self.longest_wait.min(DEFAULT_DEADLINE)];
        known.into_iter().find(|deadline| !deadline.is_zero()).unwrap_or(DEFAULT_DEADLINE)
    }

    /// How much longer to wait for the goodbyes of others; `None`: until they come.
    pub(super) fn patience_left(&self, waited: Duration) -> Option<Duration> {
        let in_doubt = self.broken.is_some() || self.suspects.iter().any(|suspect| !self.left.contains(suspect));
        in_doubt.then(|| self.patience().saturating_sub(waited))
    }
}

impl Group {
    fn hear(&self, header: Header, parcel: Parcel) {
        let from = header.from;
        // A group that has failed takes nothing more; whoever waits in it knows.
        let _taken = match header.said {
            Said::Post { number, operation } => {
                self.place.bring(from, number, &operation, for_one(self.place.rank(), parcel))
            }
            Said::Letter { operation } => self.place.deliver(from, self.place.rank(), &operation, parcel),
            Said::Gone { panicked } => {
                self.place.leave(from, panicked);
                Ok(())
            }
            Said::Failed(error) => {
                self.failed(error);
                Ok(())
            }
            Said::Bye => Ok(()),
        };
    }

    fn process_left(&self, process: usize) {
        if let Some(rank) = self.members.iter().position(|&member| member == process) {
            self.place.leave(rank, false);
        }
    }
}

impl Waiting {
    pub(super) fn new(process: &'static Process, deadline: Duration) -> Self {
        let mut desk = process.lock();
        desk.longest_wait = desk.longest_wait.max(deadline);
        drop(desk);
        process.waiting.fetch_add(1, Ordering::Relaxed);
        process.work.notify_all();
        Self(process)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Ends the process without what else is registered for its exit: it waits for MPI, too.
fn give_up() -> ! {
    // SAFETY: the process does nothing any more; what other exit handlers would do is given up on purpose.
    unsafe { libc::_exit(GAVE_UP) }
}

/// Runs when `main` returns or the program calls `exit`.
extern "C" fn at_exit() {
    if let Some(process) = PROCESS.get() {
        process.leave();
    }
}
