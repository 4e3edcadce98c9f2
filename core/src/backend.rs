//! What a device must be able to do.

use std::fmt::Debug;

use crate::{
    AccumulateArgs, AttentionPlan, AttentionProblem, BackwardArgs, DeviceInfo, DeviceResult, Event, ForwardArgs,
    MergeArgs, RelayoutArgs, RopeArgs, Storage, Stream, TensorViewMut, Timing,
};

/// One device. Object-safe; how to write one is in `docs/adding-a-backend.md`.
///
/// Arguments were validated by this crate: a backend reports only what could not be foreseen. Every launch names its
/// stream and only enqueues; results may be read after [`Backend::synchronize`].
pub trait Backend: Debug + Send + Sync {
    /// Name, memory, lanes, dtypes.
    fn info(&self) -> &DeviceInfo;

    /// A new in-order queue.
    ///
    /// # Errors
    /// What the driver reports.
    fn stream(&self) -> DeviceResult<Stream>;

    /// Memory of the device, zeroed; freed when its storage is dropped.
    ///
    /// # Errors
    /// [`crate::DeviceError::OutOfMemory`].
    fn alloc(&self, stream: &Stream, bytes: usize) -> DeviceResult<Storage>;

    /// Copies host bytes to the front of `destination`.
    ///
    /// # Errors
    /// [`crate::DeviceError::WrongDevice`], [`crate::DeviceError::Unsupported`] when the sizes do not fit.
    fn upload(&self, stream: &Stream, source: &[u8], destination: &mut Storage) -> DeviceResult<()>;

    /// Copies the front of `source` to host bytes and waits for it.
    ///
    /// # Errors
    /// As [`Backend::upload`].
    fn download(&self, stream: &Stream, source: &Storage, destination: &mut [u8]) -> DeviceResult<()>;

    /// Sets every element to `value`, rounded to the dtype.
    ///
    /// # Errors
    /// What the driver reports.
    fn fill(&self, stream: &Stream, destination: TensorViewMut<'_>, value: f64) -> DeviceResult<()>;

    /// Strided copy with a change of dtype.
    ///
    /// # Errors
    /// What the driver reports.
    fn relayout(&self, stream: &Stream, args: RelayoutArgs<'_>) -> DeviceResult<()>;

    /// Adds one tensor to another, element by element in f32.
    ///
    /// # Errors
    /// What the driver reports.
    fn accumulate(&self, stream: &Stream, args: AccumulateArgs<'_>) -> DeviceResult<()>;

    /// Turns pairs of channels by angles that grow with the position: docs/mathematics.md, equations (19)-(21).
    ///
    /// # Errors
    /// What the driver reports.
    fn rope(&self, stream: &Stream, args: RopeArgs<'_>) -> DeviceResult<()>;

    /// Marks the work enqueued so far.
    ///
    /// # Errors
    /// What the driver reports.
    fn record(&self, stream: &Stream) -> DeviceResult<Event>;

    /// Makes later work of `stream` wait for `event`.
    ///
    /// # Errors
    /// What the driver reports.
    fn wait(&self, stream: &Stream, event: &Event) -> DeviceResult<()>;

    /// Blocks until the stream's work is done.
    ///
    /// # Errors
    /// What the driver reports, late failures of launches included.
    fn synchronize(&self, stream: &Stream) -> DeviceResult<()>;

    /// Runs `work`, which enqueues on `stream`, waits for it, and says how long it took and by which clock: the device's own
    /// where the backend has one, otherwise the host's.
    ///
    /// # Errors
    /// As [`Backend::synchronize`].
    fn timed(&self, stream: &Stream, work: &mut dyn FnMut()) -> DeviceResult<Timing> {
        self.synchronize(stream)?;
        Timing::by_host(|| {
            work();
            self.synchronize(stream)
        })
    }

    /// Chooses kernel, tiles and workspace.
    ///
    /// # Errors
    /// [`crate::DeviceError::Unsupported`] naming the limit.
    fn plan_attention(&self, problem: &AttentionProblem) -> DeviceResult<AttentionPlan>;

    /// Writes `out`, and `lse` on request: docs/mathematics.md, equations (1)-(6).
    ///
    /// # Errors
    /// What the driver reports.
    fn attention_forward(&self, stream: &Stream, args: ForwardArgs<'_>) -> DeviceResult<()>;

    /// Writes the gradients the plan asks for: docs/mathematics.md, equations (7)-(16).
    ///
    /// # Errors
    /// What the driver reports.
    fn attention_backward(&self, stream: &Stream, args: BackwardArgs<'_>) -> DeviceResult<()>;

    /// Adds attention over other keys into an accumulator: docs/mathematics.md, equations (17)-(18).
    ///
    /// # Errors
    /// What the driver reports.
    fn merge(&self, stream: &Stream, args: MergeArgs<'_>) -> DeviceResult<()>;
}

#[cfg(test)]
mod tests {
    /// Compiles only while the trait is object-safe.
    fn _object_safe(_: &dyn super::Backend) {}
}
