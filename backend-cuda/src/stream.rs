//! Streams: in-order queues, handed out again after use, and the point behind everything that all of them hold.

use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{CUresult, CUstream, CUstream_flags};
use tilefold_core::{DeviceError, DeviceResult, Stream};

use crate::context::{Context, ignore};
use crate::driver::Driver;
use crate::error::Failure;
use crate::event::RawEvent;

/// A stream as the driver knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RawStream(pub(crate) CUstream);

// SAFETY: a stream may be used from any thread.
unsafe impl Send for RawStream {}
// SAFETY: as above.
unsafe impl Sync for RawStream {}

/// Streams of a context.
///
/// Own streams live as long as the context, so that memory can be freed on them; a handle that is dropped gives its
/// stream back. There are as many as were in use at one time.
#[derive(Debug, Default)]
pub(crate) struct Streams(Mutex<Lists>);

#[derive(Debug, Default)]
struct Lists {
    own: Vec<RawStream>,
    idle: Vec<RawStream>,
    external: Vec<RawStream>,
    /// Waits for all others, and frees; made when there is more than one stream.
    release: Option<RawStream>,
}

impl Streams {
    fn lists(&self) -> MutexGuard<'_, Lists> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, driver: &Driver) -> Result<RawStream, Failure> {
        let mut lists = self.lists();
        if let Some(stream) = lists.idle.pop() {
            return Ok(stream);
        }
        let stream = create(driver)?;
        lists.own.push(stream);
        Ok(stream)
    }

    /// A stream behind whose present end everything enqueued on any stream is finished. The context is current.
    ///
    /// # Errors
    /// What the driver reports.
    pub(crate) fn behind_all(&self, driver: &Driver) -> Result<RawStream, Failure> {
        let mut lists = self.lists();
        if let ([only], [], None) = (&lists.own[..], &lists.external[..], lists.release) {
            return Ok(*only);
        }
        let release = match lists.release {
            Some(stream) => stream,
            None => *lists.release.insert(create(driver)?),
        };
        for &stream in lists.own.iter().chain(&lists.external) {
            release.wait_for(driver, stream)?;
        }
        Ok(release)
    }

    /// Waits for everything enqueued on any stream. The context is current.
    ///
    /// # Errors
    /// What the driver reports.
    pub(crate) fn synchronize(&self, driver: &Driver) -> Result<(), Failure> {
        let streams: Vec<_> = {
            let lists = self.lists();
            lists.own.iter().chain(&lists.external).chain(&lists.release).copied().collect()
        };
        // SAFETY: own streams live as long as the context, external ones as long as their handle.
        streams.into_iter().try_for_each(|stream| unsafe { driver.cuStreamSynchronize(stream.0) })
    }

    /// The end of the own streams. The context is current, and nobody has a handle.
    pub(crate) fn destroy(&mut self, driver: &Driver) {
        let lists = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        for stream in lists.own.drain(..).chain(lists.release.take()) {
            // SAFETY: created here, not used again; work that is left is finished by the driver.
            ignore(unsafe { driver.cuStreamDestroy_v2(stream.0) });
        }
    }
}

fn create(driver: &Driver) -> Result<RawStream, Failure> {
    let mut stream = null_mut();
    // SAFETY: the pointer is valid, a context is current.
    unsafe { driver.cuStreamCreate(&raw mut stream, CUstream_flags::CU_STREAM_NON_BLOCKING as u32)? };
    Ok(RawStream(stream))
}

impl RawStream {
    /// Later work waits for what `other` holds now.
    fn wait_for(self, driver: &Driver, other: Self) -> Result<(), Failure> {
        // SAFETY: both streams live; a status of an idle stream is no error.
        match unsafe { driver.cuStreamQuery(other.0) } {
            Ok(()) => Ok(()),
            Err(failure) if failure.is(CUresult::CUDA_ERROR_NOT_READY) => {
                let event = RawEvent::record(driver, other)?;
                let waits = event.wait(driver, self);
                event.destroy(driver);
                waits
            }
            Err(failure) => Err(failure),
        }
    }
}

