//! Bad input: each mistake gives the error that names tensor, dimension, expected and got; nothing panics or aborts.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a panic in a test is a failed test")]

use tilefold_core::{
    AccumulateArgs, AttentionPlan, AttentionProblem, AttentionSpec, BackwardArgs, BackwardOperands, BiasSpec, DType,
    DeviceId, DeviceKind, ForwardArgs, ForwardOperands, Layout, MergeArgs, MergeOperands, ProblemError, Products,
    RelayoutArgs, RopeArgs, RopePairs, RopeSpec, Tensor, TensorView, TensorViewMut,
};

/// A bias that varies over heads and keys, in the dtype of q.
const BIAS: BiasSpec = BiasSpec { shape: [1, 1, 2, 1, 5], dtype: DType::F32 };

/// A small valid problem: batch 1, rows 3, seqlen_q 4, seqlen_k 5, 2 heads, head_dim 8, one bias.
fn spec() -> AttentionSpec {
    let mut spec = AttentionSpec::new(DType::F32, 1, 3, 4, 2, 8);
    spec.seqlen_k = 5;
    spec.biases = vec![BIAS];
    spec
}

fn plan(spec: AttentionSpec) -> AttentionPlan {
    AttentionPlan {
        problem: AttentionProblem::new(spec).unwrap(),
        device: DeviceId::CPU,
        kernel: "test".into(),
        tile_q: 16,
        tile_k: 16,
        forward_workspace_bytes: 0,
        backward_workspace_bytes: 0,
        deterministic: true,
    }
}

/// The error is the expected one and its message has every word a reader needs.
fn assert_error<T: std::fmt::Debug>(
    what: &str,
    result: Result<T, ProblemError>,
    expected: &ProblemError,
    words: &[&str],
) {
    let error = result.expect_err(what);
    assert_eq!(&error, expected, "{what}");
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "{what}: `{message}` does not say `{word}`");
    }
}

/// Asserts what [`AttentionProblem::new`] says to an edited specification.
fn refuses(what: &str, edit: impl FnOnce(&mut AttentionSpec), expected: &ProblemError, words: &[&str]) {
    let mut edited = spec();
    edit(&mut edited);
    assert_error(what, AttentionProblem::new(edited), expected, words);
}

#[test]
fn the_unedited_problem_is_valid() {
    let problem = AttentionProblem::new(spec().with_all_gradients()).unwrap();
    assert!((problem.softmax_scale() - 1.0 / 8_f64.sqrt()).abs() < 1e-15);
}

#[test]
fn zero_sizes() {
    type Edit = fn(&mut AttentionSpec);
    let cases: [(&str, &str, Edit); 8] = [
        ("q", "batch", |s| s.batch = 0),
        ("q", "rows", |s| s.rows = 0),
        ("q", "seqlen_q", |s| s.seqlen_q = 0),
        ("k", "seqlen_k", |s| s.seqlen_k = 0),
        ("q", "heads", |s| s.heads = 0),
        ("k", "kv_heads", |s| s.kv_heads = 0),
        ("q", "head_dim", |s| s.head_dim = 0),
        ("v", "head_dim_v", |s| s.head_dim_v = 0),
    ];
    for (tensor, dimension, edit) in cases {
        refuses(dimension, edit, &ProblemError::ZeroSize { tensor, dimension }, &[tensor, dimension, "at least 1"]);
    }
    let expected = ProblemError::ZeroSize { tensor: "bias0", dimension: "heads" };
    refuses("bias", |s| s.biases[0].shape[2] = 0, &expected, &["bias0", "heads"]);
}

#[test]
fn biases_that_do_not_broadcast() {
    let axes = [("batch", 1), ("rows", 3), ("heads", 2), ("seqlen_q", 4), ("seqlen_k", 5)];
    for (axis, (dimension, expected)) in axes.into_iter().enumerate() {
        let error = ProblemError::NotBroadcastable { tensor: "bias1", dimension, expected, got: 7 };
        let edit = |s: &mut AttentionSpec| {
            s.biases.push(BIAS);
            s.biases[1].shape[axis] = 7;
        };
        refuses(dimension, edit, &error, &["bias1", dimension, &expected.to_string(), "7"]);
    }
    let expected = ProblemError::Limit { what: "biases", limit: 4, got: 5 };
    refuses("five biases", |s| s.biases = vec![BIAS; 5], &expected, &["biases", "4", "5"]);
}

#[test]
fn dtypes_that_do_not_go_together() {
    for got in [DType::I32, DType::Bool] {
        let expected = ProblemError::UnsupportedDType { tensor: "q", expected: "f32, f16 or bf16".into(), got };
        refuses("q", |s| s.dtype = got, &expected, &["q", "f32, f16 or bf16", &got.to_string()]);
    }
    // (dtype of q, dtype of the bias that is refused)
    for (q, got) in [(DType::F32, DType::BF16), (DType::BF16, DType::F16), (DType::F16, DType::Bool)] {
        let error =
            ProblemError::UnsupportedDType { tensor: "bias0", expected: format!("{q} (that of q) or f32"), got };
        let edit = |s: &mut AttentionSpec| {
            s.dtype = q;
            s.biases[0].dtype = got;
        };
        refuses("bias", edit, &error, &["bias0", &q.to_string(), &got.to_string()]);
    }
}

