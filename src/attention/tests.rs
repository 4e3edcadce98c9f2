//! What the facade adds: inferred sizes, allocated outputs, errors, and a backend of the caller's own.

use std::sync::Arc;

use super::*;
use crate::{CpuBackend, DeviceKind};

const SHAPE: [usize; 5] = [1, 2, 3, 2, 4];

fn ramp(dtype: DType, shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f64> = (0..count).map(|i| f64::from(u32::try_from(i % 11).unwrap()) / 8.0 - 0.5).collect();
    Tensor::from_f64(&values, dtype, shape).unwrap()
}

fn problem_error(result: Result<impl std::fmt::Debug, Error>) -> String {
    match result.unwrap_err() {
        Error::Problem(error) => error.to_string(),
        other => panic!("expected a ProblemError, got {other:?}"),
    }
}

#[test]
fn sizes_come_from_the_shapes() {
    let (q, k, v) = (
        ramp(DType::BF16, &[2, 3, 5, 6, 8]),
        ramp(DType::BF16, &[2, 3, 7, 2, 8]),
        ramp(DType::BF16, &[2, 3, 7, 2, 16]),
    );
    let (bias, mask) = (ramp(DType::F32, &[1, 3, 1, 5, 7]), ramp(DType::Bool, &[1, 1, 7]));
    let mut inputs = Inputs::new(q.view(), k.view(), v.view());
    inputs.biases.push(bias.view());
    inputs.key_mask = Some(mask.view());
    let problem = problem(&inputs, &Options::default(), all_gradients(&inputs)).unwrap();
    assert_eq!(problem.logits_shape(), [2, 3, 6, 5, 7]);
    assert_eq!((problem.out_shape(), problem.k_shape()), ([2, 3, 5, 6, 16], [2, 3, 7, 2, 8]));
    assert!(problem.spec().key_mask && !problem.spec().segments && !problem.spec().gate);
    assert_eq!(problem.spec().gradients.biases, [true, false, false, false]);

    let device = Device::cpu().unwrap();
    let forward = attention(&device, &inputs, &Options::default()).unwrap();
    assert_eq!((forward.out.dtype(), forward.out.shape()), (DType::BF16, [2, 3, 5, 6, 16].as_slice()));
    assert_eq!((forward.lse.dtype(), forward.lse.shape()), (DType::F32, [2, 3, 6, 5].as_slice()));
    let gradients = all_gradients(&inputs);
    let backward =
        attention_backward(&device, &inputs, &Options::default(), &forward, &forward.out.view(), gradients).unwrap();
    let dbias = backward.dbiases[0].as_ref().unwrap();
    assert_eq!((dbias.dtype(), dbias.shape()), (DType::F32, [1, 3, 1, 5, 7].as_slice()));
    assert_eq!(backward.dk.unwrap().shape(), k.shape());
    assert!(backward.d_gate.is_none());
}

#[test]
fn mistakes_are_problem_errors_that_name_the_tensor() {
    let device = Device::cpu().unwrap();
    let (x, flat) = (ramp(DType::F32, &SHAPE), ramp(DType::F32, &[2, 3, 2, 4]));
    let (wide, half) = (ramp(DType::F32, &[2, 2, 3, 2, 4]), ramp(DType::F16, &SHAPE));
    let (bias, ids) = (ramp(DType::F32, &[1, 1, 2, 3, 2]), ramp(DType::I32, &[1, 1, 3]));
    let plain = || Inputs::new(x.view(), x.view(), x.view());
    let run = |inputs: Inputs<'_>| problem_error(attention(&device, &inputs, &Options::default()));
    for (inputs, expected) in [
        (Inputs::new(flat.view(), x.view(), x.view()), "q: expected 5 dimensions, got 4"),
        (Inputs::new(x.view(), flat.view(), x.view()), "k: expected 5 dimensions, got 4"),
        (Inputs::new(x.view(), x.view(), flat.view()), "v: expected 5 dimensions, got 4"),
        (Inputs::new(x.view(), wide.view(), x.view()), "k: batch must be 1, got 2"),
        (Inputs::new(x.view(), x.view(), half.view()), "v: dtype must be f32, got f16"),
        (Inputs { biases: vec![flat.view()], ..plain() }, "bias0: expected 5 dimensions, got 4"),
        (Inputs { biases: vec![bias.view()], ..plain() }, "bias0: seqlen_k must be 1 or 3 to broadcast, got 2"),
        (Inputs { biases: vec![bias.view(); 5], ..plain() }, "biases: at most 4 supported, got 5"),
        (Inputs { key_mask: Some(ids.view()), ..plain() }, "key_mask: dtype must be bool, got i32"),
        (
            Inputs { q_segments: Some(ids.view()), ..plain() },
            "k_segments: expected a tensor, got none; the plan was made with it",
        ),
        (Inputs { gate: Some(wide.view()), ..plain() }, "gate: batch must be 1, got 2"),
    ] {
        assert_eq!(run(inputs), expected);
    }
    let options = Options { softmax_scale: Some(f64::NAN), ..Options::default() };
    assert!(problem_error(attention(&device, &plain(), &options)).starts_with("softmax_scale: "));
    let options = Options { kv_lengths: Some(vec![4]), ..Options::default() };
    assert!(problem_error(attention(&device, &plain(), &options)).starts_with("kv_lengths[0]: "));
    let options = Options { products: Products::Tf32, ..Options::default() };
    let halves = Inputs::new(half.view(), half.view(), half.view());
    assert!(
        problem_error(attention(&device, &halves, &options)).starts_with("products: tf32 is for dtype f32, got f16")
    );
}

