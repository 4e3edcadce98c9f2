//! A kernel for AMD compiled for the host, each lane a fiber: `wave.h` and `launch.h` beside this file.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use libloading::Library;
use tilefold_kernels::params::Params;
use tilefold_kernels::{Kernel, Launch};

/// Releases of clang, those that `cargo xtask setup` looks for.
const COMPILERS: [&str; 6] = ["clang-19", "clang-20", "clang-21", "clang-22", "clang-18", "clang-17"];

const OPTIONS: [&str; 12] = [
    "-xc++",
    "-std=c++17",
    "-O1",
    "-shared",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-ignored-attributes",
    "-Wno-psabi",
    "-Wno-unused-const-variable",
    "-Wno-unused-function",
];

type Run = unsafe extern "C" fn(*const c_void, c_uint, c_int, usize) -> *const c_char;

/// Runs a launch, whose operands are addresses on the host; `params` names the C++ type of its argument.
pub(crate) fn run<P: Params>(launch: &Launch<P>, params: &str) -> Result<(), String> {
    let kernel = &launch.kernel;
    let threads = c_int::try_from(kernel.block_threads).map_err(|error| error.to_string())?;
    let library = compiled(kernel, params)?;
    // A file for each launch: a library has the state of one.
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let file = folder().join(format!("amd-{}-{}.so", kernel.hash, COUNT.fetch_add(1, Relaxed)));
    fs::write(&file, &*library).map_err(|error| error.to_string())?;
    let result = run_library(&file, launch, threads);
    fs::remove_file(&file).map_err(|error| error.to_string())?;
    result
}

fn folder() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn run_library<P: Params>(file: &Path, launch: &Launch<P>, threads: c_int) -> Result<(), String> {
    let kernel = &launch.kernel;
    // SAFETY: the library is ours and runs no code when it is loaded.
    let library = unsafe { Library::new(file) }.map_err(|error| error.to_string())?;
    // SAFETY: `launch.h` declares the function so.
    let function = unsafe { library.get::<Run>(b"tilefold_run\0") }.map_err(|error| error.to_string())?;
    for (blocks, argument) in launch.parts() {
        let argument: *const P = &raw const argument;
        // SAFETY: the argument has the type that the kernel takes, and its operands are alive and as large as it says.
        let wrong = unsafe { function(argument.cast(), blocks, threads, kernel.dynamic_shared_bytes as usize) };
        if !wrong.is_null() {
            // SAFETY: it is one of the library's literals.
            return Err(unsafe { CStr::from_ptr(wrong) }.to_string_lossy().into_owned());
        }
    }
    Ok(())
}

/// The library of a kernel: compiled now, or for an earlier launch.
fn compiled(kernel: &Kernel, params: &str) -> Result<Arc<[u8]>, String> {
    static LIBRARIES: Mutex<BTreeMap<String, Arc<[u8]>>> = Mutex::new(BTreeMap::new());
    if let Some(library) = LIBRARIES.lock().unwrap().get(&kernel.hash) {
        return Ok(Arc::clone(library));
    }
    let library: Arc<[u8]> = compile(kernel, params)?.into();
    LIBRARIES.lock().unwrap().insert(kernel.hash.clone(), Arc::clone(&library));
    Ok(library)
}

fn compile(kernel: &Kernel, params: &str) -> Result<Vec<u8>, String> {
    // Two threads may compile the same.
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let name = format!("amd-{}-source-{}", kernel.hash, COUNT.fetch_add(1, Relaxed));
    let (text_file, library) = (folder().join(format!("{name}.cpp")), folder().join(format!("{name}.so")));
    let (source, entry) = (&kernel.source, kernel.entry);
    let headers = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/amd");
    let text = format!(
        "#include \"wave.h\"\n#line 1 \"kernel\"\n{source}\n#define ENTRY {entry}\n#define PARAMS {params}\n\
         #include \"launch.h\"\n"
    );
    fs::write(&text_file, text).map_err(|error| error.to_string())?;
    let works = |name: &&&str| Command::new(**name).arg("--version").output().is_ok_and(|done| done.status.success());
    let compiler = COMPILERS.iter().find(works).ok_or("there is no clang: `cargo xtask setup` installs it")?;
    let done = Command::new(compiler)
        .args(OPTIONS)
        .arg("-I")
        .arg(headers)
        .arg("-o")
        .args([&library, &text_file])
        .arg("-lm")
        .output()
        .map_err(|error| format!("{compiler}: {error}"))?;
    // What does not compile stays, to be looked at.
    if !done.status.success() {
        return Err(String::from_utf8_lossy(&done.stderr).into_owned());
    }
    let bytes = fs::read(&library).map_err(|error| error.to_string())?;
    [library, text_file].iter().try_for_each(fs::remove_file).map_err(|error| error.to_string())?;
    Ok(bytes)
}