#[test]
fn products_of_half_types_have_no_choice() {
    for dtype in [DType::F16, DType::BF16] {
        let error = ProblemError::ProductsOfDType { products: Products::Tf32, dtype };
        let edit = |s: &mut AttentionSpec| (s.dtype, s.products, s.biases) = (dtype, Products::Tf32, vec![]);
        refuses("products", edit, &error, &["products", "tf32", "f32", &dtype.to_string()]);
    }
    let spec = AttentionSpec { products: Products::Tf32, ..spec() };
    assert_eq!(AttentionProblem::new(spec).unwrap().spec().products, Products::Tf32);
}

#[test]
fn limits_and_head_groups() {
    let expected = ProblemError::Limit { what: "head_dim", limit: 256, got: 257 };
    refuses("head_dim", |s| s.head_dim = 257, &expected, &["head_dim", "256", "257"]);
    let expected = ProblemError::Limit { what: "head_dim_v", limit: 256, got: 300 };
    refuses("head_dim_v", |s| s.head_dim_v = 300, &expected, &["head_dim_v", "256", "300"]);
    let expected = ProblemError::HeadGroups { heads: 6, kv_heads: 4 };
    let edit = |s: &mut AttentionSpec| {
        s.biases.clear();
        (s.heads, s.kv_heads) = (6, 4);
    };
    refuses("groups", edit, &expected, &["kv_heads", "6", "4"]);
    let expected = ProblemError::HeadGroups { heads: 2, kv_heads: 4 };
    refuses("more key heads than heads", |s| s.kv_heads = 4, &expected, &["kv_heads", "2", "4"]);
}

#[test]
fn sizes_that_overflow() {
    let huge = usize::try_from(i64::MAX / 2).unwrap();
    let q = ProblemError::Overflow { tensor: "q", quantity: "size in bytes" };
    let k = ProblemError::Overflow { tensor: "k", quantity: "size in bytes" };
    let words = ["size in bytes", "overflow"];
    refuses("seqlen_q", |s| (s.seqlen_q, s.biases) = (huge, vec![]), &q, &words);
    refuses("usize::MAX", |s| (s.batch, s.biases) = (usize::MAX, vec![]), &q, &words);
    refuses("seqlen_k", |s| (s.seqlen_k, s.biases) = (huge, vec![]), &k, &words);
    // 2^63 bytes only as a product of moderate sizes.
    let edit = |s: &mut AttentionSpec| {
        s.biases.clear();
        (s.batch, s.rows, s.seqlen_q) = (1 << 20, 1 << 20, 1 << 20);
    };
    refuses("product", edit, &q, &words);
    // The biases alone are too large: of the operands, only they have seqlen_q · seqlen_k elements.
    for (index, tensor) in ["bias0", "bias1"].into_iter().enumerate() {
        let long = 1 << 31;
        let edit = |s: &mut AttentionSpec| {
            (s.seqlen_q, s.seqlen_k, s.biases) = (long, long, vec![BiasSpec { shape: [1; 5], dtype: DType::F32 }; 2]);
            s.biases[index].shape = [1, 1, 1, long, long];
        };
        refuses(tensor, edit, &ProblemError::Overflow { tensor, quantity: "size in bytes" }, &[tensor, "overflow"]);
    }
}

#[test]
fn a_scale_that_is_not_finite_in_f32() {
    let limit = f64::from(f32::MAX) / 2.0;
    for got in [f64::INFINITY, f64::NEG_INFINITY, f64::MAX, -1e39, 3e38] {
        let expected = ProblemError::OutOfRange { parameter: "softmax_scale", limit, got };
        refuses("scale", |s| s.softmax_scale = Some(got), &expected, &["softmax_scale", "at most 1.7014"]);
    }
    let mut nan = spec();
    nan.softmax_scale = Some(f64::NAN);
    let error = AttentionProblem::new(nan).unwrap_err();
    assert!(
        matches!(error, ProblemError::OutOfRange { parameter: "softmax_scale", got, .. } if got.is_nan()),
        "{error}"
    );
    assert!(error.to_string().contains("NaN"));
    for valid in [0.0, -1.0, 1e-30, 1e30] {
        let mut edited = spec();
        edited.softmax_scale = Some(valid);
        assert!(AttentionProblem::new(edited).is_ok(), "{valid} is a finite scale");
    }
}

#[test]
fn alibi_slopes() {
    for got in [0, 1, 3] {
        let expected = ProblemError::Length { list: "alibi_slopes", expected: "2 (one per head)".into(), got };
        refuses("count", |s| s.mask.alibi_slopes = Some(vec![0.5; got]), &expected, &["alibi_slopes", "one per head"]);
    }
    for (slope, got) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let expected =
            ProblemError::Value { list: "alibi_slopes", index: 1, expected: "a finite number".into(), got: got.into() };
        refuses(got, |s| s.mask.alibi_slopes = Some(vec![0.5, slope]), &expected, &["alibi_slopes[1]", "finite", got]);
    }
}

