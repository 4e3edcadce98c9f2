//! The thread that makes all calls of MPI of its process.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tilefold_core::Tensor;

use super::ffi::{InFlight, Memory, Tag, World, driver};
use super::process::{Outgoing, Phase, Process};
use super::wire::{Header, Said};
use crate::error::CommError;
use crate::transport::Parcel;

/// How long after the last message, while a rank waits, the pump looks for the next without sleeping.
const SPIN: Duration = Duration::from_micros(200);
/// Its sleep then.
const NAP: Duration = Duration::from_micros(50);
/// Its sleep while no rank waits: what others begin to send takes so long to start.
const SLEEP: Duration = Duration::from_millis(1);

/// What a pump has in its hands.
struct Pump {
    process: &'static Process,
    world: World,
    sending: Vec<InFlight>,
    /// By sender, in the order of their headers.
    arriving: Vec<VecDeque<Arriving>>,
    /// An error has left messages out of step: nothing more is received.
    deaf: bool,
}

/// A message on its way here.
enum Arriving {
    Header(InFlight),
    Tensors(Header, Vec<InFlight>),
}

/// The thread's life.
pub(super) fn run(process: &'static Process) {
    // A panic, too, ends the phase, so that nobody waits for this thread.
    let _ended = Ended(process);
    let world = match World::start() {
        Ok(world) => world,
        Err(error) => return process.enter(Phase::Ended(Some(error))),
    };
    let arriving = (0..world.world_size()).map(|_| VecDeque::new()).collect();
    process.enter(Phase::Running { rank: world.rank(), world_size: world.world_size() });
    let mut pump = Pump { process, world, sending: Vec::new(), arriving, deaf: false };
    pump.work_until_leaving();
    if pump.say_goodbye() {
        process.enter(Phase::Finishing);
        if let Err(error) = pump.world.finish() {
            tracing::error!(%error, "MPI did not end well");
        }
    } else {
        tracing::error!("processes that do not answer: ending the job");
        process.enter(Phase::Aborting);
        pump.world.abort();
    }
}

impl Pump {
    fn work_until_leaving(&mut self) {
        let mut last = Instant::now();
        while self.process.lock().phase != Phase::Leaving {
            if self.turn() {
                last = Instant::now();
            }
            let waited_for = self.process.is_waited_for() || !self.sending.is_empty() || self.is_receiving();
            if !waited_for {
                self.process.rest(SLEEP);
            } else if last.elapsed() < SPIN {
                thread::yield_now();
            } else {
                self.process.rest(NAP);
            }
        }
    }

    /// Whether all others have said goodbye too, and everything has arrived.
    fn say_goodbye(&mut self) -> bool {
        let (started, bye) = (Instant::now(), Header::bye(self.world.rank()).encode());
        let others = (0..self.world.world_size()).filter(|&to| to != self.world.rank());
        let byes = others.map(|to| Outgoing { to, header: bye.clone(), parcel: Vec::new() });
        self.process.hand_over(byes);
        loop {
            let moved = self.turn();
            let desk = self.process.lock();
            let all_left = desk.left.len() + 1 == self.world.world_size();
            if all_left && desk.outbox.is_empty() && self.sending.is_empty() && !self.deaf {
                return true;
            }
            if desk.patience_left(started.elapsed()).is_some_and(|left| left.is_zero()) {
                return false;
            }
            drop(desk);
            if !moved {
                self.process.rest(SLEEP);
            }
        }
    }

    fn is_receiving(&self) -> bool {
        self.arriving.iter().any(|queue| !queue.is_empty())
    }

    /// Moves everything as far as it goes; whether anything moved.
    fn turn(&mut self) -> bool {
        let mut errors = Vec::new();
        let outbox = std::mem::take(&mut self.process.lock().outbox);
        let mut moved = !outbox.is_empty();
        for message in outbox {
            errors.extend(self.begin_to_send(message).err());
        }
        let before = self.sending.len();
        // A send that fails is given up; its memory leaks.
        self.sending.retain_mut(|flight| match flight.poll() {
            Ok(done) => !done,
            Err(error) => {
                errors.push(error);
                false
            }
        });
        moved |= self.sending.len() != before;
        if !self.deaf {
            match self.listen() {
                Ok(heard) => moved |= heard,
                Err(error) => {
                    self.deaf = true;
                    errors.push(error);
                }
            }
        }
        if let Some(error) = errors.into_iter().next() {
            tracing::error!(%error, "MPI failed");
            self.process.lock().break_down(&error);
        }
        moved
    }

