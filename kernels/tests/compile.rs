//! Kernels compile with the newest and the oldest NVRTC; `cargo xtask kernels check` looks at all of them more closely.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tilefold_emulator_nvrtc::{Nvrtc, Release, Target};
use tilefold_kernels::{Vendor, catalogue, kernel_files};

#[test]
fn one_kernel_of_each_file_compiles_without_a_warning() {
    let kernels = catalogue(Vendor::Nvidia).unwrap();
    for release in Release::ALL {
        let nvrtc = Nvrtc::fetched(release).unwrap();
        for file in kernel_files() {
            let path = file.strip_suffix(".cu").unwrap();
            let (whole, stem) = (path.replace('/', "_"), path.rsplit('/').next().unwrap());
            let of_file = |entry: &str| entry == whole || entry == stem;
            let found = kernels.iter().map(|each| &each.kernel).find(|kernel| of_file(kernel.entry));
            let kernel = found.unwrap_or_else(|| panic!("no kernel of {file}"));
            let compiled = nvrtc.compile(&kernel.source, Target::Ptx("compute_80"), &["--std=c++17"]);
            let compiled = compiled.unwrap_or_else(|error| panic!("{}: {error}", kernel.name));
            assert_eq!(compiled.log, "", "{}", kernel.name);
            assert!(compiled.text().unwrap().contains(&format!(".entry {}(", kernel.entry)), "{}", kernel.name);
        }
    }
}
