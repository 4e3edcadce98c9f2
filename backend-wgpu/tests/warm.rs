//! Calls that come again: what they allocate on the host, and that they still compute what is asked for.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a panic here is a failed test, which lints see only in the usual harness"
)]

mod harness;

use std::alloc::{GlobalAlloc, Layout as Block, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::ExitCode;

use tilefold_backend_wgpu::{WgpuBackend, WgpuOptions};
use tilefold_core::{
    AccumulateArgs, AttentionPlan, AttentionProblem, AttentionSpec, Backend, BackwardArgs, BackwardOperands, BiasSpec,
    DType, DeviceError, ForwardArgs, ForwardOperands, Layout, MergeArgs, MergeOperands, RelayoutArgs, RopeArgs,
    RopePairs, RopeSpec, Stream, Tensor,
};
use tilefold_kernels::params::Operand;
use tilefold_kernels::wgsl::{self, Dispatch, DispatchError, Limits};
use tilefold_kernels::{AttentionOperands, DeviceLists};

/// The system's allocator, which counts what this thread asks for.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: all of it is the system's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(block) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, block: Block) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, block) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, block: Block, bytes: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, block, bytes) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// What `run` allocates on this thread.
fn counted<T>(run: impl FnOnce() -> T) -> (u64, T) {
    let before = ALLOCATIONS.get();
    let result = run();
    (ALLOCATIONS.get() - before, result)
}

/// The median of several runs, after a few that do not count.
fn median(mut run: impl FnMut() -> u64) -> u64 {
    for _ in 0..3 {
        run();
    }
    let mut counts: Vec<_> = (0..21).map(|_| run()).collect();
    counts.sort_unstable();
    counts[10]
}

const TESTS: &[harness::Test] = &[
    ("nothing_is_allocated_beside_what_wgpu_does", nothing_is_allocated),
    ("calls_that_come_again_read_what_operands_hold_now", operands_change),
    ("another_problem_is_another_call", problems_change),
    ("workspace_of_a_call_may_be_a_tensor_later", workspace_changes_hands),
    ("memory_that_calls_have_reached_is_freed", memory_is_freed),
    ("plans_say_what_calls_take", plans_are_kept),
    ("memory_outlives_whoever_opened_its_device", memory_stays),
    ("errors_that_come_late_are_those_of_their_thread", late_errors),
];

fn main() -> ExitCode {
    harness::run(TESTS)
}

/// An attention with its tensors.
struct Attention {
    device: WgpuBackend,
    stream: Stream,
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    gate: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    d_out: Tensor,
    /// Of q, k, v, the bias and the gate.
    gradients: [Tensor; 5],
}

/// Everything that a problem may have but segments.
fn spec() -> AttentionSpec {
    let mut spec = AttentionSpec::new(DType::F32, 1, 2, 19, 2, 8);
    spec.biases = vec![BiasSpec { shape: [1, 1, 2, 19, 19], dtype: DType::F32 }];
    spec.gate = true;
    spec.kv_lengths = Some(vec![17]);
    spec.mask.alibi_slopes = Some(vec![0.5, 0.25]);
    spec.with_all_gradients()
}

fn tensor(device: &WgpuBackend, shape: &[usize], seed: u32) -> Tensor {
    let stream = device.stream().unwrap();
    let layout = Layout::contiguous(shape).unwrap();
    let values: Vec<f32> =
        (0_u32..).take(layout.len()).map(|i| ((i * 7 + seed * 13) % 31) as f32 / 31.0 - 0.5).collect();
    let mut storage = device.alloc(&stream, 4 * values.len()).unwrap();
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    device.upload(&stream, &bytes, &mut storage).unwrap();
    Tensor::new(storage, DType::F32, layout).unwrap()
}

impl Attention {
    fn new(device: &WgpuBackend, spec: AttentionSpec) -> Self {
        let problem = AttentionProblem::new(spec.clone()).unwrap();
        let of = |shape: &[usize], seed| tensor(device, shape, seed);
        let (q, bias, lse) = (problem.q_shape(), spec.biases[0].shape, problem.lse_shape());
        Self {
            q: of(&q, 1),
            k: of(&q, 2),
            v: of(&q, 3),
            bias: of(&bias, 4),
            gate: of(&q, 5),
            out: of(&q, 6),
            lse: of(&lse, 7),
            lse_low: of(&lse, 8),
            d_out: of(&q, 9),
            gradients: [of(&q, 10), of(&q, 11), of(&q, 12), of(&bias, 13), of(&q, 14)],
            stream: device.stream().unwrap(),
            device: device.clone(),
            spec,
        }
    }

    fn plan(&self) -> AttentionPlan {
        self.device.plan_attention(&AttentionProblem::new(self.spec.clone()).unwrap()).unwrap()
    }

    /// Dispatches of a forward and of a backward call.
    fn dispatches(&mut self) -> [Vec<Dispatch>; 2] {
        let (plan, limits) = (self.plan(), limits(&self.device));
        let lists = DeviceLists {
            kv_lengths: Some(Operand { data: 1 << 49, ..Operand::default() }),
            alibi_slopes: Some((1 << 49) + 4),
        };
        let (operands, outputs) = AttentionOperands::of_forward(&self.forward_operands(), lists);
        let forward = wgsl::forward(&plan.problem, &operands, &outputs, &limits, workspace()).unwrap();
        let operands = tilefold_kernels::BackwardOperands::of(&self.backward_operands(), lists);
        [forward, wgsl::backward(&plan.problem, &operands, &limits, workspace()).unwrap()]
    }

    fn forward_operands(&mut self) -> ForwardOperands<'_> {
        ForwardOperands {
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            biases: vec![self.bias.view()],
            key_mask: None,
            q_segments: None,
            k_segments: None,
            gate: Some(self.gate.view()),
            out: self.out.view_mut(),
            lse: Some(self.lse.view_mut()),
            lse_low: Some(self.lse_low.view_mut()),
        }
    }

    /// Allocations of a forward call.
    fn forward(&mut self) -> u64 {
        let (device, stream, plan) = (self.device.clone(), self.stream.clone(), self.plan());
        let args = ForwardArgs::new(&plan, self.forward_operands()).unwrap();
        let (count, result) = counted(|| device.attention_forward(&stream, args));
        result.unwrap();
        device.synchronize(&stream).unwrap();
        count
    }

    fn backward_operands(&mut self) -> BackwardOperands<'_> {
        let [dq, dk, dv, dbias, d_gate] = self.gradients.each_mut().map(Tensor::view_mut);
        BackwardOperands {
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            biases: vec![self.bias.view()],
            key_mask: None,
            q_segments: None,
            k_segments: None,
            gate: Some(self.gate.view()),
            out: self.out.view(),
            lse: self.lse.view(),
            lse_low: self.lse_low.view(),
            d_out: self.d_out.view(),
            dq: Some(dq),
            dk: Some(dk),
            dv: Some(dv),
            dbiases: vec![Some(dbias)],
            d_gate: Some(d_gate),
        }
    }

    /// Allocations of a backward call.
    fn backward(&mut self) -> u64 {
        let (device, stream, plan) = (self.device.clone(), self.stream.clone(), self.plan());
        let args = BackwardArgs::new(&plan, self.backward_operands()).unwrap();
        let (count, result) = counted(|| device.attention_backward(&stream, args));
        result.unwrap();
        device.synchronize(&stream).unwrap();
        count
    }

    fn results(&mut self) -> [&mut Tensor; 3] {
        [&mut self.out, &mut self.lse, &mut self.lse_low]
    }

    fn merge_operands<'a>([out, lse, low]: [&'a mut Tensor; 3], part: &'a [Tensor; 3]) -> MergeOperands<'a> {
        MergeOperands {
            out: part[0].view(),
            lse: part[1].view(),
            lse_low: part[2].view(),
            acc_out: out.view_mut(),
            acc_lse: lse.view_mut(),
            acc_lse_low: low.view_mut(),
        }
    }

    /// Allocations of a merge into the results.
    fn merge(&mut self, part: &[Tensor; 3]) -> u64 {
        let (device, stream) = (self.device.clone(), self.stream.clone());
        let args = MergeArgs::new(Self::merge_operands(self.results(), part)).unwrap();
        let (count, result) = counted(|| device.merge(&stream, args));
        result.unwrap();
        device.synchronize(&stream).unwrap();
        count
    }

    /// Both passes, and everything they have written.
    fn run(&mut self) -> Vec<Vec<u8>> {
        self.forward();
        self.backward();
        let written = [&self.out, &self.lse, &self.lse_low].into_iter().chain(&self.gradients);
        written
            .map(|tensor| {
                let mut bytes = vec![0; 4 * tensor.layout().len()];
                self.device.download(&self.stream, tensor.storage(), &mut bytes).unwrap();
                bytes
            })
            .collect()
    }
}