#[test]
fn backward_refuses_what_does_not_belong() {
    let (device, options) = (Device::cpu().unwrap(), Options::default());
    let (x, wide) = (ramp(DType::F32, &SHAPE), ramp(DType::F32, &[2, 2, 3, 2, 4]));
    let inputs = Inputs::new(x.view(), x.view(), x.view());
    let forward = attention(&device, &inputs, &options).unwrap();
    let back = |d_out: &Tensor, forward: &Forward, gradients| {
        problem_error(attention_backward(&device, &inputs, &options, forward, &d_out.view(), gradients))
    };
    let gate = Gradients { gate: true, ..Gradients::default() };
    assert!(back(&x, &forward, gate).starts_with("d_gate: expected none"));
    let bias = Gradients { biases: [false, true, false, false], ..Gradients::default() };
    assert!(back(&x, &forward, bias).starts_with("dbias1: expected none"));
    assert_eq!(back(&wide, &forward, all_gradients(&inputs)), "d_out: batch must be 1, got 2");
    let other = attention(&device, &Inputs::new(wide.view(), wide.view(), wide.view()), &options).unwrap();
    assert_eq!(back(&x, &other, all_gradients(&inputs)), "out: batch must be 1, got 2");
}

#[test]
fn outputs_may_be_strided_but_not_shared() {
    let device = Device::cpu().unwrap();
    let x = ramp(DType::F32, &SHAPE);
    let inputs = Inputs::new(x.view(), x.view(), x.view());
    let expected = attention(&device, &inputs, &Options::default()).unwrap().out.to_f64();
    let plan = device.plan_attention(&problem(&inputs, &Options::default(), Gradients::default()).unwrap()).unwrap();
    let mut turned = Tensor::zeros(DType::F32, &[4, 2, 3, 2, 1]).unwrap();
    let out = turned.view_mut().permute(&[4, 3, 2, 1, 0]).unwrap();
    attention_into(&device, &plan, inputs.forward_operands(out, None, None)).unwrap();
    assert_eq!(turned.view().permute(&[4, 3, 2, 1, 0]).unwrap().to_f64(), expected);

    let mut data = vec![0.0_f32; 48];
    let layout = crate::Layout::new(&SHAPE, &[0, 0, 8, 4, 1], 0).unwrap();
    let shared = TensorViewMut::from_slice_with_layout(&mut data, layout).unwrap();
    let refused = attention_into(&device, &plan, inputs.forward_operands(shared, None, None));
    assert!(problem_error(refused).starts_with("out: an output's elements must not overlap"));
}

#[test]
fn a_plan_of_another_device_is_refused() {
    let device = Device::cpu().unwrap();
    let x = ramp(DType::F32, &SHAPE);
    let inputs = Inputs::new(x.view(), x.view(), x.view());
    let mut plan =
        device.plan_attention(&problem(&inputs, &Options::default(), Gradients::default()).unwrap()).unwrap();
    plan.device = DeviceId { kind: DeviceKind::Cuda, ordinal: 1 };
    let mut out = Tensor::zeros(DType::F32, &SHAPE).unwrap();
    let error = attention_into(&device, &plan, inputs.forward_operands(out.view_mut(), None, None)).unwrap_err();
    assert_eq!(error.to_string(), "plan belongs to cuda:1, not to cpu");
}

#[test]
fn a_backend_of_the_callers_own_is_a_device() {
    let x = ramp(DType::F32, &SHAPE);
    let inputs = Inputs::new(x.view(), x.view(), x.view());
    let custom = Device::Custom(Arc::new(CpuBackend::new().unwrap()));
    let (cpu, options) = (Device::cpu().unwrap(), Options::default());
    let ours = attention(&cpu, &inputs, &options).unwrap();
    assert_eq!(attention(&custom, &inputs, &options).unwrap().out.to_f64(), ours.out.to_f64());
    let stream = custom.stream().unwrap();
    let event = custom.record(&stream).unwrap();
    custom.wait(&stream, &event).unwrap();
    let mut storage = custom.alloc(&stream, 4).unwrap();
    custom.upload(&stream, &[1, 2, 3, 4], &mut storage).unwrap();
    let mut back = [0_u8; 4];
    custom.download(&stream, &storage, &mut back).unwrap();
    assert_eq!(back, [1, 2, 3, 4]);
    let mut filled = custom.zeros(DType::F16, &[2]).unwrap();
    custom.fill(&stream, filled.view_mut(), 1.5).unwrap();
    assert_eq!(filled.to_f64(), Ok(vec![1.5, 1.5]));
}