    fn begin_to_send(&mut self, message: Outgoing) -> Result<(), CommError> {
        let Outgoing { to, header, parcel } = message;
        let chunk_bytes = self.process.chunk_bytes();
        // A header is one message, however long.
        let whole = header.len();
        self.sending.push(self.world.send(to, Tag::Header, Memory::Bytes(header), whole)?);
        for tensor in parcel {
            self.sending.push(self.world.send(to, Tag::Tensor, Memory::Shared(tensor), chunk_bytes)?);
        }
        Ok(())
    }

    /// Receives what there is.
    fn listen(&mut self) -> Result<bool, CommError> {
        let mut heard = false;
        while let Some((source, bytes)) = self.world.probe()? {
            let flight = self.world.receive(source, Tag::Header, Memory::Bytes(vec![0; bytes]), bytes)?;
            self.arriving[source].push_back(Arriving::Header(flight));
            heard = true;
        }
        for source in 0..self.arriving.len() {
            self.read_headers(source)?;
            while let Some((header, parcel)) = self.next_whole(source)? {
                self.process.lock().bring(source, header, parcel);
                heard = true;
            }
        }
        Ok(heard)
    }

    /// Begins to receive the tensors of headers that are there, in their order: MPI matches them by it.
    fn read_headers(&mut self, source: usize) -> Result<(), CommError> {
        for message in &mut self.arriving[source] {
            let Arriving::Header(flight) = message else { continue };
            if !flight.poll()? {
                break;
            }
            let Memory::Bytes(bytes) = flight.take() else { continue };
            let header = Header::decode(&bytes)?;
            let room = |&(dtype, ref shape): &(_, Vec<usize>)| {
                let tensor =
                    Tensor::zeros(dtype, shape).map_err(|error| driver("Tensor::zeros", 0, &error.to_string()))?;
                self.world.receive(source, Tag::Tensor, Memory::New(tensor), header.chunk_bytes)
            };
            let tensors = header.tensors.iter().map(room).collect::<Result<_, _>>()?;
            *message = Arriving::Tensors(header, tensors);
        }
        Ok(())
    }

    /// The next message of a process, when all of it is there.
    fn next_whole(&mut self, source: usize) -> Result<Option<(Header, Parcel)>, CommError> {
        let queue = &mut self.arriving[source];
        let Some(Arriving::Tensors(_, flights)) = queue.front_mut() else { return Ok(None) };
        for flight in flights {
            if !flight.poll()? {
                return Ok(None);
            }
        }
        let Some(Arriving::Tensors(header, flights)) = queue.pop_front() else { return Ok(None) };
        let tensor = |mut flight: InFlight| match flight.take() {
            Memory::New(tensor) => Some(Arc::new(tensor)),
            Memory::Bytes(_) | Memory::Shared(_) => None,
        };
        Ok(Some((header, flights.into_iter().filter_map(tensor).collect())))
    }
}

/// Says that the pump has ended, however it does.
struct Ended(&'static Process);

impl Drop for Ended {
    fn drop(&mut self) {
        if thread::panicking() {
            let error = driver("thread::spawn", 0, "the thread that calls MPI panicked");
            self.0.lock().break_down(&error);
            self.0.enter(Phase::Ended(Some(error)));
        } else if !matches!(self.0.lock().phase, Phase::Ended(_)) {
            self.0.enter(Phase::Ended(None));
        }
    }
}

impl Header {
    fn bye(rank: usize) -> Self {
        Self { group: String::new(), from: rank, chunk_bytes: 0, said: Said::Bye, tensors: Vec::new() }
    }
}
