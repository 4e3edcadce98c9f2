//! How long work of a device took, and by which clock.

use std::time::{Duration, Instant};

use crate::DeviceResult;

/// A clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Clock {
    /// The host's: from a stream without work until the work is done, launches and waiting included.
    Host,
    /// The device's own timestamps, before and behind the work; what the host does meanwhile counts only where the device
    /// waits for it.
    Device,
}

impl Clock {
    /// `host` or `device`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Device => "device",
        }
    }
}

/// What [`crate::Backend::timed`] has measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// How long it took.
    pub elapsed: Duration,
    /// By which clock.
    pub clock: Clock,
}

impl Timing {
    /// Times `work`, which comes back when all of it is done, by the host's clock.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn by_host(work: impl FnOnce() -> DeviceResult<()>) -> DeviceResult<Self> {
        let start = Instant::now();
        work()?;
        Ok(Self { elapsed: start.elapsed(), clock: Clock::Host })
    }
}
