//! The virtual machine room: devices, and everything that handles stand for.

use std::cell::RefCell;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use tilefold_emulator_ptx::{Memory, Module};

use crate::fault::remember;
use crate::handles::{Handle, Table};
use crate::settings::Settings;
use crate::status::{Answer, Status};

/// One virtual GPU.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) memory: Memory,
    /// Its one context, made when it is first asked for.
    context: OnceLock<Handle>,
}

// SAFETY: a handle is a number.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// A stream. Work is done when it is enqueued; what is left is what went wrong.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    pub(crate) device: usize,
    failure: Arc<Mutex<Option<(Status, String)>>>,
}

/// A function of a module.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    pub(crate) device: usize,
    pub(crate) module: Arc<Module>,
    pub(crate) name: String,
    /// Dynamic shared memory a launch may ask for.
    pub(crate) dynamic_shared_bytes: Arc<AtomicI32>,
}

/// A module, loaded for a device.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    pub(crate) device: usize,
    pub(crate) module: Arc<Module>,
}

/// An event: when it was recorded.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) timing: bool,
    pub(crate) recorded: Arc<Mutex<Option<Instant>>>,
}

/// Everything.
#[derive(Debug)]
pub(crate) struct System {
    pub(crate) settings: Settings,
    pub(crate) devices: Vec<Device>,
    /// By handle, the device.
    pub(crate) contexts: Table<usize>,
    pub(crate) streams: Table<Stream>,
    pub(crate) events: Table<Event>,
    pub(crate) modules: Table<Loaded>,
    pub(crate) functions: Table<Function>,
    pub(crate) pools: Table<usize>,
    /// Default streams, by device.
    defaults: Vec<Stream>,
    launches: AtomicU64,
}

thread_local! {
    /// Current contexts of this thread, the last one on top.
    static CURRENT: RefCell<Vec<Handle>> = const { RefCell::new(Vec::new()) };
}

static SYSTEM: OnceLock<Result<System, String>> = OnceLock::new();

impl System {
    /// Reads the settings and sets the devices up.
    ///
    /// # Errors
    /// [`Status::InvalidValue`] for settings that cannot be used, [`Status::NoDevice`] when they ask for none.
    pub(crate) fn initialise() -> Answer {
        match SYSTEM.get_or_init(|| Settings::from_environment().map(Self::new)) {
            Ok(system) if system.devices.is_empty() => Err(Status::NoDevice),
            Ok(_) => Ok(()),
            Err(error) => {
                remember(Status::InvalidValue, error.clone());
                Err(Status::InvalidValue)
            }
        }
    }

    /// The devices, once they are set up.
    ///
    /// # Errors
    /// [`Status::NotInitialized`].
    pub(crate) fn get() -> Answer<&'static Self> {
        match SYSTEM.get() {
            Some(Ok(system)) => Ok(system),
            _ => Err(Status::NotInitialized),
        }
    }

    fn new(settings: Settings) -> Self {
        let device = |number: u64| {
            let memory = Memory::of_device(usize::try_from(number).unwrap_or(usize::MAX), settings.memory_bytes);
            Device { memory, context: OnceLock::new() }
        };
        let devices: Vec<_> = (0..settings.devices).map(device).collect();
        let defaults = (0..devices.len()).map(Stream::new).collect();
        Self {
            settings,
            devices,
            contexts: Table::new(0),
            streams: Table::new(1),
            events: Table::new(2),
            modules: Table::new(3),
            functions: Table::new(4),
            pools: Table::new(5),
            defaults,
            launches: AtomicU64::new(0),
        }
    }

    /// A device by its number.
    ///
    /// # Errors
    /// [`Status::InvalidDevice`].
    pub(crate) fn device(&self, number: i32) -> Answer<usize> {
        usize::try_from(number).ok().filter(|&number| number < self.devices.len()).ok_or(Status::InvalidDevice)
    }

    /// A device's context.
    pub(crate) fn context_of(&self, device: usize) -> Handle {
        *self.devices[device].context.get_or_init(|| self.contexts.insert(device))
    }

    /// The device of the current context.
    ///
    /// # Errors
    /// [`Status::InvalidContext`] when there is none.
    pub(crate) fn current(&self) -> Answer<usize> {
        let top = CURRENT.with_borrow(|stack| stack.last().copied()).ok_or(Status::InvalidContext)?;
        self.contexts.get(top).map_err(|_| Status::InvalidContext)
    }

    /// A stream, or the current context's default stream for null. Gives up when its work went wrong.
    ///
    /// # Errors
    /// [`Status::InvalidHandle`], [`Status::InvalidContext`], and what went wrong on it.
    pub(crate) fn stream(&self, handle: Handle) -> Answer<Stream> {
        let stream =
            if handle.is_null() { self.defaults[self.current()?].clone() } else { self.streams.get(handle)? };
        let failure = stream.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        match failure {
            None => Ok(stream),
            Some((status, detail)) => {
                remember(status, detail);
                Err(status)
            }
        }
    }

    /// As [`System::stream`], for work in the current context: that of another device is refused.
    ///
    /// # Errors
    /// As [`System::stream`].
    pub(crate) fn stream_here(&self, handle: Handle) -> Answer<Stream> {
        let (here, stream) = (self.current()?, self.stream(handle)?);
        if stream.device == here { Ok(stream) } else { Err(Status::InvalidHandle) }
    }

    /// Whether the settings let this launch fail.
    pub(crate) fn launch_fails(&self) -> bool {
        self.launches.fetch_add(1, Ordering::Relaxed) + 1 == self.settings.fail_launch
    }
}

impl Stream {
    /// A stream of a device.
    pub(crate) fn new(device: usize) -> Self {
        Self { device, failure: Arc::default() }
    }

    /// Keeps what went wrong for the next call.
    pub(crate) fn fail(&self, status: Status, detail: String) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some((status, detail));
    }
}

/// The current contexts of this thread.
pub(crate) fn with_stack<T>(change: impl FnOnce(&mut Vec<Handle>) -> T) -> T {
    CURRENT.with_borrow_mut(change)
}
