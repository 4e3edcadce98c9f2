//! Memory and processor of this machine.

use sysinfo::{CpuRefreshKind, System};

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
