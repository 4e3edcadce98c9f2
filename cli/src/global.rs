//! Options every command takes: which device, how many threads.

use anyhow::{Context, Result};
use tilefold::Device;

/// Device and threads.
#[derive(Debug, clap::Args)]
pub(crate) struct Global {
    /// Device to use, such as `cpu` or `cuda:0` [default: TILEFOLD_DEVICE, else the best that is found]
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) device: Option<String>,
    /// Threads of the CPU device [default: RAYON_NUM_THREADS, else one a core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
}

impl Global {
    /// Fixes the number of worker threads; to be called once, before a device is opened.
    pub(crate) fn set_threads(&self) -> Result<()> {
        let Some(threads) = self.threads else { return Ok(()) };
        let builder = rayon::ThreadPoolBuilder::new().num_threads(usize::from(threads));
        builder.build_global().with_context(|| format!("cannot start {threads} threads; ask for fewer with --threads"))
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
