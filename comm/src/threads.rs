//! Ranks as threads of one process: tensors are handed over, not copied.
//!
//! The same place serves a rank whose peers are in other processes: there, an engine brings what they say.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::CommError;
use crate::transport::{Engine, Parcel, Transport};

/// One rank's place in a group.
#[derive(Debug)]
pub(crate) struct ThreadGroup {
    rank: usize,
    shared: Arc<Shared>,
}

/// What the ranks of a group share.
#[derive(Debug)]
struct Shared {
    world_size: usize,
    /// Ranks that fetch from an exchange here: all, or one whose peers are in other processes.
    fetching: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    failure: Option<CommError>,
    /// Ranks that dropped their place, and whether in a panic.
    gone: HashMap<usize, bool>,
    rounds: HashMap<u64, Round>,
    /// By sender and receiver.
    letters: HashMap<(usize, usize), VecDeque<(String, Parcel)>>,
    /// Groups being made, by exchange and members, until each member has its place.
    subgroups: HashMap<(u64, Vec<usize>), (Arc<Shared>, usize)>,
}

/// One exchange: what each rank brought, and how many have yet to fetch.
#[derive(Debug)]
struct Round {
    posted: Vec<Option<(String, Vec<Parcel>)>>,
    to_fetch: usize,
}

impl ThreadGroup {
    /// All places of a new group, by rank.
    pub(crate) fn world(world_size: usize) -> Vec<Self> {
        let shared = Shared::new(world_size, world_size);
        (0..world_size).map(|rank| Self { rank, shared: Arc::clone(&shared) }).collect()
    }

    /// The place of a rank whose peers are in other processes.
    #[cfg(feature = "mpi")]
    pub(crate) fn apart(rank: usize, world_size: usize) -> Self {
        Self { rank, shared: Shared::new(world_size, 1) }
    }

    /// What a rank brings to an exchange: one parcel for each rank.
    ///
    /// # Errors
    /// The group's failure, when there has been one.
    pub(crate) fn bring(
        &self,
        from: usize,
        number: u64,
        operation: &str,
        parcels: Vec<Parcel>,
    ) -> Result<(), CommError> {
        let mut state = self.shared.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        let (ranks, to_fetch) = (self.shared.world_size, self.shared.fetching);
        let round = state
            .rounds
            .entry(number)
            .or_insert_with(|| Round { posted: (0..ranks).map(|_| None).collect(), to_fetch });
        round.posted[from] = Some((operation.to_owned(), parcels));
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// A letter of one rank to another.
    ///
    /// # Errors
    /// The group's failure, when there has been one.
    pub(crate) fn deliver(&self, from: usize, to: usize, operation: &str, parcel: Parcel) -> Result<(), CommError> {
        let mut state = self.shared.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        state.letters.entry((from, to)).or_default().push_back((operation.to_owned(), parcel));
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// A rank is gone; the first word about it counts.
    pub(crate) fn leave(&self, rank: usize, panicked: bool) {
        self.shared.lock().gone.entry(rank).or_insert(panicked);
        self.shared.changed.notify_all();
    }

    /// Waits until `ready` gives something, the group fails, or time is up; `missing` says who is waited for.
    fn wait<T>(
        &self,
        operation: &str,
        deadline: Duration,
        mut ready: impl FnMut(&mut State) -> Result<Option<T>, CommError>,
        missing: impl Fn(&State) -> Vec<usize>,
    ) -> Result<T, CommError> {
        let end = Instant::now().checked_add(deadline);
        let mut state = self.shared.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let error = match ready(&mut state) {
                Ok(Some(result)) => return Ok(result),
                Err(error) => error,
                Ok(None) => {
                    let missing = missing(&state);
                    let left = end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
                    let operation = operation.to_owned();
                    if let Some((&rank, &panicked)) = missing.iter().find_map(|rank| state.gone.get_key_value(rank)) {
                        CommError::Lost { rank, panicked, operation }
                    } else if left.is_zero() {
                        CommError::Deadline { operation, deadline, missing }
                    } else {
                        let waited = self.shared.changed.wait_timeout(state, left);
                        state = waited.unwrap_or_else(PoisonError::into_inner).0;
                        continue;
                    }
                }
            };
            state.failure = Some(error.clone());
            self.shared.changed.notify_all();
            return Err(error);
        }
    }
}

impl Shared {
    fn new(world_size: usize, fetching: usize) -> Arc<Self> {
        Arc::new(Self { world_size, fetching, state: Mutex::default(), changed: Condvar::new() })
    }

