//! The calls of the CUDA driver that the backend makes, looked up in its library once, when the first device is opened.
//!
//! Types and numbers come from cudarc. Its own functions are not called: they panic where a symbol is missing, and give
//! a Rust enum whatever number a newer driver answers with.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUcontext, CUdeviceptr, CUevent, CUfunction, CUmemoryPool, CUmodule, CUstream};
use tilefold_core::OpenError;

use crate::error::Failure;

/// Oldest driver, as `cuDriverGetVersion` counts: CUDA 12.0.
const MIN_VERSION: c_int = 12_000;
/// What to do about an old or missing driver.
const HINT: &str = "install NVIDIA's driver 525 (CUDA 12.0) or newer";
/// The library's usual name, for messages.
#[cfg(not(windows))]
const LIBRARY: &str = "libcuda.so.1";
#[cfg(windows)]
const LIBRARY: &str = "nvcuda.dll";
/// What the stand-in driver of the tests exports, and no other.
const VIRTUAL_SYMBOL: &[u8] = b"tilefold_virtual_gpu";

macro_rules! calls {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {
        #[allow(non_snake_case, reason = "the driver's own names")]
        #[derive(Debug)]
        pub(crate) struct Driver {
            /// As `cuDriverGetVersion` counts.
            pub(crate) version: c_int,
            /// Whether this is the stand-in that executes kernels without hardware.
            pub(crate) is_virtual: bool,
            $($name: unsafe extern "C" fn($($type),*) -> c_int,)*
        }

        impl Driver {
            fn load() -> Result<Self, &'static str> {
                // SAFETY: the caller found that the library is there.
                let library = unsafe { sys::culib() };
                Ok(Self {
                    version: 0,
                    // SAFETY: the address is not used.
                    is_virtual: unsafe { library.get::<*const c_void>(VIRTUAL_SYMBOL) }.is_ok(),
                    // SAFETY: the signature is that of the driver's header.
                    $($name: *unsafe { library.get(stringify!($name).as_bytes()) }.map_err(|_| stringify!($name))?,)*
                })
            }

            $(
                /// The driver's call of this name.
                #[allow(non_snake_case, clippy::too_many_arguments, reason = "the driver's own names and arguments")]
                pub(crate) unsafe fn $name(&self, $($argument: $type),*) -> Result<(), Failure> {
                    // SAFETY: the caller's.
                    Failure::check(stringify!($name), unsafe { (self.$name)($($argument),*) })
                }
            )*
        }
    };
}

calls! {
    cuInit(flags: c_uint);
    cuDriverGetVersion(version: *mut c_int);
    cuGetErrorName(status: c_int, text: *mut *const c_char);
    cuGetErrorString(status: c_int, text: *mut *const c_char);
    cuDeviceGetCount(count: *mut c_int);
    cuDeviceGet(device: *mut c_int, ordinal: c_int);
    cuDeviceGetName(name: *mut c_char, bytes: c_int, device: c_int);
    cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int);
    cuDeviceGetAttribute(value: *mut c_int, attribute: sys::CUdevice_attribute, device: c_int);
    cuDevicePrimaryCtxRetain(context: *mut CUcontext, device: c_int);
    cuDevicePrimaryCtxRelease_v2(device: c_int);
    cuCtxPushCurrent_v2(context: CUcontext);
    cuCtxPopCurrent_v2(context: *mut CUcontext);
    cuCtxGetDevice(device: *mut c_int);
    cuMemPoolCreate(pool: *mut CUmemoryPool, properties: *const sys::CUmemPoolProps);
    cuMemPoolDestroy(pool: CUmemoryPool);
    cuMemPoolSetAttribute(pool: CUmemoryPool, attribute: sys::CUmemPool_attribute, value: *mut c_void);
    cuMemPoolTrimTo(pool: CUmemoryPool, bytes: usize);
    cuMemAllocFromPoolAsync(address: *mut CUdeviceptr, bytes: usize, pool: CUmemoryPool, stream: CUstream);
    cuMemFreeAsync(address: CUdeviceptr, stream: CUstream);
    cuMemAlloc_v2(address: *mut CUdeviceptr, bytes: usize);
    cuMemFree_v2(address: CUdeviceptr);
    cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    cuMemcpyHtoDAsync_v2(to: CUdeviceptr, from: *const c_void, bytes: usize, stream: CUstream);
    cuMemcpyDtoHAsync_v2(to: *mut c_void, from: CUdeviceptr, bytes: usize, stream: CUstream);
    cuMemsetD8Async(address: CUdeviceptr, value: u8, count: usize, stream: CUstream);
    cuPointerGetAttribute(value: *mut c_void, attribute: sys::CUpointer_attribute, address: CUdeviceptr);
    cuStreamCreate(stream: *mut CUstream, flags: c_uint);
    cuStreamDestroy_v2(stream: CUstream);
    cuStreamSynchronize(stream: CUstream);
    cuStreamQuery(stream: CUstream);
    cuStreamWaitEvent(stream: CUstream, event: CUevent, flags: c_uint);
    cuStreamGetCtx(stream: CUstream, context: *mut CUcontext);
    cuEventCreate(event: *mut CUevent, flags: c_uint);
    cuEventRecord(event: CUevent, stream: CUstream);
    cuEventQuery(event: CUevent);
    cuEventDestroy_v2(event: CUevent);
    cuModuleLoadDataEx(
        module: *mut CUmodule,
        image: *const c_void,
        count: c_uint,
        options: *mut sys::CUjit_option,
        values: *mut *mut c_void
    );
    cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char);
    cuModuleUnload(module: CUmodule);
    cuFuncSetAttribute(function: CUfunction, attribute: sys::CUfunction_attribute, value: c_int);
    cuLaunchKernel(
        function: CUfunction,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        dynamic_shared_bytes: c_uint,
        stream: CUstream,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void
    );
}

