//! Kernels compile with the newest and the oldest NVRTC; `cargo xtask kernels check` looks at all of them more closely.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tilefold_emulator_nvrtc::{Nvrtc, Release, Target};
use tilefold_kernels::{catalogue, kernel_files};

#[test]
fn one_kernel_of_each_file_compiles_without_a_warning() {
    let kernels = catalogue().unwrap();
    for release in Release::ALL {
        let nvrtc = Nvrtc::fetched(release).unwrap();
        for file in kernel_files() {
            let entry = file.rsplit('/').next().and_then(|name| name.strip_suffix(".cu")).unwrap();
            let kernel = kernels.iter().find(|kernel| kernel.entry == entry).unwrap_or_else(|| panic!("no {entry}"));
            let compiled = nvrtc.compile(&kernel.source, Target::Ptx("compute_80"), &["--std=c++17"]);
            let compiled = compiled.unwrap_or_else(|error| panic!("{}: {error}", kernel.name));
            assert_eq!(compiled.log, "", "{}", kernel.name);
            assert!(compiled.text().unwrap().contains(&format!(".entry {entry}(")), "{}", kernel.name);
        }
    }
}
