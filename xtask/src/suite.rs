//! `cargo xtask test`: the steps, in the order in which a mistake shows soonest.

use std::env;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use tilefold_emulator_nvrtc::Release;

use crate::clang::Clang;
use crate::command::{artifacts, output, run};
use crate::report::{Count, Report};
use crate::virtual_gpu::with_virtual_gpu;
use crate::{cuda, files, hosts, kernels, licences, mpi, setup, vulkan, wgsl};

/// Runs everything; with `quick` what takes long is left out. Whether all passed.
pub(crate) fn run_suite(quick: bool) -> bool {
    let mut report = Report::new();
    let result = steps(&mut report, quick);
    if let Err(error) = &result {
        println!();
        error.chain().for_each(|cause| println!("{cause}"));
    }
    println!("\n{}", report.summary());
    result.is_ok()
}

fn steps(report: &mut Report, quick: bool) -> Result<()> {
    let in_ci = env::var_os("CI").is_some_and(|value| value == "true");
    ensure!(!(quick && in_ci), "--quick leaves out checks, and CI=true asks for all; leave --quick out");
    report.step("toolchain: rustfmt and clippy", setup::toolchain)?;
    report.step("files: length, stubs, ignored tests", files::check)?;
    report.step("licences and sources of all dependencies", licences::check)?;
    report.step("formatting", || cargo(&["fmt", "--all", "--check"]))?;
    gpu_compilers(report)?;
    if vulkan::SUPPORTED {
        report.step("Vulkan driver", vulkan::driver)?;
    }
    // Before anything is built with all features: one of them links it.
    report.step("MPI libraries", mpi::install)?;
    let features = feature_combinations(&facade_features()?);
    let (all, others) = features.split_last().context("no combination of features")?;
    lints(report, &[all, mpi::FEATURE].join(","))?;
    tests(report)?;
    examples(report)?;
    if !quick {
        processes(report)?;
        virtual_gpu(report)?;
        wgpu(report)?;
        kernels(report)?;
        for features in others {
            lints(report, features)?;
            unit_tests(report, features)?;
        }
        documentation(report)?;
        demo(report)?;
        let archs = archs()?;
        other_archs(report, &archs)?;
        emulated_archs(report, &archs, in_ci)?;
    }
    Ok(())
}

/// What the tests of the kernels compile with, fetched where it is missing.
fn gpu_compilers(report: &mut Report) -> Result<()> {
    if !cuda::SUPPORTED {
        println!("\nleft out: the kernels are compiled and run by the virtual device on x86-64 Linux only");
        return Ok(());
    }
    report.step("CUDA compilers and disassemblers", cuda::fetch)?;
    report.step("clang for AMD", || Clang::get().map(|_| Count::one()))
}

fn cargo(arguments: &[&str]) -> Result<Count> {
    run(&[], &[&["cargo"], arguments].concat())
}

/// Ranks as processes of the MPI library that the tests of all crates are not built with, and on two hosts.
fn processes(report: &mut Report) -> Result<()> {
    for library in mpi::others() {
        report.step(&format!("ranks as processes of {}", library.name), || library.test())?;
    }
    if !hosts::are_possible() {
        println!("\nleft out: ranks on two hosts, which take the right to make network namespaces");
        return Ok(());
    }
    report.step("ranks as processes on two hosts", mpi::test_on_hosts)
}

/// Conformance through the CUDA backend on the virtual GPU; with the oldest compiler all features at once.
fn virtual_gpu(report: &mut Report) -> Result<()> {
    if !cuda::SUPPORTED {
        return Ok(());
    }
    for (release, what, filter) in [(Release::Newest, "", ""), (Release::Oldest, ", NVRTC 12.0", "bf16/everything")] {
        report.step(&format!("conformance on the virtual GPU{what}"), || {
            let test =
                ["cargo", "test", "--workspace", "--all-features", "--test", CONFORMANCE, "--", filter, "--quiet"];
            with_virtual_gpu(release, &test)
        })?;
    }
    Ok(())
}

/// Conformance through the wgpu backend with subgroups of other sizes, and on a second driver.
fn wgpu(report: &mut Report) -> Result<()> {
    if !vulkan::SUPPORTED {
        println!("\nleft out: other Vulkan drivers than the machine's own are tried on x86-64 Linux only");
        return Ok(());
    }
    let conformance = |chosen| {
        let test = ["cargo", "test", "--workspace", "--all-features", "--test", CONFORMANCE, "--", "--quiet"];
        [&test[..], &[chosen, "--skip", "determinism", "--skip", "sharded"]].concat()
    };
    let test = conformance("");
    let widths = ["128", "512"];
    report.step("conformance on wgpu, subgroups of 4 and of 16", || vulkan::at_widths(&widths, &test))?;
    // In f32, with either kind of products: its compiler takes minutes for half types with strided rows.
    let test = conformance("32/everything");
    report.step("conformance on wgpu, SwiftShader", || vulkan::on_swiftshader(&test))?;
    let both = ["cargo", "test", "--workspace", "--all-features", "--test", "devices", "--", "all_devices", "--quiet"];
    report.step("shaders, compiled by Tint", wgsl::check)?;
    report.step("two wgpu devices at once", || vulkan::on_both(&both))
}