impl Driver {
    /// The driver of this process, initialised.
    ///
    /// # Errors
    /// [`OpenError::NoDriver`], [`OpenError::TooOld`], or what `cuInit` reports.
    pub(crate) fn get() -> Result<&'static Self, OpenError> {
        static DRIVER: OnceLock<Result<Driver, OpenError>> = OnceLock::new();
        DRIVER.get_or_init(Self::start).as_ref().map_err(OpenError::clone)
    }

    fn start() -> Result<Self, OpenError> {
        // SAFETY: loads the driver's library, whose initialisers do what loading any driver does.
        if !unsafe { sys::is_culib_present() } {
            return Err(OpenError::NoDriver { library: LIBRARY.to_owned(), hint: HINT.to_owned() });
        }
        let mut driver = Self::load().map_err(|symbol| OpenError::TooOld {
            what: LIBRARY.to_owned(),
            found: format!("one without {symbol}"),
            needed: version_name(MIN_VERSION),
            hint: HINT.to_owned(),
        })?;
        let mut version = 0;
        // SAFETY: the pointer is valid; this call needs no cuInit.
        unsafe { driver.cuDriverGetVersion(&raw mut version) }.map_err(|failure| failure.describe(&driver))?;
        driver.version = version;
        if version < MIN_VERSION {
            return Err(OpenError::TooOld {
                what: LIBRARY.to_owned(),
                found: version_name(version),
                needed: version_name(MIN_VERSION),
                hint: HINT.to_owned(),
            });
        }
        // SAFETY: the only flag that exists.
        match unsafe { driver.cuInit(0) } {
            // A driver without a GPU is still a driver: the number of devices is 0.
            Err(failure) if failure.status == sys::CUresult::CUDA_ERROR_NO_DEVICE as c_int => Ok(driver),
            Err(failure) => Err(failure.describe(&driver).into()),
            Ok(()) => Ok(driver),
        }
    }

    /// What the driver calls a status, and its words for it.
    pub(crate) fn message(&self, status: c_int) -> String {
        let text = |call: &dyn Fn(*mut *const c_char) -> Result<(), Failure>| {
            let mut text = std::ptr::null();
            let known = call(&raw mut text).is_ok() && !text.is_null();
            // SAFETY: the driver gave a text that ends in 0 and lives as long as the library.
            known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        // SAFETY: any number may be asked about.
        let name = text(&|text| unsafe { self.cuGetErrorName(status, text) });
        // SAFETY: as above.
        let words = text(&|text| unsafe { self.cuGetErrorString(status, text) });
        match (name, words) {
            (Some(name), Some(words)) => format!("{name}: {words}"),
            (Some(text), None) | (None, Some(text)) => text,
            (None, None) => "a status this driver has no words for".to_owned(),
        }
    }
}

/// `CUDA 12.4` of 12040.
pub(crate) fn version_name(version: c_int) -> String {
    format!("CUDA {}.{}", version / 1000, version % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_written_as_nvidia_does() {
        assert_eq!((version_name(12_000), version_name(13_050)), ("CUDA 12.0".into(), "CUDA 13.5".into()));
    }
}