#[test]
fn kv_lengths() {
    for got in [0, 2, 4] {
        let list = "kv_lengths";
        let expected = ProblemError::Length { list, expected: "1, 1 (batch) or 3 (batch · rows)".into(), got };
        refuses("count", |s| s.kv_lengths = Some(vec![5; got]), &expected, &["kv_lengths", "batch"]);
    }
    for length in [6, -1, i64::MAX, i64::MIN] {
        let expected = ProblemError::Value {
            list: "kv_lengths",
            index: 2,
            expected: "0..=5 (seqlen_k)".into(),
            got: length.to_string(),
        };
        let words = ["kv_lengths[2]", "0..=5", &length.to_string()];
        refuses("length", |s| s.kv_lengths = Some(vec![0, 5, length]), &expected, &words);
    }
}

#[test]
fn gradients_of_absent_operands() {
    let reason = "the problem has no such operand";
    let expected = ProblemError::Unexpected { tensor: "d_gate", reason };
    refuses("gate", |s| s.gradients.gate = true, &expected, &["d_gate", "no such operand"]);
    for (i, tensor) in [(1, "dbias1"), (2, "dbias2"), (3, "dbias3")] {
        let expected = ProblemError::Unexpected { tensor, reason };
        refuses(tensor, |s| s.gradients.biases[i] = true, &expected, &[tensor, "no such operand"]);
    }
}

#[test]
fn layouts() {
    let overflow = ProblemError::Overflow { tensor: "layout", quantity: "size or offset" };
    assert_error("count", Layout::contiguous(&[usize::MAX, 2]), &overflow, &["layout", "overflow"]);
    assert_error("span", Layout::new(&[3], &[i64::MAX], 0), &overflow, &["layout"]);
    assert_error("offset", Layout::new(&[2], &[1], i64::MAX), &overflow, &["layout"]);
    assert_error("below", Layout::new(&[3], &[i64::MIN / 2], -10), &overflow, &["layout"]);
    let zero = ProblemError::ZeroSize { tensor: "layout", dimension: "dimension 1" };
    assert_error("zero", Layout::new(&[2, 0], &[1, 1], 0), &zero, &["dimension 1"]);
    let rank = ProblemError::Rank { tensor: "strides", expected: 2, got: 1 };
    assert_error("rank", Layout::new(&[2, 2], &[1], 0), &rank, &["strides", "2", "1"]);
}

#[test]
fn views_of_a_layout() {
    let layout = Layout::contiguous(&[4, 6]).unwrap();
    for order in [vec![0, 0], vec![0], vec![0, 2], vec![0, 1, 2]] {
        let (expected, got) = ("a permutation of 0..2".into(), order.len());
        let error = ProblemError::Length { list: "order", expected, got };
        assert_error("permute", layout.permute(&order), &error, &["order", "0..2"]);
    }
    let limit = |what, limit, got| ProblemError::Limit { what, limit, got };
    assert_error("dimension", layout.slice(2, 0..1, 1), &limit("slice dimension", 1, 2), &["slice dimension"]);
    assert_error("end", layout.slice(0, 0..5, 1), &limit("slice end", 4, 5), &["slice end", "4", "5"]);
    let empty = ProblemError::ZeroSize { tensor: "slice", dimension: "range or step" };
    assert_error("empty range", layout.slice(0, 2..2, 1), &empty, &["slice", "range"]);
    assert_error("step of 0", layout.slice(0, 0..4, 0), &empty, &["slice", "step"]);
    let overflow = ProblemError::Overflow { tensor: "layout", quantity: "size or offset" };
    assert_error("step", layout.slice(0, 0..4, i64::MIN), &overflow, &["overflow"]);
    assert_error("unsqueeze", layout.unsqueeze(3), &limit("new dimension", 2, 3), &["new dimension", "2", "3"]);
    let dimension = "dimension 0";
    let error = ProblemError::NotBroadcastable { tensor: "expand", dimension, expected: 8, got: 4 };
    assert_error("expand", layout.expand(&[8, 6]), &error, &["expand", "8", "4"]);
    let rank = ProblemError::Rank { tensor: "expand", expected: 2, got: 1 };
    assert_error("expand", layout.expand(&[4]), &rank, &["expand", "2", "1"]);
}

