//! Vulkan drivers for the wgpu backend: Mesa's, which brings one for processors, and SwiftShader, a second implementation.

use std::fs;
use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result, anyhow};

use crate::command::{output, run};
use crate::emulate::apt::{Apt, unpack_files};
use crate::report::Count;
use crate::setup;

/// Whether these checks run here: elsewhere the system's own driver is what there is.
pub(crate) const SUPPORTED: bool = cfg!(all(target_os = "linux", target_arch = "x86_64"));

/// Where drivers say where they are.
const FOLDERS: [&str; 3] = ["/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d"];

/// The start of the name of the file in which Mesa's driver for processors says where it is.
const LAVAPIPE: &str = "lvp_icd";

/// The package that has SwiftShader, and its files there.
const SWIFTSHADER_PACKAGE: &str = "chromium-common";
const SWIFTSHADER_FILES: [&str; 2] =
    ["./usr/lib/chromium/libvk_swiftshader.so", "./usr/lib/chromium/vk_swiftshader_icd.json"];

/// What the Vulkan loader reads: drivers, instead of those that are installed.
const DRIVERS: &str = "VK_DRIVER_FILES";

/// Installs Mesa's driver where it is missing.
pub(crate) fn driver() -> Result<Count> {
    if lavapipe().is_ok() && has_loader() {
        println!("Mesa's Vulkan driver is there");
        return Ok(Count::one());
    }
    setup::packages(&["libvulkan1", "mesa-vulkan-drivers"])?;
    lavapipe().map(|_| Count::one())
}

fn has_loader() -> bool {
    let known = output(&["/sbin/ldconfig", "-p"]).unwrap_or_default();
    String::from_utf8_lossy(&known).contains("libvulkan.so.1")
}

/// The file that names Mesa's driver for processors.
fn lavapipe() -> Result<PathBuf> {
    let files = FOLDERS.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    let is_it = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(LAVAPIPE));
    let found = files.map(|file| file.path()).find(is_it);
    found.with_context(|| format!("no {LAVAPIPE}*.json below {}", FOLDERS.join(", ")))
}

/// The file that names SwiftShader, taken out of Debian's package below `target/`.
fn swiftshader() -> Result<PathBuf> {
    // From the root: to apt a relative path is one below its own folders.
    let target = std::env::current_dir().context("no working folder")?.join("target");
    let folder = target.join("swiftshader");
    let files = SWIFTSHADER_FILES.map(|file| folder.join(file));
    if files.iter().all(|file| file.exists()) {
        return Ok(files[1].clone());
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let apt = Apt::open(&target.join("emulate"))?;
    apt.download(&[SWIFTSHADER_PACKAGE.to_owned()], &folder)?;
    let packages = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let is_package = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
    let package = packages.flatten().map(|file| file.path()).find(is_package).context("apt-get left no package")?;
    unpack_files(&package, &folder, &SWIFTSHADER_FILES)?;
    fs::remove_file(&package).with_context(|| format!("cannot remove {}", package.display()))?;
    Ok(files[1].clone())
}

/// A test on Mesa's driver with vectors of so many bits, which decide how large a subgroup is; at all widths at the same
/// time, since in one process the driver compiles one shader after another.
pub(crate) fn at_widths(bits: &[&str], test: &[&str]) -> Result<Count> {
    let counts: Vec<_> = thread::scope(|scope| {
        let runs: Vec<_> = bits.iter().map(|bits| scope.spawn(|| at_width(bits, test))).collect();
        runs.into_iter().map(thread::ScopedJoinHandle::join).collect()
    });
    let mut all = Count::default();
    for count in counts {
        all += count.map_err(|_| anyhow!("a run at one width panicked"))??;
    }
    Ok(all)
}

/// The driver's cache does not tell code of one width from that of another.
fn at_width(bits: &str, test: &[&str]) -> Result<Count> {
    let drivers = lavapipe()?;
    let drivers = drivers.to_str().context("a path that is no text")?;
    let variables = [REQUIRED, DEVICE, (DRIVERS, drivers), ("LP_NATIVE_VECTOR_WIDTH", bits), NO_CACHE];
    let width = ["cargo", "test", "--workspace", "--all-features", "--test", "devices", "--", "subgroups", "--quiet"];
    let mut count = run(&variables, &width)?;
    count += run(&variables, test)?;
    Ok(count)
}

/// The same on SwiftShader.
pub(crate) fn on_swiftshader(test: &[&str]) -> Result<Count> {
    let drivers = swiftshader()?;
    run(&[REQUIRED, DEVICE, (DRIVERS, drivers.to_str().context("a path that is no text")?)], test)
}

/// A test with both drivers: two devices in one process.
pub(crate) fn on_both(test: &[&str]) -> Result<Count> {
    let drivers = std::env::join_paths([lavapipe()?, swiftshader()?])?;
    run(&[REQUIRED, (DRIVERS, drivers.to_str().context("a path that is no text")?)], test)
}

const REQUIRED: (&str, &str) = ("TILEFOLD_REQUIRE", "wgpu");
const DEVICE: (&str, &str) = ("TILEFOLD_DEVICE", "wgpu");
const NO_CACHE: (&str, &str) = ("MESA_SHADER_CACHE_DISABLE", "true");
