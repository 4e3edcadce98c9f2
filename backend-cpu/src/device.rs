//! The CPU device: what it reports, and each call of the contract handed to its file.

use std::sync::Arc;

use tilefold_core::{
    AttentionPlan, AttentionProblem, Backend, BackwardArgs, DType, DeviceError, DeviceId, DeviceInfo, DeviceResult,
    Event, ForwardArgs, MergeArgs, OpenError, RelayoutArgs, Storage, Stream, TensorViewMut,
};

use crate::arch::Arch;
use crate::{attention, memory, merge, relayout};

/// All processors of the host as one device.
///
/// *Streams*: a launch returns when its work is done, so every stream is in order by itself. *Threads*: those of the rayon
/// pool the caller is in, unless [`CpuBackend::with_threads`] gave the device a pool of its own.
#[derive(Clone, Debug)]
pub struct CpuBackend {
    info: DeviceInfo,
    arch: Arch,
    pool: Option<Arc<rayon::ThreadPool>>,
    cache: Arc<attention::BlockCache>,
}

impl CpuBackend {
    /// The host with its best instruction set, or the one `TILEFOLD_CPU_ARCH` names.
    ///
    /// # Errors
    /// [`OpenError::BadSetting`] when `TILEFOLD_CPU_ARCH` names no instruction set, or one this machine lacks.
    pub fn new() -> Result<Self, OpenError> {
        Self::with_arch(Arch::from_environment()?)
    }

    /// The host with one instruction set.
    ///
    /// # Errors
    /// [`OpenError::BadSetting`] when this machine lacks it.
    pub fn with_arch(arch: Arch) -> Result<Self, OpenError> {
        arch.check_available()?;
        let (name, vendor) = memory::processor();
        let info = DeviceInfo {
            id: DeviceId::CPU,
            name,
            vendor,
            arch: arch.name().to_owned(),
            memory_bytes: memory::total_bytes(),
            parallelism: rayon::current_num_threads(),
            lanes: arch.lanes(),
            dtypes: vec![DType::F32, DType::F16, DType::BF16],
        };
        Ok(Self { info, arch, pool: None, cache: Arc::default() })
    }

    /// The same device with `threads` workers of its own.
    ///
    /// # Errors
    /// [`OpenError::Device`] when the threads cannot be started.
    pub fn with_threads(mut self, threads: usize) -> Result<Self, OpenError> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|error| {
            DeviceError::Driver { call: "rayon::ThreadPoolBuilder::build", status: -1, message: error.to_string() }
        })?;
        self.info.parallelism = pool.current_num_threads();
        self.pool = Some(Arc::new(pool));
        Ok(self)
    }

    /// The instruction set in use.
    #[must_use]
    pub fn arch(&self) -> Arch {
        self.arch
    }

    fn install<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}

impl Backend for CpuBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn stream(&self) -> DeviceResult<Stream> {
        Ok(Stream::new(DeviceId::CPU, Arc::new(())))
    }

    fn alloc(&self, _: &Stream, bytes: usize) -> DeviceResult<Storage> {
        memory::storage(bytes)
    }

    fn upload(&self, _: &Stream, source: &[u8], destination: &mut Storage) -> DeviceResult<()> {
        let bytes = host(destination.host_bytes_mut(), "storage")?;
        bytes.get_mut(..source.len()).ok_or_else(|| too_small(source.len()))?.copy_from_slice(source);
        Ok(())
    }

    fn download(&self, _: &Stream, source: &Storage, destination: &mut [u8]) -> DeviceResult<()> {
        let bytes = host(source.host_bytes(), "storage")?;
        destination.copy_from_slice(bytes.get(..destination.len()).ok_or_else(|| too_small(destination.len()))?);
        Ok(())
    }

    fn fill(&self, _: &Stream, destination: TensorViewMut<'_>, value: f64) -> DeviceResult<()> {
        self.install(|| relayout::fill(destination, value));
        Ok(())
    }

    fn relayout(&self, _: &Stream, args: RelayoutArgs<'_>) -> DeviceResult<()> {
        self.install(|| relayout::relayout(args));
        Ok(())
    }

    fn record(&self, stream: &Stream) -> DeviceResult<Event> {
        Ok(Event::new(stream.device(), Arc::new(())))
    }

    fn wait(&self, _: &Stream, _: &Event) -> DeviceResult<()> {
        Ok(())
    }

    fn synchronize(&self, _: &Stream) -> DeviceResult<()> {
        Ok(())
    }

    fn plan_attention(&self, problem: &AttentionProblem) -> DeviceResult<AttentionPlan> {
        Ok(attention::plan(problem, self.arch, self.info.parallelism))
    }

    fn attention_forward(&self, _: &Stream, args: ForwardArgs<'_>) -> DeviceResult<()> {
        self.install(|| attention::forward(self.arch, &self.cache, args))
    }

    fn attention_backward(&self, _: &Stream, args: BackwardArgs<'_>) -> DeviceResult<()> {
        self.install(|| attention::backward(self.arch, &self.cache, args))
    }

    fn merge(&self, _: &Stream, args: MergeArgs<'_>) -> DeviceResult<()> {
        self.install(|| merge::merge(args));
        Ok(())
    }
}

/// Host bytes, or the error for memory that is not the host's.
fn host<T>(bytes: Option<T>, what: &'static str) -> DeviceResult<T> {
    bytes.ok_or_else(|| DeviceError::Unsupported { limit: format!("{what} is not host memory") })
}

fn too_small(bytes: usize) -> DeviceError {
    DeviceError::Unsupported { limit: format!("a copy of {bytes} bytes from or to a smaller storage") }
}
