//! Kernels on a device: compiled, loaded, kept; and the one launch.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_uint, c_void};
use std::ptr::{null_mut, without_provenance_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{CUfunction, CUfunction_attribute, CUjit_option, CUmodule, CUresult};
use tilefold_core::{DeviceError, DeviceResult};
use tilefold_kernels::params::Params;
use tilefold_kernels::{Kernel, KernelError, Launch};

use crate::cache::{Cache, key};
use crate::context::{Context, ignore};
use crate::device::Limits;
use crate::driver::{self, Driver};
use crate::error::Failure;
use crate::nvrtc::{self, Compiler, Target};
use crate::stream::CudaStream;

/// Room for what the driver says about code it refuses.
const LOG_BYTES: usize = 8192;
/// Dynamic shared memory a kernel has without being asked for more.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// A kernel that is loaded.
#[derive(Clone, Copy, Debug)]
struct Function {
    module: CUmodule,
    raw: CUfunction,
}

// SAFETY: modules and functions may be used from any thread.
unsafe impl Send for Function {}

/// One kernel's place: locked while it is compiled, so that nobody does so twice.
type Slot = Arc<Mutex<Option<Function>>>;

/// The kernels of a context.
#[derive(Debug)]
pub(crate) struct Modules {
    slots: Mutex<HashMap<String, Slot>>,
    cache: Cache,
    /// The driver refused machine code of its own architecture once: a virtual device does.
    refuses_cubins: AtomicBool,
}

impl Default for Modules {
    fn default() -> Self {
        let (slots, refuses_cubins) = (Mutex::default(), AtomicBool::new(false));
        Self { slots, cache: Cache::from_environment(), refuses_cubins }
    }
}

impl Modules {
    /// The kernel, loaded. The context is current.
    fn function(&self, context: &Context, arch: c_int, kernel: &Kernel) -> DeviceResult<CUfunction> {
        let slot = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(slots.entry(kernel.hash.clone()).or_default())
        };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = *slot {
            return Ok(function.raw);
        }
        let module = self.load(context, arch, kernel)?;
        let function = find(context.driver, module, kernel);
        if function.is_err() {
            // SAFETY: loaded above, not used.
            ignore(unsafe { context.driver.cuModuleUnload(module) });
        }
        Ok(slot.insert(function?).raw)
    }

    /// Tries the forms of the kernel that the compiler can make, best first.
    fn load(&self, context: &Context, arch: c_int, kernel: &Kernel) -> DeviceResult<CUmodule> {
        let compiler = Compiler::get(context.driver.version)
            .map_err(|error| DeviceError::Unsupported { limit: error.to_string() })?;
        let mut refusal = None;
        for target in compiler.targets(arch) {
            let is_cubin = matches!(target, Target::Cubin(_));
            if is_cubin && self.refuses_cubins.load(Ordering::Relaxed) {
                continue;
            }
            let parts = [&kernel.hash, &nvrtc::version_name(compiler.version), &target.options().join(" ")];
            let make = || compiler.compile(&kernel.name, &kernel.source, target);
            let image = self.cache.get(&key(&parts.map(String::as_str)), make)?;
            match load_image(context.driver, image, kernel) {
                Ok(module) => return Ok(module),
                Err((failure, _)) if is_cubin && failure.refuses_image() => {
                    tracing::debug!(kernel = kernel.name, status = failure.status, "the driver refuses machine code");
                    self.refuses_cubins.store(true, Ordering::Relaxed);
                }
                Err((failure, log)) => refusal = Some(refused(context.driver, compiler, failure, &log)),
            }
        }
        Err(refusal.unwrap_or_else(|| DeviceError::Unsupported {
            limit: format!(
                "{} does not know sm_{arch} or an older architecture that is supported; install a newer one",
                nvrtc::version_name(compiler.version)
            ),
        }))
    }

    /// Ends every module. The context is current, and nothing runs.
    pub(crate) fn unload(&mut self, driver: &Driver) {
        let slots = self.slots.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (_, slot) in slots.drain() {
            if let Some(function) = slot.lock().unwrap_or_else(PoisonError::into_inner).take() {
                // SAFETY: loaded by `load`, not used again.
                ignore(unsafe { driver.cuModuleUnload(function.module) });
            }
        }
    }
}

