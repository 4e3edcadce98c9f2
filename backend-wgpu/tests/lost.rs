//! A device that goes away: in a process of its own, since all backends of a device share it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic here is a failed test, which lints see only in the usual harness"
)]

mod harness;

use std::process::ExitCode;

use tilefold_backend_wgpu::{WgpuBackend, WgpuOptions};
use tilefold_core::{
    AccumulateArgs, AttentionProblem, AttentionSpec, Backend, BackwardArgs, BackwardOperands, DType, DeviceError,
    ForwardArgs, ForwardOperands, Layout, MergeArgs, MergeOperands, RelayoutArgs, RopeArgs, RopePairs, RopeSpec,
    Tensor,
};

fn main() -> ExitCode {
    harness::run(&[
        ("a_lost_device_is_an_error_of_every_call", lost),
        ("a_device_that_is_lost_while_a_thread_waits", lost_while_waiting),
    ])
}

fn lost() {
    let device = WgpuBackend::new(0).unwrap();
    let stream = device.stream().unwrap();
    let tensor = || {
        let layout = Layout::contiguous(&[1 << 20]).unwrap();
        Tensor::new(device.alloc(&stream, 4 << 20).unwrap(), DType::F32, layout).unwrap()
    };
    let (mut source, mut destination) = (tensor(), tensor());
    let of = |shape: &[usize]| {
        let layout = Layout::contiguous(shape).unwrap();
        Tensor::new(device.alloc(&stream, layout.len() * 4).unwrap(), DType::F32, layout).unwrap()
    };
    let mut heads = [(); 2].map(|()| of(&[1, 1, 16, 2, 8]));
    let mut sums = [(); 3].map(|()| of(&[1, 1, 2, 16]));
    let mut spec = AttentionSpec::new(DType::F32, 1, 1, 16, 2, 8);
    spec.gradients.q = true;
    let plan = device.plan_attention(&AttentionProblem::new(spec).unwrap()).unwrap();
    let rope = RopeSpec::new(8, RopePairs::Halves);
    let mut unused = device.alloc(&stream, 64).unwrap();
    for _ in 0..20 {
        device.fill(&stream, source.view_mut(), 1.0).unwrap();
        let args = RelayoutArgs::new(source.view(), destination.view_mut()).unwrap();
        device.relayout(&stream, args).unwrap();
    }
    let event = device.record(&stream).unwrap();
    // In the middle of what was enqueued.
    device.raw_device().destroy();
    let is_lost =
        |result: Result<(), DeviceError>| assert!(matches!(result, Err(DeviceError::Lost { .. })), "{result:?}");
    is_lost(device.synchronize(&stream));
    is_lost(device.alloc(&stream, 64).map(drop));
    is_lost(device.upload(&stream, &[1; 64], &mut unused));
    is_lost(device.download(&stream, &unused, &mut [0; 64]));
    is_lost(device.fill(&stream, source.view_mut(), 1.0));
    let args = RelayoutArgs::new(source.view(), destination.view_mut()).unwrap();
    is_lost(device.relayout(&stream, args));
    is_lost(device.accumulate(&stream, AccumulateArgs::new(source.view(), destination.view_mut()).unwrap()));
    is_lost(device.record(&stream).map(drop));
    is_lost(device.wait(&stream, &event));
    is_lost(device.timed(&stream, &mut || ()).map(drop));
    let [q, acc_out] = &mut heads;
    is_lost(device.rope(&stream, RopeArgs::new(&rope, q.view(), acc_out.view_mut()).unwrap()));
    let [lse, acc_lse, acc_lse_low] = &mut sums;
    let (out, acc_out, [acc_lse, acc_lse_low]) =
        (q.view(), acc_out.view_mut(), [acc_lse, acc_lse_low].map(Tensor::view_mut));
    let operands = MergeOperands { out, lse: lse.view(), lse_low: lse.view(), acc_out, acc_lse, acc_lse_low };
    is_lost(device.merge(&stream, MergeArgs::new(operands).unwrap()));
    let [q, out] = &mut heads;
    let [lse, ..] = &mut sums;
    #[rustfmt::skip]
    let operands = ForwardOperands {
        q: q.view(), k: q.view(), v: q.view(), biases: Vec::new(), key_mask: None, q_segments: None, k_segments: None, gate: None,
        out: out.view_mut(), lse: Some(lse.view_mut()), lse_low: None,
    };
    is_lost(device.attention_forward(&stream, ForwardArgs::new(&plan, operands).unwrap()));
    let [q, dq] = &mut heads;
    #[rustfmt::skip]
    let operands = BackwardOperands {
        q: q.view(), k: q.view(), v: q.view(), biases: Vec::new(), key_mask: None, q_segments: None, k_segments: None, gate: None,
        out: q.view(), lse: lse.view(), lse_low: lse.view(), d_out: q.view(),
        dq: Some(dq.view_mut()), dk: None, dv: None, dbiases: Vec::new(), d_gate: None,
    };
    is_lost(device.attention_backward(&stream, BackwardArgs::new(&plan, operands).unwrap()));

    // Opened again it is another device, which works and knows nothing of the old one's memory.
    let again = WgpuBackend::new(0).unwrap();
    let fresh = again.stream().unwrap();
    assert!(again.alloc(&fresh, 64).is_ok());
    assert!(matches!(again.upload(&fresh, &[1; 64], &mut unused), Err(DeviceError::Unsupported { .. })));
    assert!(matches!(again.synchronize(&stream), Err(DeviceError::Unsupported { .. })));
}

/// Whoever waits comes back: with what was done before, or with the loss.
fn lost_while_waiting() {
    let device = WgpuBackend::with_options(0, WgpuOptions::default()).unwrap();
    let stream = device.stream().unwrap();
    let layout = Layout::contiguous(&[1 << 22]).unwrap();
    let mut tensor = Tensor::new(device.alloc(&stream, 16 << 20).unwrap(), DType::F32, layout).unwrap();
    for _ in 0..60 {
        device.fill(&stream, tensor.view_mut(), 1.0).unwrap();
    }
    let waited = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| device.synchronize(&stream));
        std::thread::sleep(std::time::Duration::from_millis(20));
        device.raw_device().destroy();
        waiting.join().unwrap()
    });
    assert!(matches!(waited, Ok(()) | Err(DeviceError::Lost { .. })), "{waited:?}");
    assert!(matches!(device.synchronize(&stream), Err(DeviceError::Lost { .. })));
}