/// The kernels without a GPU: what the compilers make of them, and what that costs by the static instrument.
fn kernels(report: &mut Report) -> Result<()> {
    if !cuda::SUPPORTED {
        return Ok(());
    }
    report.step("tests of the static instrument", || {
        setup::programs(&[("python3", "python3")])?;
        run(&[], &["python3", "-m", "unittest", "discover", "-s", "benches/static/tests"])
    })?;
    report.step("kernels: registers, spills, instructions, cost", kernels::quick)
}

/// Every target of every crate.
fn lints(report: &mut Report, features: &str) -> Result<()> {
    report.step(&format!("lints, features: {}", named(features)), || {
        let features = format!("--features={features}");
        cargo(&["clippy", "--workspace", "--all-targets", &features, "--", "--deny", "warnings"])
    })
}

/// Unit tests, conformance, doctests: all crates at once, with all features.
fn tests(report: &mut Report) -> Result<()> {
    report.step("tests and doctests of all crates", || {
        let required = if vulkan::SUPPORTED { (REQUIRED.0, "cpu,wgpu") } else { REQUIRED };
        run(&[required], &["cargo", "test", "--workspace", "--all-features", "--", "--quiet"])
    })
}

/// A device that is not there makes conformance fail.
const REQUIRED: (&str, &str) = ("TILEFOLD_REQUIRE", "cpu");

/// Conformance holds this device alone to the reference.
const CPU: (&str, &str) = ("TILEFOLD_DEVICE", "cpu");

/// Unit tests of the crate whose features they are, with fewer of them.
///
/// Built with the workspace: built alone, its dependencies would have other features, and be built again.
fn unit_tests(report: &mut Report, features: &str) -> Result<()> {
    report.step(&format!("unit tests, features: {}", named(features)), || {
        let tests = test_executable(&["--lib", &format!("--features={features}")], "tilefold")?;
        run(&[], &[&tests, "--quiet"])
    })
}

fn named(features: &str) -> &str {
    if features.is_empty() { "none" } else { features }
}

/// The examples, in order; those of the library on a device with memory of its own, too.
fn examples(report: &mut Report) -> Result<()> {
    let mut examples = Vec::new();
    report.step("building the examples", || {
        examples = executables(&["build", "--workspace", "--all-features", "--examples"])?;
        ensure!(!examples.is_empty(), "cargo built no example");
        Ok(Count::one())
    })?;
    examples.sort();
    for (name, executable) in examples {
        report.step(&format!("example {name}"), || run(&[], &[&executable]))?;
        if vulkan::SUPPORTED && name.starts_with(|first: char| first.is_ascii_digit()) {
            report
                .step(&format!("example {name} on wgpu"), || run(&[("TILEFOLD_DEVICE", "wgpu:0")], &[&executable]))?;
        }
    }
    Ok(())
}

fn documentation(report: &mut Report) -> Result<()> {
    report.step("documentation", || {
        let doc = ["cargo", "doc", "--workspace", "--no-deps", "--all-features"];
        run(&[("RUSTDOCFLAGS", "--deny warnings")], &doc)
    })
}

/// The README's first command, in the profile it asks for, without the size that needs gigabytes.
fn demo(report: &mut Report) -> Result<()> {
    let folder = Path::new("target").join("xtask");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let folder = folder.to_str().context("a folder whose name is no text")?;
    report.step("the demo", || cargo(&["run", "--release", "--", "demo", "--no-paper-size", "--out", folder]))
}

/// The test target that holds each device against the reference.
const CONFORMANCE: &str = "conformance";

/// Conformance on the instruction sets of this machine that the tests did not choose by themselves.
fn other_archs(report: &mut Report, archs: &[Arch]) -> Result<()> {
    for arch in archs.iter().filter(|arch| arch.available && !arch.selected) {
        report.step(&format!("conformance on {}", arch.name), || {
            // Ranks move and split work alike, whatever the instructions: once is enough.
            let test = ["cargo", "test", "--workspace", "--all-features", "--test", CONFORMANCE, "--"];
            let test = [&test[..], &["--quiet", "--skip", "sharded"]].concat();
            run(&[REQUIRED, CPU, ("TILEFOLD_CPU_ARCH", &arch.name)], &test)
        })?;
    }
    Ok(())
}

/// The part of conformance that is run where each instruction is emulated: every feature at once, in every dtype.
const EMULATED: &str = "everything";

/// The package with the instruction sets, and its tests of each operation against plain arithmetic.
const BACKEND: &str = "tilefold-backend-cpu";
const OPERATIONS: &str = "arch::tests";

