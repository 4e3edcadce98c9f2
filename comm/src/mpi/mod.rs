//! Ranks as processes of an MPI job.
//!
//! One thread of each process, the *pump*, makes all calls of MPI ([`pump`]). It starts what the ranks of this process
//! hand to it ([`process`]), and brings what other processes send to the place where they wait: the same
//! [`ThreadGroup`] that ranks in threads have, so what they get, errors too, is the same.
//!
//! ```text
//! rank      post, send, drop -> outbox                       collect, receive <- place of its group
//! pump      outbox -> header, tensors: Isend                 Iprobe -> header; its tensors: Irecv -> place
//! ```
//!
//! Why a thread. MPI moves large messages only while it is called. With a pump they travel while a rank computes, a
//! rank learns of a failure wherever it is, and a rank waits on a condition with a deadline, never inside MPI.
//!
//! *Groups* are names in headers, over one communicator of MPI, so none is made or freed after the start. *Messages*
//! from one process to another arrive in order; a header names dtypes and shapes of the tensors that follow it, each in
//! chunks, since counts of MPI have 32 bits. *Failures*: the rank that finds one tells the others of its group. *End*:
//! at its exit each process says goodbye and stays until all others have, so whatever it has sent is received.

mod ffi;
mod process;
mod pump;
mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use self::process::{Outgoing, Process, Waiting};
use self::wire::{Header, Said};
use crate::error::CommError;
use crate::threads::ThreadGroup;
use crate::transport::{Engine, Parcel, Transport};

/// One rank's place in a group of processes.
#[derive(Debug)]
pub(crate) struct MpiGroup {
    process: &'static Process,
    group: Arc<Group>,
}

/// What the pump knows of it too.
#[derive(Debug)]
struct Group {
    name: String,
    /// Where others' words arrive.
    place: ThreadGroup,
    /// Numbers of its ranks among all processes.
    members: Vec<usize>,
    /// Whether all members know of the group's failure.
    told: AtomicBool,
}

impl MpiGroup {
    /// A group of all processes; MPI starts at the first call. Every process makes its groups in the same order.
    pub(crate) fn world() -> Result<Self, CommError> {
        let process = Process::get()?;
        let (rank, world_size, number) = process.next_world()?;
        Ok(Self::open(process, number.to_string(), rank, (0..world_size).collect()))
    }

    fn open(process: &'static Process, name: String, rank: usize, members: Vec<usize>) -> Self {
        let place = ThreadGroup::apart(rank, members.len());
        let group = Arc::new(Group { name, place, members, told: AtomicBool::new(false) });
        process.open(&group);
        Self { process, group }
    }

    fn outgoing(&self, to: usize, said: Said, parcel: Parcel) -> Outgoing {
        let tensors = parcel.iter().map(|tensor| (tensor.dtype(), tensor.shape().to_vec())).collect();
        let (group, from) = (self.group.name.clone(), self.rank());
        let header = Header { group, from, chunk_bytes: self.process.chunk_bytes(), said, tensors };
        Outgoing { to: self.group.members[to], header: header.encode(), parcel }
    }

    /// Says the same to all others.
    fn say(&self, said: &Said) {
        self.process.hand_over(self.group.to_others(said));
    }

    /// Passes a failure on, once.
    fn tell<T>(&self, result: Result<T, CommError>) -> Result<T, CommError> {
        if let Err(error) = &result
            && !self.group.told.swap(true, Ordering::Relaxed)
        {
            self.process.suspect(&self.group, error);
            self.say(&Said::Failed(error.clone()));
        }
        result
    }
}

impl Group {
    /// The same words, without tensors, for every other rank.
    fn to_others(&self, said: &Said) -> impl Iterator<Item = Outgoing> {
        let from = self.place.rank();
        let header = Header { group: self.name.clone(), from, chunk_bytes: 0, said: said.clone(), tensors: Vec::new() };
        let header = header.encode();
        let others = self.members.iter().enumerate().filter(move |(rank, _)| *rank != from);
        others.map(move |(_, &to)| Outgoing { to, header: header.clone(), parcel: Parcel::new() })
    }

    /// A failure that another rank found, and told everyone.
    fn failed(&self, error: CommError) {
        self.told.store(true, Ordering::Relaxed);
        self.place.fail(error);
    }
}

impl Transport for MpiGroup {
    fn rank(&self) -> usize {
        self.group.place.rank()
    }

    fn world_size(&self) -> usize {
        self.group.members.len()
    }

    fn post(&self, number: u64, operation: &str, mut parcels: Vec<Parcel>) -> Result<(), CommError> {
        let here = self.rank();
        let own = parcels.get_mut(here).map(std::mem::take).unwrap_or_default();
        self.group.place.bring(here, number, operation, for_one(here, own))?;
        let said = Said::Post { number, operation: operation.to_owned() };
        let others = parcels.into_iter().enumerate().filter(|(to, _)| *to != here);
        self.process.hand_over(others.map(|(to, parcel)| self.outgoing(to, said.clone(), parcel)));
        Ok(())
    }

    fn collect(&self, number: u64, operation: &str, deadline: Duration) -> Result<Vec<Parcel>, CommError> {
        let _waiting = Waiting::new(self.process, deadline);
        self.tell(self.group.place.collect(number, operation, deadline))
    }

    fn send(&self, to: usize, operation: &str, parcel: Parcel) -> Result<(), CommError> {
        if to == self.rank() {
            return self.group.place.send(to, operation, parcel);
        }
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        let said = Said::Letter { operation: operation.to_owned() };
        self.process.hand_over([self.outgoing(to, said, parcel)]);
        Ok(())
    }

    fn receive(&self, from: usize, operation: &str, deadline: Duration) -> Result<Parcel, CommError> {
        let _waiting = Waiting::new(self.process, deadline);
        self.tell(self.group.place.receive(from, operation, deadline))
    }

    fn subgroup(&self, number: u64, members: &[usize]) -> Result<Engine, CommError> {
        // Groups of one exchange have no member in common, so one name does for all of them.
        let name = format!("{}/{number}", self.group.name);
        let rank = members.iter().position(|&rank| rank == self.rank()).unwrap_or(0);
        let members = members.iter().map(|&rank| self.group.members[rank]).collect();
        Ok(Self::open(self.process, name, rank, members).into())
    }

    fn fail(&self, error: CommError) -> CommError {
        let failure = self.group.place.fail(error);
        match self.tell(Err::<(), _>(failure)) {
            Ok(()) => CommError::Unusable { first: String::new() },
            Err(failure) => failure,
        }
    }

    fn failure(&self) -> Option<CommError> {
        self.group.place.failure()
    }
}

impl Drop for MpiGroup {
    fn drop(&mut self) {
        self.say(&Said::Gone { panicked: std::thread::panicking() });
        self.process.close(&self.group);
    }
}

/// Parcels of an exchange, of which only that of rank `here` is at hand.
fn for_one(here: usize, parcel: Parcel) -> Vec<Parcel> {
    let mut parcels = vec![Parcel::new(); here];
    parcels.push(parcel);
    parcels
}
