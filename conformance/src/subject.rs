//! Which devices to test: those the environment asks for, each with the twins that must give the same bits.

use std::sync::Arc;

use tilefold::{Backend, CpuBackend, DEVICE_VARIABLE, Device, OpenError};

use crate::suite::Subject;

/// Devices that may not be absent: `cpu,cuda`.
pub const REQUIRE_VARIABLE: &str = "TILEFOLD_REQUIRE";

/// A device that was looked for.
#[derive(Debug)]
pub struct Candidate {
    /// `cpu`, `cuda`, ...
    pub name: String,
    /// The device, or why it cannot be tested.
    pub subject: Result<Subject, String>,
    /// Whether an absence is a failure.
    pub required: bool,
}

impl Subject {
    /// A device, with itself at 1, 2, 3 and as many workers as there are processors where that can be chosen.
    ///
    /// # Errors
    /// What opening a twin reports.
    pub fn of(device: &Device) -> Result<Self, OpenError> {
        let mut twins = Vec::new();
        if let Device::Cpu(cpu) = device {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            let mut counts = vec![1, 2, 3, processors];
            counts.sort_unstable();
            counts.dedup();
            for threads in counts {
                let twin: Arc<dyn Backend> = Arc::new(CpuBackend::with_arch(cpu.arch())?.with_threads(threads)?);
                twins.push((format!("{threads}_threads"), twin));
            }
        }
        Ok(Self { device: Arc::new(device.clone()), twins })
    }
}

/// The device `TILEFOLD_DEVICE` names, otherwise every kind of device this build knows; `TILEFOLD_REQUIRE` lists those
/// that have to be there.
#[must_use]
pub fn candidates() -> Vec<Candidate> {
    let required = std::env::var(REQUIRE_VARIABLE).unwrap_or_default();
    let required: Vec<&str> = required.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    let found: Vec<(String, Result<Device, OpenError>)> = match std::env::var(DEVICE_VARIABLE) {
        Ok(name) => vec![(name.clone(), Device::open(&name))],
        Err(_) => Device::all().into_iter().map(|found| (found.name, found.device)).collect(),
    };
    let mut candidates: Vec<Candidate> = found
        .into_iter()
        .map(|(name, device)| Candidate {
            required: required.contains(&name.as_str()),
            subject: device.and_then(|device| Subject::of(&device)).map_err(|error| error.to_string()),
            name,
        })
        .collect();
    for name in required {
        if candidates.iter().all(|candidate| candidate.name != name) {
            let subject = Err(format!("{REQUIRE_VARIABLE} asks for `{name}`, which was not looked for"));
            candidates.push(Candidate { name: name.to_owned(), subject, required: true });
        }
    }
    candidates
}