/// What a [`Stream`] of this backend holds.
#[derive(Debug)]
pub(crate) struct CudaStream {
    pub(crate) context: Arc<Context>,
    pub(crate) raw: RawStream,
    external: bool,
    /// Host data of copies that may not be done.
    kept: Mutex<Vec<(RawEvent, Vec<u8>)>>,
}

impl CudaStream {
    /// An own stream.
    ///
    /// # Errors
    /// What the driver reports.
    pub(crate) fn open(context: &Arc<Context>) -> DeviceResult<Stream> {
        let _entered = context.enter()?;
        let raw = context.streams.take(context.driver)?;
        Ok(Self::handle(context, raw, false))
    }

    /// A stream of the caller's.
    ///
    /// # Safety
    /// It lives as long as the handle.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for a stream of another context, and what the driver reports.
    pub(crate) unsafe fn external(context: &Arc<Context>, stream: CUstream) -> DeviceResult<Stream> {
        let _entered = context.enter()?;
        let mut owner = null_mut();
        // SAFETY: the caller's.
        unsafe { context.driver.cuStreamGetCtx(stream, &raw mut owner)? };
        if owner != context.raw {
            let limit =
                format!("this stream belongs to another context than {}; open that context instead", context.id);
            return Err(DeviceError::Unsupported { limit });
        }
        context.streams.lists().external.push(RawStream(stream));
        Ok(Self::handle(context, RawStream(stream), true))
    }

    fn handle(context: &Arc<Context>, raw: RawStream, external: bool) -> Stream {
        let stream = Self { context: Arc::clone(context), raw, external, kept: Mutex::default() };
        Stream::new(context.id, Arc::new(stream))
    }

    /// The handle inside a stream of this context.
    ///
    /// # Errors
    /// [`DeviceError::WrongDevice`], [`DeviceError::Unsupported`] for a stream that some other backend made.
    pub(crate) fn of<'a>(context: &Context, stream: &'a Stream) -> DeviceResult<&'a Self> {
        if stream.device() != context.id {
            return Err(DeviceError::WrongDevice { what: "stream", expected: context.id, got: stream.device() });
        }
        stream.handle::<Self>().filter(|stream| stream.context.raw == context.raw).ok_or_else(|| {
            DeviceError::Unsupported { limit: format!("a stream that this backend of {} did not make", context.id) }
        })
    }

    /// Keeps the source of a copy until the copy, already enqueued, is done. The context is current.
    ///
    /// # Errors
    /// What the driver reports; then the data is kept for good.
    pub(crate) fn keep(&self, data: Vec<u8>) -> Result<(), Failure> {
        let driver = self.context.driver;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(event, _)| {
            let pending = event.is_pending(driver);
            if !pending {
                event.destroy(driver);
            }
            pending
        });
        match RawEvent::record(driver, self.raw) {
            Ok(event) => kept.push((event, data)),
            Err(failure) => {
                std::mem::forget(data);
                return Err(failure);
            }
        }
        Ok(())
    }

    /// Waits for the work enqueued so far.
    ///
    /// # Errors
    /// What the driver reports, late failures of launches included.
    pub(crate) fn synchronize(&self) -> Result<(), Failure> {
        let _entered = self.context.enter()?;
        // SAFETY: the stream lives as long as its handle.
        unsafe { self.context.driver.cuStreamSynchronize(self.raw.0) }
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        let kept = std::mem::take(self.kept.get_mut().unwrap_or_else(PoisonError::into_inner));
        if self.external || !kept.is_empty() {
            // The driver knows an external stream no longer once its owner takes it back: its work must be done by then.
            ignore(self.synchronize());
        }
        for (event, _) in &kept {
            event.destroy(self.context.driver);
        }
        let mut lists = self.context.streams.lists();
        if !self.external {
            lists.idle.push(self.raw);
        } else if let Some(at) = lists.external.iter().position(|&stream| stream == self.raw) {
            lists.external.swap_remove(at);
        }
    }
}
