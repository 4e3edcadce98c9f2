//! A device and its queue, shared by all backends of one adapter in a process; and what has gone wrong with them.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::{self, ThreadId};

use tilefold_core::{DeviceError, DeviceId, DeviceKind, DeviceResult, OpenError};
use tilefold_kernels::wgsl::Limits;

use crate::calls::Calls;
use crate::error::{caught, driver};
use crate::memory::Memory;
use crate::module::Pipelines;

/// What a kernel needs at least: WebGPU's defaults have fewer storage buffers than one attention has operands.
const MIN_STORAGE_BUFFERS: u32 = 10;
/// Bindings whose bytes 32 bits can count.
const MAX_BINDING_BYTES: u64 = (1 << 32) - 4;

/// Memory of a workgroup that is used, so that several fit one multiprocessor: what every device has.
const MAX_WORKGROUP_BYTES: u64 = 16 << 10;
/// Rounds of loops that llvmpipe does, less what a bound from measurements may miss: LP_MAX_TGSI_LOOP_ITERATIONS is 65 535.
const LLVMPIPE_LOOP_ROUNDS: u64 = 61_440;
/// Compiled kernels that are kept.
const MAX_PIPELINES: usize = 256;
/// Threads of a workgroup, which no subgroup exceeds here.
const THREADS: u32 = 64;

/// What a device is asked for: less than it has, to see what happens where there is less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WgpuOptions {
    /// Whether kernels use subgroups where the device has them.
    pub subgroups: bool,
    /// Whether rows that all threads of a workgroup want are read into its memory; `None` for where that pays, on GPUs.
    pub workgroup_memory: Option<bool>,
    /// Whether kernels are those for processors, which have memory for many registers and no exponential of their own; `None`
    /// for what the driver says it is.
    pub software: Option<bool>,
    /// Whether work is timed by the device's timestamps where it has them.
    pub timestamps: bool,
    /// Storage buffers of one shader, at most; no fewer than 10 are enough.
    pub max_storage_buffers: u32,
    /// Bytes of one binding, at most.
    pub max_binding_bytes: u64,
    /// Workgroups along one axis of a dispatch, at most; more are folded into the other.
    pub max_workgroups: u32,
    /// Rounds that the loops of one thread make, at most: llvmpipe ends loops after 65 535, without a word.
    pub max_loop_rounds: u64,
    /// Compiled kernels that are kept, at most: a driver's code for one may take a megabyte.
    pub max_pipelines: usize,
}

impl Default for WgpuOptions {
    fn default() -> Self {
        Self {
            subgroups: true,
            workgroup_memory: None,
            software: None,
            timestamps: true,
            max_storage_buffers: u32::MAX,
            max_binding_bytes: u64::MAX,
            max_workgroups: u32::MAX,
            max_loop_rounds: u64::MAX,
            max_pipelines: MAX_PIPELINES,
        }
    }
}

impl WgpuOptions {
    /// What every browser has: no subgroups, no timestamps, 10 storage buffers, bindings of 128 MiB.
    #[must_use]
    pub fn portable() -> Self {
        Self {
            subgroups: false,
            workgroup_memory: None,
            software: None,
            timestamps: false,
            max_storage_buffers: 10,
            max_binding_bytes: 128 << 20,
            max_workgroups: 65_535,
            max_loop_rounds: u64::MAX,
            max_pipelines: MAX_PIPELINES,
        }
    }
}

/// A device in use.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) id: DeviceId,
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) limits: Limits,
    pub(crate) memory: Memory,
    pub(crate) pipelines: Pipelines,
    pub(crate) calls: Calls,
    state: Arc<State>,
}

/// What callbacks have told.
#[derive(Debug, Default)]
struct State {
    lost: OnceLock<String>,
    /// The first error of each thread that no scope has caught, until its next call: wgpu reports on the thread whose call
    /// it is.
    failed: Mutex<HashMap<ThreadId, DeviceError>>,
}