#[test]
fn strides_out_of_bounds() {
    let data = [0_f32; 12];
    // (shape, strides, offset, first byte, one past the last byte)
    let cases = [
        ([3, 4], [4, 1], 1, 4, 52),
        ([3, 4], [5, 1], 0, 0, 56),
        ([3, 4], [-4, 1], 7, -4, 44),
        ([1, 1], [0, 0], 12, 48, 52),
    ];
    for (shape, strides, offset, first, end) in cases {
        let layout = Layout::new(&shape, &strides, offset).unwrap();
        let expected = ProblemError::OutOfBounds { tensor: "tensor", first, end, available: 48 };
        let words = [first.to_string(), end.to_string(), "48".to_owned()];
        let view = TensorView::from_slice_with_layout(&data, layout.clone());
        assert_error("view", view, &expected, &words.each_ref().map(String::as_str));
        let mut owned = data.to_vec();
        let view = TensorViewMut::from_slice_with_layout(&mut owned, layout);
        assert_error("mutable view", view, &expected, &["tensor"]);
    }
    let expected = ProblemError::Length { list: "data", expected: "10 for shape [2, 5]".into(), got: 12 };
    assert_error("count", TensorView::from_slice(&data, &[2, 5]), &expected, &["data", "10", "12"]);
    // In bytes, the extent overflows although it fits in elements.
    let far = Layout::new(&[1], &[1], i64::MAX / 2).unwrap();
    let expected = ProblemError::Overflow { tensor: "tensor", quantity: "size in bytes" };
    assert_error("bytes", TensorView::from_slice_with_layout(&data, far), &expected, &["size in bytes"]);
}

#[test]
fn allocations_beyond_memory_are_errors() {
    for elements in [1_usize << 58, 1 << 60, 1 << 61] {
        let expected = ProblemError::OutOfMemory { tensor: "tensor", bytes: elements * 4 };
        assert_error("zeros", Tensor::zeros(DType::F32, &[elements]), &expected, &[&(elements * 4).to_string()]);
    }
    let expected = ProblemError::Overflow { tensor: "tensor", quantity: "size in bytes" };
    assert_error("overflow", Tensor::zeros(DType::F32, &[1 << 62]), &expected, &["size in bytes"]);
}

/// Host tensors of every operand of a plan, to be spoilt one at a time.
struct Fixture {
    inputs: Vec<Tensor>,
    out: Tensor,
    lse: [Tensor; 2],
    gradients: Vec<Tensor>,
}

impl Fixture {
    fn new(plan: &AttentionPlan) -> Self {
        let p = &plan.problem;
        let zeros = |shape: &[usize]| Tensor::zeros(DType::F32, shape).unwrap();
        let inputs = [p.q_shape(), p.k_shape(), p.v_shape(), BIAS.shape, p.out_shape(), p.out_shape()];
        Self {
            inputs: inputs.iter().map(|shape| zeros(shape)).collect(),
            out: zeros(&p.out_shape()),
            lse: [zeros(&p.lse_shape()), zeros(&p.lse_shape())],
            gradients: [p.q_shape(), p.k_shape(), p.v_shape(), BIAS.shape].iter().map(|s| zeros(s)).collect(),
        }
    }

    fn forward(&mut self) -> ForwardOperands<'_> {
        let [lse, lse_low] = &mut self.lse;
        ForwardOperands {
            q: self.inputs[0].view(),
            k: self.inputs[1].view(),
            v: self.inputs[2].view(),
            biases: vec![self.inputs[3].view()],
            key_mask: None,
            q_segments: None,
            k_segments: None,
            gate: None,
            out: self.out.view_mut(),
            lse: Some(lse.view_mut()),
            lse_low: Some(lse_low.view_mut()),
        }
    }

    fn backward(&mut self) -> BackwardOperands<'_> {
        let [dq, dk, dv, dbias] = &mut self.gradients[..] else { panic!("four gradients") };
        BackwardOperands {
            q: self.inputs[0].view(),
            k: self.inputs[1].view(),
            v: self.inputs[2].view(),
            biases: vec![self.inputs[3].view()],
            key_mask: None,
            q_segments: None,
            k_segments: None,
            gate: None,
            out: self.inputs[4].view(),
            lse: self.lse[0].view(),
            lse_low: self.lse[1].view(),
            d_out: self.inputs[5].view(),
            dq: Some(dq.view_mut()),
            dk: Some(dk.view_mut()),
            dv: Some(dv.view_mut()),
            dbiases: vec![Some(dbias.view_mut())],
            d_gate: None,
        }
    }
}

fn forward_refuses(
    plan: &AttentionPlan,
    what: &str,
    edit: impl for<'a> FnOnce(&mut ForwardOperands<'a>, &'a Spare),
    expected: &ProblemError,
) {
    let spare = Spare::new();
    let mut fixture = Fixture::new(&self::plan(spec()));
    let mut operands = fixture.forward();
    edit(&mut operands, &spare);
    let result = ForwardArgs::new(plan, operands);
    assert_error(what, result, expected, &[]);
}

fn backward_refuses(
    plan: &AttentionPlan,
    what: &str,
    edit: impl for<'a> FnOnce(&mut BackwardOperands<'a>, &'a Spare),
    expected: &ProblemError,
) {
    let spare = Spare::new();
    let mut fixture = Fixture::new(&self::plan(spec()));
    let mut operands = fixture.backward();
    edit(&mut operands, &spare);
    assert_error(what, BackwardArgs::new(plan, operands), expected, &[]);
}

/// Tensors that fit nowhere.
struct Spare {
    half: Tensor,
    flat: Tensor,
    long: Tensor,
    mask: Tensor,
    ids: Tensor,
    out: Tensor,
}

