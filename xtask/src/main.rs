//! The chores of this workspace: `cargo xtask test` and what it is made of.
#![allow(clippy::print_stdout, reason = "a program says what it does")]

mod clang;
mod command;
mod cuda;
mod emulate;
mod files;
mod hosts;
mod kernels;
mod licences;
mod mpi;
mod report;
mod setup;
mod suite;
mod virtual_gpu;
mod vulkan;
mod wgsl;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use tilefold_emulator_nvrtc::Release;

/// Chores of the tilefold workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Runs everything that is checked: what CI runs
    Test {
        /// Only formatting, lints and tests on this machine's own instruction sets; refused with CI=true
        #[arg(long)]
        quick: bool,
    },
    /// Fetches the GPU compilers that the kernels' tests and checks use, where they are missing
    Setup,
    /// Compiles the GPU kernels and looks at what came out
    #[command(subcommand)]
    Kernels(kernels::Task),
    /// Compiles the shaders of the wgpu backend with a second compiler, Tint
    Tint,
    /// Runs a command with SwiftShader for its Vulkan driver, and `wgpu` for its device
    Swiftshader {
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Runs a command on the virtual GPU: `cargo xtask virtual-gpu cargo run --features cuda -- doctor`
    VirtualGpu {
        /// Compiles kernels with the oldest NVRTC that is supported
        #[arg(long)]
        oldest: bool,
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Runs the tests of ranks in processes with Open MPI, MPICH, and between two hosts
    Processes,
    /// Runs tests on an instruction set that this machine lacks
    #[command(subcommand)]
    Emulate(Emulate),
}

#[derive(Debug, Subcommand)]
enum Emulate {
    /// `cargo test` with these arguments, for 64-bit Arm
    Neon {
        /// What follows `cargo test`
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// A test executable of this machine, on a processor with AVX-512 and BF16
    Avx512 {
        /// The executable
        binary: PathBuf,
        /// Its arguments
        #[arg(last = true)]
        arguments: Vec<String>,
    },
}

fn main() -> Result<ExitCode> {
    let task = Task::parse();
    // Every command runs in the root, wherever this one was started.
    let root = workspace_root()?;
    std::env::set_current_dir(&root).with_context(|| format!("cannot enter {}", root.display()))?;
    match task {
        Task::Test { quick } if !suite::run_suite(quick) => return Ok(ExitCode::FAILURE),
        Task::Test { .. } => {}
        Task::Kernels(task) => kernels::run(&task)?,
        Task::Setup => {
            cuda::fetch()?;
            println!("{}: there", clang::Clang::get()?.name());
        }
        Task::Processes => mpi::run_all()?,
        Task::Tint => {
            wgsl::check()?;
        }
        Task::Swiftshader { command } => {
            vulkan::on_swiftshader(&as_strs(&command))?;
        }
        Task::VirtualGpu { oldest, command } => {
            let release = if oldest { Release::Oldest } else { Release::Newest };
            virtual_gpu::with_virtual_gpu(release, &as_strs(&command))?;
        }
        Task::Emulate(Emulate::Neon { arguments }) => emulate::neon(&as_strs(&arguments))?,
        Task::Emulate(Emulate::Avx512 { binary, arguments }) => emulate::avx512(&binary, &as_strs(&arguments))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn as_strs(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

fn workspace_root() -> Result<PathBuf> {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    own.parent().map(PathBuf::from).context("the xtask package has no folder above it")
}
