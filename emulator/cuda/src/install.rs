//! A folder for the library path in which the stand-in has the driver's names.

use std::fs;
use std::io;
use std::path::Path;

/// The file name of the library as cargo builds it.
pub const LIBRARY: &str = "libtilefold_emulator_cuda.so";

/// Names a program looks for.
const NAMES: [&str; 2] = ["libcuda.so", "libcuda.so.1"];

/// Makes `folder` one that, first on the library path, replaces the driver by the library at `library`.
///
/// The build folder itself is no such place: cargo puts it on the library path, and every program it starts would run
/// on virtual devices.
///
/// # Errors
/// What the file system reports.
#[cfg(unix)]
pub fn install(library: &Path, folder: &Path) -> io::Result<()> {
    let library = fs::canonicalize(library)?;
    fs::create_dir_all(folder)?;
    for name in NAMES {
        // Complete before it has its name, for processes that start at the same time.
        let (link, new) = (folder.join(name), folder.join(format!("{name}.{}", std::process::id())));
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::os::unix::fs::symlink(&library, &new)?;
        fs::rename(&new, &link)?;
    }
    Ok(())
}
