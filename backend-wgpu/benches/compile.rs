//! How long a driver compiles the kernels of the catalogue: the slowest of each kernel and width.
//!
//! `cargo bench -p tilefold-backend-wgpu --bench compile`; `-- --all` prints every one, and `-- --filter TEXT` takes those
//! whose line has it. Mesa keeps what it has compiled, unless `MESA_SHADER_CACHE_DISABLE=true`.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program that stops where something fails")]

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::Instant;

use tilefold_backend_wgpu::WgpuBackend;
use tilefold_core::Backend;
use tilefold_kernels::wgsl::{Constant, Dispatch, Elements, Shader, Sharing, Use, catalogue};

/// Bytes of each buffer: of the argument, and of operands that nothing reads.
const BUFFER_BYTES: u64 = 4096;

fn main() {
    let device = match WgpuBackend::new(0) {
        Ok(device) => device,
        Err(error) => {
            println!("no measurement: {error}");
            return;
        }
    };
    let (info, all) = (device.info(), std::env::args().any(|argument| argument == "--all"));
    let filter = std::env::args().skip_while(|argument| argument != "--filter").nth(1).unwrap_or_default();
    println!("{} ({}, {}), subgroups of {} lanes", info.id, info.name, info.arch, info.lanes);
    let lanes = u32::try_from(info.lanes).unwrap();
    let wanted = |Dispatch { shader, .. }: &Dispatch| {
        let fits = |sharing| !matches!(sharing, Sharing::Subgroup(strip) if strip > lanes);
        let is_ours = number(shader, "NATIVE_EXP").is_none_or(|native| native != u32::from(device.is_software()));
        is_ours && shader.operands.iter().all(|operand| fits(operand.sharing)) && describe(shader).contains(&filter)
    };
    let dispatches: Vec<Dispatch> = catalogue().unwrap().into_iter().filter(wanted).collect();
    let mut slowest = BTreeMap::<(&str, String), [f64; 2]>::new();
    for dispatch in &dispatches {
        let shader = &dispatch.shader;
        let elapsed_ms @ [created_ms, all_ms] = compile(device.raw_device(), device.raw_queue(), dispatch);
        if all {
            println!("{created_ms:>6.0} {all_ms:>6.0} ms  {}", describe(shader));
        }
        let most = slowest.entry((shader.file.name(), width(shader))).or_default();
        *most = std::array::from_fn(|i| most[i].max(elapsed_ms[i]));
    }
    println!("{} kernels; the slowest of each and of each width (quads of channels of q and v):", dispatches.len());
    for ((kernel, width), [created_ms, all_ms]) in slowest {
        println!("{kernel:<17} {width:>7} {created_ms:>6.0} ms until it is made, {all_ms:>6.0} ms until it has run");
    }
}

fn number(shader: &Shader, wanted: &str) -> Option<u32> {
    shader.constants.iter().find(|(name, _)| *name == wanted).map(|&(_, constant)| match constant {
        Constant::Number(number) => number,
        Constant::Switch(switch) => u32::from(switch),
    })
}

fn width(shader: &Shader) -> String {
    match (number(shader, "Q_QUADS"), number(shader, "V_QUADS")) {
        (Some(q), Some(v)) => format!("{q:>3}-{v:<3}"),
        _ => String::new(),
    }
}

/// Name, constants and operands in a line.
fn describe(shader: &Shader) -> String {
    let constants = shader.constants.iter().map(|&(name, constant)| match constant {
        Constant::Number(number) => format!("{name}={number}"),
        Constant::Switch(switch) => format!("{name}={}", u32::from(switch)),
    });
    let used = shader.operands.iter().filter(|operand| operand.usage != Use::Absent);
    let operands = used.map(|operand| match operand.usage {
        Use::ReadQuads(dtype) | Use::WriteQuads(dtype) => format!("{}:{dtype}x4", operand.name),
        Use::Read(Elements::Numbers(dtype)) | Use::Write(Elements::Numbers(dtype)) => {
            format!("{}:{dtype}", operand.name)
        }
        _ => operand.name.to_owned(),
    });
    let subgroups = if shader.has_subgroups() { "subgroups" } else { "" };
    let words = [shader.file.name().to_owned(), subgroups.to_owned()];
    words.into_iter().chain(constants).chain(operands).collect::<Vec<_>>().join(" ")
}

/// Milliseconds of processor time until a pipeline is made, and until a dispatch of no workgroups is done: drivers compile at
/// the first, and some once more at the second, for the values of the argument.
fn compile(device: &wgpu::Device, queue: &wgpu::Queue, dispatch: &Dispatch) -> [f64; 2] {
    let (shader, before) = (&dispatch.shader, busy_ms());
    let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let kinds = dispatch.bindings.iter().map(|binding| wgpu::BufferBindingType::Storage { read_only: !binding.writes });
    let entries: Vec<_> = (0..)
        .zip(std::iter::once(wgpu::BufferBindingType::Uniform).chain(kinds))
        .map(|(binding, ty)| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        })
        .collect();
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries });
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: None,
        bind_group_layouts: &[Some(&layout)],
        immediate_size: 0,
    });
    let descriptor = wgpu::ShaderModuleDescriptor {
        label: Some(shader.file.name()),
        source: wgpu::ShaderSource::Wgsl(shader.source(0).into()),
    };
    // SAFETY: no workgroup runs it.
    let module = unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) };
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some(shader.file.name()),
        layout: Some(&pipeline_layout),
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions {
            zero_initialize_workgroup_memory: false,
            ..wgpu::PipelineCompilationOptions::default()
        },
        cache: None,
    });
    let buffer = |_| {
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
        let descriptor = wgpu::BufferDescriptor { label: None, size: BUFFER_BYTES, usage, mapped_at_creation: false };
        device.create_buffer(&descriptor)
    };
    let buffers: Vec<wgpu::Buffer> = (0..=dispatch.bindings.len()).map(buffer).collect();
    queue.write_buffer(&buffers[0], 0, bytemuck::cast_slice(&dispatch.params));
    let entries: Vec<_> = (0..)
        .zip(&buffers)
        .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
        .collect();
    let descriptor = wgpu::BindGroupDescriptor { label: None, layout: &layout, entries: &entries };
    let group = device.create_bind_group(&descriptor);
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
    pass.set_pipeline(&pipeline);
    pass.set_bind_group(0, &group, &[]);
    pass.dispatch_workgroups(0, 1, 1);
    drop(pass);
    let created_ms = busy_ms() - before;
    queue.submit([encoder.finish()]);
    device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
    let error = pollster::block_on(scope.pop());
    assert!(error.is_none(), "{}: {error:?}", describe(shader));
    [created_ms, busy_ms() - before]
}

/// Milliseconds that the threads of this process have run on processors, as Linux counts them; elsewhere those of the clock.
fn busy_ms() -> f64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    let busy = || -> Option<f64> {
        let threads = std::fs::read_dir("/proc/self/task").ok()?.filter_map(Result::ok);
        let times = threads.map(|thread| std::fs::read_to_string(thread.path().join("schedstat")).ok());
        times.map(|times| times?.split(' ').next()?.parse::<f64>().ok()).sum::<Option<f64>>()
    };
    busy().map_or_else(|| START.elapsed().as_secs_f64() * 1e3, |nanoseconds| nanoseconds / 1e6)
}
