//! The devices of this build behind one type: found, opened, chosen, and one `match` to the backend.

use std::env;
use std::ffi::OsStr;
use std::sync::Arc;

#[cfg(feature = "cuda")]
use crate::CudaBackend;
#[cfg(feature = "wgpu")]
use crate::WgpuBackend;
use crate::{
    AccumulateArgs, AttentionPlan, AttentionProblem, Backend, BackwardArgs, CpuBackend, DType, DeviceError, DeviceId,
    DeviceInfo, DeviceResult, Error, Event, ForwardArgs, Layout, MergeArgs, OpenError, ProblemError, RelayoutArgs,
    RopeArgs, Storage, Stream, Tensor, TensorViewMut, Timing,
};

/// The environment variable that names the device [`Device::best`] opens.
pub const DEVICE_VARIABLE: &str = "TILEFOLD_DEVICE";

/// Kinds of device by preference.
const KINDS: [&str; 4] = ["cuda", "rocm", "wgpu", "cpu"];

/// One device: closed over the backends of this build, open through `Custom`.
///
/// ```
/// use tilefold::{Backend, Device};
/// let device = Device::open("cpu")?;
/// println!("{} ({})", device.info().name, device.info().arch);
/// # Ok::<(), tilefold::Error>(())
/// ```
#[non_exhaustive]
#[derive(Clone, Debug)]
pub enum Device {
    /// The host's processors.
    Cpu(CpuBackend),
    /// An NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda(CudaBackend),
    /// A Vulkan, Metal or DX12 device.
    #[cfg(feature = "wgpu")]
    Wgpu(WgpuBackend),
    /// A backend of the caller's own; `docs/adding-a-backend.md` shows how to write one.
    Custom(Arc<dyn Backend>),
}

/// A device that was looked for.
#[derive(Clone, Debug)]
pub struct Discovery {
    /// The name [`Device::open`] takes.
    pub name: String,
    /// The device, or why it cannot be used.
    pub device: Result<Device, OpenError>,
}

impl Device {
    /// Every kind of device this crate knows, best first: its devices, or why there is none.
    ///
    /// The first device of a kind has the kind's name, further ones a number: `cuda`, `cuda:1`.
    ///
    /// ```
    /// for found in tilefold::Device::all() {
    ///     match found.device {
    ///         Ok(_) => println!("{}: ready", found.name),
    ///         Err(why) => println!("{}: {why}", found.name),
    ///     }
    /// }
    /// ```
    #[must_use]
    pub fn all() -> Vec<Discovery> {
        let names = KINDS.iter().flat_map(|&kind| {
            let further = (1..count(kind)).map(move |ordinal| format!("{kind}:{ordinal}"));
            std::iter::once(kind.to_owned()).chain(further)
        });
        names.map(|name| Discovery { device: Self::open(&name), name }).collect()
    }

    /// The device with a name: `cpu`, `cpu:0`, `cuda:0`, ...; a name without a number means number 0.
    ///
    /// ```
    /// use tilefold::{Device, OpenError};
    /// assert!(Device::open("cpu:0").is_ok());
    /// assert!(matches!(Device::open("abacus"), Err(OpenError::NoSuchDevice { .. })));
    /// ```
    ///
    /// # Errors
    /// [`OpenError::NoSuchDevice`] for an unknown name, [`OpenError::NotCompiled`] for a kind of device this build leaves
    /// out, [`OpenError::NoBackend`] for one this version has no backend for, and what the backend reports.
    pub fn open(name: &str) -> Result<Self, OpenError> {
        let unknown = || OpenError::NoSuchDevice { name: name.to_owned(), known: known_names() };
        let (kind, ordinal) = match name.split_once(':') {
            None => (name, 0),
            Some((kind, ordinal)) => (kind, ordinal.parse::<usize>().map_err(|_| unknown())?),
        };
        match KINDS.iter().find(|&&known| known == kind) {
            Some(&"cpu") if ordinal == 0 => Self::cpu(),
            Some(&"cpu") | None => Err(unknown()),
            Some(&"cuda") => cuda(ordinal),
            Some(&"wgpu") => wgpu(ordinal),
            Some(kind) => Err(OpenError::NoBackend { kind, version: env!("CARGO_PKG_VERSION") }),
        }
    }

    /// The device `TILEFOLD_DEVICE` names; without it the first that opens, GPUs before the CPU. A wgpu device that is itself
    /// a program on the CPU has to be named.
    ///
    /// ```
    /// use tilefold::Backend;
    /// println!("{}", tilefold::Device::best()?.info().name);
    /// # Ok::<(), tilefold::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`OpenError::BadSetting`] when the variable names no device; otherwise as [`Device::open`].
    pub fn best() -> Result<Self, OpenError> {
        Self::choose(env::var_os(DEVICE_VARIABLE).as_deref())
    }

