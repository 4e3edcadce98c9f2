//! The calls of MPI, each with its return code checked, and memory that outlives the transfers it is in.
//!
//! Nothing here is shared between threads: the one that makes a [`World`] makes every call.

use std::mem::{self, MaybeUninit};
use std::ptr;
use std::sync::Arc;

use mpi_sys::{
    MPI_Abort, MPI_Comm, MPI_Comm_dup, MPI_Comm_rank, MPI_Comm_set_errhandler, MPI_Comm_size, MPI_Error_string,
    MPI_Finalize, MPI_Get_count, MPI_Init_thread, MPI_Initialized, MPI_Iprobe, MPI_Irecv, MPI_Isend,
    MPI_MAX_ERROR_STRING, MPI_Request, MPI_Status, MPI_Test, RSMPI_ANY_SOURCE, RSMPI_COMM_WORLD, RSMPI_ERRORS_RETURN,
    RSMPI_REQUEST_NULL, RSMPI_STATUS_IGNORE, RSMPI_THREAD_FUNNELED, RSMPI_UINT8_T,
};
use tilefold_core::Tensor;

use crate::error::CommError;

/// `int` of C.
type Int = std::ffi::c_int;

/// `MPI_SUCCESS`, by the standard.
const SUCCESS: Int = 0;

/// What a job is ended with when it would hang: an exit status.
const ABORT_STATUS: Int = 1;

/// Names of calls that errors carry, for errors that come from another process.
pub(super) const CALLS: [&str; 17] = [
    "MPI_Comm_dup",
    "MPI_Comm_rank",
    "MPI_Comm_set_errhandler",
    "MPI_Comm_size",
    "MPI_Finalize",
    "MPI_Get_count",
    "MPI_Init_thread",
    "MPI_Initialized",
    "MPI_Iprobe",
    "MPI_Irecv",
    "MPI_Isend",
    "MPI_Test",
    "Tensor::zeros",
    "a count for MPI",
    "a header",
    "atexit",
    "thread::spawn",
];

/// What a message is: a header, or bytes of a tensor that a header told of.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tag {
    Header = 1,
    Tensor = 2,
}

/// A communicator of all processes of the job, which nobody else knows.
#[derive(Debug)]
pub(super) struct World {
    comm: MPI_Comm,
    rank: usize,
    world_size: usize,
}

/// Memory that MPI reads or writes.
#[derive(Debug)]
pub(super) enum Memory {
    /// A header, either way.
    Bytes(Vec<u8>),
    /// Read alone.
    Shared(Arc<Tensor>),
    /// Written alone.
    New(Tensor),
}

/// A transfer under way, in one request for each chunk, and its memory.
///
/// Dropped before its end it leaks the memory: MPI may still read or write it.
#[derive(Debug)]
pub(super) struct InFlight {
    requests: Vec<MPI_Request>,
    memory: Memory,
}

/// An error of MPI in its own words.
fn check(call: &'static str, status: Int) -> Result<(), CommError> {
    if status == SUCCESS {
        return Ok(());
    }
    let mut text = [0_u8; MPI_MAX_ERROR_STRING as usize];
    let mut length: Int = 0;
    // SAFETY: `text` has the room that the standard asks for.
    let described = unsafe { MPI_Error_string(status, text.as_mut_ptr().cast(), &raw mut length) };
    let known = usize::try_from(length).ok().filter(|_| described == SUCCESS).and_then(|length| text.get(..length));
    let message = known.map_or_else(|| "an error without a text".into(), String::from_utf8_lossy);
    Err(driver(call, status, &message))
}

/// [`CommError::Driver`].
pub(super) fn driver(call: &'static str, status: Int, message: &str) -> CommError {
    CommError::Driver { call, status: i64::from(status), message: message.to_owned() }
}

fn count<T, N: TryFrom<T>>(number: T) -> Result<N, CommError> {
    N::try_from(number).map_err(|_| driver("a count for MPI", SUCCESS, "out of range"))
}

