//! The library and its one use: source text in, PTX or a cubin out.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;

use libloading::Library;

use crate::{NvrtcError, Release};

type Program = *mut c_void;
type Status = c_int;

const SUCCESS: Status = 0;
const COMPILATION: Status = 6;

/// What to compile for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// PTX for a virtual architecture such as `compute_80`.
    Ptx(&'a str),
    /// Machine code for an architecture such as `sm_80`.
    Cubin(&'a str),
}

impl Target<'_> {
    fn name(&self) -> &str {
        match self {
            Self::Ptx(name) | Self::Cubin(name) => name,
        }
    }
}

/// What a compilation gave.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// PTX text without the NUL at its end, or a cubin.
    pub code: Vec<u8>,
    /// Warnings and, with `--ptxas-options=-v`, registers and spills. Often empty.
    pub log: String,
}

impl Compiled {
    /// The code as text.
    ///
    /// # Errors
    /// [`NvrtcError::NotText`] for a cubin.
    pub fn text(&self) -> Result<&str, NvrtcError> {
        str::from_utf8(&self.code).map_err(|_| NvrtcError::NotText)
    }
}

/// A loaded NVRTC. Loading takes a while: keep it. Several versions may be loaded at once.
#[derive(Debug)]
pub struct Nvrtc {
    calls: Calls,
    version: (u32, u32),
}

impl Nvrtc {
    /// Loads a release that `cargo xtask setup` has fetched.
    ///
    /// # Errors
    /// [`NvrtcError::NotFetched`] and those of [`Self::load`].
    pub fn fetched(release: Release) -> Result<Self, NvrtcError> {
        let path = release.library();
        if path.is_file() { Self::load(&path) } else { Err(NvrtcError::NotFetched { path }) }
    }

    /// Loads the library at a path; its `libnvrtc-builtins` must lie beside it.
    ///
    /// # Errors
    /// [`NvrtcError::Load`], and [`NvrtcError::Call`] when it does not tell its version.
    pub fn load(path: &Path) -> Result<Self, NvrtcError> {
        let calls = Calls::load(path).map_err(|source| NvrtcError::Load { path: path.to_owned(), source })?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two integers to write to.
        calls.check("nvrtcVersion", unsafe { (calls.version)(&raw mut major, &raw mut minor) })?;
        Ok(Self { calls, version: (major.unsigned_abs(), minor.unsigned_abs()) })
    }

    /// The compiler's version, such as `(13, 5)`.
    #[must_use]
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Compiles one self-contained source.
    ///
    /// `options` come beside `--gpu-architecture`, which `target` sets.
    ///
    /// # Errors
    /// [`NvrtcError::Refused`] with the compiler's log, [`NvrtcError::Nul`], [`NvrtcError::Call`].
    pub fn compile(&self, source: &str, target: Target<'_>, options: &[&str]) -> Result<Compiled, NvrtcError> {
        let source = CString::new(source).map_err(|_| NvrtcError::Nul { what: "source" })?;
        let architecture = format!("--gpu-architecture={}", target.name());
        let options = std::iter::once(architecture.as_str()).chain(options.iter().copied());
        let options: Vec<CString> = options
            .map(|option| CString::new(option).map_err(|_| NvrtcError::Nul { what: "option" }))
            .collect::<Result<_, _>>()?;
        let program = self.create(&source)?;
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let count = c_int::try_from(pointers.len()).unwrap_or(c_int::MAX);
        // SAFETY: a live program, and `count` strings that outlive the call.
        let status = unsafe { (self.calls.compile)(program.handle, count, pointers.as_ptr()) };
        let log = program.read("nvrtcGetProgramLog", self.calls.log_size, self.calls.log)?;
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim_end().to_owned();
        if status == COMPILATION {
            return Err(NvrtcError::Refused { version: self.version, target: target.name().to_owned(), log });
        }
        self.calls.check("nvrtcCompileProgram", status)?;
        let code = match target {
            Target::Ptx(_) => {
                let mut text = program.read("nvrtcGetPTX", self.calls.ptx_size, self.calls.ptx)?;
                text.truncate(text.iter().position(|&byte| byte == 0).unwrap_or(text.len()));
                text
            }
            Target::Cubin(_) => program.read("nvrtcGetCUBIN", self.calls.cubin_size, self.calls.cubin)?,
        };
        Ok(Compiled { code, log })
    }