/// Conformance on the instruction sets this machine lacks.
fn emulated_archs(report: &mut Report, archs: &[Arch], in_ci: bool) -> Result<()> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) && !in_ci {
        println!("\nleft out: instruction sets this machine lacks are emulated on x86-64 Debian only");
        return Ok(());
    }
    let lacks = |name: &str| archs.iter().any(|arch| arch.name == name && !arch.available);
    let emulate = |kind: &str, arch: &str, arguments: &[&str]| {
        let command = [&["cargo", "xtask", "emulate", kind], arguments, &["--quiet", "--color=never"]].concat();
        run(&[REQUIRED, CPU, ("TILEFOLD_CPU_ARCH", arch)], &command)
    };
    // Other numbers of workers, and ranks, share out the same work, whatever the instructions.
    let without_twins = ["--skip", "determinism", "--skip", "sharded"];
    if lacks("neon") {
        // Both packages in both steps: what they depend on is built once.
        let packages = ["--", "--package", BACKEND, "--package", "tilefold-conformance"];
        report.step("operations of neon, emulated", || {
            emulate("neon", "neon", &[&packages[..], &["--lib", "--", OPERATIONS]].concat())
        })?;
        report.step("conformance on neon, emulated", || {
            let chosen = ["--test", CONFORMANCE, "--", EMULATED];
            emulate("neon", "neon", &[&packages[..], &chosen, &without_twins].concat())
        })?;
    }
    let lacking: Vec<_> = ["avx512", "avx512bf16"].into_iter().filter(|name| lacks(name)).collect();
    if !lacking.is_empty() {
        report.step("tools for the emulator of avx512", || {
            setup::programs(&[("g++", "g++"), ("make", "make"), ("tar", "tar"), ("xz", "xz-utils")])
        })?;
        report.step("operations of avx512 and avx512bf16, emulated", || {
            let tests = test_executable(&["--all-features", "--lib"], &BACKEND.replace('-', "_"))?;
            emulate("avx512", "avx512", &[&tests, "--", OPERATIONS])
        })?;
    }
    for arch in lacking {
        report.step(&format!("conformance on {arch}, emulated"), || {
            let tests = test_executable(&["--all-features", "--test", CONFORMANCE], CONFORMANCE)?;
            // In the other dtypes the two compute alike.
            let chosen = if arch == "avx512bf16" { format!("bf16/{EMULATED}") } else { EMULATED.to_owned() };
            emulate("avx512", arch, &[&[&*tests, "--", &*chosen], &without_twins[..]].concat())
        })?;
    }
    Ok(())
}

/// The file that a test target of the workspace is run as, built as for the tests of all crates.
fn test_executable(chosen: &[&str], name: &str) -> Result<String> {
    let built = executables(&[&["test", "--workspace", "--no-run"], chosen].concat())?;
    match built.into_iter().find(|(target, _)| target == name) {
        Some((_, executable)) => Ok(executable),
        None => bail!("cargo built no test target {name}"),
    }
}

/// Names and files of what a cargo command builds; asked of cargo with the features of the tests, nothing is built again.
fn executables(arguments: &[&str]) -> Result<Vec<(String, String)>> {
    let built = artifacts(arguments)?.into_iter();
    Ok(built.filter_map(|artifact| Some((artifact.target.name, artifact.executable?))).collect())
}

#[derive(Deserialize)]
struct Doctor {
    cpu: Cpu,
}

#[derive(Deserialize)]
struct Cpu {
    simd: Vec<Arch>,
}

#[derive(Deserialize)]
struct Arch {
    name: String,
    available: bool,
    selected: bool,
}

/// Instruction sets by the program's own word.
fn archs() -> Result<Vec<Arch>> {
    let doctor = output(&["cargo", "run", "--release", "--quiet", "--", "doctor", "--json"])?;
    let doctor: Doctor = serde_json::from_slice(&doctor).context("cannot read what tilefold doctor prints")?;
    ensure!(doctor.cpu.simd.iter().any(|arch| arch.selected), "tilefold doctor selected no instruction set");
    Ok(doctor.cpu.simd)
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    features: std::collections::BTreeMap<String, Vec<String>>,
}

/// Features of the crate `tilefold`, without `default`.
fn facade_features() -> Result<Vec<String>> {
    let metadata = output(&["cargo", "metadata", "--format-version", "1", "--no-deps"])?;
    let metadata: Metadata = serde_json::from_slice(&metadata).context("cannot read what cargo metadata prints")?;
    let facade = metadata.packages.into_iter().find(|package| package.name == "tilefold");
    let features = facade.context("there is no package tilefold")?.features.into_keys();
    Ok(features.filter(|feature| feature != "default").collect())
}

/// None, each alone, and all together.
fn feature_combinations(features: &[String]) -> Vec<String> {
    let mut combinations = vec![String::new()];
    combinations.extend(features.iter().map(|feature| format!("tilefold/{feature}")));
    if features.len() > 1 {
        combinations.push(combinations[1..].join(","));
    }
    combinations
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feature_combinations_are_none_each_and_all() {
        let features = ["a", "b"].map(String::from);
        assert_eq!(feature_combinations(&features), ["", "tilefold/a", "tilefold/b", "tilefold/a,tilefold/b"]);
        assert_eq!(feature_combinations(&features[..1]), ["", "tilefold/a"]);
    }
}
