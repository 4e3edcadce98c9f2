//! Launches: checked as a driver checks them, then executed by the interpreter at once.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::atomic::Ordering;

use tilefold_emulator_ptx::{Fault, FaultKind, Kernel, Launch, run};

use super::device::MAX_BLOCK_THREADS;
use super::{export, put};
use crate::handles::Handle;
use crate::status::{Answer, Status};
use crate::system::{Function, System};

/// Blocks a grid may have along y and z.
const MAX_GRID_YZ: u32 = 65_535;
/// Blocks a grid may have along x.
const MAX_GRID_X: u32 = 0x7fff_ffff;
/// Threads of a multiprocessor of sm_80.
const MULTIPROCESSOR_THREADS: c_int = 2048;

export! {
    /// Runs a kernel. What it does wrong is reported by the next call on the stream.
    fn cuLaunchKernel(
        function: Handle,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        dynamic_shared_bytes: c_uint,
        stream: Handle,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) {
        let system = System::get()?;
        let function = system.functions.get(function)?;
        let stream = system.stream_here(stream)?;
        let kernel = function.module.kernel(&function.name).ok_or(Status::InvalidHandle)?;
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        if function.device != stream.device {
            return Err(Status::InvalidHandle);
        }
        if !extra.is_null() {
            return Err(Status::NotSupported);
        }
        check(&function, kernel, grid, block, dynamic_shared_bytes)?;
        // SAFETY: the caller's.
        let parameters = unsafe { gather(kernel, parameters) }?;
        if system.launch_fails() {
            stream.fail(Status::LaunchFailed, "a failure that the environment asked for".to_owned());
            return Ok(());
        }
        let memory = &system.devices[stream.device].memory;
        let module = &*function.module;
        let launch = Launch { kernel, module, grid, block, dynamic_shared_bytes, parameters: &parameters };
        if let Err(fault) = run(memory, &launch) {
            report(&fault);
            stream.fail(status(&fault), fault.to_string());
        }
        Ok(())
    }

    /// An estimate from threads alone: the interpreter has no registers to run out of.
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut c_int,
        function: Handle,
        block_threads: c_int,
        _dynamic_shared_bytes: usize,
    ) {
        System::get()?.functions.get(function)?;
        if block_threads < 1 {
            return Err(Status::InvalidValue);
        }
        // SAFETY: the caller's.
        unsafe { put(blocks, MULTIPROCESSOR_THREADS / block_threads) }
    }
}

fn check(function: &Function, kernel: &Kernel, grid: [u32; 3], block: [u32; 3], shared: u32) -> Answer {
    let threads = block.into_iter().try_fold(1_u32, u32::checked_mul).unwrap_or(u32::MAX);
    let most = kernel.max_threads.unwrap_or(MAX_BLOCK_THREADS).min(MAX_BLOCK_THREADS);
    let grid_fits = (1..=MAX_GRID_X).contains(&grid[0]) && grid[1..].iter().all(|n| (1..=MAX_GRID_YZ).contains(n));
    let allowed = u32::try_from(function.dynamic_shared_bytes.load(Ordering::Relaxed)).unwrap_or(0);
    if (1..=most).contains(&threads) && grid_fits && shared <= allowed { Ok(()) } else { Err(Status::InvalidValue) }
}

/// Puts the arguments at their places in the block of parameters.
///
/// # Safety
/// There is one valid pointer for each parameter of the kernel.
unsafe fn gather(kernel: &Kernel, arguments: *mut *mut c_void) -> Answer<Vec<u8>> {
    let mut block = vec![0_u8; usize::try_from(kernel.parameter_bytes).unwrap_or(0)];
    for (at, parameter) in kernel.parameters.iter().enumerate() {
        if arguments.is_null() {
            return Err(Status::InvalidValue);
        }
        let (offset, bytes) = (parameter.offset as usize, parameter.bytes as usize);
        let place = block.get_mut(offset..offset + bytes).ok_or(Status::InvalidValue)?;
        // SAFETY: the caller's.
        unsafe { arguments.add(at).read().cast::<u8>().copy_to_nonoverlapping(place.as_mut_ptr(), bytes) };
    }
    Ok(block)
}

fn status(fault: &Fault) -> Status {
    match fault.kind {
        FaultKind::OutOfBounds { .. } => Status::IllegalAddress,
        FaultKind::Misaligned { .. } => Status::MisalignedAddress,
        _ => Status::LaunchFailed,
    }
}

#[allow(clippy::print_stderr, reason = "a driver has no other way to say where a kernel went wrong")]
fn report(fault: &Fault) {
    eprintln!("tilefold virtual GPU: {fault}");
}
