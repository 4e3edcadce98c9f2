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
        system.refresh_memory();
        system.refresh_cpu_list(CpuRefreshKind::nothing());
        // A container may be allowed less than the machine has; pages of files it holds can be taken back.
        let limits = system.cgroup_limits();
        let total = limits.as_ref().map_or(u64::MAX, |limits| limits.total_memory);
        let free = limits.as_ref().map_or(u64::MAX, |limits| limits.total_memory.saturating_sub(limits.rss));
        Self {
            cpu_model: system.cpus().first().map_or("", |cpu| cpu.brand().trim()).to_owned(),
            logical_cores: system.cpus().len(),
            memory_total_bytes: system.total_memory().min(total),
            memory_available_bytes: system.available_memory().min(free),
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