    /// A panic of another rank leaves the state whole: every change is made under one lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Transport for ThreadGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.shared.world_size
    }

    fn post(&self, number: u64, operation: &str, parcels: Vec<Parcel>) -> Result<(), CommError> {
        self.bring(self.rank, number, operation, parcels)
    }

    fn collect(&self, number: u64, operation: &str, deadline: Duration) -> Result<Vec<Parcel>, CommError> {
        let here = self.rank;
        let ready = |state: &mut State| {
            let Some(round) = state.rounds.get_mut(&number) else { return Ok(None) };
            let called = round.posted.iter().enumerate().filter_map(|(rank, posted)| Some((rank, &posted.as_ref()?.0)));
            let mut called = called.peekable();
            let first = called.peek().map(|&(rank, operation)| (rank, operation.clone()));
            if let (Some((rank, operation)), Some((other, theirs))) =
                (&first, first.as_ref().and_then(|(_, operation)| called.find(|(_, theirs)| *theirs != operation)))
            {
                let operations = [operation.clone(), theirs.clone()];
                return Err(CommError::Mismatch { ranks: [*rank, other], operations });
            }
            if round.posted.iter().any(Option::is_none) {
                return Ok(None);
            }
            let parcels = round.posted.iter_mut().flatten();
            let parcels = parcels.map(|(_, parcels)| std::mem::take(&mut parcels[here])).collect();
            round.to_fetch -= 1;
            if round.to_fetch == 0 {
                state.rounds.remove(&number);
            }
            Ok(Some(parcels))
        };
        let missing = |state: &State| {
            let posted = |rank: &usize| state.rounds.get(&number).is_some_and(|round| round.posted[*rank].is_some());
            (0..self.shared.world_size).filter(|rank| !posted(rank)).collect()
        };
        self.wait(operation, deadline, ready, missing)
    }

    fn send(&self, to: usize, operation: &str, parcel: Parcel) -> Result<(), CommError> {
        self.deliver(self.rank, to, operation, parcel)
    }

    fn receive(&self, from: usize, operation: &str, deadline: Duration) -> Result<Parcel, CommError> {
        let here = self.rank;
        let ready = |state: &mut State| {
            let letter = state.letters.get_mut(&(from, here)).and_then(VecDeque::pop_front);
            let Some((theirs, parcel)) = letter else { return Ok(None) };
            if theirs == operation {
                return Ok(Some(parcel));
            }
            Err(CommError::Mismatch { ranks: [here, from], operations: [operation.to_owned(), theirs] })
        };
        self.wait(operation, deadline, ready, |_| vec![from])
    }

    fn subgroup(&self, number: u64, members: &[usize]) -> Result<Engine, CommError> {
        let mut state = self.shared.lock();
        let key = (number, members.to_vec());
        let entry = state.subgroups.entry(key.clone());
        let (shared, to_come) = entry.or_insert_with(|| (Shared::new(members.len(), members.len()), members.len()));
        *to_come -= 1;
        let (shared, complete) = (Arc::clone(shared), *to_come == 0);
        if complete {
            state.subgroups.remove(&key);
        }
        let rank = members.iter().position(|&rank| rank == self.rank).unwrap_or(0);
        Ok(Self { rank, shared }.into())
    }

    fn fail(&self, error: CommError) -> CommError {
        let mut state = self.shared.lock();
        let failure = state.failure.get_or_insert(error).clone();
        drop(state);
        self.shared.changed.notify_all();
        failure
    }

    fn failure(&self) -> Option<CommError> {
        self.shared.lock().failure.clone()
    }
}

impl Drop for ThreadGroup {
    fn drop(&mut self) {
        self.leave(self.rank, std::thread::panicking());
    }
}