/// A lock that a panic of another thread does not spoil: what it guards is replaced as a whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What `call` gives: wgpu panics where a driver fails while it is waited for, and where a device is lost then.
///
/// # Errors
/// [`DeviceError::Driver`] with the panic's words.
fn unpanicked<T>(call: &'static str, work: impl FnOnce() -> T) -> DeviceResult<T> {
    // What wgpu guards with locks it replaces as a whole; and a device that has failed so is not used again.
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let words = panic.downcast_ref::<String>().map(String::as_str);
        let words = words.or_else(|| panic.downcast_ref::<&str>().copied());
        driver(call, words.unwrap_or("wgpu panicked").to_owned())
    })
}

/// The adapters that can compute, best first: their numbers are those of devices.
pub(crate) fn adapters() -> &'static [wgpu::Adapter] {
    static ADAPTERS: OnceLock<Vec<wgpu::Adapter>> = OnceLock::new();
    ADAPTERS.get_or_init(|| {
        let backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
        let descriptor =
            wgpu::InstanceDescriptor { backends, ..wgpu::InstanceDescriptor::new_without_display_handle() };
        let instance = wgpu::Instance::new(descriptor);
        let mut adapters = pollster::block_on(instance.enumerate_adapters(backends));
        adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
            wgpu::DeviceType::DiscreteGpu => 0,
            wgpu::DeviceType::IntegratedGpu => 1,
            wgpu::DeviceType::VirtualGpu => 2,
            wgpu::DeviceType::Other => 3,
            wgpu::DeviceType::Cpu => 4,
        });
        adapters
    })
}

impl Context {
    /// The context of an adapter: the one in use, or a new one.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] naming a limit that is too low, and what the driver reports.
    pub(crate) fn of(ordinal: usize, adapter: &wgpu::Adapter) -> Result<Arc<Self>, OpenError> {
        static CONTEXTS: OnceLock<Mutex<HashMap<usize, Weak<Context>>>> = OnceLock::new();
        let mut contexts = lock(CONTEXTS.get_or_init(Mutex::default));
        let in_use = contexts.get(&ordinal).and_then(Weak::upgrade);
        if let Some(context) = in_use.filter(|context| context.state.lost.get().is_none()) {
            return Ok(context);
        }
        let context = Arc::new(Self::open(ordinal, adapter, WgpuOptions::default())?);
        contexts.insert(ordinal, Arc::downgrade(&context));
        Ok(context)
    }