    fn create(&self, source: &CStr) -> Result<OpenProgram<'_>, NvrtcError> {
        let mut handle = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: the source outlives the call, which copies it; there are no headers.
        let status =
            unsafe { (self.calls.create)(&raw mut handle, source.as_ptr(), c"kernel.cu".as_ptr(), 0, none, none) };
        self.calls.check("nvrtcCreateProgram", status)?;
        Ok(OpenProgram { calls: &self.calls, handle })
    }
}

/// A program of NVRTC, destroyed when dropped.
struct OpenProgram<'a> {
    calls: &'a Calls,
    handle: Program,
}

impl OpenProgram<'_> {
    /// One of NVRTC's pairs of "how many bytes" and "copy them".
    fn read(&self, call: &'static str, size: SizeCall, copy: CopyCall) -> Result<Vec<u8>, NvrtcError> {
        let mut bytes = 0;
        // SAFETY: a live program and a number to write to.
        self.calls.check(call, unsafe { size(self.handle, &raw mut bytes) })?;
        let mut buffer = vec![0_u8; bytes];
        // SAFETY: as many bytes as NVRTC asked for.
        self.calls.check(call, unsafe { copy(self.handle, buffer.as_mut_ptr().cast()) })?;
        Ok(buffer)
    }
}

impl Drop for OpenProgram<'_> {
    fn drop(&mut self) {
        // SAFETY: created by NVRTC and destroyed once; a failure would leave nothing to do.
        let _ = unsafe { (self.calls.destroy)(&raw mut self.handle) };
    }
}

type SizeCall = unsafe extern "C" fn(Program, *mut usize) -> Status;
type CopyCall = unsafe extern "C" fn(Program, *mut c_char) -> Status;
type CreateCall = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> Status;

/// The functions of `nvrtc.h` that are used.
#[derive(Debug)]
struct Calls {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status,
    create: CreateCall,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    log_size: SizeCall,
    log: CopyCall,
    ptx_size: SizeCall,
    ptx: CopyCall,
    cubin_size: SizeCall,
    cubin: CopyCall,
    message: unsafe extern "C" fn(Status) -> *const c_char,
    /// Keeps the functions above where they are.
    _library: Library,
}

impl Calls {
    fn load(path: &Path) -> Result<Self, libloading::Error> {
        // SAFETY: NVRTC's initialisers have no preconditions.
        let library = unsafe { Library::new(path) }?;
        // SAFETY: the types are those of nvrtc.h, the same from CUDA 12.0 to 13.
        unsafe {
            Ok(Self {
                version: *library.get(b"nvrtcVersion")?,
                create: *library.get(b"nvrtcCreateProgram")?,
                compile: *library.get(b"nvrtcCompileProgram")?,
                destroy: *library.get(b"nvrtcDestroyProgram")?,
                log_size: *library.get(b"nvrtcGetProgramLogSize")?,
                log: *library.get(b"nvrtcGetProgramLog")?,
                ptx_size: *library.get(b"nvrtcGetPTXSize")?,
                ptx: *library.get(b"nvrtcGetPTX")?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize")?,
                cubin: *library.get(b"nvrtcGetCUBIN")?,
                message: *library.get(b"nvrtcGetErrorString")?,
                _library: library,
            })
        }
    }

    fn check(&self, call: &'static str, status: Status) -> Result<(), NvrtcError> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: takes any number.
        let text = unsafe { (self.message)(status) };
        let message = if text.is_null() {
            String::new()
        } else {
            // SAFETY: a constant of the library, which is loaded.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        Err(NvrtcError::Call { call, status, message })
    }
}
