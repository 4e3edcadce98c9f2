//! Options every command takes: which device, how many threads.

use std::env;

use anyhow::{Context, Result, anyhow};
use tilefold::Device;

/// Threads when `--threads` does not say; the name is rayon's.
const THREADS_VARIABLE: &str = "RAYON_NUM_THREADS";
/// Most threads that may be asked for.
const MAX_THREADS: u16 = 1024;

/// Device and threads.
#[derive(Debug, clap::Args)]
pub(crate) struct Global {
    /// Device to use: `cpu`, or `cuda:0` and `wgpu:0` in a build with the feature of that name [default: TILEFOLD_DEVICE, else the best that
    /// is found]
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) device: Option<String>,
    /// Threads of the CPU device [default: RAYON_NUM_THREADS, else one a core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_THREADS)))]
    pub(crate) threads: Option<u16>,
}

/// A variable that holds no number of threads.
#[derive(Debug, thiserror::Error)]
#[error("{THREADS_VARIABLE}={value}: expected a number of threads from 1 to {MAX_THREADS}, or 0 for one a core")]
struct ThreadsError {
    value: String,
}

impl Global {
    /// Starts the worker threads; to be called once, before a device is opened: rayon itself ignores a variable it cannot
    /// read, and panics when threads cannot be started.
    pub(crate) fn start_threads(&self) -> Result<()> {
        let threads = match self.threads {
            Some(threads) => threads,
            None => threads_of(env::var_os(THREADS_VARIABLE).map(|value| value.to_string_lossy().into_owned()))?,
        };
        let builder = rayon::ThreadPoolBuilder::new().num_threads(usize::from(threads));
        builder.build_global().map_err(|error| {
            let count = if threads == 0 { "one a core".to_owned() } else { threads.to_string() };
            // As text: rayon's message repeats that of its cause.
            anyhow!("cannot start the worker threads ({count}): {error}; ask for fewer with --threads")
        })
    }

    /// Opens the device asked for.
    pub(crate) fn open(&self) -> Result<Device> {
        match &self.device {
            Some(name) => Device::open(name).with_context(|| {
                format!("cannot open device `{name}`; `tilefold doctor` lists the devices and why others are off")
            }),
            None => Device::best().context("cannot open a device; `tilefold doctor` says why"),
        }
    }
}

/// The variable's number; 0, one a core, when it is not set or empty.
fn threads_of(value: Option<String>) -> Result<u16, ThreadsError> {
    match value {
        None => Ok(0),
        Some(value) if value.is_empty() => Ok(0),
        Some(value) => {
            let threads = value.trim().parse().ok().filter(|&threads| threads <= MAX_THREADS);
            threads.ok_or(ThreadsError { value })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_is_a_number_or_an_error() {
        let threads = |value: &str| threads_of(Some(value.to_owned()));
        assert_eq!(threads_of(None).unwrap(), 0);
        for (value, expected) in [("", 0), ("0", 0), ("2", 2), (" 3", 3), ("1024", 1024)] {
            assert_eq!(threads(value).unwrap(), expected);
        }
        for value in ["abc", "-1", "1.5", "1025", "99999999999"] {
            let message = threads(value).unwrap_err().to_string();
            assert!(message.starts_with(&format!("RAYON_NUM_THREADS={value}: expected")), "{message}");
        }
    }
}
