//! A device that wgpu drives: found, opened, described, and each call of the contract handed to its file.

use std::sync::Arc;

use tilefold_core::{
    AccumulateArgs, AttentionPlan, AttentionProblem, Backend, BackwardArgs, DType, DeviceError, DeviceId, DeviceInfo,
    DeviceKind, DeviceResult, Event, ForwardArgs, MergeArgs, OpenError, RelayoutArgs, RopeArgs, Storage, Stream,
    TensorViewMut, Timing,
};

use crate::context::{Context, WgpuOptions, adapters};
use crate::stream::WgpuStream;
use crate::{accumulate, attention, event, memory, merge, relayout, rope, timing};

/// One Vulkan, Metal or DX12 device.
///
/// *Streams*: launches only enqueue; all streams of a device share one queue. *Sharing*: all backends of one device in a
/// process share its memory and kernels. *Threads*: every call may be made from any thread.
#[derive(Clone, Debug)]
pub struct WgpuBackend {
    info: DeviceInfo,
    context: Arc<Context>,
}

impl WgpuBackend {
    /// Devices that drivers offer; GPUs come before software.
    #[must_use]
    pub fn count() -> usize {
        adapters().len()
    }

    /// Device number `ordinal`.
    ///
    /// # Errors
    /// [`OpenError::NoDriver`] where no driver offers a device, [`OpenError::NoSuchDevice`], [`DeviceError::Unsupported`]
    /// naming a limit that is too low, and what the driver reports.
    pub fn new(ordinal: usize) -> Result<Self, OpenError> {
        let adapter = adapter(ordinal)?;
        let context = Context::of(ordinal, adapter)?;
        Ok(Self { info: describe(ordinal, adapter), context })
    }

    /// Device number `ordinal` with less than it has. Its memory, streams and kernels are its own: those of other backends
    /// of the device are refused.
    ///
    /// # Errors
    /// As [`WgpuBackend::new`].
    pub fn with_options(ordinal: usize, options: WgpuOptions) -> Result<Self, OpenError> {
        let adapter = adapter(ordinal)?;
        let context = Arc::new(Context::open(ordinal, adapter, options)?);
        Ok(Self { info: describe(ordinal, adapter), context })
    }

    /// Whether device number `ordinal` is a program on the processor, which is slower than the CPU backend.
    #[must_use]
    pub fn is_software(&self) -> bool {
        self.context.limits.software
    }

    /// Bytes of the device's memory in use by this process, and the most there were.
    #[must_use]
    pub fn memory_bytes(&self) -> [u64; 2] {
        self.context.memory.in_use()
    }

    /// The device in use, for other libraries.
    #[must_use]
    pub fn raw_device(&self) -> &wgpu::Device {
        &self.context.device
    }

    /// Its queue, for other libraries: work of both runs in the order in which it was submitted.
    #[must_use]
    pub fn raw_queue(&self) -> &wgpu::Queue {
        &self.context.queue
    }

    fn check(&self, stream: &Stream, what: &'static str, device: DeviceId) -> DeviceResult<()> {
        WgpuStream::check(&self.context, stream)?;
        let expected = self.context.id;
        if device == expected { Ok(()) } else { Err(DeviceError::WrongDevice { what, expected, got: device }) }
    }
}

fn adapter(ordinal: usize) -> Result<&'static wgpu::Adapter, OpenError> {
    let adapters = adapters();
    if adapters.is_empty() {
        return Err(OpenError::NoDriver { library: LIBRARY.to_owned(), hint: HINT.to_owned() });
    }
    adapters.get(ordinal).ok_or_else(|| {
        let names: Vec<_> = (0..adapters.len()).map(|ordinal| format!("wgpu:{ordinal}")).collect();
        OpenError::NoSuchDevice { name: format!("wgpu:{ordinal}"), known: names.join(", ") }
    })
}

/// What is missing where there is no device.
#[cfg(target_os = "windows")]
const LIBRARY: &str = "a DX12 or Vulkan driver";
#[cfg(target_vendor = "apple")]
const LIBRARY: &str = "Metal";
#[cfg(not(any(target_os = "windows", target_vendor = "apple")))]
const LIBRARY: &str = "a Vulkan driver";

/// What to do about it.
#[cfg(target_os = "windows")]
const HINT: &str = "install the driver of your GPU's maker";
#[cfg(target_vendor = "apple")]
const HINT: &str = "this machine has no device that Metal can use";
#[cfg(not(any(target_os = "windows", target_vendor = "apple")))]
const HINT: &str = "install the Vulkan driver of your GPU's maker, or Mesa's (apt install mesa-vulkan-drivers), which also \
brings one for processors; VK_DRIVER_FILES may hide those that are there";

