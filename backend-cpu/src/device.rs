//! The CPU device: what it reports, and each call of the contract handed to its file.

use std::sync::Arc;

use tilefold_core::{
    AccumulateArgs, AttentionPlan, AttentionProblem, Backend, BackwardArgs, DType, DeviceError, DeviceId, DeviceInfo,
    DeviceResult, Event, ForwardArgs, MergeArgs, OpenError, RelayoutArgs, RopeArgs, Storage, Stream, TensorViewMut,
};

use crate::arch::Arch;
use crate::{accumulate, attention, memory, merge, relayout, rope};

/// All processors of the host as one device.
///
/// *Streams*: a launch returns when its work is done, so every stream is in order by itself. *Threads*: those of the rayon
/// pool the caller is in, unless [`CpuBackend::with_threads`] gave the device a pool of its own.
#[derive(Clone, Debug)]
pub struct CpuBackend {
    info: DeviceInfo,
    arch: Arch,
    pool: Option<Arc<rayon::ThreadPool>>,
    caches: Arc<attention::Caches>,
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
            memory_bytes: memory::host_memory().total_bytes,
            parallelism: rayon::current_num_threads(),
            lanes: arch.lanes(),
            dtypes: vec![DType::F32, DType::F16, DType::BF16],
            is_virtual: false,
        };
        Ok(Self { info, arch, pool: None, caches: Arc::default() })
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

    fn fill(&self, stream: &Stream, destination: TensorViewMut<'_>, value: f64) -> DeviceResult<()> {
        ours(stream, "destination", destination.as_view().device())?;
        self.install(|| relayout::fill(destination, value));
        Ok(())
    }

    fn relayout(&self, stream: &Stream, args: RelayoutArgs<'_>) -> DeviceResult<()> {
        ours(stream, "source", args.device())?;
        self.install(|| relayout::relayout(self.arch, args));
        Ok(())
    }

    fn accumulate(&self, stream: &Stream, args: AccumulateArgs<'_>) -> DeviceResult<()> {
        ours(stream, "source", args.device())?;
        self.install(|| accumulate::accumulate(self.arch, args));
        Ok(())
    }

    fn rope(&self, stream: &Stream, args: RopeArgs<'_>) -> DeviceResult<()> {
        ours(stream, "source", args.device())?;
        self.install(|| rope::rope(self.arch, args));
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
        attention::plan(problem, self.arch, self.info.parallelism)
    }

    fn attention_forward(&self, stream: &Stream, args: ForwardArgs<'_>) -> DeviceResult<()> {
        ours(stream, "plan", args.plan().device)?;
        self.install(|| attention::forward(self.arch, self.info.parallelism, &self.caches, args))
    }

    fn attention_backward(&self, stream: &Stream, args: BackwardArgs<'_>) -> DeviceResult<()> {
        ours(stream, "plan", args.plan().device)?;
        self.install(|| attention::backward(self.arch, self.info.parallelism, &self.caches, args))
    }

    fn merge(&self, stream: &Stream, args: MergeArgs<'_>) -> DeviceResult<()> {
        ours(stream, "out", args.device())?;
        self.install(|| merge::merge(self.arch, args));
        Ok(())
    }
}

/// Refuses streams and operands of other devices: their addresses mean nothing here.
fn ours(stream: &Stream, what: &'static str, device: DeviceId) -> DeviceResult<()> {
    match [("stream", stream.device()), (what, device)].into_iter().find(|&(_, got)| got != DeviceId::CPU) {
        Some((what, got)) => Err(DeviceError::WrongDevice { what, expected: DeviceId::CPU, got }),
        None => Ok(()),
    }
}

/// Host bytes, or the error for memory that is not the host's.
fn host<T>(bytes: Option<T>, what: &'static str) -> DeviceResult<T> {
    bytes.ok_or_else(|| DeviceError::Unsupported { limit: format!("{what} is not host memory") })
}

