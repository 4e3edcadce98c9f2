//! A device whose attention fails at a launch.

use std::sync::atomic::{AtomicUsize, Ordering};

use tilefold_backend_cpu::CpuBackend;
use tilefold_core::{
    AccumulateArgs, AttentionPlan, AttentionProblem, Backend, BackwardArgs, DeviceError, DeviceInfo, DeviceResult,
    Event, ForwardArgs, MergeArgs, RelayoutArgs, RopeArgs, Storage, Stream, TensorViewMut,
};

/// What it says then.
pub(crate) const FAULT: &str = "a fault that was planted";

/// The CPU, but for one launch of attention.
#[derive(Debug)]
pub(crate) struct Failing {
    inner: CpuBackend,
    /// Launches that are left until then.
    left: AtomicUsize,
}

impl Failing {
    /// One that fails after so many launches.
    pub(crate) fn after(launches: usize) -> Self {
        Self { inner: CpuBackend::new().unwrap(), left: AtomicUsize::new(launches) }
    }

    /// Launches there were, of one that fails after usize::MAX of them.
    pub(crate) fn launches(&self) -> usize {
        usize::MAX - self.left.load(Ordering::Relaxed)
    }

    fn launch(&self) -> DeviceResult<()> {
        let left = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.wrapping_sub(1)));
        if left == Ok(0) { Err(DeviceError::Unsupported { limit: FAULT.to_owned() }) } else { Ok(()) }
    }
}

impl Backend for Failing {
    fn info(&self) -> &DeviceInfo {
        self.inner.info()
    }

    fn stream(&self) -> DeviceResult<Stream> {
        self.inner.stream()
    }

    fn alloc(&self, stream: &Stream, bytes: usize) -> DeviceResult<Storage> {
        self.inner.alloc(stream, bytes)
    }

    fn upload(&self, stream: &Stream, source: &[u8], destination: &mut Storage) -> DeviceResult<()> {
        self.inner.upload(stream, source, destination)
    }

    fn download(&self, stream: &Stream, source: &Storage, destination: &mut [u8]) -> DeviceResult<()> {
        self.inner.download(stream, source, destination)
    }

    fn fill(&self, stream: &Stream, destination: TensorViewMut<'_>, value: f64) -> DeviceResult<()> {
        self.inner.fill(stream, destination, value)
    }

    fn relayout(&self, stream: &Stream, args: RelayoutArgs<'_>) -> DeviceResult<()> {
        self.inner.relayout(stream, args)
    }

    fn accumulate(&self, stream: &Stream, args: AccumulateArgs<'_>) -> DeviceResult<()> {
        self.inner.accumulate(stream, args)
    }

    fn rope(&self, stream: &Stream, args: RopeArgs<'_>) -> DeviceResult<()> {
        self.inner.rope(stream, args)
    }

    fn record(&self, stream: &Stream) -> DeviceResult<Event> {
        self.inner.record(stream)
    }

    fn wait(&self, stream: &Stream, event: &Event) -> DeviceResult<()> {
        self.inner.wait(stream, event)
    }

    fn synchronize(&self, stream: &Stream) -> DeviceResult<()> {
        self.inner.synchronize(stream)
    }

    fn plan_attention(&self, problem: &AttentionProblem) -> DeviceResult<AttentionPlan> {
        self.inner.plan_attention(problem)
    }

    fn attention_forward(&self, stream: &Stream, args: ForwardArgs<'_>) -> DeviceResult<()> {
        self.launch()?;
        self.inner.attention_forward(stream, args)
    }

    fn attention_backward(&self, stream: &Stream, args: BackwardArgs<'_>) -> DeviceResult<()> {
        self.launch()?;
        self.inner.attention_backward(stream, args)
    }

    fn merge(&self, stream: &Stream, args: MergeArgs<'_>) -> DeviceResult<()> {
        self.inner.merge(stream, args)
    }
}