fn describe(ordinal: usize, adapter: &wgpu::Adapter) -> DeviceInfo {
    let info = adapter.get_info();
    let vendor = match info.vendor {
        0x10de => "NVIDIA".to_owned(),
        0x1002 | 0x1022 => "AMD".to_owned(),
        0x8086 => "Intel".to_owned(),
        0x106b => "Apple".to_owned(),
        0x5143 => "Qualcomm".to_owned(),
        0x13b5 => "ARM".to_owned(),
        0x10005 => "Mesa".to_owned(),
        0x1ae0 => "Google".to_owned(),
        other => format!("vendor {other:#x}"),
    };
    let driver = [info.driver, info.driver_info].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>();
    DeviceInfo {
        id: DeviceId { kind: DeviceKind::Wgpu, ordinal },
        name: info.name,
        vendor,
        arch: format!("{}: {}", info.backend, driver.join(" ")).trim_end_matches([':', ' ']).to_owned(),
        // WebGPU tells neither.
        memory_bytes: 0,
        parallelism: 0,
        lanes: usize::try_from(info.subgroup_min_size).unwrap_or(1).max(1),
        dtypes: vec![DType::F32, DType::F16, DType::BF16],
        is_virtual: false,
    }
}

impl Backend for WgpuBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn stream(&self) -> DeviceResult<Stream> {
        Ok(WgpuStream::open(&self.context))
    }

    fn alloc(&self, stream: &Stream, bytes: usize) -> DeviceResult<Storage> {
        WgpuStream::check(&self.context, stream)?;
        memory::storage(&self.context, bytes)
    }

    fn upload(&self, stream: &Stream, source: &[u8], destination: &mut Storage) -> DeviceResult<()> {
        self.check(stream, "storage", destination.device())?;
        memory::upload(&self.context, source, destination)
    }

    fn download(&self, stream: &Stream, source: &Storage, destination: &mut [u8]) -> DeviceResult<()> {
        self.check(stream, "storage", source.device())?;
        memory::download(&self.context, source, destination)
    }

    fn fill(&self, stream: &Stream, destination: TensorViewMut<'_>, value: f64) -> DeviceResult<()> {
        self.check(stream, "destination", destination.as_view().device())?;
        relayout::fill(&self.context, &destination, value)
    }

    fn relayout(&self, stream: &Stream, args: RelayoutArgs<'_>) -> DeviceResult<()> {
        self.check(stream, "source", args.device())?;
        relayout::relayout(&self.context, args)
    }

    fn accumulate(&self, stream: &Stream, args: AccumulateArgs<'_>) -> DeviceResult<()> {
        self.check(stream, "source", args.device())?;
        accumulate::accumulate(&self.context, args)
    }

    fn rope(&self, stream: &Stream, args: RopeArgs<'_>) -> DeviceResult<()> {
        self.check(stream, "source", args.device())?;
        rope::rope(&self.context, args)
    }

    fn record(&self, stream: &Stream) -> DeviceResult<Event> {
        WgpuStream::check(&self.context, stream)?;
        self.context.check_lost()?;
        Ok(event::record(&self.context))
    }

    fn wait(&self, stream: &Stream, event: &Event) -> DeviceResult<()> {
        WgpuStream::check(&self.context, stream)?;
        self.context.check_lost()?;
        event::wait(&self.context, event)
    }

    fn synchronize(&self, stream: &Stream) -> DeviceResult<()> {
        WgpuStream::check(&self.context, stream)?;
        self.context.wait(None)
    }

    /// By timestamps of the device, unless it has none or [`WgpuOptions::timestamps`] is off.
    fn timed(&self, stream: &Stream, work: &mut dyn FnMut()) -> DeviceResult<Timing> {
        WgpuStream::check(&self.context, stream)?;
        timing::timed(&self.context, work)
    }

    fn plan_attention(&self, problem: &AttentionProblem) -> DeviceResult<AttentionPlan> {
        attention::plan(&self.context, problem)
    }

    fn attention_forward(&self, stream: &Stream, args: ForwardArgs<'_>) -> DeviceResult<()> {
        self.check(stream, "plan", args.plan().device)?;
        attention::forward(&self.context, args)
    }

    fn attention_backward(&self, stream: &Stream, args: BackwardArgs<'_>) -> DeviceResult<()> {
        self.check(stream, "plan", args.plan().device)?;
        attention::backward(&self.context, args)
    }

    fn merge(&self, stream: &Stream, args: MergeArgs<'_>) -> DeviceResult<()> {
        self.check(stream, "out", args.device())?;
        merge::merge(&self.context, args)
    }
}