impl Spare {
    fn new() -> Self {
        let zeros = |dtype, shape: &[usize]| Tensor::zeros(dtype, shape).unwrap();
        Self {
            half: zeros(DType::F16, &[1, 3, 4, 2, 8]),
            flat: zeros(DType::F32, &[192]),
            long: zeros(DType::F32, &[1, 3, 6, 2, 8]),
            mask: zeros(DType::Bool, &[1, 3, 4]),
            ids: zeros(DType::I32, &[1, 1, 5]),
            out: zeros(DType::F32, &[1, 3, 4, 2, 8]),
        }
    }
}

#[test]
fn the_unspoilt_operands_are_valid() {
    let forward = plan(spec());
    let backward = plan(spec().with_all_gradients());
    let mut fixture = Fixture::new(&forward);
    assert!(ForwardArgs::new(&forward, fixture.forward()).is_ok());
    assert!(BackwardArgs::new(&backward, fixture.backward()).is_ok());
}

#[test]
fn operands_with_wrong_shape_rank_or_dtype() {
    let plan = plan(spec());
    let (dimension, expected, got) = ("seqlen_q", 4, 6);
    forward_refuses(
        &plan,
        "q",
        |o, spare| o.q = spare.long.view(),
        &ProblemError::Shape { tensor: "q", dimension, expected, got },
    );
    let dimension = "seqlen_k";
    for tensor in ["k", "v"] {
        let error = ProblemError::Shape { tensor, dimension, expected: 5, got: 6 };
        forward_refuses(
            &plan,
            tensor,
            |o, spare| match tensor {
                "k" => o.k = spare.long.view(),
                _ => o.v = spare.long.view(),
            },
            &error,
        );
    }
    let error = ProblemError::UnsupportedDType { tensor: "q", expected: "f32".into(), got: DType::F16 };
    forward_refuses(&plan, "dtype", |o, spare| o.q = spare.half.view(), &error);
    let error = ProblemError::Rank { tensor: "v", expected: 5, got: 1 };
    forward_refuses(&plan, "rank", |o, spare| o.v = spare.flat.view(), &error);
    let error = ProblemError::Shape { tensor: "bias0", dimension: "rows", expected: 1, got: 3 };
    forward_refuses(&plan, "bias", |o, spare| o.biases = vec![spare.out.view()], &error);
    let error = ProblemError::Length { list: "biases", expected: "1 (as planned)".into(), got: 0 };
    forward_refuses(&plan, "no bias", |o, _| o.biases.clear(), &error);
}

#[test]
fn masks_and_segments_that_do_not_broadcast() {
    let mut masked = spec();
    (masked.key_mask, masked.segments) = (true, true);
    let masked = plan(masked);
    let reason = "the plan was made with it";
    forward_refuses(&masked, "mask", |_, _| (), &ProblemError::Missing { tensor: "key_mask", reason });
    let error = ProblemError::NotBroadcastable { tensor: "key_mask", dimension: "seqlen_k", expected: 5, got: 4 };
    forward_refuses(&masked, "mask", |o, spare| o.key_mask = Some(spare.mask.view()), &error);
    let error = ProblemError::UnsupportedDType { tensor: "key_mask", expected: "bool".into(), got: DType::I32 };
    forward_refuses(&masked, "mask", |o, spare| o.key_mask = Some(spare.ids.view()), &error);
    let mut segmented = spec();
    segmented.segments = true;
    let error = ProblemError::NotBroadcastable { tensor: "q_segments", dimension: "seqlen_q", expected: 4, got: 5 };
    forward_refuses(&plan(segmented), "ids", |o, spare| o.q_segments = Some(spare.ids.view()), &error);
}

#[test]
fn missing_and_unexpected_operands() {
    let plain = plan(spec());
    let reason = "the plan was made without it";
    let unexpected = |tensor| ProblemError::Unexpected { tensor, reason };
    forward_refuses(&plain, "mask", |o, s| o.key_mask = Some(s.mask.view()), &unexpected("key_mask"));
    forward_refuses(&plain, "ids", |o, s| o.q_segments = Some(s.ids.view()), &unexpected("q_segments"));
    forward_refuses(&plain, "ids", |o, s| o.k_segments = Some(s.ids.view()), &unexpected("k_segments"));
    forward_refuses(&plain, "gate", |o, s| o.gate = Some(s.out.view()), &unexpected("gate"));
    let mut gated = spec();
    gated.gate = true;
    let missing = |tensor| ProblemError::Missing { tensor, reason: "the plan was made with it" };
    forward_refuses(&plan(gated), "gate", |_, _| (), &missing("gate"));

    let all = plan(spec().with_all_gradients());
    backward_refuses(&all, "dq", |o, _| o.dq = None, &missing("dq"));
    backward_refuses(&all, "dk", |o, _| o.dk = None, &missing("dk"));
    backward_refuses(&all, "dv", |o, _| o.dv = None, &missing("dv"));
    backward_refuses(&all, "dbias", |o, _| o.dbiases.clear(), &missing("dbias0"));
    backward_refuses(&all, "dbias", |o, _| o.dbiases[0] = None, &missing("dbias0"));
    let limit = ProblemError::Limit { what: "dbiases", limit: 1, got: 2 };
    backward_refuses(&all, "dbiases", |o, _| o.dbiases.push(None), &limit);
    // A plan for the forward pass alone takes no gradient.
    backward_refuses(&plain, "dq", |_, _| (), &unexpected("dq"));
}

