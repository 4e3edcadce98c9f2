//! Fused attention against the chain it replaces, on one adapter, in turns: products, bias, softmax and gradients as
//! dispatches of their own, which keep two matrices of all logits.
//!
//! `cargo bench -p tilefold-backend-wgpu` prints medians, ratios and the memory beside operands and results, and
//! `-- --json FILE` writes them to a file as well. The first fused run compiles its kernels. On a device that
//! is a program on the processor ratios are all that counts.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program that stops where something fails")]

use std::time::Instant;

use tilefold_backend_wgpu::{WgpuBackend, WgpuOptions};
use tilefold_core::{
    AttentionPlan, AttentionProblem, AttentionSpec, Backend, BackwardArgs, BackwardOperands, BiasSpec, DType,
    ForwardArgs, ForwardOperands, Gradients, Layout, Stream, Tensor,
};

/// Rows, length, heads, channels.
const SHAPES: [[usize; 4]; 5] =
    [[16, 256, 4, 32], [128, 256, 8, 32], [64, 256, 8, 8], [16, 1024, 4, 32], [32, 1024, 8, 8]];
/// Timed turns; the median counts.
const TURNS: usize = 5;
/// Bytes of one binding that every device has.
const BINDING_BYTES: usize = 128 << 20;

fn main() {
    let device = match WgpuBackend::new(0) {
        Ok(device) => device,
        Err(error) => {
            println!("no measurement: {error}");
            return;
        }
    };
    let info = device.info();
    println!("{} ({}, {})", info.id, info.name, info.arch);
    println!(
        "rows x L x H x D    pass      fused ms  unfused ms  ratio  first fused ms  MB fused, unfused, ratio: beside operands; with them"
    );
    let mut rows = Vec::new();
    for shape in SHAPES {
        for gradients in [false, true] {
            // Of its own each time: the most memory it had in use is counted from the beginning.
            let device = WgpuBackend::with_options(0, WgpuOptions::default()).unwrap();
            rows.push(measure(&device, shape, gradients));
        }
    }
    let file = std::env::args().skip_while(|argument| argument != "--json").nth(1);
    if let Some(file) = file {
        let record = serde_json::json!({ "device": info.name, "driver": info.arch, "turns": TURNS, "rows": rows });
        std::fs::write(file, format!("{}\n", serde_json::to_string_pretty(&record).unwrap())).unwrap();
    }
}

