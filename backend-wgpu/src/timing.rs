//! Timing by the device's timestamps, where it has them.

use std::sync::Arc;
use std::time::Duration;

use tilefold_core::{Clock, DeviceResult, Timing};

use crate::context::Context;
use crate::memory::{Block, Place, read};

/// Bytes of two timestamps.
const TICKS_BYTES: u64 = 16;

/// Times what `work` enqueues, and waits for it; other work that is enqueued meanwhile counts as well.
///
/// # Errors
/// What wgpu reports.
pub(crate) fn timed(context: &Arc<Context>, work: &mut dyn FnMut()) -> DeviceResult<Timing> {
    context.wait(None)?;
    if !context.device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
        return Timing::by_host(|| {
            work();
            context.wait(None)
        });
    }
    let ticks = Block::new(context, TICKS_BYTES)?;
    let queries = context.guarded("createQuerySet", || {
        let descriptor = wgpu::QuerySetDescriptor { label: None, ty: wgpu::QueryType::Timestamp, count: 2 };
        Ok(context.device.create_query_set(&descriptor))
    })?;
    let by_host = Timing::by_host(|| {
        mark(context, &queries, [Some(0), None])?;
        work();
        mark(context, &queries, [None, Some(1)])?;
        context.wait(None)
    })?;
    let [before, behind] = resolve(context, &queries, ticks.address())?;
    // Counters that start anew say nothing.
    let Some(ticks) = behind.checked_sub(before).filter(|ticks| *ticks > 0) else { return Ok(by_host) };
    let nanoseconds = ticks as f64 * f64::from(context.queue.get_timestamp_period());
    Ok(Timing { elapsed: Duration::from_secs_f64(nanoseconds / 1e9), clock: Clock::Device })
}

/// Enqueues a pass with nothing in it but a timestamp at its beginning or its end.
fn mark(context: &Context, queries: &wgpu::QuerySet, [beginning, end]: [Option<u32>; 2]) -> DeviceResult<()> {
    context.guarded("submit", || {
        let mut encoder = context.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let writes = wgpu::ComputePassTimestampWrites {
            query_set: queries,
            beginning_of_pass_write_index: beginning,
            end_of_pass_write_index: end,
        };
        drop(encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes: Some(writes) }));
        context.queue.submit([encoder.finish()]);
        Ok(())
    })
}

/// Both timestamps, through memory at this address.
fn resolve(context: &Context, queries: &wgpu::QuerySet, address: u64) -> DeviceResult<[u64; 2]> {
    let Place { buffer, offset, .. } = context.memory.find(address)?;
    context.guarded("resolveQuerySet", || {
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let descriptor = wgpu::BufferDescriptor { label: None, size: TICKS_BYTES, usage, mapped_at_creation: false };
        let resolved = context.device.create_buffer(&descriptor);
        let mut encoder = context.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.resolve_query_set(queries, 0..2, &resolved, 0);
        encoder.copy_buffer_to_buffer(&resolved, 0, &buffer, offset, TICKS_BYTES);
        context.queue.submit([encoder.finish()]);
        Ok(())
    })?;
    let mut ticks = [0; 2];
    read(context, address, bytemuck::cast_slice_mut(&mut ticks))?;
    Ok(ticks)
}
