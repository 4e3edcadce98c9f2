//! Collectives: what every engine does with the two calls of [`crate::transport`], in the same order of sums.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tilefold_core::{ProblemError, Tensor, TensorView};

use crate::error::{CommError, Error, Result};
use crate::host;
#[cfg(feature = "mpi")]
use crate::mpi::MpiGroup;
use crate::reduce::{Reduction, reduce};
use crate::threads::ThreadGroup;
use crate::transport::{Engine, Parcel, Transport};

/// How long a collective waits for the other ranks when nothing else is said.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(300);

/// One rank's end of a group of ranks.
///
/// Every collective is called by all ranks, in the same order. Tensors are row-major host tensors of any dtype. *Deadline*:
/// each call waits for the others so long at most. *Determinism*: sums are taken in f32 in the order of ranks and rounded
/// once, so results are the same bits on every rank, engine and run. *Errors*: when a rank panics, leaves, is late, or
/// calls something else than its peers, every rank gets a [`CommError`] within its deadline, and the communicator is
/// unusable from then on ([`Communicator::is_usable`]).
#[derive(Debug)]
pub struct Communicator {
    engine: Engine,
    deadline: Cell<Duration>,
    /// Exchanges begun.
    begun: Cell<u64>,
    /// Whether the group's failure has been returned: from then on it is [`CommError::Unusable`].
    told: Cell<bool>,
    traffic: RefCell<BTreeMap<&'static str, Traffic>>,
}

/// What one rank has sent to others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Calls.
    pub calls: u64,
    /// Bytes of tensors sent to other ranks.
    pub bytes_sent: u64,
}

/// A letter on its way: what [`Communicator::begin_shift`] gives.
#[derive(Debug)]
#[must_use = "the other ranks wait for it; call `finish`"]
pub struct Shift<'c> {
    comm: &'c Communicator,
    operation: &'static str,
    from: usize,
}

impl Communicator {
    /// A group of one: every collective gives back what it got.
    #[must_use]
    pub fn alone() -> Self {
        let mut places = ThreadGroup::world(1);
        Self::over(places.remove(0).into())
    }

    /// The ends of a group whose ranks are threads of this process, to be handed to one thread each; [`on_threads`] starts
    /// the threads too.
    #[must_use]
    pub fn threads(world_size: usize) -> Vec<Self> {
        ThreadGroup::world(world_size).into_iter().map(|place| Self::over(place.into())).collect()
    }

    /// This process's end of a group of all processes of its MPI job.
    ///
    /// MPI starts at the first call, on a thread that makes all its calls from then on, and ends when the process exits:
    /// when `main` returns or `std::process::exit` is called, in both cases after a panic too. Each further call gives
    /// another group of the same processes, also after a failure has made an earlier one unusable; all processes make
    /// their groups in the same order. Without `mpirun` the group has one rank.
    ///
    /// *Exit*: a process waits for the exit of all others, as `MPI_Finalize` does; but where one has missed a deadline
    /// and not been heard of since, it waits so long once more, and then ends the whole job with `MPI_Abort`.
    ///
    /// # Errors
    /// [`CommError::Driver`] when MPI does not start, or something else in this process has started it.
    #[cfg(feature = "mpi")]
    pub fn mpi() -> Result<Self> {
        Ok(Self::over(MpiGroup::world()?.into()))
    }

    pub(crate) fn over(engine: Engine) -> Self {
        let (deadline, begun) = (Cell::new(DEFAULT_DEADLINE), Cell::new(0));
        Self { engine, deadline, begun, told: Cell::new(false), traffic: RefCell::default() }
    }