/// A device that no other test shares.
fn own_device() -> WgpuBackend {
    WgpuBackend::with_options(0, WgpuOptions::default()).unwrap()
}

/// What wgpu allocates for one submission of such dispatches, in kernels that do nothing, with everything made before.
fn bare(device: &WgpuBackend, dispatches: &[Dispatch]) -> u64 {
    let (gpu, queue) = (device.raw_device(), device.raw_queue());
    let buffer = |usage| {
        let descriptor = wgpu::BufferDescriptor { label: None, size: 256, usage, mapped_at_creation: false };
        gpu.create_buffer(&descriptor)
    };
    let uniform = buffer(wgpu::BufferUsages::UNIFORM);
    // One buffer where the dispatches have one.
    let mut buffers = BTreeMap::new();
    for binding in dispatches.iter().flat_map(|dispatch| &dispatch.bindings) {
        buffers.entry(binding.address).or_insert_with(|| buffer(wgpu::BufferUsages::STORAGE));
    }
    let mut made = Vec::new();
    for dispatch in dispatches {
        let mut source = "@group(0) @binding(0) var<uniform> u: vec4<u32>;\n".to_owned();
        let mut body = "_ = u;\n".to_owned();
        let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: uniform.as_entire_binding() }];
        for (i, binding) in (1..).zip(&dispatch.bindings) {
            let access = if binding.writes { "read_write" } else { "read" };
            writeln!(source, "@group(0) @binding({i}) var<storage, {access}> b{i}: array<u32>;").unwrap();
            writeln!(body, "_ = b{i}[0];").unwrap();
            let resource = buffers[&binding.address].as_entire_binding();
            entries.push(wgpu::BindGroupEntry { binding: i, resource });
        }
        let source = format!("{source}@compute @workgroup_size(1) fn main() {{\n{body}}}\n");
        let source = wgpu::ShaderSource::Wgsl(source.into());
        let module = gpu.create_shader_module(wgpu::ShaderModuleDescriptor { label: None, source });
        let pipeline = gpu.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        let layout = &pipeline.get_bind_group_layout(0);
        let group = gpu.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries });
        made.push((pipeline, group));
    }
    median(|| {
        let (count, ()) = counted(|| {
            let mut encoder = gpu.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                for (pipeline, group) in &made {
                    pass.set_pipeline(pipeline);
                    pass.set_bind_group(0, group, &[]);
                    pass.dispatch_workgroups(1, 1, 1);
                }
            }
            queue.submit([encoder.finish()]);
        });
        device.synchronize(&device.stream().unwrap()).unwrap();
        count
    })
}