#[test]
fn gradients_with_wrong_shapes() {
    let all = plan(spec().with_all_gradients());
    let shape = |tensor, dimension, expected, got| ProblemError::Shape { tensor, dimension, expected, got };
    backward_refuses(&all, "dk", |o, _| std::mem::swap(&mut o.dq, &mut o.dk), &shape("dq", "seqlen_q", 4, 5));
    backward_refuses(&all, "d_out", |o, s| o.d_out = s.long.view(), &shape("d_out", "seqlen_q", 4, 6));
    backward_refuses(&all, "out", |o, s| o.out = s.long.view(), &shape("out", "seqlen_q", 4, 6));
    let rank = ProblemError::Rank { tensor: "lse", expected: 4, got: 5 };
    backward_refuses(&all, "lse", |o, s| o.lse = s.out.view(), &rank);
    let error = ProblemError::UnsupportedDType { tensor: "lse_low", expected: "f32".into(), got: DType::F16 };
    backward_refuses(&all, "lse_low", |o, s| o.lse_low = s.half.view(), &error);
    backward_refuses(&all, "dbias", |o, _| std::mem::swap(&mut o.dv, &mut o.dbiases[0]), &shape("dv", "rows", 3, 1));
}

#[test]
fn a_plan_used_with_other_operands() {
    let mut other = spec();
    other.seqlen_q = 9;
    let error = ProblemError::Shape { tensor: "q", dimension: "seqlen_q", expected: 9, got: 4 };
    forward_refuses(&plan(other.clone()), "plan", |_, _| (), &error);
    backward_refuses(&plan(other.with_all_gradients()), "plan", |_, _| (), &error);
}

#[test]
fn operands_on_another_device() {
    let mut elsewhere = plan(spec().with_all_gradients());
    elsewhere.device = DeviceId { kind: DeviceKind::Cuda, ordinal: 1 };
    let error = ProblemError::WrongDevice { tensor: "q", expected: elsewhere.device, got: DeviceId::CPU };
    assert!(error.to_string().contains("cuda:1") && error.to_string().contains("cpu"));
    forward_refuses(&elsewhere, "device", |_, _| (), &error);
    backward_refuses(&elsewhere, "device", |_, _| (), &error);
}

/// An exclusive view of part of a buffer that other views may reach too: what safe code cannot build.
fn aliased<'a>(buffer: &Tensor, layout: Layout) -> TensorViewMut<'a> {
    let storage = buffer.storage();
    // SAFETY: the view is only checked, never read or written, and the buffer outlives the check.
    unsafe {
        TensorViewMut::from_raw(storage.address(), storage.bytes(), DeviceId::CPU, buffer.dtype(), layout).unwrap()
    }
}

#[test]
fn offsets_beyond_64_bits() {
    let cases = [(i64::MAX - 1, 0, "q_offset"), (0, i64::MAX - 1, "k_offset"), (i64::MIN, i64::MAX - 9, "k_offset")];
    for (q_offset, k_offset, tensor) in cases {
        let mut spec = spec();
        (spec.mask.q_offset, spec.mask.k_offset) = (q_offset, k_offset);
        let error = AttentionProblem::new(spec).unwrap_err();
        assert!(matches!(error, ProblemError::Overflow { tensor: got, .. } if got == tensor), "{error}");
    }
}

#[test]
fn outputs_that_overlap_an_input() {
    let plan = plan(spec());
    let buffer = Tensor::zeros(DType::F32, &[2 * 192]).unwrap();
    let dense = |shift| Layout::new(&[1, 3, 4, 2, 8], &[192, 64, 16, 8, 1], shift).unwrap();
    // q at 0..192 and out in one buffer: side by side, with one element in common, the same.
    for (shift, overlap) in [(192, false), (191, true), (0, true)] {
        let (mut fixture, q, out) = (Fixture::new(&plan), aliased(&buffer, dense(0)), aliased(&buffer, dense(shift)));
        let mut operands = fixture.forward();
        (operands.q, operands.out) = (q.as_view().clone(), out);
        let result = ForwardArgs::new(&plan, operands);
        if overlap {
            let expected = ProblemError::Overlap { output: "out", other: "q" };
            assert_error("out over q", result, &expected, &["out", "q", "memory of its own"]);
        } else {
            assert!(result.is_ok(), "{result:?}");
        }
    }
}

