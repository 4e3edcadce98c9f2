//! `tilefold doctor`: what was found on this machine, and why the rest is off.

use std::env;

use anyhow::Result;
use serde::Serialize;
use tilefold::{Arch, Backend, Device};

use crate::global::Global;
use crate::output::{Outcome, as_f64, bytes, say, say_json, table};
use crate::system::Machine;

mod cache;

/// Variables that change what the program does.
const VARIABLES: [&str; 6] = [
    tilefold::DEVICE_VARIABLE,
    "TILEFOLD_CPU_ARCH",
    "TILEFOLD_CACHE_DIR",
    "TILEFOLD_NVRTC",
    "TILEFOLD_REQUIRE",
    "RAYON_NUM_THREADS",
];

/// What a virtual device is.
const VIRTUAL_NOTE: &str = "kernels are executed by an interpreter on the processor, not by a GPU; its results count, \
its times mean nothing";

/// Options of `doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Prints JSON instead of tables
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    target: String,
    devices: Vec<DeviceReport>,
    selected_device: Option<String>,
    selected_error: Option<String>,
    cpu: CpuReport,
    memory_total_bytes: u64,
    memory_available_bytes: u64,
    environment: Vec<Variable>,
}

#[derive(Serialize)]
struct DeviceReport {
    name: String,
    available: bool,
    model: Option<String>,
    arch: Option<String>,
    /// `None` where the driver does not tell.
    parallelism: Option<usize>,
    dtypes: Vec<String>,
    /// As `parallelism`.
    memory_bytes: Option<u64>,
    /// Whether an interpreter stands in for the hardware.
    is_virtual: bool,
    /// Why it is off.
    reason: Option<String>,
}

#[derive(Serialize)]
struct CpuReport {
    model: String,
    logical_cores: usize,
    threads: usize,
    simd: Vec<SimdReport>,
    caches: Vec<cache::Cache>,
}

#[derive(Serialize)]
struct SimdReport {
    name: &'static str,
    lanes: usize,
    compiled: bool,
    available: bool,
    selected: bool,
}

#[derive(Serialize)]
struct Variable {
    name: &'static str,
    value: Option<String>,
}

/// Prints what was found.
pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let report = Report::collect(global);
    if args.json {
        say_json(&report)?
    } else {
        report.print()?
    }
    Ok(if report.selected_device.is_some() { Outcome::Passed } else { Outcome::Failed })
}

impl Report {
    fn collect(global: &Global) -> Self {
        let machine = Machine::now();
        let selected = global.open();
        let found = Device::all().into_iter();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            target: format!("{}-{}", env::consts::ARCH, env::consts::OS),
            devices: found
                .map(|found| DeviceReport::new(found.name, found.device.map_err(|why| why.to_string())))
                .collect(),
            selected_device: selected.as_ref().ok().map(|device| device.info().id.to_string()),
            selected_error: selected.err().map(|error| format!("{error:#}")),
            cpu: CpuReport::collect(&machine),
            memory_total_bytes: machine.memory_total_bytes,
            memory_available_bytes: machine.memory_available_bytes,
            environment: VARIABLES.into_iter().map(Variable::read).collect(),
        }
    }

    fn print(&self) -> Result<()> {
        say(&format!("tilefold {} ({})\n", self.version, self.target))?;
        let mut devices = table(&["device", "state", "model", "kernels", "workers", "memory"], 4);
        for device in &self.devices {
            devices.add_row(device.row(self.selected_device.as_deref()));
        }
        say(&devices.to_string())?;
        for device in self.devices.iter().filter(|device| !device.available) {
            say(&format!("  {} is off: {}", device.name, device.reason.as_deref().unwrap_or("unknown")))?;
        }
        for device in self.devices.iter().filter(|device| device.is_virtual) {
            say(&format!("  {} is VIRTUAL: {}", device.name, VIRTUAL_NOTE))?;
        }
        if let Some(error) = &self.selected_error {
            say(&format!("  no device selected: {error}"))?;
        }
        say(&format!("\n{}: {} logical cores, {} threads", self.cpu.model, self.cpu.logical_cores, self.cpu.threads))?;
        let mut simd = table(&["instruction set", "f32 lanes", "compiled in", "on this machine", "selected"], 1);
        for set in &self.cpu.simd {
            let mark = |yes: bool| if yes { "yes" } else { "-" }.to_owned();
            let marks = [set.compiled, set.available, set.selected].map(mark);
            simd.add_row([set.name.to_owned(), set.lanes.to_string()].into_iter().chain(marks));
        }
        say(&simd.to_string())?;
        for cache in &self.cpu.caches {
            say(&format!("  L{} {} cache: {} KiB", cache.level, cache.kind, cache.bytes >> 10))?;
        }
        let (available, total) = (as_f64(self.memory_available_bytes), as_f64(self.memory_total_bytes));
        say(&format!("\nmemory: {} available of {}", bytes(available), bytes(total)))?;
        for variable in &self.environment {
            say(&format!("{}: {}", variable.name, variable.value.as_deref().unwrap_or("not set")))?;
        }
        Ok(())
    }
}