/// What decides about the number of dispatches.
fn limits(device: &WgpuBackend) -> Limits {
    let limits = device.raw_device().limits();
    Limits {
        binding_bytes: limits.max_storage_buffer_binding_size,
        storage_buffers: limits.max_storage_buffers_per_shader_stage,
        offset_alignment: u64::from(limits.min_storage_buffer_offset_alignment),
        workgroups: limits.max_compute_workgroups_per_dimension,
        subgroup: 1,
        workgroup_bytes: 0,
        loop_rounds: u64::MAX,
        software: device.is_software(),
    }
}

/// Addresses of nothing, far apart.
fn workspace() -> impl FnMut(u64) -> Result<u64, DispatchError> {
    let mut next = 1 << 50;
    move |_| {
        next += 1 << 30;
        Ok(next)
    }
}

fn nothing_is_allocated() {
    let device = own_device();
    let mut attention = Attention::new(&device, spec());
    let [forward, backward] = attention.dispatches();
    assert!(forward.len() == 1 && backward.len() > 3, "{} {}", forward.len(), backward.len());
    let cold = attention.forward();
    assert!(cold > 1000, "a call that compiles kernels allocates {cold} times: allocations are not counted");
    assert_eq!(median(|| attention.forward()), bare(&device, &forward), "forward");
    assert_eq!(median(|| attention.backward()), bare(&device, &backward), "backward");

    let part = attention.results().map(|tensor| self::tensor(&device, tensor.shape(), 3));
    let operands = Attention::merge_operands(attention.results(), &part);
    let merge = wgsl::merge(&operands, &limits(&device)).unwrap();
    assert_eq!(median(|| attention.merge(&part)), bare(&device, &merge), "merge");

    moves_allocate_nothing(&device, &attention);
    let (stream, [to, ..]) = (device.stream().unwrap(), attention.results());
    let fill = wgsl::fill(to.view_mut().as_view(), 1.0, &limits(&device)).unwrap();
    let count = median(|| {
        let (count, result) = counted(|| device.fill(&stream, to.view_mut(), 1.0));
        result.unwrap();
        device.synchronize(&stream).unwrap();
        // The view is the caller's.
        count - counted(|| to.view_mut()).0
    });
    assert_eq!(count, bare(&device, &fill), "fill");
}

