//! Copies, fills and merges compile with the newest and the oldest NVRTC; `forward.rs` does it for attention.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tilefold_emulator_nvrtc::{Nvrtc, Release, Target};
use tilefold_kernels::catalogue;

#[test]
fn one_kernel_of_each_entry_compiles_without_a_warning() {
    let mut kernels = catalogue().unwrap();
    kernels.sort_by_key(|kernel| kernel.entry);
    kernels.dedup_by_key(|kernel| kernel.entry);
    assert_eq!(kernels.iter().map(|kernel| kernel.entry).collect::<Vec<_>>(), ["fill", "merge", "relayout"]);
    for release in Release::ALL {
        let nvrtc = Nvrtc::fetched(release).unwrap();
        for kernel in &kernels {
            let compiled = nvrtc.compile(&kernel.source, Target::Ptx("compute_80"), &["--std=c++17"]);
            let compiled = compiled.unwrap_or_else(|error| panic!("{}: {error}", kernel.name));
            assert_eq!(compiled.log, "", "{}", kernel.name);
            assert!(compiled.text().unwrap().contains(&format!(".entry {}(", kernel.entry)), "{}", kernel.name);
        }
    }
}