    fn choose(setting: Option<&OsStr>) -> Result<Self, OpenError> {
        let Some(value) = setting else {
            let opened =
                Self::all().into_iter().filter_map(|found| found.device.ok()).find(|device| !device.is_software());
            return opened.map_or_else(Self::cpu, Ok);
        };
        let bad = || OpenError::BadSetting {
            variable: DEVICE_VARIABLE,
            value: value.to_string_lossy().into_owned(),
            expected: format!("one of {}", known_names()),
        };
        match Self::open(value.to_str().ok_or_else(bad)?) {
            Err(OpenError::NoSuchDevice { .. }) => Err(bad()),
            opened => opened,
        }
    }

    /// Whether it is a wgpu device that is a program on the CPU: correct, and slower than the CPU backend.
    fn is_software(&self) -> bool {
        match self {
            #[cfg(feature = "wgpu")]
            Self::Wgpu(device) => device.is_software(),
            _ => false,
        }
    }

    /// The host's processors, with the best instruction set or the one `TILEFOLD_CPU_ARCH` names.
    ///
    /// # Errors
    /// [`OpenError::BadSetting`] when that variable has a value this machine cannot follow.
    pub fn cpu() -> Result<Self, OpenError> {
        CpuBackend::new().map(Self::Cpu)
    }

    /// A row-major tensor of zeros on the device.
    ///
    /// ```
    /// let out = tilefold::Device::cpu()?.zeros(tilefold::DType::BF16, &[1, 4, 16, 2, 8])?;
    /// assert_eq!(out.shape(), [1, 4, 16, 2, 8]);
    /// # Ok::<(), tilefold::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ProblemError::ZeroSize`], [`ProblemError::Overflow`], [`crate::DeviceError::OutOfMemory`].
    pub fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<Tensor, Error> {
        let layout = Layout::contiguous(shape)?;
        let overflow = ProblemError::Overflow { tensor: "tensor", quantity: "size in bytes" };
        let bytes = layout.len().checked_mul(dtype.size_bytes()).ok_or(overflow)?;
        let stream = self.stream()?;
        let storage = self.alloc(&stream, bytes)?;
        // The stream ends here: what is to come on others must find zeros.
        self.synchronize(&stream)?;
        Ok(Tensor::new(storage, dtype, layout)?)
    }

    /// A host tensor as one of the device, in the same layout; where the device reads host memory it stays where it is.
    ///
    /// ```
    /// use tilefold::{Device, Tensor};
    /// let device = Device::cpu()?;
    /// let tensor = device.upload_tensor(Tensor::from_vec(vec![1.0_f32, 2.0], &[2])?)?;
    /// assert_eq!(device.download_tensor(tensor)?.to_f64()?, [1.0, 2.0]);
    /// # Ok::<(), tilefold::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`crate::DeviceError::WrongDevice`] for a tensor of another device, [`crate::DeviceError::OutOfMemory`], and what the
    /// device reports.
    pub fn upload_tensor(&self, tensor: Tensor) -> Result<Tensor, Error> {
        let id = self.info().id;
        if tensor.device() == id {
            return Ok(tensor);
        }
        let foreign = || DeviceError::WrongDevice { what: "tensor", expected: DeviceId::CPU, got: tensor.device() };
        let bytes = tensor.storage().host_bytes().ok_or_else(foreign)?;
        let stream = self.stream()?;
        let mut storage = self.alloc(&stream, bytes.len())?;
        self.upload(&stream, bytes, &mut storage)?;
        self.synchronize(&stream)?;
        Ok(Tensor::new(storage, tensor.dtype(), tensor.layout().clone())?)
    }

    /// A tensor of the device as one of the host, in the same layout; one of the host stays where it is.
    ///
    /// Waits for the copy, and for no work of other streams: synchronize these first.
    ///
    /// # Errors
    /// [`crate::DeviceError::WrongDevice`] for a tensor of another device, [`ProblemError::OutOfMemory`], and what the device
    /// reports.
    pub fn download_tensor(&self, tensor: Tensor) -> Result<Tensor, Error> {
        let (expected, got) = (self.info().id, tensor.device());
        if got.is_host() {
            return Ok(tensor);
        }
        if got != expected {
            return Err(DeviceError::WrongDevice { what: "tensor", expected, got }.into());
        }
        let bytes = tensor.storage().bytes();
        // Words, so that elements of every dtype are aligned.
        let mut words: Vec<f32> = Vec::new();
        let out_of_memory = |_| ProblemError::OutOfMemory { tensor: "tensor", bytes };
        words.try_reserve_exact(bytes.div_ceil(size_of::<f32>())).map_err(out_of_memory)?;
        words.resize(bytes.div_ceil(size_of::<f32>()), 0.0);
        let mut storage = Storage::from_vec(words);
        let to = storage.host_bytes_mut().and_then(|to| to.get_mut(..bytes));
        self.download(&self.stream()?, tensor.storage(), to.unwrap_or_default())?;
        Ok(Tensor::new(storage, tensor.dtype(), tensor.layout().clone())?)
    }
}