    /// A context of its own.
    ///
    /// # Errors
    /// As [`Context::of`].
    pub(crate) fn open(ordinal: usize, adapter: &wgpu::Adapter, options: WgpuOptions) -> Result<Self, OpenError> {
        let id = DeviceId { kind: DeviceKind::Wgpu, ordinal };
        let (mut limits, info) = (adapter.limits(), adapter.get_info());
        let buffers = &mut limits.max_storage_buffers_per_shader_stage;
        *buffers = options.max_storage_buffers.min(*buffers);
        let bytes = &mut limits.max_storage_buffer_binding_size;
        *bytes = options.max_binding_bytes.min(*bytes);
        let workgroups = &mut limits.max_compute_workgroups_per_dimension;
        *workgroups = options.max_workgroups.min(*workgroups);
        let found = limits.max_storage_buffers_per_shader_stage;
        if found < MIN_STORAGE_BUFFERS {
            let limit = format!(
                "{id} ({}) has max_storage_buffers_per_shader_stage {found}, and the kernels need {MIN_STORAGE_BUFFERS}",
                info.name
            );
            return Err(DeviceError::Unsupported { limit }.into());
        }
        let wanted = |is_wanted: bool, feature| if is_wanted { feature } else { wgpu::Features::empty() };
        let wanted = wanted(options.subgroups, wgpu::Features::SUBGROUP)
            | wanted(options.timestamps, wgpu::Features::TIMESTAMP_QUERY);
        let features = adapter.features() & wanted;
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("tilefold"),
            required_features: features,
            required_limits: limits.clone(),
            ..wgpu::DeviceDescriptor::default()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
            .map_err(|error| driver("requestDevice", error.to_string()))?;
        let state = Arc::new(State::default());
        let told = Arc::clone(&state);
        device.set_device_lost_callback(move |reason, message| {
            // The first message stays.
            let _ = told.lost.set(format!("{reason:?}: {message}"));
        });
        let told = Arc::clone(&state);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            lock(&told.failed).entry(thread::current().id()).or_insert_with(|| caught("submit", &error));
        }));
        let software = options.software.unwrap_or(info.device_type == wgpu::DeviceType::Cpu);
        let driver_rounds = if info.driver == "llvmpipe" { LLVMPIPE_LOOP_ROUNDS } else { u64::MAX };
        let has_subgroups = features.contains(wgpu::Features::SUBGROUP);
        let staged = options.workgroup_memory.unwrap_or(!software);
        let workgroup_bytes = u64::from(limits.max_compute_workgroup_storage_size).min(MAX_WORKGROUP_BYTES);
        let kernel_limits = Limits {
            binding_bytes: limits.max_storage_buffer_binding_size.min(MAX_BINDING_BYTES),
            storage_buffers: found,
            offset_alignment: u64::from(limits.min_storage_buffer_offset_alignment),
            workgroups: limits.max_compute_workgroups_per_dimension,
            subgroup: if has_subgroups { info.subgroup_min_size.clamp(1, THREADS) } else { 1 },
            workgroup_bytes: if staged { workgroup_bytes } else { 0 },
            loop_rounds: options.max_loop_rounds.min(driver_rounds),
            software,
        };
        let memory = Memory::new(limits.max_buffer_size);
        let argument_alignment = u64::from(limits.min_uniform_buffer_offset_alignment);
        let pipelines = Pipelines::new(argument_alignment, options.max_pipelines);
        Ok(Self { id, device, queue, limits: kernel_limits, memory, pipelines, calls: Calls::default(), state })
    }

    /// Runs `work`, and gives what it reports: errors of its own, those that wgpu has found in it, and a lost device.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], [`DeviceError::OutOfMemory`] without numbers, which [`crate::error::asked`] adds, [`DeviceError::Driver`].
    pub(crate) fn guarded<T>(&self, call: &'static str, work: impl FnOnce() -> DeviceResult<T>) -> DeviceResult<T> {
        self.check_lost()?;
        let filters = [wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Internal];
        let scopes = filters.map(|filter| self.device.push_error_scope(filter));
        let result = unpanicked(call, work).flatten();
        let mut found = None;
        for scope in scopes.into_iter().rev() {
            // Every scope is popped, the innermost first.
            let error = pollster::block_on(scope.pop());
            found = found.or(error);
        }
        self.check_lost()?;
        match found {
            Some(error) => Err(caught(call, &error)),
            None => result,
        }
    }

    /// Waits for work that was submitted: all of it, or up to one submission.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], and errors that came too late for the call that caused them.
    pub(crate) fn wait(&self, submission: Option<wgpu::SubmissionIndex>) -> DeviceResult<()> {
        self.check_lost()?;
        let poll = || self.device.poll(wgpu::PollType::Wait { submission_index: submission, timeout: None });
        let waits = unpanicked("poll", poll);
        self.check_lost()?;
        waits?.map_err(|error| driver("poll", error.to_string()))?;
        self.check()
    }

    /// Whether all is well with what this thread has called.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], and what no scope has caught, once.
    pub(crate) fn check(&self) -> DeviceResult<()> {
        self.check_lost()?;
        lock(&self.state.failed).remove(&thread::current().id()).map_or(Ok(()), Err)
    }

    pub(crate) fn check_lost(&self) -> DeviceResult<()> {
        match self.state.lost.get() {
            Some(message) => Err(DeviceError::Lost { message: message.clone() }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_with_its_words() {
        #[allow(clippy::panic, reason = "what is caught")]
        fn fails(name: &str) {
            panic!("no {name}");
        }
        assert_eq!(unpanicked("poll", || 3), Ok(3));
        assert_eq!(unpanicked("poll", || fails("device")), Err(driver("poll", "no device".into())));
    }
}