#[test]
fn outputs_that_overlap_each_other() {
    let forward = plan(spec());
    let mut fixture = Fixture::new(&forward);
    let low = fixture.lse[0].view().layout().clone();
    let low = aliased(&fixture.lse[0], low);
    let mut operands = fixture.forward();
    operands.lse_low = Some(low);
    let expected = ProblemError::Overlap { output: "lse_low", other: "lse" };
    assert_error("lse_low over lse", ForwardArgs::new(&forward, operands), &expected, &["lse_low", "lse"]);

    let backward = plan(spec().with_all_gradients());
    let layout = fixture.gradients[1].layout().clone();
    let dv = aliased(&fixture.gradients[1], layout);
    let mut operands = fixture.backward();
    operands.dv = Some(dv);
    let expected = ProblemError::Overlap { output: "dv", other: "dk" };
    assert_error("dv over dk", BackwardArgs::new(&backward, operands), &expected, &["dv", "dk"]);

    let layout = fixture.inputs[5].layout().clone();
    let dq = aliased(&fixture.inputs[5], layout);
    let mut operands = fixture.backward();
    operands.dq = Some(dq);
    let expected = ProblemError::Overlap { output: "dq", other: "d_out" };
    assert_error("dq over d_out", BackwardArgs::new(&backward, operands), &expected, &["dq", "d_out"]);
}

#[test]
fn outputs_that_overlap_themselves() {
    let forward = plan(spec());
    let strides = vec![0, 64, 16, 0, 1];
    let mut fixture = Fixture::new(&forward);
    let out = aliased(&fixture.out, Layout::new(&[1, 3, 4, 2, 8], &strides, 0).unwrap());
    let mut operands = fixture.forward();
    operands.out = out;
    let expected = ProblemError::SelfOverlap { tensor: "out", strides };
    let words = ["out", "[0, 64, 16, 0, 1]", "distinct"];
    assert_error("stride 0", ForwardArgs::new(&forward, operands), &expected, &words);

    let backward = plan(spec().with_all_gradients());
    let strides = vec![16, 16, 1, 4, 1];
    let dbias = aliased(&fixture.gradients[0], Layout::new(&BIAS.shape, &strides, 0).unwrap());
    let mut operands = fixture.backward();
    operands.dbiases = vec![Some(dbias)];
    let expected = ProblemError::SelfOverlap { tensor: "dbias0", strides };
    assert_error(
        "interleaved heads",
        BackwardArgs::new(&backward, operands),
        &expected,
        &["dbias0", "[16, 16, 1, 4, 1]"],
    );
}

#[test]
fn merges_that_do_not_fit() {
    let zeros = |dtype, shape: &[usize]| Tensor::zeros(dtype, shape).unwrap();
    let (out, lse, low) =
        (zeros(DType::F16, &[1, 2, 3, 4, 8]), zeros(DType::F32, &[1, 2, 4, 3]), zeros(DType::F32, &[1, 2, 4, 3]));
    let refuses = |what, edit: &dyn Fn(&mut [Tensor; 3]), expected: ProblemError| {
        let mut acc =
            [zeros(DType::F32, &[1, 2, 3, 4, 8]), zeros(DType::F32, lse.shape()), zeros(DType::F32, lse.shape())];
        edit(&mut acc);
        let [acc_out, acc_lse, acc_lse_low] = &mut acc;
        let operands = MergeOperands {
            out: out.view(),
            lse: lse.view(),
            lse_low: low.view(),
            acc_out: acc_out.view_mut(),
            acc_lse: acc_lse.view_mut(),
            acc_lse_low: acc_lse_low.view_mut(),
        };
        assert_error(what, MergeArgs::new(operands), &expected, &[]);
    };
    let error = ProblemError::Shape { tensor: "acc_out", dimension: "head_dim_v", expected: 8, got: 9 };
    refuses("channels", &|acc| acc[0] = zeros(DType::F32, &[1, 2, 3, 4, 9]), error);
    let error = ProblemError::Shape { tensor: "acc_lse", dimension: "heads", expected: 4, got: 3 };
    refuses("axes", &|acc| acc[1] = zeros(DType::F32, &[1, 2, 3, 4]), error);
    let error = ProblemError::UnsupportedDType { tensor: "acc_lse_low", expected: "f32".into(), got: DType::BF16 };
    refuses("dtype", &|acc| acc[2] = zeros(DType::BF16, &[1, 2, 4, 3]), error);
    let error = ProblemError::Rank { tensor: "acc_out", expected: 5, got: 1 };
    refuses("rank", &|acc| acc[0] = zeros(DType::F32, &[192]), error);
}

#[test]
fn sums_that_do_not_fit() {
    let zeros = |dtype, shape: &[usize]| Tensor::zeros(dtype, shape).unwrap();
    let (floats, ids) = (zeros(DType::F32, &[2, 3]), zeros(DType::I32, &[2, 3]));
    let refuses = |from: &Tensor, mut to: Tensor, expected: ProblemError, word: &str| {
        assert_error("accumulate", AccumulateArgs::new(from.view(), to.view_mut()), &expected, &[word]);
    };
    let dtype = |tensor, got| ProblemError::UnsupportedDType { tensor, expected: "f32, f16 or bf16".into(), got };
    refuses(&ids, zeros(DType::I32, &[2, 3]), dtype("source", DType::I32), "source");
    refuses(&floats, zeros(DType::Bool, &[2, 3]), dtype("destination", DType::Bool), "destination");
    let shape = ProblemError::Shape { tensor: "destination", dimension: "dimension 0", expected: 2, got: 1 };
    refuses(&floats, zeros(DType::BF16, &[1, 3]), shape, "destination");
    let same = aliased(&floats, Layout::new(&[2, 3], &[3, 1], 0).unwrap());
    let expected = ProblemError::Overlap { output: "destination", other: "source" };
    assert_error("itself", AccumulateArgs::new(floats.view(), same), &expected, &["destination", "source"]);
}

