//! NVRTC, the run-time compiler: found, loaded, and one call from source to machine code or PTX.
//!
//! cudarc's own loader takes no path and panics without the library; the few calls needed are looked up here.

use std::ffi::{CStr, CString, OsStr, c_char, c_int};
use std::path::PathBuf;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

use libloading::Library;
use tilefold_core::{DeviceError, DeviceResult, OpenError};

/// The environment variable with the path of NVRTC's library, where it is not on the library path.
pub const NVRTC_VARIABLE: &str = "TILEFOLD_NVRTC";

/// Names the library has, by the CUDA version of the driver: a compiler not newer than the driver writes PTX it can read.
#[cfg(not(windows))]
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
#[cfg(windows)]
const NAMES: [&str; 3] = ["nvrtc64_130_0.dll", "nvrtc64_120_0.dll", "nvrtc.dll"];

/// Oldest version the kernels are compiled with in tests.
const MIN_VERSION: (c_int, c_int) = (12, 0);
/// What to do when there is none.
const HINT: &str = "`pip install nvidia-cuda-nvrtc`, or install the CUDA toolkit, and put the library's folder on the \
library path or its path into TILEFOLD_NVRTC";

/// A program being compiled.
type Program = *mut std::ffi::c_void;

macro_rules! calls {
    ($($name:ident($($type:ty),*);)*) => {
        #[allow(non_snake_case, reason = "NVRTC's own names")]
        #[derive(Debug)]
        struct Calls { $($name: unsafe extern "C" fn($($type),*) -> c_int,)* }

        impl Calls {
            fn load(library: &Library) -> Result<Self, &'static str> {
                Ok(Self {
                    // SAFETY: the signature is that of NVRTC's header.
                    $($name: *unsafe { library.get(stringify!($name).as_bytes()) }.map_err(|_| stringify!($name))?,)*
                })
            }
        }
    };
}
calls! {
    nvrtcVersion(*mut c_int, *mut c_int);
    nvrtcGetNumSupportedArchs(*mut c_int);
    nvrtcGetSupportedArchs(*mut c_int);
    nvrtcCreateProgram(*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char);
    nvrtcCompileProgram(Program, c_int, *const *const c_char);
    nvrtcGetProgramLogSize(Program, *mut usize);
    nvrtcGetProgramLog(Program, *mut c_char);
    nvrtcGetCUBINSize(Program, *mut usize);
    nvrtcGetCUBIN(Program, *mut c_char);
    nvrtcGetPTXSize(Program, *mut usize);
    nvrtcGetPTX(Program, *mut c_char);
    nvrtcDestroyProgram(*mut Program);
}

/// The compiler.
#[derive(Debug)]
pub(crate) struct Compiler {
    calls: Calls,
    /// Major and minor.
    pub(crate) version: (c_int, c_int),
    /// Architectures it knows, as 80 for sm_80, rising.
    archs: Vec<c_int>,
    /// Keeps the calls loaded.
    _library: Library,
}

/// What a kernel becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Machine code of one architecture.
    Cubin(c_int),
    /// Text that the driver compiles for any architecture from this one on.
    Ptx(c_int),
}

impl Compiler {
    /// The compiler of this process.
    ///
    /// # Errors
    /// [`OpenError::NoDriver`], [`OpenError::TooOld`], [`OpenError::BadSetting`].
    pub(crate) fn get(driver_version: c_int) -> Result<&'static Self, OpenError> {
        static COMPILER: OnceLock<Result<Compiler, OpenError>> = OnceLock::new();
        let setting = std::env::var_os(NVRTC_VARIABLE).filter(|value| !value.is_empty());
        let start = || Self::start(setting.as_deref(), driver_version);
        COMPILER.get_or_init(start).as_ref().map_err(OpenError::clone)
    }

    fn start(setting: Option<&OsStr>, driver_version: c_int) -> Result<Self, OpenError> {
        let (library, name) = open(setting, driver_version)?;
        let too_old = |found| OpenError::TooOld {
            what: name.clone(),
            found,
            needed: version_name(MIN_VERSION),
            hint: HINT.to_owned(),
        };
        let calls = Calls::load(&library).map_err(|symbol| too_old(format!("one without {symbol}")))?;
        let (mut major, mut minor, mut count) = (0, 0, 0);
        // SAFETY: all pointers are valid.
        check("nvrtcVersion", unsafe { (calls.nvrtcVersion)(&raw mut major, &raw mut minor) })?;
        if (major, minor) < MIN_VERSION {
            return Err(too_old(version_name((major, minor))));
        }
        // SAFETY: as above.
        check("nvrtcGetNumSupportedArchs", unsafe { (calls.nvrtcGetNumSupportedArchs)(&raw mut count) })?;
        let mut archs = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: room for as many as it said.
        check("nvrtcGetSupportedArchs", unsafe { (calls.nvrtcGetSupportedArchs)(archs.as_mut_ptr()) })?;
        archs.sort_unstable();
        Ok(Self { calls, version: (major, minor), archs, _library: library })
    }

    /// The forms of a kernel worth trying on a device, best first.
    pub(crate) fn targets(&self, arch: c_int) -> Vec<Target> {
        let cubin = self.archs.contains(&arch).then_some(Target::Cubin(arch));
        let ptx = self.archs.iter().rev().find(|&&known| known <= arch).map(|&known| Target::Ptx(known));
        cubin.into_iter().chain(ptx).collect()
    }

    /// Compiles a self-contained source.
    ///
    /// # Errors
    /// [`DeviceError::Driver`] with the compiler's log.
    pub(crate) fn compile(&self, name: &str, source: &str, target: Target) -> DeviceResult<Vec<u8>> {
        let (source, name) = (c_string(source)?, c_string(name)?);
        let options: Vec<_> = target.options().into_iter().map(|option| c_string(&option)).collect::<Result<_, _>>()?;
        let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = null_mut();
        // SAFETY: texts end in 0; no headers are named.
        let created = unsafe {
            (self.calls.nvrtcCreateProgram)(&raw mut program, source.as_ptr(), name.as_ptr(), 0, null(), null())
        };
        check("nvrtcCreateProgram", created)?;
        let result = self.compile_program(program, &options, target);
        // SAFETY: created above, not used again.
        let _ = unsafe { (self.calls.nvrtcDestroyProgram)(&raw mut program) };
        result
    }

    fn compile_program(&self, program: Program, options: &[*const c_char], target: Target) -> DeviceResult<Vec<u8>> {
        let count = c_int::try_from(options.len()).unwrap_or(c_int::MAX);
        // SAFETY: the program lives; the options are texts that end in 0.
        let status = unsafe { (self.calls.nvrtcCompileProgram)(program, count, options.as_ptr()) };
        if status != 0 {
            let log = read(program, self.calls.nvrtcGetProgramLogSize, self.calls.nvrtcGetProgramLog, "log");
            let message = String::from_utf8_lossy(&log?).trim_end_matches(['\0', '\n']).to_owned();
            return Err(DeviceError::Driver { call: "nvrtcCompileProgram", status: status.into(), message });
        }
        match target {
            Target::Cubin(_) => read(program, self.calls.nvrtcGetCUBINSize, self.calls.nvrtcGetCUBIN, "nvrtcGetCUBIN"),
            Target::Ptx(_) => read(program, self.calls.nvrtcGetPTXSize, self.calls.nvrtcGetPTX, "nvrtcGetPTX"),
        }
    }
}

