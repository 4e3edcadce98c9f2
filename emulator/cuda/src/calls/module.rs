//! Modules: PTX is read and checked whole; machine code is refused, as by a device of another architecture.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use tilefold_emulator_ptx::Module;

use super::device::{DEFAULT_SHARED_BYTES, MAX_BLOCK_THREADS, MAX_SHARED_BYTES};
use super::{export, int, put};
use crate::fault::remember;
use crate::handles::Handle;
use crate::status::{Answer, Status};
use crate::system::{Function, Loaded, System};

/// How ELF files, and NVIDIA's containers of code, begin.
const MACHINE_CODE: [[u8; 4]; 2] = [*b"\x7fELF", 0xba55_ed50_u32.to_le_bytes()];
/// Options of loading that are followed, by the driver's numbers.
const ERROR_LOG: c_uint = 5;
const ERROR_LOG_BYTES: c_uint = 6;
/// Attributes of a function that are known, by the driver's numbers.
const MAX_THREADS: c_uint = 0;
const STATIC_SHARED: c_uint = 1;
const LOCAL: c_uint = 3;
const MAX_DYNAMIC_SHARED: c_uint = 8;

/// # Safety
/// `image` is PTX that ends in 0, or begins as machine code does.
unsafe fn load(image: *const c_void) -> Answer<Loaded> {
    let system = System::get()?;
    let device = system.current()?;
    let start: *const u8 = image.cast();
    if start.is_null() {
        return Err(Status::InvalidValue);
    }
    // SAFETY: byte by byte, no further than the 0 that ends a text: no shorter text begins as machine code does.
    let begins = |magic: &[u8; 4]| (0..4).all(|at| unsafe { start.add(at).read() } == magic[at]);
    if MACHINE_CODE.iter().any(begins) {
        return Err(Status::NoBinaryForGpu);
    }
    // SAFETY: the caller's.
    let text = unsafe { CStr::from_ptr(image.cast()) }.to_str().map_err(|_| Status::InvalidImage)?;
    match Module::parse(text) {
        Ok(module) => Ok(Loaded { device, module: Arc::new(module) }),
        Err(error) => {
            remember(Status::InvalidPtx, error.to_string());
            Err(Status::InvalidPtx)
        }
    }
}

fn function(system: &System, handle: Handle) -> Answer<Function> {
    system.functions.get(handle)
}

export! {
    /// Loads PTX.
    fn cuModuleLoadData(module: *mut Handle, image: *const c_void) {
        // SAFETY: the caller's.
        unsafe { put(module, System::get()?.modules.insert(load(image)?)) }
    }

    /// Loads PTX; what is wrong with it goes into the error log.
    fn cuModuleLoadDataEx(
        module: *mut Handle,
        image: *const c_void,
        count: c_uint,
        options: *mut c_uint,
        values: *mut *mut c_void,
    ) {
        // SAFETY: the caller's.
        match unsafe { load(image) } {
            // SAFETY: the caller's.
            Ok(loaded) => unsafe { put(module, System::get()?.modules.insert(loaded)) },
            Err(status) => {
                // SAFETY: the caller's.
                unsafe { write_log(status, count, options, values) };
                Err(status)
            }
        }
    }

    /// Ends a module; its functions go with their last use.
    fn cuModuleUnload(module: Handle) {
        System::get()?.modules.remove(module).map(drop)
    }

    /// A kernel by its name.
    fn cuModuleGetFunction(handle: *mut Handle, module: Handle, name: *const c_char) {
        let system = System::get()?;
        let Loaded { device, module } = system.modules.get(module)?;
        if name.is_null() {
            return Err(Status::InvalidValue);
        }
        // SAFETY: the caller's.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        module.kernel(&name).ok_or(Status::NotFound)?;
        let dynamic_shared_bytes = Arc::new(AtomicI32::new(int(DEFAULT_SHARED_BYTES.into())));
        let new = Function { device, module, name, dynamic_shared_bytes };
        // SAFETY: the caller's.
        unsafe { put(handle, system.functions.insert(new)) }
    }

    /// A global variable by its name.
    fn cuModuleGetGlobal_v2(address: *mut u64, bytes: *mut usize, module: Handle, name: *const c_char) {
        let system = System::get()?;
        let Loaded { device, module } = system.modules.get(module)?;
        if name.is_null() {
            return Err(Status::InvalidValue);
        }
        // SAFETY: the caller's.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        let memory = &system.devices[device].memory;
        let found = memory.variable(&module, &name).map_err(|_| Status::OutOfMemory)?.ok_or(Status::NotFound)?;
        // SAFETY: the caller's.
        unsafe { put(address, found.0).and_then(|()| put(bytes, usize::try_from(found.1).unwrap_or(usize::MAX))) }
    }

    /// What is known about a kernel.
    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_uint, handle: Handle) {
        let function = function(System::get()?, handle)?;
        let kernel = function.module.kernel(&function.name).ok_or(Status::InvalidHandle)?;
        let number = match attribute {
            MAX_THREADS => int(kernel.max_threads.unwrap_or(MAX_BLOCK_THREADS).into()),
            STATIC_SHARED => int(kernel.static_shared_bytes.into()),
            LOCAL => int(kernel.local_bytes.into()),
            MAX_DYNAMIC_SHARED => function.dynamic_shared_bytes.load(Ordering::Relaxed),
            _ => return Err(Status::NotSupported),
        };
        // SAFETY: the caller's.
        unsafe { put(value, number) }
    }

    /// Lets launches ask for more shared memory.
    fn cuFuncSetAttribute(handle: Handle, attribute: c_uint, value: c_int) {
        let function = function(System::get()?, handle)?;
        let kernel = function.module.kernel(&function.name).ok_or(Status::InvalidHandle)?;
        let most = int(MAX_SHARED_BYTES.saturating_sub(kernel.static_shared_bytes).into());
        match attribute {
            MAX_DYNAMIC_SHARED if (0..=most).contains(&value) => {
                function.dynamic_shared_bytes.store(value, Ordering::Relaxed);
                Ok(())
            }
            MAX_DYNAMIC_SHARED => Err(Status::InvalidValue),
            _ => Err(Status::NotSupported),
        }
    }
}

/// Writes the words for a refusal where the options ask for them.
///
/// # Safety
/// There are `count` options and values, and a buffer has the size that is said of it.
unsafe fn write_log(status: Status, count: c_uint, options: *mut c_uint, values: *mut *mut c_void) {
    let (mut buffer, mut room): (*mut u8, usize) = (std::ptr::null_mut(), 0);
    for at in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the caller's.
        let (option, value) = unsafe { (options.add(at).read(), values.add(at).read()) };
        match option {
            ERROR_LOG => buffer = value.cast(),
            ERROR_LOG_BYTES => room = value.addr(),
            _ => {}
        }
    }
    if buffer.is_null() || room == 0 {
        return;
    }
    let text = crate::fault::words(status).to_bytes();
    let length = text.len().min(room - 1);
    // SAFETY: the caller's.
    unsafe {
        buffer.copy_from_nonoverlapping(text.as_ptr(), length);
        buffer.add(length).write(0);
    }
}
