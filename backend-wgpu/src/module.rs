//! Pipelines, made at the first dispatch that needs them, and dispatches on the queue.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tilefold_core::DeviceResult;
use tilefold_kernels::wgsl::{Dispatch, Shader};

use crate::context::{Context, lock};

/// Pipelines kept at a time: a driver's code for one may take a megabyte.
const MAX_PIPELINES: usize = 256;

/// Pipelines of a device.
#[derive(Debug)]
pub(crate) struct Pipelines {
    /// By shader and by which of its inputs lie in buffers that it also writes.
    made: Mutex<HashMap<(Shader, u32), Arc<Pipeline>>>,
    /// Arguments of the dispatches of one submission; who fills it holds the lock until the submission.
    arguments: Mutex<Option<wgpu::Buffer>>,
    argument_alignment: u64,
}

#[derive(Debug)]
struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

impl Pipelines {
    pub(crate) fn new(argument_alignment: u64) -> Self {
        Self { made: Mutex::default(), arguments: Mutex::default(), argument_alignment }
    }
}

/// A dispatch whose operands have been found.
struct Found {
    pipeline: Arc<Pipeline>,
    buffers: Vec<(wgpu::Buffer, u64)>,
    argument_at: u64,
}

/// Enqueues dispatches, in order, as one submission.
///
/// # Errors
/// What wgpu reports.
pub(crate) fn submit(context: &Context, dispatches: Vec<Dispatch>) -> DeviceResult<()> {
    if dispatches.is_empty() {
        return Ok(());
    }
    let mut arguments = Vec::new();
    let mut found = Vec::new();
    for dispatch in &dispatches {
        let buffers = dispatch
            .bindings
            .iter()
            .map(|binding| context.memory.find(binding.address))
            .collect::<DeviceResult<Vec<_>>>()?;
        let pipeline = pipeline(context, dispatch, written(dispatch, &buffers))?;
        let alignment = usize::try_from(context.pipelines.argument_alignment).unwrap_or(256);
        arguments.resize(arguments.len().next_multiple_of(alignment), 0);
        let argument_at = arguments.len() as u64;
        arguments.extend_from_slice(bytemuck::cast_slice(&dispatch.params));
        found.push(Found { pipeline, buffers, argument_at });
    }
    context.guarded("submit", || {
        let mut kept = lock(&context.pipelines.arguments);
        let size = arguments.len() as u64;
        let buffer = kept.take().filter(|buffer| buffer.size() >= size);
        let buffer = buffer.unwrap_or_else(|| {
            let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
            let size = size.next_power_of_two().max(4096);
            let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
            context.device.create_buffer(&descriptor)
        });
        context.queue.write_buffer(&buffer, 0, &arguments);
        let mut encoder = context.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for (dispatch, found) in dispatches.iter().zip(&found) {
            encode(context, &mut encoder, dispatch, found, &buffer);
        }
        context.queue.submit([encoder.finish()]);
        *kept = Some(buffer);
        Ok(())
    })
}

fn encode(
    context: &Context,
    encoder: &mut wgpu::CommandEncoder,
    dispatch: &Dispatch,
    found: &Found,
    arguments: &wgpu::Buffer,
) {
    let bound = |buffer, offset, size| {
        wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size: wgpu::BufferSize::new(size) })
    };
    let size = size_of_val(dispatch.params.as_slice()) as u64;
    let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: bound(arguments, found.argument_at, size) }];
    for (number, (binding, (buffer, offset))) in (1..).zip(dispatch.bindings.iter().zip(&found.buffers)) {
        entries.push(wgpu::BindGroupEntry { binding: number, resource: bound(buffer, *offset, binding.bytes) });
    }
    let descriptor = wgpu::BindGroupDescriptor { label: None, layout: &found.pipeline.layout, entries: &entries };
    let group = context.device.create_bind_group(&descriptor);
    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
    pass.set_pipeline(&found.pipeline.pipeline);
    pass.set_bind_group(0, &group, &[]);
    let [x, y] = dispatch.groups;
    pass.dispatch_workgroups(x, y, 1);
}

/// Bits of the bindings that lie in a buffer which the dispatch writes: a buffer cannot be read-only and writable at once.
fn written(dispatch: &Dispatch, buffers: &[(wgpu::Buffer, u64)]) -> u32 {
    let mut bits = 0;
    for (i, (buffer, _)) in buffers.iter().enumerate() {
        let writes = |(binding, other): (&tilefold_kernels::wgsl::Binding, &(wgpu::Buffer, u64))| {
            binding.writes && other.0 == *buffer
        };
        if dispatch.bindings.iter().zip(buffers).any(writes) {
            bits |= 1 << i;
        }
    }
    bits
}

fn pipeline(context: &Context, dispatch: &Dispatch, written: u32) -> DeviceResult<Arc<Pipeline>> {
    let key = (dispatch.shader.clone(), written);
    if let Some(pipeline) = lock(&context.pipelines.made).get(&key) {
        return Ok(Arc::clone(pipeline));
    }
    // Not under the lock: a driver may take seconds. Two threads that want the same make it twice, and one is kept.
    let started = std::time::Instant::now();
    let pipeline = Arc::new(context.guarded("createComputePipeline", || Ok(make(context, dispatch, written)))?);
    let (kernel, elapsed_ms) = (dispatch.shader.file.name(), started.elapsed().as_millis());
    tracing::debug!(kernel, elapsed_ms, "compiled a kernel");
    let mut made = lock(&context.pipelines.made);
    if made.len() >= MAX_PIPELINES {
        // Those in use stay until they are done.
        made.clear();
    }
    Ok(Arc::clone(made.entry(key).or_insert(pipeline)))
}

fn make(context: &Context, dispatch: &Dispatch, written: u32) -> Pipeline {
    let device = &context.device;
    let name = dispatch.shader.file.name();
    let descriptor = wgpu::ShaderModuleDescriptor {
        label: Some(name),
        source: wgpu::ShaderSource::Wgsl(dispatch.shader.source(written).into()),
    };
    // SAFETY: kernels of this crate's own: their loops end, their divisors are not 0, and operands that `core` has checked lie
    // inside the bindings.
    let module = unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) };
    let entry = |binding, ty| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
        count: None,
    };
    let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform)];
    for (number, binding) in (1_u32..).zip(&dispatch.bindings) {
        let read_only = !binding.writes && written & (1 << (number - 1)) == 0;
        entries.push(entry(number, wgpu::BufferBindingType::Storage { read_only }));
    }
    let layout =
        device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(name), entries: &entries });
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: Some(name),
        bind_group_layouts: &[Some(&layout)],
        immediate_size: 0,
    });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some(name),
        layout: Some(&pipeline_layout),
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions {
            zero_initialize_workgroup_memory: false,
            ..wgpu::PipelineCompilationOptions::default()
        },
        cache: None,
    });
    Pipeline { pipeline, layout }
}