/// Hands an image to the driver; with the driver's words when it refuses.
fn load_image(driver: &Driver, mut image: Vec<u8>, kernel: &Kernel) -> Result<CUmodule, (Failure, String)> {
    // PTX is a text that ends in 0, and machine code does not mind one.
    image.push(0);
    let mut log = vec![0_u8; LOG_BYTES];
    let mut options = [CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // A number is passed as the value of a pointer.
    let mut values = [log.as_mut_ptr().cast::<c_void>(), without_provenance_mut(LOG_BYTES)];
    let mut module = null_mut();
    // SAFETY: the image is what the compiler gave for this kernel; the log has the room that is said.
    let loaded = unsafe {
        let image = image.as_ptr().cast();
        driver.cuModuleLoadDataEx(&raw mut module, image, 2, options.as_mut_ptr(), values.as_mut_ptr())
    };
    let log = nvrtc::text_of(&log);
    if !log.is_empty() {
        tracing::debug!(kernel = kernel.name, log, "the driver's log");
    }
    loaded.map(|()| module).map_err(|failure| (failure, log))
}

fn refused(driver: &Driver, compiler: &Compiler, failure: Failure, log: &str) -> DeviceError {
    let DeviceError::Driver { call, status, mut message } = failure.describe(driver) else {
        return failure.describe(driver);
    };
    if failure.is(CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION) {
        message += &format!(
            "; {} is newer than the driver ({}): update the driver, or name an older NVRTC in {}",
            nvrtc::version_name(compiler.version),
            driver::version_name(driver.version),
            nvrtc::NVRTC_VARIABLE
        );
    }
    if !log.is_empty() {
        message += &format!("; {}", log.trim_end());
    }
    DeviceError::Driver { call, status, message }
}

fn find(driver: &Driver, module: CUmodule, kernel: &Kernel) -> DeviceResult<Function> {
    let name = CString::new(kernel.entry)
        .map_err(|_| DeviceError::Unsupported { limit: format!("a kernel named {:?}", kernel.entry) })?;
    let mut raw = null_mut();
    // SAFETY: the module is loaded, the name ends in 0.
    unsafe { driver.cuModuleGetFunction(&raw mut raw, module, name.as_ptr())? };
    if kernel.dynamic_shared_bytes > DEFAULT_SHARED_BYTES {
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = c_int::try_from(kernel.dynamic_shared_bytes).unwrap_or(c_int::MAX);
        // SAFETY: the function is of a loaded module.
        unsafe { driver.cuFuncSetAttribute(raw, attribute, bytes)? };
    }
    Ok(Function { module, raw })
}

/// Enqueues a kernel with its one argument: the launch of this backend.
///
/// # Errors
/// What compiler and driver report.
fn launch(stream: &CudaStream, arch: c_int, kernel: &Kernel, grid_blocks: u32, parameters: &[u8]) -> DeviceResult<()> {
    let context = &*stream.context;
    let _entered = context.enter()?;
    let function = context.modules.function(context, arch, kernel)?;
    let mut argument = parameters.as_ptr().cast_mut().cast::<c_void>();
    let (threads, shared): (c_uint, c_uint) = (kernel.block_threads, kernel.dynamic_shared_bytes);
    let (driver, raw) = (context.driver, stream.raw.0);
    tracing::trace!(kernel = kernel.name, grid_blocks, threads, shared, "launch");
    // SAFETY: the argument is the struct this kernel takes, and the driver copies it; its addresses are the operands',
    // checked by core, whose memory is freed behind this launch.
    unsafe {
        let parameters = &raw mut argument;
        driver.cuLaunchKernel(function, grid_blocks, 1, 1, threads, 1, 1, shared, raw, parameters, null_mut())?;
    }
    Ok(())
}

/// Enqueues a planned launch, in as many parts as the grid asks for.
///
/// # Errors
/// [`DeviceError::Unsupported`] when there is no kernel, and what compiler and driver report.
pub(crate) fn launch_all<P: Params>(
    stream: &CudaStream,
    limits: Limits,
    planned: Result<Launch<P>, KernelError>,
) -> DeviceResult<()> {
    let planned = planned.map_err(unsupported)?;
    for (blocks, params) in planned.parts() {
        launch(stream, limits.arch, &planned.kernel, blocks, bytemuck::bytes_of(&params))?;
    }
    Ok(())
}

/// A limit that the kernels, or numbers, have.
pub(crate) fn unsupported(limit: impl ToString) -> DeviceError {
    DeviceError::Unsupported { limit: limit.to_string() }
}
