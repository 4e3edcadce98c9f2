//! Attention on a virtual device: the way from operands to a launch.
//!
//! What the kernels compute is held against the oracle by the conformance suite, which `cargo xtask test` runs on a
//! virtual device; here are one case, and what the suite has not.

use std::sync::Arc;

use tilefold_backend_cuda::CudaBackend;
use tilefold_conformance::oracle::{self, Expected};
use tilefold_conformance::values::Inputs;
use tilefold_conformance::{cases, exchange};
use tilefold_core::{
    AttentionPlan, AttentionProblem, AttentionSpec, Backend, BackwardArgs, BackwardOperands, BiasSpec, DType,
    ForwardArgs, ForwardOperands, Layout, Precision, Storage, Stream, Tensor,
};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("attention_agrees_with_the_oracle", attention),
    ("tf32_is_used_where_it_is_allowed", tf32),
    ("strides_are_64_bits_wide", far_apart),
];

/// All features at once: both lists that are uploaded with a launch, every gradient, workspace.
fn attention() {
    let device = CudaBackend::new(0).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let case = cases::all(dtype, &[]).into_iter().find(|case| case.group == "everything").unwrap();
        assert!(case.spec.kv_lengths.is_some() && case.spec.mask.alibi_slopes.is_some());
        assert!(case.spec.gradients.q && case.spec.gradients.biases.contains(&true));
        oracle::check_case(&device, &case).unwrap();
    }
}

/// Every result has the error of tf32 where that is allowed, which exact products would not leave.
fn tf32() {
    let device = CudaBackend::new(0).unwrap();
    let of = |precision: Precision| {
        let mut all = cases::all(precision, &[]).into_iter();
        all.find(|case| case.group == "workload" && case.name == "msa_row").unwrap()
    };
    let (exact, rounded) = (of(DType::F32.into()), of(Precision::TF32));
    let inputs = Inputs::draw(&exact);
    let results = exchange::run(&device, &rounded, &inputs).unwrap();
    Expected::of(&rounded, &inputs).unwrap().check(&rounded, &results).unwrap();
    let message = Expected::of(&exact, &inputs).unwrap().check(&exact, &results).unwrap_err();
    for name in ["out[", "lse[", "dq[", "dk[", "dv[", "dbias0[", "dbias1["] {
        assert!(message.contains(name), "{name} is as exact as f32: {message}");
    }
}

/// Operands as two allocations each, farther apart than 32 bits of bytes or elements reach, give the same bits: entries of
/// the batch, and queries.
fn far_apart() {
    let device = CudaBackend::new(0).unwrap();
    let stream = device.stream().unwrap();
    let batch = AttentionSpec::new(DType::BF16, 2, 1, 40, 2, 8);
    let queries = AttentionSpec { seqlen_k: 64, ..AttentionSpec::new(DType::BF16, 1, 1, 2, 1, 8) };
    for mut spec in [batch, queries] {
        let shape = [spec.batch, 1, spec.heads, spec.seqlen_q, spec.seqlen_k];
        spec.biases = vec![BiasSpec { shape, dtype: DType::BF16 }];
        spec.gate = true;
        let plan = device.plan_attention(&AttentionProblem::new(spec.with_all_gradients()).unwrap()).unwrap();
        let near = passes(&device, &stream, &plan, false);
        assert!(near.iter().all(|bytes| bytes.iter().any(|&byte| byte != 0)));
        assert!(near == passes(&device, &stream, &plan, true));
    }
}

