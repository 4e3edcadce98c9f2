//! A CUDA device: found, opened, described, and each call of the contract handed to its file.

use std::any::Any;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use tilefold_core::{
    AccumulateArgs, AttentionPlan, AttentionProblem, Backend, BackwardArgs, DType, DeviceError, DeviceId, DeviceInfo,
    DeviceKind, DeviceResult, Event, ForwardArgs, MergeArgs, OpenError, RelayoutArgs, RopeArgs, Storage, Stream,
    TensorViewMut,
};

use crate::context::Context;
use crate::driver::Driver;
use crate::nvrtc::Compiler;
use crate::stream::CudaStream;
use crate::{accumulate, attention, event, memory, merge, relayout, rope};

/// Oldest architecture the kernels run on, as 80 for sm_80.
const MIN_ARCH: c_int = 80;
/// Longest name of a device.
const NAME_BYTES: c_int = 256;

/// One NVIDIA GPU.
///
/// *Streams*: launches only enqueue. Memory is freed behind all work that was enqueued when its storage is dropped, on
/// whichever stream. *Sharing*: all backends of one device in a process share its context, memory and kernels.
/// *Threads*: every call may be made from any thread, and leaves the thread's current context as it was.
#[derive(Clone, Debug)]
pub struct CudaBackend {
    info: DeviceInfo,
    limits: Limits,
    context: Arc<Context>,
}

/// What kernels must keep to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Architecture as 80 for sm_80.
    pub(crate) arch: c_int,
    /// Shared memory one block can have.
    pub(crate) shared_bytes: u32,
    /// Multiprocessors.
    pub(crate) multiprocessors: u32,
}

impl CudaBackend {
    /// Devices the driver sees.
    ///
    /// # Errors
    /// [`OpenError::NoDriver`], [`OpenError::TooOld`], and what the driver reports.
    pub fn count() -> Result<usize, OpenError> {
        count(Driver::get()?)
    }

    /// Device number `ordinal`, in its primary context.
    ///
    /// # Errors
    /// [`OpenError::NoDriver`] without a driver or NVRTC, [`OpenError::TooOld`], [`OpenError::NoSuchDevice`],
    /// [`DeviceError::Unsupported`] for an architecture older than sm_80, and what the driver reports.
    pub fn new(ordinal: usize) -> Result<Self, OpenError> {
        let driver = Driver::get()?;
        let device = device(driver, ordinal)?;
        let (info, limits) = describe(driver, ordinal, device)?;
        Compiler::get(driver.version)?;
        let context = Context::primary(driver, ordinal, device)?;
        Ok(Self { info, limits, context })
    }

    /// The device of a context of the caller's.
    ///
    /// # Safety
    /// `context` is a `CUcontext` that stays valid while this backend, or anything made with it, lives.
    ///
    /// # Errors
    /// As [`CudaBackend::new`].
    pub unsafe fn from_raw(context: *mut c_void) -> Result<Self, OpenError> {
        let driver = Driver::get()?;
        let mut handle = -1;
        let raw = context.cast();
        let mut popped = std::ptr::null_mut();
        // SAFETY: the caller's; what is pushed is popped.
        let known = unsafe {
            driver.cuCtxPushCurrent_v2(raw).and_then(|()| {
                let known = driver.cuCtxGetDevice(&raw mut handle);
                driver.cuCtxPopCurrent_v2(&raw mut popped).and(known)
            })
        };
        known.map_err(|failure| failure.describe(driver))?;
        let is_it = |&ordinal: &usize| device(driver, ordinal).is_ok_and(|device| device == handle);
        let ordinal = (0..count(driver)?).find(is_it).unwrap_or(0);
        let (info, limits) = describe(driver, ordinal, handle)?;
        Compiler::get(driver.version)?;
        // SAFETY: the caller's.
        let context = unsafe { Context::external(driver, ordinal, handle, raw)? };
        Ok(Self { info, limits, context })
    }

    /// The `CUcontext` in use, for other libraries.
    #[must_use]
    pub fn raw_context(&self) -> *mut c_void {
        self.context.raw.cast()
    }

