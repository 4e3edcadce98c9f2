//! A device that goes away: in a process of its own, since all backends of a device share it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a panic here is a failed test, which lints see only in the usual harness"
)]

mod harness;

use std::process::ExitCode;

use tilefold_backend_wgpu::WgpuBackend;
use tilefold_core::{Backend, DType, DeviceError, Layout, RelayoutArgs, Tensor};

fn main() -> ExitCode {
    harness::run(&[("a_lost_device_is_an_error_of_every_call", lost)])
}

fn lost() {
    let device = WgpuBackend::new(0).unwrap();
    let stream = device.stream().unwrap();
    let tensor = || {
        let layout = Layout::contiguous(&[1 << 20]).unwrap();
        Tensor::new(device.alloc(&stream, 4 << 20).unwrap(), DType::F32, layout).unwrap()
    };
    let (mut source, mut destination) = (tensor(), tensor());
    let mut unused = device.alloc(&stream, 64).unwrap();
    for _ in 0..20 {
        device.fill(&stream, source.view_mut(), 1.0).unwrap();
        let args = RelayoutArgs::new(source.view(), destination.view_mut()).unwrap();
        device.relayout(&stream, args).unwrap();
    }
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

    // Opened again it is another device, which works and knows nothing of the old one's memory.
    let again = WgpuBackend::new(0).unwrap();
    let fresh = again.stream().unwrap();
    assert!(again.alloc(&fresh, 64).is_ok());
    assert!(matches!(again.upload(&fresh, &[1; 64], &mut unused), Err(DeviceError::Unsupported { .. })));
    assert!(matches!(again.synchronize(&stream), Err(DeviceError::Unsupported { .. })));
}
