//! Memory and processor of this machine.

use sysinfo::{CpuRefreshKind, System};
use tilefold_benches::{peak_rss_bytes, reset_peak_rss};

/// What the operating system tells.
#[derive(Clone, Debug, Default)]
pub(crate) struct Machine {
    pub(crate) cpu_model: String,
    pub(crate) logical_cores: usize,
    pub(crate) memory_total_bytes: u64,
    pub(crate) memory_available_bytes: u64,
}

impl Machine {
    /// Asks now; zeros and an empty model where the system does not tell.
    pub(crate) fn now() -> Self {
        let Ok(mut system) = System::new() else { return Self::default() };
        system.refresh_cpu_list(CpuRefreshKind::nothing());
        let memory = tilefold::host_memory();
        Self {
            cpu_model: system.cpus().first().map_or("", |cpu| cpu.brand().trim()).to_owned(),
            logical_cores: system.cpus().len(),
            memory_total_bytes: memory.total_bytes,
            memory_available_bytes: memory.available_bytes,
        }
    }
}

/// Most bytes this process holds from a moment on.
#[derive(Debug)]
pub(crate) struct PeakMemory {
    is_reset: bool,
}

impl PeakMemory {
    /// From now on.
    pub(crate) fn start() -> Self {
        Self { is_reset: reset_peak_rss() }
    }

    /// Until now; `None` where the system does not tell, or still counts what was before.
    pub(crate) fn bytes(&self) -> Option<u64> {
        peak_rss_bytes().filter(|_| self.is_reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_that_was_not_reset_is_unknown() {
        assert_eq!(PeakMemory { is_reset: false }.bytes(), None);
        let peak = PeakMemory::start();
        assert_eq!(peak.bytes().is_some(), peak.is_reset && peak_rss_bytes().is_some());
    }
}