    /// Number of this rank, from 0.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.engine.rank()
    }

    /// How many ranks there are.
    #[must_use]
    pub fn world_size(&self) -> usize {
        self.engine.world_size()
    }

    /// The rank `steps` further round the ring.
    #[must_use]
    pub fn neighbour(&self, steps: isize) -> usize {
        let ranks = self.world_size();
        let steps = steps.rem_euclid(isize::try_from(ranks).unwrap_or(isize::MAX));
        (self.rank() + steps.unsigned_abs()) % ranks
    }

    /// Whether no failure has left the ranks out of step.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.engine.failure().is_none()
    }

    /// How long each call waits for other ranks.
    #[must_use]
    pub fn deadline(&self) -> Duration {
        self.deadline.get()
    }

    /// Sets how long each call of this rank waits for other ranks.
    ///
    /// # Errors
    /// [`CommError::ZeroDeadline`].
    pub fn set_deadline(&self, deadline: Duration) -> Result<()> {
        if deadline.is_zero() {
            return Err(CommError::ZeroDeadline.into());
        }
        self.deadline.set(deadline);
        Ok(())
    }

    /// Takes over another communicator's deadline.
    pub(crate) fn wait_as(&self, other: &Self) {
        self.deadline.set(other.deadline.get());
    }

    /// What this rank has sent to others so far, by operation.
    #[must_use]
    pub fn traffic(&self) -> BTreeMap<&'static str, Traffic> {
        self.traffic.borrow().clone()
    }

    /// Waits for all ranks.
    ///
    /// # Errors
    /// A [`CommError`].
    pub fn barrier(&self) -> Result<()> {
        self.exchange("barrier", "", self.to_all(&Vec::new())).map(|_| ())
    }

    /// Parts of all ranks, in their order. Parts may differ along the first axis, in nothing else.
    ///
    /// # Errors
    /// A [`CommError`]; [`ProblemError::NotContiguous`] and [`ProblemError::WrongDevice`] for a part that is not a
    /// row-major host tensor.
    pub fn all_gather(&self, part: &TensorView<'_>) -> Result<Vec<Arc<Tensor>>> {
        let kind = format!("{} {}", part.dtype(), rest_of(part.shape()));
        let parcel = self.checked("all_gather", owned("part", part))?;
        self.exchange("all_gather", &kind, self.to_all(&vec![parcel])).and_then(singles)
    }

    /// One part for each rank; gives what each rank had for this one. Parts may have any shape.
    ///
    /// # Errors
    /// As [`Communicator::all_gather`]; [`CommError::Counts`] when there is not one part for each rank.
    pub fn all_to_all(&self, parts: &[TensorView<'_>]) -> Result<Vec<Arc<Tensor>>> {
        let operation = "all_to_all";
        self.checked(operation, self.one_for_each_rank("parts", parts.len()))?;
        let dtype = parts[0].dtype();
        let parcels = parts.iter().map(|part| {
            if part.dtype() == dtype {
                return Ok(vec![owned("parts", part)?]);
            }
            let (tensor, expected) = ("parts", dtype.to_string());
            Err(ProblemError::UnsupportedDType { tensor, expected, got: part.dtype() }.into())
        });
        let parcels = self.checked(operation, parcels.collect::<Result<_>>())?;
        self.exchange(operation, &dtype.to_string(), parcels).and_then(singles)
    }

    /// `all_to_all` of several tensors at a time, of any dtypes and shapes.
    ///
    /// # Errors
    /// As there.
    pub fn all_to_all_parcels(&self, parcels: Vec<Parcel>) -> Result<Vec<Parcel>> {
        let checked = self
            .one_for_each_rank("parcels", parcels.len())
            .and_then(|()| parcels.iter().flatten().try_for_each(|tensor| host::dense("parcels", &tensor.view())));
        self.checked("all_to_all", checked)?;
        self.exchange("all_to_all", "parcels", parcels)
    }

    /// The reduction of all ranks' tensors, element by element; the same bits on every rank.
    ///
    /// *Numerics*: docs/sequence-parallel.md: floats in f32 in the order of ranks, rounded once to the dtype; integers exactly.
    ///
    /// # Errors
    /// As [`Communicator::all_gather`]; [`CommError::IntegerOverflow`].
    pub fn all_reduce(&self, values: &TensorView<'_>, reduction: Reduction) -> Result<Tensor> {
        let operation = "all_reduce";
        let kind = format!("{reduction} {} {:?}", values.dtype(), values.shape());
        let counts = near_equal(values.layout().len(), self.world_size());
        let parcels = self.checked(operation, host::cut(values, &counts))?;
        let parts = self.exchange(operation, &kind, parcels)?.into_iter().flatten().collect::<Vec<_>>();
        let reduced = self.checked(operation, reduce(operation, &parts, reduction))?;
        // Before the whole comes on top.
        drop(parts);
        let parcel = reduced.into_iter().map(Arc::new).collect();
        let parts: Parcel = self.exchange(operation, &kind, self.to_all(&parcel))?.into_iter().flatten().collect();
        self.checked(operation, host::join(&parts, values.dtype(), values.shape()))
    }

    /// The reduction of all ranks' tensors, of which each rank keeps a part of the first axis: `counts`, one entry for
    /// each rank, the same on all, adds up to that axis.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`]; [`CommError::Counts`].
    pub fn reduce_scatter(&self, values: &TensorView<'_>, counts: &[usize], reduction: Reduction) -> Result<Tensor> {
        let operation = "reduce_scatter";
        let kind = format!("{reduction} {} {:?} into {counts:?}", values.dtype(), values.shape());
        let fitting = self.one_for_each_rank("counts", counts.len()).and_then(|()| {
            let size = values.shape().first().copied().unwrap_or(0);
            let sum = counts.iter().try_fold(0_usize, |sum, &count| sum.checked_add(count));
            if sum != Some(size) || counts.contains(&0) {
                let expected = format!("numbers above 0 that add up to axis 0, {size}");
                return Err(CommError::Counts { list: "counts", expected, got: format!("{counts:?}") }.into());
            }
            let row = values.layout().len() / size;
            Ok(counts.iter().map(|count| count * row).collect::<Vec<_>>())
        });
        let parcels = self.checked(operation, fitting.and_then(|counts| host::cut(values, &counts)))?;
        let reduced = self.reduce_parts(operation, &kind, parcels, reduction)?;
        let shape: Vec<usize> =
            std::iter::once(counts[self.rank()]).chain(values.shape().iter().skip(1).copied()).collect();
        self.checked(operation, host::reshaped(reduced, &shape))
    }

    /// The tensor of `root` on every rank; the others give none.
    ///
    /// # Errors
    /// As [`Communicator::all_gather`]; [`CommError::NoSuchRank`], [`ProblemError::Missing`], [`ProblemError::Unexpected`].
    pub fn broadcast(&self, root: usize, tensor: Option<&TensorView<'_>>) -> Result<Arc<Tensor>> {
        let (operation, is_root) = ("broadcast", self.rank() == root);
        let given = self.known_rank("root", root).and_then(|()| match tensor {
            Some(tensor) if is_root => Ok(self.to_all(&vec![owned("tensor", tensor)?])),
            None if !is_root => Ok(self.to_all(&Vec::new())),
            None => Err(ProblemError::Missing { tensor: "tensor", reason: "this rank is the root" }.into()),
            Some(_) => Err(ProblemError::Unexpected { tensor: "tensor", reason: "this rank is not the root" }.into()),
        });
        let parcels = self.checked(operation, given)?;
        let mut got = self.exchange(operation, &format!("from {root}"), parcels)?;
        got.swap_remove(root).pop().ok_or_else(|| lost(operation, root))
    }

    /// Sends tensors to a rank; returns at once.
    ///
    /// # Errors
    /// As [`Communicator::all_gather`]; [`CommError::NoSuchRank`].
    pub fn send(&self, to: usize, parcel: Parcel) -> Result<()> {
        self.send_as("send", to, parcel)
    }

    /// Waits for what a rank sends to this one.
    ///
    /// # Errors
    /// A [`CommError`].
    pub fn receive(&self, from: usize) -> Result<Parcel> {
        self.receive_as("send", from)
    }

    /// Sends to one rank and receives from another, as all ranks of a ring do at once.
    ///
    /// # Errors
    /// As [`Communicator::send`].
    pub fn send_recv(&self, to: usize, parcel: Parcel, from: usize) -> Result<Parcel> {
        self.begin_shift("send_recv", to, parcel, from)?.finish()
    }

    /// Begins a [`Communicator::send_recv`] that other work may overlap; `operation` is what it is called in errors and
    /// in [`Communicator::traffic`], the same at both ends.
    ///
    /// # Errors
    /// As [`Communicator::send`].
    pub fn begin_shift(&self, operation: &'static str, to: usize, parcel: Parcel, from: usize) -> Result<Shift<'_>> {
        self.checked(operation, self.known_rank("from", from))?;
        self.send_as(operation, to, parcel)?;
        Ok(Shift { comm: self, operation, from })
    }

    /// Groups of the ranks that name the same `colour`, in the order of `key`, then of their ranks here.
    ///
    /// # Errors
    /// A [`CommError`].
    pub fn split(&self, colour: u32, key: i32) -> Result<Self> {
        let number = self.begun.get();
        let colour = i32::from_ne_bytes(colour.to_ne_bytes());
        let mine = [colour, key];
        let named = Arc::new(Tensor::from_vec(mine.to_vec(), &[2])?);
        let named = self.exchange("split", "", self.to_all(&vec![named])).and_then(singles)?;
        let mut members = Vec::new();
        for (rank, named) in named.iter().enumerate() {
            let &[theirs, key] = named.as_slice::<i32>()? else { continue };
            if theirs == colour {
                members.push((key, rank));
            }
        }
        members.sort_unstable();
        let members: Vec<usize> = members.into_iter().map(|(_, rank)| rank).collect();
        let engine = self.engine.subgroup(number, &members).map_err(|error| self.told(error))?;
        let group = Self::over(engine);
        group.deadline.set(self.deadline.get());
        Ok(group)
    }

    /// Makes sure that all ranks are about to do the same: `here` is this rank's description of it, or the error that it
    /// has found in its own arguments. The communicator stays usable.
    ///
    /// # Errors
    /// This rank's own error; [`CommError::Refused`] when another has one; [`CommError::Mismatch`].
    pub fn agree(&self, operation: &'static str, here: Result<String>) -> Result<()> {
        let said = match &here {
            Ok(text) => format!("+{text}"),
            Err(error) => format!("-{error}"),
        };
        let bytes = said.into_bytes();
        let count = bytes.len();
        let said = Arc::new(Tensor::from_vec(bytes, &[count])?);
        let said = self.exchange(operation, "agreed", self.to_all(&vec![said])).and_then(singles)?;
        here?;
        let texts = said.iter().map(|text| Ok(String::from_utf8_lossy(text.as_slice::<u8>()?).into_owned()));
        let texts = texts.collect::<Result<Vec<_>>>()?;
        for (rank, text) in texts.iter().enumerate() {
            if let Some(message) = text.strip_prefix('-') {
                let (operation, message) = (operation.to_owned(), message.to_owned());
                return Err(CommError::Refused { operation, rank, message }.into());
            }
            if *text != texts[0] {
                let operations = [&texts[0], text].map(|text| format!("{operation} {}", &text[1..]));
                return Err(CommError::Mismatch { ranks: [0, rank], operations }.into());
            }
        }
        Ok(())
    }

    /// The reduction of what each rank has for this one: one tensor a rank, of one shape and dtype.
    pub(crate) fn reduce_parts(
        &self,
        name: &'static str,
        kind: &str,
        parcels: Vec<Parcel>,
        reduction: Reduction,
    ) -> Result<Tensor> {
        let parts: Parcel = self.exchange(name, kind, parcels)?.into_iter().flatten().collect();
        let reduced = self.checked(name, reduce(name, &parts, reduction))?;
        reduced.ok_or_else(|| lost(name, self.rank()))
    }

    /// One exchange of all ranks, from begin to end.
    pub(crate) fn exchange(&self, name: &'static str, kind: &str, parcels: Vec<Parcel>) -> Result<Vec<Parcel>> {
        let operation = if kind.is_empty() { name.to_owned() } else { format!("{name} {kind}") };
        self.ready()?;
        for (rank, parcel) in parcels.iter().enumerate() {
            self.count(name, rank, parcel, 0);
        }
        self.count(name, self.rank(), &Vec::new(), 1);
        let number = self.begun.get();
        self.begun.set(number + 1);
        let posted = self.engine.post(number, &operation, parcels);
        let collected = posted.and_then(|()| self.engine.collect(number, &operation, self.deadline.get()));
        collected.map_err(|error| self.told(error))
    }

    pub(crate) fn send_as(&self, operation: &'static str, to: usize, parcel: Parcel) -> Result<()> {
        self.ready()?;
        let fit = parcel.iter().try_for_each(|tensor| host::dense("parcel", &tensor.view()));
        self.checked(operation, self.known_rank("to", to).and(fit))?;
        self.count(operation, to, &parcel, 1);
        self.engine.send(to, operation, parcel).map_err(|error| self.told(error))
    }

    pub(crate) fn receive_as(&self, operation: &'static str, from: usize) -> Result<Parcel> {
        self.ready()?;
        self.checked(operation, self.known_rank("from", from))?;
        self.engine.receive(from, operation, self.deadline.get()).map_err(|error| self.told(error))
    }

    /// An error of this rank's own that leaves the others waiting: told to them.
    pub(crate) fn checked<T>(&self, operation: impl Display, result: Result<T>) -> Result<T> {
        let error = match result {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if !self.told.get() {
            let (operation, message) = (operation.to_string(), error.to_string());
            self.engine.fail(CommError::Refused { operation, rank: self.rank(), message });
            self.told.set(true);
        }
        Err(error)
    }

    /// After the first failure, what every call returns.
    fn ready(&self) -> Result<()> {
        match self.engine.failure() {
            Some(failure) => Err(self.told(failure)),
            None => Ok(()),
        }
    }

    fn told(&self, failure: CommError) -> Error {
        if self.told.replace(true) {
            return CommError::Unusable { first: failure.to_string() }.into();
        }
        failure.into()
    }

    fn to_all(&self, parcel: &Parcel) -> Vec<Parcel> {
        vec![parcel.clone(); self.world_size()]
    }

    fn count(&self, operation: &'static str, to: usize, parcel: &Parcel, calls: u64) {
        let bytes: usize = parcel.iter().map(|tensor| tensor.layout().len() * tensor.dtype().size_bytes()).sum();
        let mut traffic = self.traffic.borrow_mut();
        let traffic = traffic.entry(operation).or_default();
        traffic.calls += calls;
        if to != self.rank() {
            traffic.bytes_sent += bytes as u64;
        }
    }

    fn known_rank(&self, parameter: &'static str, got: usize) -> Result<()> {
        let world_size = self.world_size();
        if got < world_size { Ok(()) } else { Err(CommError::NoSuchRank { parameter, world_size, got }.into()) }
    }

    fn one_for_each_rank(&self, list: &'static str, got: usize) -> Result<()> {
        let ranks = self.world_size();
        if got == ranks {
            return Ok(());
        }
        let expected = format!("one entry for each of {ranks} ranks");
        Err(CommError::Counts { list, expected, got: got.to_string() }.into())
    }
}

impl Shift<'_> {
    /// Waits for what the other rank sends.
    ///
    /// # Errors
    /// A [`CommError`].
    pub fn finish(self) -> Result<Parcel> {
        self.comm.receive_as(self.operation, self.from)
    }
}

/// Runs `work` as each rank of a new group, on a thread of its own; gives what each rank gave, by rank, or what it panicked
/// with. The others get [`CommError::Lost`] then.
///
/// ```
/// use tilefold_comm::{Reduction, on_threads};
/// use tilefold_core::TensorView;
/// let sums = on_threads(3, |comm| {
///     let mine = [comm.rank() as f32, 1.0];
///     comm.all_reduce(&TensorView::from_slice(&mine, &[2])?, Reduction::Sum)
/// });
/// for sum in sums {
///     assert_eq!(sum.expect("no panic")?.as_slice::<f32>()?, [3.0, 3.0]);
/// }
/// # Ok::<(), tilefold_comm::Error>(())
/// ```
#[must_use = "that a rank has panicked is in its result"]
pub fn on_threads<T: Send>(world_size: usize, work: impl Fn(Communicator) -> T + Sync) -> Vec<thread::Result<T>> {
    let work = &work;
    thread::scope(|scope| {
        let start = |comm| scope.spawn(move || work(comm));
        let threads: Vec<_> = Communicator::threads(world_size).into_iter().map(start).collect();
        threads.into_iter().map(thread::ScopedJoinHandle::join).collect()
    })
}

/// `[*, 4, 32]`: every axis but the first.
fn rest_of(shape: &[usize]) -> String {
    let rest: Vec<String> = shape.iter().skip(1).map(usize::to_string).collect();
    format!("[*, {}]", rest.join(", "))
}

/// `count` things shared out over `ranks`: the first ranks get one more where it does not come out even.
#[must_use]
pub fn near_equal(count: usize, ranks: usize) -> Vec<usize> {
    (0..ranks).map(|rank| count / ranks + usize::from(rank < count % ranks)).collect()
}

/// A copy that can be sent.
fn owned(name: &'static str, view: &TensorView<'_>) -> Result<Arc<Tensor>> {
    host::dense(name, view)?;
    Ok(Arc::new(host::tensor(view.as_bytes()?, view.dtype(), view.shape())?))
}

/// The one tensor of each parcel.
fn singles(parcels: Vec<Parcel>) -> Result<Vec<Arc<Tensor>>> {
    let single = |(rank, mut parcel): (usize, Parcel)| parcel.pop().ok_or_else(|| lost("exchange", rank));
    parcels.into_iter().enumerate().map(single).collect()
}

fn lost(operation: &str, rank: usize) -> Error {
    CommError::Lost { rank, panicked: false, operation: operation.to_owned() }.into()
}
