//! What a device does besides attention: memory, streams, plans.

use std::sync::Arc;

use tilefold_core::{AttentionProblem, AttentionSpec, Backend, DType, DeviceError, Storage};

use crate::suite::Trial;

const GROUP: &str = "device";

pub(crate) fn trials(device: &Arc<dyn Backend>) -> Vec<Trial> {
    type Run = fn(&dyn Backend) -> Result<(), String>;
    let list: [(&str, Run); 6] = [
        ("memory_is_zeroed_and_keeps_what_is_written", memory),
        ("allocation_beyond_memory_is_an_error", out_of_memory),
        ("copies_that_do_not_fit_are_errors", copies),
        ("streams_and_events", streams),
        ("workspace_is_linear_in_length", workspace),
        ("plans_of_extreme_sizes", extreme_plans),
    ];
    let trial = |&(name, run): &(&str, Run)| {
        let device = Arc::clone(device);
        Trial::new(GROUP, format!("{GROUP}/{name}"), move || run(&*device).map(|()| 0.0))
    };
    list.iter().map(trial).collect()
}

fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(message()) }
}

fn memory(device: &dyn Backend) -> Result<(), String> {
    let stream = device.stream().map_err(|e| e.to_string())?;
    let read =
        |storage: &Storage, bytes: &mut [u8]| device.download(&stream, storage, bytes).map_err(|e| e.to_string());
    for bytes in [1, 63, 4096, 100_003] {
        let mut storage = device.alloc(&stream, bytes).map_err(|e| e.to_string())?;
        ensure(storage.bytes() >= bytes && storage.device() == device.info().id, || format!("{storage:?}"))?;
        let mut got = vec![1_u8; bytes];
        read(&storage, &mut got)?;
        ensure(got.iter().all(|&byte| byte == 0), || format!("{bytes} bytes are not zeroed"))?;
        let pattern: Vec<u8> = (0..bytes).map(|i| u8::try_from(i % 251).unwrap_or(0)).collect();
        device.upload(&stream, &pattern, &mut storage).map_err(|e| e.to_string())?;
        device.upload(&stream, &[7], &mut storage).map_err(|e| e.to_string())?;
        read(&storage, &mut got)?;
        ensure(got[0] == 7 && got[1..] == pattern[1..], || "an upload writes the front of a storage".to_owned())?;
    }
    Ok(())
}

fn out_of_memory(device: &dyn Backend) -> Result<(), String> {
    let stream = device.stream().map_err(|e| e.to_string())?;
    for bytes in [usize::MAX, usize::MAX / 2, 1 << 60] {
        match device.alloc(&stream, bytes) {
            Err(DeviceError::OutOfMemory { asked, .. }) => {
                ensure(asked >= u64::try_from(bytes).unwrap_or(0), || {
                    format!("asked for {bytes} bytes, said {asked}")
                })?;
            }
            other => return Err(format!("{bytes} bytes: expected an out-of-memory error, got {other:?}")),
        }
    }
    Ok(())
}

fn copies(device: &dyn Backend) -> Result<(), String> {
    let stream = device.stream().map_err(|e| e.to_string())?;
    let mut storage = device.alloc(&stream, 8).map_err(|e| e.to_string())?;
    let size = storage.bytes() + 1;
    let upload = device.upload(&stream, &vec![0; size], &mut storage);
    ensure(matches!(upload, Err(DeviceError::Unsupported { .. })), || format!("upload: {upload:?}"))?;
    let download = device.download(&stream, &storage, &mut vec![0; size]);
    ensure(matches!(download, Err(DeviceError::Unsupported { .. })), || format!("download: {download:?}"))
}

fn streams(device: &dyn Backend) -> Result<(), String> {
    let run = || {
        let (first, second) = (device.stream()?, device.stream()?);
        let event = device.record(&first)?;
        device.wait(&second, &event)?;
        device.synchronize(&second)?;
        device.synchronize(&first)?;
        Ok((first.device(), event.device()))
    };
    let id = device.info().id;
    let devices = run().map_err(|e: DeviceError| e.to_string())?;
    ensure(devices == (id, id), || format!("expected handles of {id}, got {devices:?}"))
}

fn plan(device: &dyn Backend, spec: AttentionSpec) -> Result<tilefold_core::AttentionPlan, String> {
    let problem = AttentionProblem::new(spec).map_err(|e| e.to_string())?;
    let plan = device.plan_attention(&problem).map_err(|e| e.to_string())?;
    ensure(plan.problem == problem && plan.device == device.info().id, || format!("another problem: {plan:?}"))?;
    ensure(plan.tile_q > 0 && plan.tile_k > 0 && plan.deterministic, || format!("{plan:?}"))?;
    Ok(plan)
}

/// Without biases nothing may grow with the square of the length.
fn workspace(device: &dyn Backend) -> Result<(), String> {
    for dtype in crate::case::DTYPES {
        let bytes = |length| {
            let plan = plan(device, AttentionSpec::new(dtype, 1, 4, length, 8, 32).with_all_gradients())?;
            Ok::<_, String>([plan.forward_workspace_bytes, plan.backward_workspace_bytes])
        };
        let (short, long) = (bytes(1 << 10)?, bytes(1 << 14)?);
        for (short, long) in short.into_iter().zip(long) {
            // 16 times the length: 256 times the bytes would be a matrix of logits.
            ensure(long <= 20 * short + (1 << 20), || format!("{dtype}: {short} bytes at 2^10, {long} at 2^14"))?;
        }
    }
    Ok(())
}

/// A plan is arithmetic: sizes no machine holds give a plan or a typed error, and never a panic.
fn extreme_plans(device: &dyn Backend) -> Result<(), String> {
    let sizes =
        [(1, 1, 1 << 24, 1, 256), (1 << 20, 1 << 10, 1, 1, 1), (1, 1 << 20, 1 << 10, 64, 64), (1, 1, 1 << 31, 96, 64)];
    for (batch, rows, length, heads, head_dim) in sizes {
        let spec = AttentionSpec::new(DType::BF16, batch, rows, length, heads, head_dim).with_all_gradients();
        let problem = AttentionProblem::new(spec).map_err(|e| e.to_string())?;
        match device.plan_attention(&problem) {
            Ok(_) | Err(DeviceError::Unsupported { .. } | DeviceError::OutOfMemory { .. }) => {}
            Err(error) => return Err(format!("{batch}x{rows}x{length}x{heads}x{head_dim}: {error}")),
        }
    }
    Ok(())
}