fn measure(
    device: &WgpuBackend,
    shape @ [rows, length, heads, channels]: [usize; 4],
    gradients: bool,
) -> serde_json::Value {
    let stream = device.stream().unwrap();
    let title = format!("{rows} x {length} x {heads} x {channels}");
    let mut fused = Fused::new(device, &stream, shape, gradients);
    let chain = Chain::new(device, shape, gradients);
    let [before, _] = device.memory_bytes();
    let start = Instant::now();
    fused.run(device, &stream);
    let first_ms = start.elapsed().as_secs_f64() * 1e3;
    chain.run();
    check(&fused, &chain, device, &stream);
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..TURNS {
        let start = Instant::now();
        fused.run(device, &stream);
        times[0].push(start.elapsed().as_secs_f64() * 1e3);
        let start = Instant::now();
        chain.run();
        times[1].push(start.elapsed().as_secs_f64() * 1e3);
    }
    let [fused_ms, chain_ms] = times.map(median);
    let [_, peak] = device.memory_bytes();
    let megabytes = |bytes: u64| f64::from(u32::try_from(bytes >> 10).unwrap_or(u32::MAX)) / 1024.0;
    let beside = [peak.saturating_sub(before), chain.logits_bytes()];
    let memory = [beside, [peak, chain.bytes()]].map(|both| both.map(megabytes));
    let [beside_mb, all_mb] =
        memory.map(|[fused, chain]| format!("{fused:.1}, {chain:.1}, {:.1}", chain / fused.max(1e-3)));
    println!(
        "{title:<19} {:<9} {fused_ms:>8.1} {chain_ms:>11.1} {:>6.2} {first_ms:>15.0}   {beside_mb}; {all_mb}",
        if gradients { "both" } else { "forward" },
        chain_ms / fused_ms,
    );
    serde_json::json!({
        "shape": shape,
        "backward": gradients,
        "fused_ms": fused_ms,
        "unfused_ms": chain_ms,
        "first_fused_ms": first_ms,
        "fused_bytes_beside_operands": beside[0],
        "unfused_bytes_beside_operands": beside[1],
        "fused_peak_bytes": peak,
        "unfused_peak_bytes": chain.bytes(),
    })
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Numbers that repeat, about as large as normal ones.
fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from(u16::try_from(state >> 16).unwrap_or(0)) / 32_768.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Sizes of q, k, v, d_out; and of the bias.
fn sizes([rows, length, heads, channels]: [usize; 4]) -> [usize; 2] {
    [rows * length * heads * channels, heads * length * length]
}

/// tilefold's own.
struct Fused {
    plan: AttentionPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    gradients: Option<[Tensor; 4]>,
}

impl Fused {
    fn new(device: &WgpuBackend, stream: &Stream, shape: [usize; 4], gradients: bool) -> Self {
        let [rows, length, heads, channels] = shape;
        let (full, pair) = ([1, rows, length, heads, channels], [1, 1, heads, length, length]);
        let mut spec = AttentionSpec::new(DType::F32, 1, rows, length, heads, channels);
        spec.biases.push(BiasSpec { shape: pair, dtype: DType::F32 });
        if gradients {
            spec.gradients = Gradients { q: true, k: true, v: true, gate: false, biases: [true, false, false, false] };
        }
        let plan = device.plan_attention(&AttentionProblem::new(spec).unwrap()).unwrap();
        let tensor = |shape: &[usize], values: &[f32]| {
            let layout = Layout::contiguous(shape).unwrap();
            let mut storage = device.alloc(stream, layout.len() * 4).unwrap();
            device.upload(stream, bytemuck::cast_slice(values), &mut storage).unwrap();
            Tensor::new(storage, DType::F32, layout).unwrap()
        };
        let zeros = |shape: &[usize]| tensor(shape, &[]);
        let filled = |shape: &[usize], seed| tensor(shape, &values(shape.iter().product(), seed));
        let lse = [1, rows, heads, length];
        Self {
            plan,
            q: filled(&full, 1),
            k: filled(&full, 2),
            v: filled(&full, 3),
            bias: filled(&pair, 4),
            d_out: filled(&full, 5),
            out: zeros(&full),
            lse: zeros(&lse),
            lse_low: zeros(&lse),
            gradients: gradients.then(|| [zeros(&full), zeros(&full), zeros(&full), zeros(&pair)]),
        }
    }

    fn run(&mut self, device: &WgpuBackend, stream: &Stream) {
        let operands = ForwardOperands {
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            biases: vec![self.bias.view()],
            key_mask: None,
            q_segments: None,
            k_segments: None,
            gate: None,
            out: self.out.view_mut(),
            lse: Some(self.lse.view_mut()),
            lse_low: Some(self.lse_low.view_mut()),
        };
        device.attention_forward(stream, ForwardArgs::new(&self.plan, operands).unwrap()).unwrap();
        if let Some([dq, dk, dv, dbias]) = &mut self.gradients {
            let operands = BackwardOperands {
                q: self.q.view(),
                k: self.k.view(),
                v: self.v.view(),
                biases: vec![self.bias.view()],
                key_mask: None,
                q_segments: None,
                k_segments: None,
                gate: None,
                out: self.out.view(),
                lse: self.lse.view(),
                lse_low: self.lse_low.view(),
                d_out: self.d_out.view(),
                dq: Some(dq.view_mut()),
                dk: Some(dk.view_mut()),
                dv: Some(dv.view_mut()),
                dbiases: vec![Some(dbias.view_mut())],
                d_gate: None,
            };
            device.attention_backward(stream, BackwardArgs::new(&self.plan, operands).unwrap()).unwrap();
        }
        device.synchronize(stream).unwrap();
    }
}

/// The unfused chain: commands recorded anew for each run, as a framework does.
struct Chain {
    device: wgpu::Device,
    queue: wgpu::Queue,
    shape: [usize; 4],
    gradients: bool,
    pipelines: Vec<(&'static str, wgpu::ComputePipeline)>,
    buffers: Vec<(&'static str, wgpu::Buffer)>,
}

impl Chain {
    fn new(device: &WgpuBackend, shape: [usize; 4], gradients: bool) -> Self {
        let (device, queue) = (device.raw_device().clone(), device.raw_queue().clone());
        let module = |text: &'static str| {
            let source = wgpu::ShaderSource::Wgsl(text.into());
            let descriptor = wgpu::ShaderModuleDescriptor { label: None, source };
            // SAFETY: kernels that stay within their bindings, compiled as tilefold's own are.
            unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        };
        let matmul = module(include_str!("unfused/matmul.wgsl"));
        let elements = module(include_str!("unfused/elements.wgsl"));
        let entries = [
            ("matmul", &matmul, "main"),
            ("add_bias", &elements, "add_bias"),
            ("softmax", &elements, "softmax"),
            ("softmax_backward", &elements, "softmax_backward"),
            ("sum_rows", &elements, "sum_rows"),
        ];
        let pipelines = entries.map(|(name, module, entry)| {
            let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(name),
                layout: None,
                module,
                entry_point: Some(entry),
                compilation_options: wgpu::PipelineCompilationOptions {
                    zero_initialize_workgroup_memory: false,
                    ..wgpu::PipelineCompilationOptions::default()
                },
                cache: None,
            });
            (name, pipeline)
        });
        let [rows, length, heads, _] = shape;
        let [full, pair] = sizes(shape);
        let logits = rows * heads * length * length;
        let mut wanted = vec![("q", full, 1), ("k", full, 2), ("v", full, 3), ("bias", pair, 4)];
        wanted.extend([("out", full, 0), ("p", logits, 0)]);
        if gradients {
            wanted.extend([("d_out", full, 5), ("ds", logits, 0), ("dq", full, 0), ("dk", full, 0)]);
            wanted.extend([("dv", full, 0), ("dbias", pair, 0)]);
        }
        let buffer = |(name, count, seed): (&'static str, usize, u32)| {
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
            let size = 4 * count as u64;
            let descriptor = wgpu::BufferDescriptor { label: Some(name), size, usage, mapped_at_creation: false };
            let buffer = device.create_buffer(&descriptor);
            if seed > 0 {
                queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&values(count, seed)));
            }
            (name, buffer)
        };
        let buffers = wanted.into_iter().map(buffer).collect();
        Self { pipelines: pipelines.into(), buffers, device, queue, shape, gradients }
    }

    /// Bytes of the matrices of logits.
    fn logits_bytes(&self) -> u64 {
        let is_logits = |(name, _): &&(&str, wgpu::Buffer)| matches!(*name, "p" | "ds");
        self.buffers.iter().filter(is_logits).map(|(_, buffer)| buffer.size()).sum()
    }

    /// Bytes of all its buffers, which it has from the beginning to the end.
    fn bytes(&self) -> u64 {
        self.buffers.iter().map(|(_, buffer)| buffer.size()).sum()
    }

    fn buffer(&self, name: &str) -> &wgpu::Buffer {
        &self.buffers.iter().find(|(known, _)| *known == name).unwrap().1
    }

    fn run(&self) {
        let [rows, length, heads, channels] = self.shape;
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        // As many rows at a time as one binding shows.
        let step = (BINDING_BYTES / (4 * heads * length * length)).clamp(1, rows);
        let scale = 1.0 / f32::from(u16::try_from(channels).unwrap()).sqrt();
        // Strides by row, head and the two axes of a matrix; a turned matrix has the last two swapped.
        let by_position = [length * heads * channels, channels, heads * channels, 1];
        let by_logit = [heads * length * length, length * length, length, 1];
        let turned = |[row, head, a, b]: [usize; 4]| [row, head, b, a];
        for first in (0..rows).step_by(step) {
            let part = [first, step.min(rows - first)];
            let (to_logits, to_channels) = ([length, length, channels], [length, channels, length]);
            self.product(
                &mut encoder,
                part,
                ["q", "k", "p"],
                [by_position, turned(by_position), by_logit],
                to_logits,
                scale,
            );
            self.elements(&mut encoder, part, "add_bias", ["bias", "bias", "p"]);
            self.elements(&mut encoder, part, "softmax", ["bias", "bias", "p"]);
            self.product(&mut encoder, part, ["p", "v", "out"], [by_logit, by_position, by_position], to_channels, 1.0);
            if !self.gradients {
                continue;
            }
            self.product(
                &mut encoder,
                part,
                ["p", "d_out", "dv"],
                [turned(by_logit), by_position, by_position],
                to_channels,
                1.0,
            );
            self.product(
                &mut encoder,
                part,
                ["d_out", "v", "ds"],
                [by_position, turned(by_position), by_logit],
                to_logits,
                1.0,
            );
            self.elements(&mut encoder, part, "softmax_backward", ["p", "bias", "ds"]);
            self.elements(&mut encoder, part, "sum_rows", ["ds", "bias", "dbias"]);
            self.product(
                &mut encoder,
                part,
                ["ds", "k", "dq"],
                [by_logit, by_position, by_position],
                to_channels,
                scale,
            );
            self.product(
                &mut encoder,
                part,
                ["ds", "q", "dk"],
                [turned(by_logit), by_position, by_position],
                to_channels,
                scale,
            );
        }
        self.queue.submit([encoder.finish()]);
        self.device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
    }

    /// A product of matrices for every head of some rows.
    fn product(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        part @ [_, rows]: [usize; 2],
        names: [&str; 3],
        [a, b, c]: [[usize; 4]; 3],
        [m, n, k]: [usize; 3],
        scale: f32,
    ) {
        let heads = self.shape[2];
        let mut params: Vec<u32> = [m, n, k, heads].map(small).into();
        params.extend([a, b, c].into_iter().flatten().map(small));
        params.extend([scale.to_bits(), 0, 0, 0]);
        let groups = [small(n.div_ceil(32)), small(m.div_ceil(32)), small(rows * heads)];
        self.dispatch(encoder, part, "matmul", names, &params, groups);
    }

    /// One of the steps between products, for some rows.
    fn elements(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        part @ [first, rows]: [usize; 2],
        name: &str,
        names: [&str; 3],
    ) {
        let [_, length, heads, _] = self.shape;
        let adds = u32::from(first > 0);
        let params = [small(rows), small(heads), small(length), small(length), adds, 0, 0, 0];
        let threads = match name {
            "add_bias" => rows * heads * length * length,
            "sum_rows" => heads * length * length,
            _ => rows * heads * length,
        };
        let groups = small(threads.div_ceil(64));
        self.dispatch(encoder, part, name, names, &params, [groups.min(65_535), groups.div_ceil(65_535), 1]);
    }

    /// A dispatch on the rows of `part`.
    fn dispatch(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        [first, rows]: [usize; 2],
        name: &str,
        names: [&str; 3],
        params: &[u32],
        [x, y, z]: [u32; 3],
    ) {
        let pipeline = &self.pipelines.iter().find(|(known, _)| *known == name).unwrap().1;
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let size = size_of_val(params) as u64;
        let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
        let argument = self.device.create_buffer(&descriptor);
        self.queue.write_buffer(&argument, 0, bytemuck::cast_slice(params));
        let whole = |buffer, offset, size| {
            wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size: wgpu::BufferSize::new(size) })
        };
        let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: whole(&argument, 0, size) }];
        for (binding, name) in (1..).zip(names) {
            let buffer = self.buffer(name);
            // The bias and its gradient have no rows.
            let row_bytes = if name.ends_with("bias") { 0 } else { buffer.size() / self.shape[0] as u64 };
            let size = if row_bytes == 0 { buffer.size() } else { row_bytes * rows as u64 };
            entries.push(wgpu::BindGroupEntry { binding, resource: whole(buffer, row_bytes * first as u64, size) });
        }
        let layout = &pipeline.get_bind_group_layout(0);
        let descriptor = wgpu::BindGroupDescriptor { label: None, layout, entries: &entries };
        let group = self.device.create_bind_group(&descriptor);
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(x, y, z);
    }

    fn read(&self, name: &str) -> Vec<f32> {
        let buffer = self.buffer(name);
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let descriptor = wgpu::BufferDescriptor { label: None, size: buffer.size(), usage, mapped_at_creation: false };
        let staging = self.device.create_buffer(&descriptor);
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, buffer.size());
        self.queue.submit([encoder.finish()]);
        staging.map_async(wgpu::MapMode::Read, .., |mapped| mapped.unwrap());
        self.device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
        let view = staging.get_mapped_range(..).unwrap();
        bytemuck::cast_slice(&view).to_vec()
    }
}

fn small(size: usize) -> u32 {
    u32::try_from(size).unwrap()
}

/// Both compute the same.
fn check(fused: &Fused, chain: &Chain, device: &WgpuBackend, stream: &Stream) {
    let mut results = vec![("out", &fused.out)];
    if let Some([dq, dk, dv, dbias]) = &fused.gradients {
        results.extend([("dq", dq), ("dk", dk), ("dv", dv), ("dbias", dbias)]);
    }
    for (name, tensor) in results {
        let mut got = vec![0_f32; tensor.layout().len()];
        device.download(stream, tensor.storage(), bytemuck::cast_slice_mut(&mut got)).unwrap();
        let expected = chain.read(name);
        let largest = expected.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
        let error = got.iter().zip(&expected).fold(0.0_f32, |worst, (got, x)| worst.max((got - x).abs()));
        assert!(error <= 1e-4 * largest, "{name}: {error} of {largest}");
    }
}