fn too_small(bytes: usize) -> DeviceError {
    DeviceError::Unsupported { limit: format!("a copy of {bytes} bytes from or to a smaller storage") }
}

#[cfg(test)]
mod tests {
    use tilefold_core::{AttentionSpec, BiasSpec, DeviceKind, ForwardOperands, Tensor, TensorView};

    use super::*;

    const ELSEWHERE: DeviceId = DeviceId { kind: DeviceKind::Cuda, ordinal: 1 };

    #[test]
    fn streams_and_operands_of_other_devices_are_refused() {
        let device = CpuBackend::new().unwrap();
        let (mut here, there) = (Tensor::zeros(DType::F32, &[4]).unwrap(), Stream::new(ELSEWHERE, Arc::new(())));
        let refused = |what| Err(DeviceError::WrongDevice { what, expected: DeviceId::CPU, got: ELSEWHERE });
        assert_eq!(device.fill(&there, here.view_mut(), 1.0), refused("stream"));

        let data = [0_f32; 4];
        let layout = here.layout().clone();
        // SAFETY: the address is never read: that is what is tested.
        let foreign = |at: *const f32| unsafe {
            TensorView::from_raw(at.cast(), 16, ELSEWHERE, DType::F32, layout.clone()).unwrap()
        };
        let ours = device.stream().unwrap();
        let mut target = [0_f32; 4];
        // SAFETY: as above.
        let mut destination = || unsafe {
            let at = target.as_mut_ptr().cast();
            TensorViewMut::from_raw(at, 16, ELSEWHERE, DType::F32, layout.clone()).unwrap()
        };
        assert_eq!(device.fill(&ours, destination(), 1.0), refused("destination"));
        let args = RelayoutArgs::new(foreign(data.as_ptr()), destination()).unwrap();
        assert_eq!(device.relayout(&ours, args), refused("source"));
    }

    #[test]
    fn workspace_that_cannot_be_addressed_is_refused() {
        let device = CpuBackend::new().unwrap();
        let mut spec = AttentionSpec::new(DType::BF16, 1, 2, 1, 1 << 50, 1);
        spec.kv_heads = 1;
        spec.biases = vec![BiasSpec { shape: [1, 1, 1, 1, 1], dtype: DType::BF16 }];
        let problem = AttentionProblem::new(spec.clone()).unwrap();
        assert!(matches!(device.plan_attention(&problem), Err(DeviceError::Unsupported { .. })));
        spec.kv_heads = spec.heads;
        let problem = AttentionProblem::new(spec).unwrap();
        assert!(device.plan_attention(&problem).unwrap().forward_workspace_bytes < 1 << 30);
    }

    #[test]
    fn a_launch_in_a_larger_pool_keeps_to_the_workspace_of_its_plan() {
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let device = pool(1).install(|| CpuBackend::new().unwrap());
        let shape = [1, 8, 200, 2, 16];
        let problem = AttentionProblem::new(AttentionSpec::new(DType::F32, 1, 8, 200, 2, 16)).unwrap();
        let plan = device.plan_attention(&problem).unwrap();
        let (input, mut out) = (Tensor::zeros(DType::F32, &shape).unwrap(), Tensor::zeros(DType::F32, &shape).unwrap());
        let operands = ForwardOperands {
            q: input.view(),
            k: input.view(),
            v: input.view(),
            biases: vec![],
            key_mask: None,
            q_segments: None,
            k_segments: None,
            gate: None,
            out: out.view_mut(),
            lse: None,
            lse_low: None,
        };
        let args = ForwardArgs::new(&plan, operands).unwrap();
        let stream = device.stream().unwrap();
        pool(4).install(|| device.attention_forward(&stream, args)).unwrap();
        assert!(
            device.caches.scratch.bytes() <= plan.forward_workspace_bytes,
            "{} bytes",
            device.caches.scratch.bytes()
        );
        assert!(device.caches.scratch.bytes() > 0);
    }
}