impl World {
    /// Starts MPI, whose calls are this thread's from then on.
    pub(super) fn start() -> Result<Self, CommError> {
        let mut initialized: Int = 0;
        // SAFETY: allowed before MPI_Init; the place is valid.
        check("MPI_Initialized", unsafe { MPI_Initialized(&raw mut initialized) })?;
        if initialized != 0 {
            let message = "something else in this process has initialised MPI; call Communicator::mpi before it does";
            return Err(driver("MPI_Initialized", SUCCESS, message));
        }
        // SAFETY: a constant of the C library.
        let funneled = unsafe { RSMPI_THREAD_FUNNELED };
        let mut provided: Int = 0;
        // SAFETY: the standard allows null for both arguments of `main`; the place is valid.
        let status = unsafe { MPI_Init_thread(ptr::null_mut(), ptr::null_mut(), funneled, &raw mut provided) };
        check("MPI_Init_thread", status)?;
        if provided < funneled {
            let message = "this MPI library serves single-threaded programs alone; use one with MPI_THREAD_FUNNELED";
            return Err(driver("MPI_Init_thread", provided, message));
        }
        Self::own_communicator()
    }

    fn own_communicator() -> Result<Self, CommError> {
        // SAFETY: a constant of the C library.
        let all = unsafe { RSMPI_COMM_WORLD };
        // SAFETY: a constant of the C library.
        let returned = unsafe { RSMPI_ERRORS_RETURN };
        // SAFETY: MPI is initialised; both handles are the library's.
        check("MPI_Comm_set_errhandler", unsafe { MPI_Comm_set_errhandler(all, returned) })?;
        let mut comm = all;
        // SAFETY: as above; the place is valid. The duplicate has the same error handler.
        check("MPI_Comm_dup", unsafe { MPI_Comm_dup(all, &raw mut comm) })?;
        let (mut rank, mut world_size): (Int, Int) = (0, 0);
        // SAFETY: `comm` is a communicator; the place is valid.
        check("MPI_Comm_rank", unsafe { MPI_Comm_rank(comm, &raw mut rank) })?;
        // SAFETY: as above.
        check("MPI_Comm_size", unsafe { MPI_Comm_size(comm, &raw mut world_size) })?;
        Ok(Self { comm, rank: count(rank)?, world_size: count(world_size)? })
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn world_size(&self) -> usize {
        self.world_size
    }

    /// Begins to send memory in chunks of at most `chunk_bytes`.
    pub(super) fn send(&self, to: usize, tag: Tag, memory: Memory, chunk_bytes: usize) -> Result<InFlight, CommError> {
        let (peer, comm) = (count(to)?, self.comm);
        // SAFETY: a constant of the C library.
        let byte = unsafe { RSMPI_UINT8_T };
        InFlight::begin("MPI_Isend", memory, chunk_bytes, |start, bytes, request| {
            // SAFETY: `InFlight` keeps these bytes until the request is complete; nobody writes them before then.
            unsafe { MPI_Isend(start.cast_const().cast(), bytes, byte, peer, tag as Int, comm, request) }
        })
    }

    /// Begins to fill memory with what a rank sends in chunks of at most `chunk_bytes`.
    pub(super) fn receive(
        &self,
        from: usize,
        tag: Tag,
        memory: Memory,
        chunk_bytes: usize,
    ) -> Result<InFlight, CommError> {
        let (peer, comm) = (count(from)?, self.comm);
        // SAFETY: a constant of the C library.
        let byte = unsafe { RSMPI_UINT8_T };
        InFlight::begin("MPI_Irecv", memory, chunk_bytes, |start, bytes, request| {
            // SAFETY: `InFlight` keeps these bytes, and to itself, until the request is complete.
            unsafe { MPI_Irecv(start.cast(), bytes, byte, peer, tag as Int, comm, request) }
        })
    }

    /// The sender and the bytes of a header that nothing has begun to receive.
    pub(super) fn probe(&self) -> Result<Option<(usize, usize)>, CommError> {
        // SAFETY: a constant of the C library.
        let any = unsafe { RSMPI_ANY_SOURCE };
        let (mut found, mut status): (Int, _) = (0, MaybeUninit::<MPI_Status>::uninit());
        // SAFETY: both places are valid.
        let code = unsafe { MPI_Iprobe(any, Tag::Header as Int, self.comm, &raw mut found, status.as_mut_ptr()) };
        check("MPI_Iprobe", code)?;
        if found == 0 {
            return Ok(None);
        }
        // SAFETY: MPI fills in the status of a message that it has found.
        let status = unsafe { status.assume_init() };
        // SAFETY: a constant of the C library.
        let byte = unsafe { RSMPI_UINT8_T };
        let mut bytes: Int = 0;
        // SAFETY: the status is of a message of bytes; the place is valid.
        check("MPI_Get_count", unsafe { MPI_Get_count(&raw const status, byte, &raw mut bytes) })?;
        Ok(Some((count(status.MPI_SOURCE)?, count(bytes)?)))
    }

    /// Ends MPI; waits for the other processes to do so too.
    pub(super) fn finish(self) -> Result<(), CommError> {
        // SAFETY: this thread initialised MPI, and `self` was what its other calls need.
        check("MPI_Finalize", unsafe { MPI_Finalize() })
    }

    /// Ends the job, all its processes.
    pub(super) fn abort(&self) {
        // SAFETY: `comm` is a communicator.
        let status = unsafe { MPI_Abort(self.comm, ABORT_STATUS) };
        tracing::error!(status, "MPI_Abort came back");
    }
}

impl Memory {
    /// First byte, and how many.
    fn range(&mut self) -> Result<(*mut u8, usize), CommError> {
        let unreadable = |error: tilefold_core::ProblemError| driver("a count for MPI", SUCCESS, &error.to_string());
        match self {
            Self::Bytes(bytes) => Ok((bytes.as_mut_ptr(), bytes.len())),
            Self::Shared(tensor) => {
                let view = tensor.view();
                let bytes = view.as_bytes().map_err(unreadable)?;
                Ok((bytes.as_ptr().cast_mut(), bytes.len()))
            }
            Self::New(tensor) => {
                let bytes = tensor.layout().len() * tensor.dtype().size_bytes();
                let memory = tensor.host_bytes_mut().and_then(|memory| memory.get_mut(..bytes)).unwrap_or_default();
                Ok((memory.as_mut_ptr(), memory.len()))
            }
        }
    }
}

impl InFlight {
    /// Calls `begin` for each chunk: its first byte, its bytes, the place of its request.
    fn begin(
        call: &'static str,
        mut memory: Memory,
        chunk_bytes: usize,
        begin: impl Fn(*mut u8, Int, *mut MPI_Request) -> Int,
    ) -> Result<Self, CommError> {
        let (start, bytes) = memory.range()?;
        let mut flight = Self { requests: Vec::new(), memory };
        for offset in (0..bytes).step_by(chunk_bytes.max(1)) {
            let chunk = count((bytes - offset).min(chunk_bytes))?;
            // SAFETY: a constant of the C library.
            let mut request = unsafe { RSMPI_REQUEST_NULL };
            check(call, begin(start.wrapping_add(offset), chunk, &raw mut request))?;
            flight.requests.push(request);
        }
        Ok(flight)
    }

    /// Whether all of it is done.
    pub(super) fn poll(&mut self) -> Result<bool, CommError> {
        // SAFETY: a constant of the C library.
        let ignored = unsafe { RSMPI_STATUS_IGNORE };
        while let Some(request) = self.requests.last_mut() {
            let mut done: Int = 0;
            // SAFETY: the request is of a call of this thread and not known to be complete; the place is valid.
            check("MPI_Test", unsafe { MPI_Test(&raw mut *request, &raw mut done, ignored) })?;
            if done == 0 {
                return Ok(false);
            }
            self.requests.pop();
        }
        Ok(true)
    }

    /// The memory, empty when the transfer is not done: it leaks then.
    pub(super) fn take(&mut self) -> Memory {
        if self.requests.is_empty() {
            mem::replace(&mut self.memory, Memory::Bytes(Vec::new()))
        } else {
            Memory::Bytes(Vec::new())
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.requests.is_empty() {
            mem::forget(mem::replace(&mut self.memory, Memory::Bytes(Vec::new())));
        }
    }
}