impl Target {
    /// What the compiler is told.
    pub(crate) fn options(self) -> Vec<String> {
        let arch = match self {
            Self::Cubin(arch) => format!("sm_{arch}"),
            Self::Ptx(arch) => format!("compute_{arch}"),
        };
        vec![format!("--gpu-architecture={arch}"), "--std=c++17".to_owned()]
    }
}

type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Read = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

fn read(program: Program, size: Size, read: Read, call: &'static str) -> DeviceResult<Vec<u8>> {
    let mut bytes = 0;
    // SAFETY: the program lives; the pointer is valid.
    check(call, unsafe { size(program, &raw mut bytes) })?;
    let mut data = vec![0_u8; bytes];
    // SAFETY: room for as many bytes as it said.
    check(call, unsafe { read(program, data.as_mut_ptr().cast()) })?;
    Ok(data)
}

fn check(call: &'static str, status: c_int) -> DeviceResult<()> {
    let message = || "the run-time compiler failed; install another version of NVRTC".to_owned();
    if status == 0 { Ok(()) } else { Err(DeviceError::Driver { call, status: status.into(), message: message() }) }
}

fn c_string(text: &str) -> DeviceResult<CString> {
    CString::new(text).map_err(|_| DeviceError::Unsupported { limit: "a kernel source with a zero byte".to_owned() })
}

/// The library the setting names, or the first of its usual names.
fn open(setting: Option<&OsStr>, driver_version: c_int) -> Result<(Library, String), OpenError> {
    if let Some(path) = setting {
        let shown = PathBuf::from(path).display().to_string();
        // SAFETY: loads the compiler's library, whose initialisers do nothing but set it up.
        let library = unsafe { Library::new(path) };
        return library.map(|library| (library, shown.clone())).map_err(|error| {
            let expected = format!("the path of NVRTC's library ({error})");
            OpenError::BadSetting { variable: NVRTC_VARIABLE, value: shown, expected }
        });
    }
    let mut names = NAMES;
    if driver_version < 13_000 {
        names.swap(0, 1);
    }
    // SAFETY: as above.
    let found = names.into_iter().find_map(|name| unsafe { Library::new(name) }.ok().map(|library| (library, name)));
    found
        .map(|(library, name)| (library, name.to_owned()))
        .ok_or_else(|| OpenError::NoDriver { library: format!("NVRTC ({})", names.join(", ")), hint: HINT.to_owned() })
}

/// `NVRTC 12.0`.
pub(crate) fn version_name((major, minor): (c_int, c_int)) -> String {
    format!("NVRTC {major}.{minor}")
}

/// Text of the compiler, which ends in 0.
pub(crate) fn text_of(bytes: &[u8]) -> String {
    CStr::from_bytes_until_nul(bytes).map_or_else(|_| String::new(), |text| text.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_is_no_library_is_a_bad_setting() {
        let error = open(Some(OsStr::new("/nowhere/libnvrtc.so")), 13_000).unwrap_err();
        assert!(matches!(&error, OpenError::BadSetting { variable: NVRTC_VARIABLE, .. }), "{error}");
    }

    #[test]
    fn options_name_the_form() {
        assert_eq!(Target::Cubin(80).options(), ["--gpu-architecture=sm_80", "--std=c++17"]);
        assert_eq!(Target::Ptx(90).options(), ["--gpu-architecture=compute_90", "--std=c++17"]);
    }
}