#[test]
fn rotations_that_do_not_fit() {
    let zeros = |dtype, shape: &[usize]| Tensor::zeros(dtype, shape).unwrap();
    let source = zeros(DType::F16, &[1, 2, 3, 4, 600]);
    let spec = RopeSpec::new(8, RopePairs::Halves);
    let refuses = |spec: &RopeSpec, mut to: Tensor, expected: ProblemError, word: &str| {
        assert_error("rope", RopeArgs::new(spec, source.view(), to.view_mut()), &expected, &[word]);
    };
    let fitting = || zeros(DType::F16, &[1, 2, 3, 4, 600]);
    let tensor = "destination";
    let dtype = ProblemError::UnsupportedDType { tensor, expected: "f16, as the source's".into(), got: DType::F32 };
    refuses(&spec, zeros(DType::F32, &[1, 2, 3, 4, 600]), dtype, tensor);
    refuses(&spec, zeros(DType::F16, &[6, 4, 600]), ProblemError::Rank { tensor, expected: 5, got: 3 }, tensor);
    let shape = ProblemError::Shape { tensor, dimension: "heads", expected: 4, got: 3 };
    refuses(&spec, zeros(DType::F16, &[1, 2, 3, 3, 600]), shape, "heads");
    for rotary_dim in [0, 7, 602] {
        let (parameter, expected) = ("rotary_dim", "an even number from 2 to head_dim = 600".to_owned());
        let error = ProblemError::Parameter { parameter, expected, got: rotary_dim.to_string() };
        refuses(&RopeSpec { rotary_dim, ..spec.clone() }, fitting(), error, "rotary_dim");
    }
    let limit = ProblemError::Limit { what: "rotary_dim", limit: 256, got: 600 };
    refuses(&RopeSpec { rotary_dim: 600, ..spec.clone() }, fitting(), limit, "rotary_dim");
    for (base, position_scale, parameter) in [
        (0.5, 1.0, "base"),
        (f64::NAN, 1.0, "base"),
        (1e4, 0.0, "position_scale"),
        (1e4, f64::INFINITY, "position_scale"),
    ] {
        let mut to = fitting();
        let spec = RopeSpec { base, position_scale, ..spec.clone() };
        let error = RopeArgs::new(&spec, source.view(), to.view_mut()).unwrap_err();
        assert!(matches!(&error, ProblemError::Parameter { parameter: named, .. } if *named == parameter), "{error}");
    }
    let in_place = aliased(&source, source.layout().clone());
    let expected = ProblemError::Overlap { output: tensor, other: "source" };
    assert_error("in place", RopeArgs::new(&spec, source.view(), in_place), &expected, &[tensor, "source"]);
}

#[test]
fn relayouts_that_do_not_fit() {
    let zeros = |dtype, shape: &[usize]| Tensor::zeros(dtype, shape).unwrap();
    let tensor = "destination";
    let refuses = |from: &Tensor, mut to: Tensor, expected: ProblemError| {
        assert_error("relayout", RelayoutArgs::new(from.view(), to.view_mut()), &expected, &[tensor]);
    };
    let (floats, ids) = (zeros(DType::F32, &[2, 3]), zeros(DType::I32, &[2, 3]));
    let dtype = |expected: &str, got| ProblemError::UnsupportedDType { tensor, expected: expected.into(), got };
    refuses(&floats, zeros(DType::Bool, &[2, 3]), dtype("f32, f16 or bf16", DType::Bool));
    refuses(&ids, zeros(DType::F32, &[2, 3]), dtype("i32", DType::F32));
    refuses(&floats, zeros(DType::F32, &[6]), ProblemError::Rank { tensor, expected: 2, got: 1 });
    let shape = ProblemError::Shape { tensor, dimension: "dimension 1", expected: 3, got: 4 };
    refuses(&floats, zeros(DType::F32, &[2, 4]), shape);

    let turned = aliased(&floats, Layout::new(&[3, 2], &[1, 3], 0).unwrap());
    let source = floats.view().permute(&[1, 0]).unwrap();
    let expected = ProblemError::Overlap { output: tensor, other: "source" };
    assert_error("in place", RelayoutArgs::new(source, turned), &expected, &[tensor, "source"]);
    let zero_strides = aliased(&ids, Layout::new(&[2, 3], &[0, 1], 0).unwrap());
    let expected = ProblemError::SelfOverlap { tensor, strides: vec![0, 1] };
    let source = zeros(DType::I32, &[2, 3]);
    assert_error("stride 0", RelayoutArgs::new(source.view(), zero_strides), &expected, &[tensor]);
}
