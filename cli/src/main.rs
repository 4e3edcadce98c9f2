//! The `tilefold` program: attention on real inputs, checks, timings and sizes from the command line.

mod bench;
mod chart;
mod demo;
mod doctor;
mod genome;
mod global;
mod list;
mod out_file;
mod output;
mod plan;
mod run;
mod system;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use global::Global;
use output::Outcome;

/// Exact fused biased attention, forward and backward.
///
/// This version computes on the CPU; backends for other hardware are not part of it yet.
#[derive(Debug, Parser)]
#[command(name = "tilefold", version, about, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the four Evoformer attentions on a real alignment, checks them, and draws what they cost
    Demo(demo::Args),
    /// Says which devices and instruction sets were found, and why others are off
    Doctor(doctor::Args),
    /// Runs the conformance suite on a device
    Verify(verify::Args),
    /// Times named workloads, or a shape of your own
    Bench(bench::Args),
    /// Computes attention on the tensors of a safetensors file
    Run(run::Args),
    /// Trains a small language model of a genome, split over ranks, and holds it against one rank
    Genome(genome::Args),
    /// Says how many bytes a problem takes, fused and unfused, and what length fits a memory size
    Plan(plan::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = cli.global.start_threads().and_then(|()| match cli.command {
        Command::Demo(args) => demo::run(&args, &cli.global),
        Command::Doctor(args) => doctor::run(&args, &cli.global),
        Command::Verify(args) => verify::run(&args, &cli.global),
        Command::Bench(args) => bench::run(&args, &cli.global),
        Command::Run(args) => run::run(&args, &cli.global),
        Command::Genome(args) => genome::run(&args, &cli.global),
        Command::Plan(args) => plan::run(&args, &cli.global),
    });
    match result {
        Ok(Outcome::Passed) => ExitCode::SUCCESS,
        Ok(Outcome::Failed) => ExitCode::FAILURE,
        Err(error) => {
            output::warn(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
