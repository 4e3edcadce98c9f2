//! Pipelines, made at the first dispatch that needs them, and dispatches on the queue.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tilefold_core::DeviceResult;
use tilefold_kernels::wgsl::{Binding, Dispatch, OperandKey, Shader, Use};

use crate::context::{Context, lock};
use crate::error::{asked, driver};
use crate::memory::Place;

/// Pipelines of a device.
#[derive(Debug)]
pub(crate) struct Pipelines {
    /// By shader and by which of its inputs lie in buffers that it also writes.
    made: Mutex<HashMap<(Shader, u32), Arc<Pipeline>>>,
    argument_alignment: u64,
    max: usize,
}

#[derive(Debug)]
struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

impl Pipelines {
    /// Keeps at most `max` of them.
    pub(crate) fn new(argument_alignment: u64, max: usize) -> Self {
        Self { made: Mutex::default(), argument_alignment, max }
    }
}

/// A dispatch with all that it needs in place.
#[derive(Debug)]
pub(crate) struct Launch {
    pipeline: Arc<Pipeline>,
    bindings: wgpu::BindGroup,
    groups: [u32; 2],
    /// Addresses of the buffers it reaches.
    pub(crate) buffers: Vec<u64>,
}

/// Puts in place what dispatches need: pipelines, bindings, arguments.
///
/// # Errors
/// What wgpu reports.
pub(crate) fn prepare(context: &Context, dispatches: &[Dispatch]) -> DeviceResult<Vec<Launch>> {
    if dispatches.is_empty() {
        return Ok(Vec::new());
    }
    let alignment = usize::try_from(context.pipelines.argument_alignment).unwrap_or(256);
    let mut arguments = Vec::new();
    let mut found = Vec::new();
    for dispatch in dispatches {
        let places = dispatch.bindings.iter().map(|binding| context.memory.find(binding.address));
        let places = places.collect::<DeviceResult<Vec<_>>>()?;
        let pipeline = pipeline(context, dispatch, written(dispatch, &places))?;
        arguments.resize(arguments.len().next_multiple_of(alignment), 0);
        found.push((pipeline, places, arguments.len() as u64));
        arguments.extend_from_slice(bytemuck::cast_slice(&dispatch.params));
    }
    let launches = context.guarded("createBindGroup", || {
        let buffer = constant(context, &arguments)?;
        let launches = dispatches.iter().zip(found).map(|(dispatch, (pipeline, places, at))| Launch {
            bindings: bind(context, dispatch, &pipeline, &places, (&buffer, at)),
            pipeline,
            groups: dispatch.groups,
            buffers: places.iter().map(|place| place.first).collect(),
        });
        Ok(launches.collect())
    });
    launches.map_err(asked(arguments.len() as u64))
}

/// A uniform buffer with this content.
fn constant(context: &Context, content: &[u8]) -> DeviceResult<wgpu::Buffer> {
    let usage = wgpu::BufferUsages::UNIFORM;
    let size = content.len() as u64;
    let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: true };
    let buffer = context.device.create_buffer(&descriptor);
    let mapped = buffer.get_mapped_range_mut(..).map_err(|error| driver("getMappedRange", error.to_string()))?;
    { mapped }.copy_from_slice(content);
    buffer.unmap();
    Ok(buffer)
}

fn bind(
    context: &Context,
    dispatch: &Dispatch,
    pipeline: &Pipeline,
    places: &[Place],
    (arguments, at): (&wgpu::Buffer, u64),
) -> wgpu::BindGroup {
    let bound = |buffer, offset, size| {
        wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size: wgpu::BufferSize::new(size) })
    };
    let size = size_of_val(dispatch.params.as_slice()) as u64;
    let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: bound(arguments, at, size) }];
    for (number, (binding, place)) in (1..).zip(dispatch.bindings.iter().zip(places)) {
        let resource = bound(&place.buffer, place.offset, binding.bytes);
        entries.push(wgpu::BindGroupEntry { binding: number, resource });
    }
    let descriptor = wgpu::BindGroupDescriptor { label: None, layout: &pipeline.layout, entries: &entries };
    context.device.create_bind_group(&descriptor)
}

/// Enqueues launches, in order, as one submission: each sees what those before it have written.
pub(crate) fn submit(context: &Context, launches: &[Launch]) {
    if launches.is_empty() {
        return;
    }
    let mut encoder = context.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        for Launch { pipeline, bindings, groups: [x, y], .. } in launches {
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, bindings, &[]);
            pass.dispatch_workgroups(*x, *y, 1);
        }
    }
    context.queue.submit([encoder.finish()]);
}

/// Bits of the bindings that lie in a buffer which the dispatch writes: a buffer cannot be read-only and writable at once.
fn written(dispatch: &Dispatch, places: &[Place]) -> u32 {
    let mut bits = 0;
    for (i, place) in places.iter().enumerate() {
        let writes = |(binding, other): (&Binding, &Place)| binding.writes && other.first == place.first;
        if dispatch.bindings.iter().zip(places).any(writes) {
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
    if made.len() >= context.pipelines.max {
        // Those in use stay until they are done.
        made.clear();
    }
    Ok(Arc::clone(made.entry(key).or_insert(pipeline)))
}

/// Size of the elements of a shader's binding.
fn element_bytes(shader: &Shader, slot: u32) -> u64 {
    let declares = |operand: &&OperandKey| operand.slot == slot && operand.usage != Use::Absent;
    match shader.operands.iter().find(declares).map(|operand| operand.usage) {
        Some(Use::ReadQuads(dtype) | Use::WriteQuads(dtype)) => 4 * dtype.size_bytes() as u64,
        _ => 4,
    }
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
    // With their least sizes, which wgpu otherwise looks up, and keeps, at every dispatch.
    let entry = |binding, ty, bytes| {
        let ty =
            wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: wgpu::BufferSize::new(bytes) };
        wgpu::BindGroupLayoutEntry { binding, visibility: wgpu::ShaderStages::COMPUTE, ty, count: None }
    };
    let arguments = size_of_val(dispatch.params.as_slice()) as u64;
    let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform, arguments)];
    for (slot, binding) in (0_u32..).zip(&dispatch.bindings) {
        let read_only = !binding.writes && written & (1 << slot) == 0;
        let ty = wgpu::BufferBindingType::Storage { read_only };
        entries.push(entry(slot + 1, ty, element_bytes(&dispatch.shader, slot)));
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