    /// A `CUstream` of the caller's, null for the default stream, as a stream.
    ///
    /// Dropping the last clone of the result waits for the stream's work.
    ///
    /// # Safety
    /// `stream` is a stream of this backend's context that is destroyed after the last clone of the result.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for a stream of another context, and what the driver reports.
    pub unsafe fn stream_from_raw(&self, stream: *mut c_void) -> DeviceResult<Stream> {
        // SAFETY: the caller's.
        unsafe { CudaStream::external(&self.context, stream.cast()) }
    }

    /// The `CUstream` inside a stream, for other libraries.
    ///
    /// # Errors
    /// [`DeviceError::WrongDevice`], [`DeviceError::Unsupported`] for a stream that another backend made.
    pub fn raw_stream(&self, stream: &Stream) -> DeviceResult<*mut c_void> {
        Ok(CudaStream::of(&self.context, stream)?.raw.0.cast())
    }

    /// Memory of the caller's, at a `CUdeviceptr`, as a storage; kept alive by `owner`.
    ///
    /// # Safety
    /// As [`Storage::from_raw`].
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for an address that is not of this device, and what the driver reports.
    pub unsafe fn storage_from_raw(
        &self,
        address: u64,
        bytes: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> DeviceResult<Storage> {
        // SAFETY: the caller's.
        unsafe { memory::external(&self.context, address, bytes, owner) }
    }

    /// The handle of a stream and the check that what it is used for is of this device, too.
    fn ours<'a>(&self, stream: &'a Stream, what: &'static str, device: DeviceId) -> DeviceResult<&'a CudaStream> {
        let handle = CudaStream::of(&self.context, stream)?;
        let expected = self.context.id;
        if device == expected { Ok(handle) } else { Err(DeviceError::WrongDevice { what, expected, got: device }) }
    }
}

fn count(driver: &Driver) -> Result<usize, OpenError> {
    let mut count = 0;
    // SAFETY: the pointer is valid.
    match unsafe { driver.cuDeviceGetCount(&raw mut count) } {
        // The driver was not initialised, for want of a device.
        Err(failure) if failure.is(cudarc::driver::sys::CUresult::CUDA_ERROR_NOT_INITIALIZED) => Ok(0),
        Err(failure) if failure.is(cudarc::driver::sys::CUresult::CUDA_ERROR_NO_DEVICE) => Ok(0),
        Err(failure) => Err(failure.describe(driver).into()),
        Ok(()) => Ok(usize::try_from(count).unwrap_or(0)),
    }
}

/// The driver's handle of a device.
fn device(driver: &Driver, ordinal: usize) -> Result<c_int, OpenError> {
    let count = count(driver)?;
    let number = c_int::try_from(ordinal).ok().filter(|_| ordinal < count).ok_or_else(|| {
        let names: Vec<_> = (0..count).map(|ordinal| format!("cuda:{ordinal}")).collect();
        let none = || "the driver sees no GPU (CUDA_VISIBLE_DEVICES may hide it)".to_owned();
        OpenError::NoSuchDevice {
            name: format!("cuda:{ordinal}"),
            known: if names.is_empty() { none() } else { names.join(", ") },
        }
    })?;
    let mut device = -1;
    // SAFETY: the pointer is valid.
    unsafe { driver.cuDeviceGet(&raw mut device, number) }.map_err(|failure| failure.describe(driver))?;
    Ok(device)
}

fn describe(driver: &Driver, ordinal: usize, device: c_int) -> Result<(DeviceInfo, Limits), OpenError> {
    let id = DeviceId { kind: DeviceKind::Cuda, ordinal };
    let attribute = |attribute: Attribute| {
        let mut value = 0;
        // SAFETY: the pointer is valid, the device is one the driver named.
        unsafe { driver.cuDeviceGetAttribute(&raw mut value, attribute, device) }
            .map_err(|failure| failure.describe(driver))
            .map(|()| value)
    };
    let mut bytes = 0;
    // SAFETY: as above.
    unsafe { driver.cuDeviceTotalMem_v2(&raw mut bytes, device) }.map_err(|failure| failure.describe(driver))?;
    let name = name(driver, device)?;
    let arch = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
        + attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    if arch < MIN_ARCH {
        let limit = format!("{id} ({name}) is sm_{arch}, and the kernels need sm_{MIN_ARCH} (A100) or newer");
        return Err(DeviceError::Unsupported { limit }.into());
    }
    let unsigned = |value: c_int| u32::try_from(value).unwrap_or(0);
    let multiprocessors = unsigned(attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?);
    let lanes = unsigned(attribute(Attribute::CU_DEVICE_ATTRIBUTE_WARP_SIZE)?);
    let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    let info = DeviceInfo {
        id,
        name,
        vendor: if driver.is_virtual { "tilefold" } else { "NVIDIA" }.to_owned(),
        arch: format!("sm_{arch}"),
        memory_bytes: u64::try_from(bytes).unwrap_or(u64::MAX),
        parallelism: usize::try_from(multiprocessors).unwrap_or(1),
        lanes: usize::try_from(lanes).unwrap_or(1),
        dtypes: vec![DType::F32, DType::F16, DType::BF16],
        is_virtual: driver.is_virtual,
    };
    Ok((info, Limits { arch, shared_bytes: unsigned(shared), multiprocessors }))
}

fn name(driver: &Driver, device: c_int) -> Result<String, OpenError> {
    let mut name = [0_u8; NAME_BYTES as usize];
    // SAFETY: room for as many bytes as is said.
    unsafe { driver.cuDeviceGetName(name.as_mut_ptr().cast::<c_char>(), NAME_BYTES, device) }
        .map_err(|failure| failure.describe(driver))?;
    let text = CStr::from_bytes_until_nul(&name);
    Ok(text.map(|text| text.to_string_lossy().into_owned()).unwrap_or_default())
}

impl Backend for CudaBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn stream(&self) -> DeviceResult<Stream> {
        CudaStream::open(&self.context)
    }