/// Copies, sums and rotations.
fn moves_allocate_nothing(device: &WgpuBackend, attention: &Attention) {
    let (stream, limits) = (device.stream().unwrap(), limits(device));
    let (source, mut to) = (attention.q.view(), tensor(device, attention.q.shape(), 3));
    let rotation = RopeSpec::new(8, RopePairs::Halves);
    let copies = wgsl::relayout(&source, to.view_mut().as_view(), &limits).unwrap();
    let sums = wgsl::accumulate(&source, to.view_mut().as_view(), &limits).unwrap();
    let turns = wgsl::rope(&rotation, &rotation.angles(), &source, to.view_mut().as_view(), &limits).unwrap();
    let mut check = |what, dispatches: &[Dispatch], call: &mut dyn FnMut(&mut Tensor) -> u64| {
        let count = median(|| {
            let count = call(&mut to);
            device.synchronize(&stream).unwrap();
            count
        });
        assert_eq!(count, bare(device, dispatches), "{what}");
    };
    check("relayout", &copies, &mut |to| {
        let args = RelayoutArgs::new(source.clone(), to.view_mut()).unwrap();
        let (count, result) = counted(|| device.relayout(&stream, args));
        result.unwrap();
        count
    });
    check("accumulate", &sums, &mut |to| {
        let args = AccumulateArgs::new(source.clone(), to.view_mut()).unwrap();
        let (count, result) = counted(|| device.accumulate(&stream, args));
        result.unwrap();
        count
    });
    check("rope", &turns, &mut |to| {
        let args = RopeArgs::new(&rotation, source.clone(), to.view_mut()).unwrap();
        let (count, result) = counted(|| device.rope(&stream, args));
        result.unwrap();
        count
    });
}

/// Results of both passes on a device of their own.
fn fresh(spec: &AttentionSpec, seed: u32) -> Vec<Vec<u8>> {
    let mut attention = Attention::new(&own_device(), spec.clone());
    attention.q = tensor(&attention.device, attention.q.shape(), seed);
    attention.run()
}

fn operands_change() {
    let mut attention = Attention::new(&own_device(), spec());
    let first = attention.run();
    assert_eq!(first, fresh(&spec(), 1));
    let shape = attention.q.shape().to_vec();
    // Back into the place of q: the same address.
    drop(std::mem::replace(&mut attention.q, tensor(&attention.device, &[1], 0)));
    attention.q = tensor(&attention.device, &shape, 77);
    let second = attention.run();
    assert_ne!(second, first);
    assert_eq!(second, fresh(&spec(), 77));
    // And elsewhere, with the old one where it was.
    let moved = tensor(&attention.device, &shape, 1);
    let _before = std::mem::replace(&mut attention.q, moved);
    assert_eq!(attention.run(), first);
}

fn problems_change() {
    let mut attention = Attention::new(&own_device(), spec());
    let mut specs = [spec(), spec(), spec(), spec()];
    specs[1].kv_lengths = Some(vec![5]);
    specs[2].mask.causal = true;
    specs[3].softmax_scale = Some(0.1);
    let expected: Vec<_> = specs.iter().map(|spec| fresh(spec, 1)).collect();
    for (i, (spec, expected)) in specs.iter().zip(&expected).chain(specs.iter().zip(&expected)).enumerate() {
        attention.spec = spec.clone();
        assert_eq!(attention.run(), *expected, "{i}");
        assert_eq!(attention.run(), *expected, "{i} again");
    }
    assert_ne!(expected[0], expected[1]);
}