#[cfg(feature = "cuda")]
fn cuda(ordinal: usize) -> Result<Device, OpenError> {
    CudaBackend::new(ordinal).map(Device::Cuda)
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> Result<Device, OpenError> {
    Err(OpenError::NotCompiled { kind: "cuda" })
}

#[cfg(feature = "wgpu")]
fn wgpu(ordinal: usize) -> Result<Device, OpenError> {
    WgpuBackend::new(ordinal).map(Device::Wgpu)
}

#[cfg(not(feature = "wgpu"))]
fn wgpu(_: usize) -> Result<Device, OpenError> {
    Err(OpenError::NotCompiled { kind: "wgpu" })
}

/// Devices of a kind, as far as this build can tell.
fn count(kind: &str) -> usize {
    match kind {
        #[cfg(feature = "cuda")]
        "cuda" => CudaBackend::count().unwrap_or(0),
        #[cfg(feature = "wgpu")]
        "wgpu" => WgpuBackend::count(),
        _ => 1,
    }
}

/// Names that may be given to [`Device::open`] in this build.
fn known_names() -> String {
    let names = KINDS.iter().flat_map(|&kind| match kind {
        "cpu" => vec!["cpu".to_owned()],
        #[cfg(feature = "cuda")]
        "cuda" => (0..count(kind)).map(|ordinal| format!("{kind}:{ordinal}")).collect(),
        #[cfg(feature = "wgpu")]
        "wgpu" => (0..count(kind)).map(|ordinal| format!("{kind}:{ordinal}")).collect(),
        _ => Vec::new(),
    });
    names.collect::<Vec<_>>().join(", ")
}

macro_rules! dispatch {
    ($device:expr, $backend:ident => $call:expr) => {
        match $device {
            Device::Cpu($backend) => $call,
            #[cfg(feature = "cuda")]
            Device::Cuda($backend) => $call,
            #[cfg(feature = "wgpu")]
            Device::Wgpu($backend) => $call,
            Device::Custom($backend) => $call,
        }
    };
}

impl Backend for Device {
    fn info(&self) -> &DeviceInfo {
        dispatch!(self, backend => backend.info())
    }

    fn stream(&self) -> DeviceResult<Stream> {
        dispatch!(self, backend => backend.stream())
    }

    fn alloc(&self, stream: &Stream, bytes: usize) -> DeviceResult<Storage> {
        dispatch!(self, backend => backend.alloc(stream, bytes))
    }

    fn upload(&self, stream: &Stream, source: &[u8], destination: &mut Storage) -> DeviceResult<()> {
        dispatch!(self, backend => backend.upload(stream, source, destination))
    }

    fn download(&self, stream: &Stream, source: &Storage, destination: &mut [u8]) -> DeviceResult<()> {
        dispatch!(self, backend => backend.download(stream, source, destination))
    }

    fn fill(&self, stream: &Stream, destination: TensorViewMut<'_>, value: f64) -> DeviceResult<()> {
        dispatch!(self, backend => backend.fill(stream, destination, value))
    }

    fn relayout(&self, stream: &Stream, args: RelayoutArgs<'_>) -> DeviceResult<()> {
        dispatch!(self, backend => backend.relayout(stream, args))
    }

    fn accumulate(&self, stream: &Stream, args: AccumulateArgs<'_>) -> DeviceResult<()> {
        dispatch!(self, backend => backend.accumulate(stream, args))
    }

    fn rope(&self, stream: &Stream, args: RopeArgs<'_>) -> DeviceResult<()> {
        dispatch!(self, backend => backend.rope(stream, args))
    }

    fn record(&self, stream: &Stream) -> DeviceResult<Event> {
        dispatch!(self, backend => backend.record(stream))
    }

    fn wait(&self, stream: &Stream, event: &Event) -> DeviceResult<()> {
        dispatch!(self, backend => backend.wait(stream, event))
    }

    fn synchronize(&self, stream: &Stream) -> DeviceResult<()> {
        dispatch!(self, backend => backend.synchronize(stream))
    }

    fn timed(&self, stream: &Stream, work: &mut dyn FnMut()) -> DeviceResult<Timing> {
        dispatch!(self, backend => backend.timed(stream, work))
    }

    fn plan_attention(&self, problem: &AttentionProblem) -> DeviceResult<AttentionPlan> {
        dispatch!(self, backend => backend.plan_attention(problem))
    }

    fn attention_forward(&self, stream: &Stream, args: ForwardArgs<'_>) -> DeviceResult<()> {
        dispatch!(self, backend => backend.attention_forward(stream, args))
    }

    fn attention_backward(&self, stream: &Stream, args: BackwardArgs<'_>) -> DeviceResult<()> {
        dispatch!(self, backend => backend.attention_backward(stream, args))
    }

    fn merge(&self, stream: &Stream, args: MergeArgs<'_>) -> DeviceResult<()> {
        dispatch!(self, backend => backend.merge(stream, args))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_open_or_say_why_not() {
        assert!(matches!(Device::open("cpu"), Ok(Device::Cpu(_))));
        assert!(matches!(Device::open("cpu:0"), Ok(Device::Cpu(_))));
        let error = Device::open("rocm:3").unwrap_err();
        assert!(matches!(error, OpenError::NoBackend { kind: "rocm", .. }), "{error}");
        for name in ["", "cpu:1", "cpu:", "cpu:-1", "cuda:x", "CPU", "tpu"] {
            let error = Device::open(name).unwrap_err();
            assert!(
                matches!(&error, OpenError::NoSuchDevice { known, .. } if known.ends_with("cpu")),
                "{name}: {error}"
            );
        }
    }

    #[test]
    fn a_backend_left_out_is_named_with_its_feature() {
        for (kind, compiled) in [("cuda", cfg!(feature = "cuda")), ("wgpu", cfg!(feature = "wgpu"))] {
            for name in [kind.to_owned(), format!("{kind}:0")].into_iter().filter(|_| !compiled) {
                let error = Device::open(&name).unwrap_err();
                assert_eq!(error, OpenError::NotCompiled { kind });
                assert!(error.to_string().ends_with(&format!("build it with the cargo feature `{kind}`")), "{error}");
            }
        }
    }

    /// On a machine with or without a driver.
    #[test]
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    fn a_device_that_is_not_there_is_a_typed_error() {
        let name = if cfg!(feature = "cuda") { "cuda:99" } else { "wgpu:99" };
        let error = Device::open(name).unwrap_err();
        let typed =
            matches!(error, OpenError::NoDriver { .. } | OpenError::TooOld { .. } | OpenError::NoSuchDevice { .. });
        assert!(typed, "{error}");
    }

    #[test]
    fn all_lists_what_is_off_with_its_reason() {
        let all = Device::all();
        let kinds = all.iter().filter(|found| !found.name.contains(':'));
        assert_eq!(kinds.map(|found| found.name.as_str()).collect::<Vec<_>>(), ["cuda", "rocm", "wgpu", "cpu"]);
        let is_off = |name: &str| all.iter().any(|found| found.name == name && found.device.is_err());
        assert!(is_off("rocm") && !is_off("cpu"));
        assert!(is_off("cuda") || cfg!(feature = "cuda"));
        assert!(is_off("wgpu") || cfg!(feature = "wgpu"));
    }

    #[test]
    fn the_environment_is_never_ignored() {
        assert!(Device::choose(None).is_ok());
        assert!(matches!(Device::choose(Some(OsStr::new("cpu"))), Ok(Device::Cpu(_))));
        assert_eq!(
            Device::choose(Some(OsStr::new("rocm:0"))).unwrap_err(),
            OpenError::NoBackend { kind: "rocm", version: "0.1.0" }
        );
        for value in ["", "gpu", "cpu:7"] {
            let error = Device::choose(Some(OsStr::new(value))).unwrap_err();
            assert_eq!(error.to_string(), format!("TILEFOLD_DEVICE={value}: expected one of {}", known_names()));
        }
    }

    #[test]
    fn zeros_are_on_the_device_and_sizes_are_checked() {
        let device = Device::cpu().unwrap();
        let tensor = device.zeros(DType::BF16, &[2, 3]).unwrap();
        assert_eq!((tensor.device(), tensor.to_f64().unwrap()), (device.info().id, vec![0.0; 6]));
        assert!(matches!(device.zeros(DType::F32, &[2, 0]), Err(Error::Problem(ProblemError::ZeroSize { .. }))));
        let huge = usize::try_from(i64::MAX).unwrap();
        assert!(matches!(device.zeros(DType::F32, &[huge]), Err(Error::Problem(ProblemError::Overflow { .. }))));
        assert!(matches!(device.zeros(DType::Bool, &[huge / 2]), Err(Error::Device(_))));
    }
}