    fn alloc(&self, stream: &Stream, bytes: usize) -> DeviceResult<Storage> {
        memory::storage(CudaStream::of(&self.context, stream)?, bytes)
    }

    fn upload(&self, stream: &Stream, source: &[u8], destination: &mut Storage) -> DeviceResult<()> {
        memory::upload(self.ours(stream, "storage", destination.device())?, source, destination)
    }

    fn download(&self, stream: &Stream, source: &Storage, destination: &mut [u8]) -> DeviceResult<()> {
        memory::download(self.ours(stream, "storage", source.device())?, source, destination)
    }

    fn fill(&self, stream: &Stream, destination: TensorViewMut<'_>, value: f64) -> DeviceResult<()> {
        let stream = self.ours(stream, "destination", destination.as_view().device())?;
        relayout::fill(stream, self.limits, &destination, value)
    }

    fn relayout(&self, stream: &Stream, args: RelayoutArgs<'_>) -> DeviceResult<()> {
        relayout::relayout(self.ours(stream, "source", args.device())?, self.limits, args)
    }

    fn accumulate(&self, stream: &Stream, args: AccumulateArgs<'_>) -> DeviceResult<()> {
        accumulate::accumulate(self.ours(stream, "source", args.device())?, self.limits, args)
    }

    fn rope(&self, stream: &Stream, args: RopeArgs<'_>) -> DeviceResult<()> {
        rope::rope(self.ours(stream, "source", args.device())?, self.limits, args)
    }

    fn record(&self, stream: &Stream) -> DeviceResult<Event> {
        event::record(CudaStream::of(&self.context, stream)?)
    }

    fn wait(&self, stream: &Stream, event: &Event) -> DeviceResult<()> {
        event::wait(CudaStream::of(&self.context, stream)?, event)
    }

    fn synchronize(&self, stream: &Stream) -> DeviceResult<()> {
        Ok(CudaStream::of(&self.context, stream)?.synchronize()?)
    }

    fn plan_attention(&self, problem: &AttentionProblem) -> DeviceResult<AttentionPlan> {
        attention::plan(problem, self.context.id, self.limits)
    }

    fn attention_forward(&self, stream: &Stream, args: ForwardArgs<'_>) -> DeviceResult<()> {
        attention::forward(self.ours(stream, "plan", args.plan().device)?, self.limits, args)
    }

    fn attention_backward(&self, stream: &Stream, args: BackwardArgs<'_>) -> DeviceResult<()> {
        attention::backward(self.ours(stream, "plan", args.plan().device)?, self.limits, args)
    }

    fn merge(&self, stream: &Stream, args: MergeArgs<'_>) -> DeviceResult<()> {
        merge::merge(self.ours(stream, "out", args.device())?, self.limits, args)
    }
}