/// The bytes of all results of both passes; with `far`, operands lie in two allocations.
fn passes(device: &CudaBackend, stream: &Stream, plan: &AttentionPlan, far: bool) -> Vec<Vec<u8>> {
    let problem = &plan.problem;
    let (query, key) = (problem.q_shape(), problem.k_shape());
    let (lse, bias) = (problem.lse_shape(), problem.spec().biases[0].shape);
    let half = |shape: &[usize]| InTwo::new(device, stream, DType::BF16, shape, far);
    let single = || InTwo::new(device, stream, DType::F32, &lse, far);
    let ([q, gate, d_out], [k, v]) = (std::array::from_fn(|_| half(&query)), std::array::from_fn(|_| half(&key)));
    let bias_given = half(&bias);
    let (mut out, [mut lse, mut lse_low]) = (half(&query), [single(), single()]);
    let operands = ForwardOperands {
        q: q.tensor.view(),
        k: k.tensor.view(),
        v: v.tensor.view(),
        biases: vec![bias_given.tensor.view()],
        key_mask: None,
        q_segments: None,
        k_segments: None,
        gate: Some(gate.tensor.view()),
        out: out.tensor.view_mut(),
        lse: Some(lse.tensor.view_mut()),
        lse_low: Some(lse_low.tensor.view_mut()),
    };
    device.attention_forward(stream, ForwardArgs::new(plan, operands).unwrap()).unwrap();
    let [mut dq, mut d_gate] = std::array::from_fn(|_| half(&query));
    let [mut dk, mut dv] = std::array::from_fn(|_| half(&key));
    let mut dbias = half(&bias);
    let operands = BackwardOperands {
        q: q.tensor.view(),
        k: k.tensor.view(),
        v: v.tensor.view(),
        biases: vec![bias_given.tensor.view()],
        key_mask: None,
        q_segments: None,
        k_segments: None,
        gate: Some(gate.tensor.view()),
        out: out.tensor.view(),
        lse: lse.tensor.view(),
        lse_low: lse_low.tensor.view(),
        d_out: d_out.tensor.view(),
        dq: Some(dq.tensor.view_mut()),
        dk: Some(dk.tensor.view_mut()),
        dv: Some(dv.tensor.view_mut()),
        dbiases: vec![Some(dbias.tensor.view_mut())],
        d_gate: Some(d_gate.tensor.view_mut()),
    };
    device.attention_backward(stream, BackwardArgs::new(plan, operands).unwrap()).unwrap();
    // Not lse_low: the last bits of f32 show which path strides let a tile take.
    [out, lse, dq, dk, dv, d_gate, dbias].iter().map(|each| each.download(device, stream)).collect()
}

/// A tensor and the allocations that hold it: with `far` two, for the entries of its first axis of size 2, if it has one.
struct InTwo {
    tensor: Tensor,
    parts: Vec<Storage>,
}

impl InTwo {
    /// Filled with numbers from -1 to 1 that depend on the place in the tensor alone.
    fn new(device: &CudaBackend, stream: &Stream, dtype: DType, shape: &[usize], far: bool) -> Self {
        let axis = shape.iter().position(|&size| size == 2);
        let far = far && axis.is_some();
        let count: usize = shape.iter().product();
        let values = (0..count).map(|i| (i as f32 * 0.7).sin());
        let bytes: Vec<u8> = match dtype {
            DType::F32 => values.flat_map(f32::to_le_bytes).collect(),
            _ => values.flat_map(|value| half::bf16::from_f32(value).to_le_bytes()).collect(),
        };
        let pieces = if far { bytes.chunks(bytes.len() / 2).collect() } else { vec![&bytes[..]] };
        let allocate = |piece: &&[u8]| {
            let mut storage = device.alloc(stream, piece.len()).unwrap();
            device.upload(stream, piece, &mut storage).unwrap();
            storage
        };
        let parts: Vec<_> = pieces.iter().map(allocate).collect();
        let [first, last] = [&parts[0], &parts[parts.len() - 1]].map(|part| part.address().addr());
        let step = (last - first) / dtype.size_bytes();
        assert!(!far || step > 1 << 32, "allocations are {step} elements apart");
        let all = last - first + parts[0].bytes();
        // SAFETY: `parts` outlive the tensor; what lies between them is never used.
        let storage = unsafe { device.storage_from_raw(first as u64, all, Arc::new(())) }.unwrap();
        let mut strides = Layout::contiguous(shape).unwrap().strides().to_vec();
        if let (true, Some(axis)) = (far, axis) {
            strides[axis] = i64::try_from(step).unwrap();
        }
        let tensor = Tensor::new(storage, dtype, Layout::new(shape, &strides, 0).unwrap()).unwrap();
        Self { tensor, parts }
    }

    fn download(&self, device: &CudaBackend, stream: &Stream) -> Vec<u8> {
        let of_part = |part: &Storage| {
            let mut bytes = vec![0; part.bytes()];
            device.download(stream, part, &mut bytes).unwrap();
            bytes
        };
        self.parts.iter().flat_map(of_part).collect()
    }
}