impl DeviceReport {
    fn new(name: String, device: Result<Device, String>) -> Self {
        match device {
            Ok(device) => {
                let info = device.info();
                Self {
                    name,
                    available: true,
                    model: Some(info.name.clone()),
                    arch: Some(info.arch.clone()),
                    parallelism: (info.parallelism > 0).then_some(info.parallelism),
                    dtypes: info.dtypes.iter().map(ToString::to_string).collect(),
                    memory_bytes: (info.memory_bytes > 0).then_some(info.memory_bytes),
                    is_virtual: info.is_virtual,
                    reason: None,
                }
            }
            Err(reason) => Self {
                name,
                available: false,
                model: None,
                arch: None,
                parallelism: None,
                dtypes: Vec::new(),
                memory_bytes: None,
                is_virtual: false,
                reason: Some(reason),
            },
        }
    }

    fn row(&self, selected: Option<&str>) -> [String; 6] {
        let state = match (self.available, selected) {
            (false, _) => "off",
            (true, Some(id)) if id == self.name || id.strip_suffix(":0") == Some(self.name.as_str()) => "selected",
            (true, _) => "ready",
        };
        // Of what is off nothing is known anyway.
        let known =
            |value: Option<String>| value.unwrap_or_else(|| (if self.available { "unknown" } else { "" }).to_owned());
        [
            self.name.clone(),
            state.to_owned(),
            self.model.clone().unwrap_or_default(),
            self.arch.clone().unwrap_or_default(),
            known(self.parallelism.map(|workers| workers.to_string())),
            known(self.memory_bytes.map(|memory| bytes(as_f64(memory)))),
        ]
    }
}

impl CpuReport {
    fn collect(machine: &Machine) -> Self {
        let selected = Arch::from_environment().ok();
        let simd = Arch::ALL.into_iter().map(|arch| SimdReport {
            name: arch.name(),
            lanes: arch.lanes(),
            compiled: is_compiled(arch),
            available: arch.is_available(),
            selected: selected == Some(arch),
        });
        Self {
            model: machine.cpu_model.clone(),
            logical_cores: machine.logical_cores,
            threads: rayon::current_num_threads(),
            simd: simd.collect(),
            caches: cache::of_first_core(),
        }
    }
}

/// Whether this build has kernels for it.
fn is_compiled(arch: Arch) -> bool {
    match arch {
        Arch::Avx2 | Arch::Avx512 | Arch::Avx512Bf16 => cfg!(target_arch = "x86_64"),
        Arch::Neon => cfg!(target_arch = "aarch64"),
        _ => true,
    }
}

impl Variable {
    fn read(name: &'static str) -> Self {
        Self { name, value: env::var_os(name).map(|value| value.to_string_lossy().into_owned()) }
    }
}