/// Tensors that take what was workspace keep what they hold, and gradients come out as before.
fn workspace_changes_hands() {
    let device = own_device();
    let mut attention = Attention::new(&device, spec());
    let expected = attention.run();
    let [in_use, peak] = device.memory_bytes();
    assert!(peak > in_use, "a backward pass takes workspace");
    let stream = device.stream().unwrap();
    let mut taken = Vec::new();
    // All sizes, several of each: whatever is idle.
    for bytes in (256..=16_384).step_by(256).flat_map(|bytes| [bytes; 4]) {
        let mut storage = device.alloc(&stream, bytes).unwrap();
        device.upload(&stream, &vec![0xab; bytes], &mut storage).unwrap();
        taken.push(storage);
    }
    for _ in 0..2 {
        assert_eq!(attention.run(), expected);
    }
    for storage in &taken {
        let mut bytes = vec![0; storage.bytes()];
        device.download(&stream, storage, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 0xab));
    }
    drop(taken);
    assert_eq!(attention.run(), expected);
}

/// What was prepared for memory does not keep it from the device.
fn memory_is_freed() {
    const BYTES: usize = 200 << 20;
    let device = own_device();
    let stream = device.stream().unwrap();
    let mut tensors: Vec<_> = (0..4)
        .map(|_| {
            let layout = Layout::contiguous(&[BYTES / 4]).unwrap();
            Tensor::new(device.alloc(&stream, BYTES).unwrap(), DType::F32, layout).unwrap()
        })
        .collect();
    let reserved = || {
        device.synchronize(&stream).unwrap();
        device.raw_device().generate_allocator_report().unwrap().total_allocated_bytes
    };
    for tensor in &mut tensors {
        device.fill(&stream, tensor.view_mut(), 1.0).unwrap();
    }
    assert!(reserved() >= 4 * BYTES as u64);
    drop(tensors);
    assert!(reserved() < 3 * BYTES as u64, "idle memory is bounded");
}

/// Masks and biases are put together where there are few storage buffers, and sums of wide heads lie in memory.
fn plans_are_kept() {
    for options in [WgpuOptions::default(), WgpuOptions::portable()] {
        for head_dim in [8, 72] {
            let device = WgpuBackend::with_options(0, options).unwrap();
            let mut attention = Attention::new(&device, AttentionSpec { head_dim, head_dim_v: head_dim, ..spec() });
            let (plan, [before, _]) = (attention.plan(), device.memory_bytes());
            let mut check = |what, planned: usize, call: &mut dyn FnMut(&mut Attention) -> u64| {
                call(&mut attention);
                let [_, peak] = device.memory_bytes();
                let (taken, planned) = (peak - before, planned as u64);
                // Sizes of buffers are multiples of 256 bytes, and there are few.
                let rounded = planned..planned + 8 * 256;
                assert!(rounded.contains(&taken), "{what}, {options:?}, {head_dim} channels: {taken} of {planned}");
            };
            check("forward", plan.forward_workspace_bytes, &mut Attention::forward);
            check("backward", plan.backward_workspace_bytes, &mut Attention::backward);
        }
    }
}

fn memory_stays() {
    let (mut storage, bytes) = {
        let device = WgpuBackend::new(0).unwrap();
        let stream = device.stream().unwrap();
        (device.alloc(&stream, 64).unwrap(), [7; 64])
    };
    let again = WgpuBackend::new(0).unwrap();
    let stream = again.stream().unwrap();
    again.upload(&stream, &bytes, &mut storage).unwrap();
    drop((again, stream));
    let again = WgpuBackend::new(0).unwrap();
    let mut read = [0; 64];
    again.download(&again.stream().unwrap(), &storage, &mut read).unwrap();
    assert_eq!(read, bytes);
}

/// A mistake that no scope of ours catches, by a thread that uses the device itself.
fn late_errors() {
    let device = own_device();
    let stream = device.stream().unwrap();
    std::thread::scope(|scope| {
        let mistaken = scope.spawn(|| {
            let usage = wgpu::BufferUsages::empty();
            let descriptor = wgpu::BufferDescriptor { label: None, size: 4, usage, mapped_at_creation: false };
            let _invalid = device.raw_device().create_buffer(&descriptor);
            // Another thread's call comes first, and is well.
            std::thread::scope(|scope| scope.spawn(|| device.synchronize(&stream)).join().unwrap()).unwrap();
            let error = device.synchronize(&stream).unwrap_err();
            assert!(matches!(error, DeviceError::Driver { .. }), "{error}");
            device.synchronize(&stream).unwrap();
        });
        mistaken.join().unwrap();
    });
    device.synchronize(&stream).unwrap();
}
