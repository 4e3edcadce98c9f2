//! Kernels compile with the newest and the oldest NVRTC; `cargo xtask kernels check` looks at all of them more closely.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tilefold_emulator_nvrtc::{Nvrtc, Release, Target};
use tilefold_kernels::{Kernel, Vendor, catalogue, kernel_files};

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

#[test]
fn tf32_multiplies_once_where_exact_f32_does_three_times() {
    let kernels = catalogue(Vendor::Nvidia).unwrap();
    let nvrtc = Nvrtc::fetched(Release::Newest).unwrap();
    let multiplications = |kernel: &Kernel| {
        let compiled = nvrtc.compile(&kernel.source, Target::Ptx("compute_80"), &["--std=c++17"]).unwrap();
        compiled.text().unwrap().matches(".f32.tf32.tf32.f32").count()
    };
    // How often tf32 has the products of exact f32: backward once more, on the plain way.
    let copies = [
        ("forward f32 32x32 key_mask", 1),
        ("backward_keys f32 32x32", 2),
        ("backward_queries f32 32x32", 2),
        ("backward_bias f32 32x32", 2),
    ];
    for (name, copies) in copies {
        let exact = kernels.iter().map(|entry| &entry.kernel).find(|kernel| kernel.name.starts_with(name)).unwrap();
        let wanted = exact.name.replace("f32 32x32", "tf32 32x32");
        let rounded = kernels.iter().map(|entry| &entry.kernel).find(|kernel| kernel.name == wanted).unwrap();
        let (exact, rounded) = (multiplications(exact), multiplications(rounded));
        assert!(rounded > 0, "{name}");
        assert_eq!(exact * copies, 3 * rounded, "{name}");
    }
}
