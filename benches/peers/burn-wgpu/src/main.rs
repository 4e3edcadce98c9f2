//! tilefold's wgpu backend beside burn-wgpu: attention with a pair bias, in one process, on one adapter, in turns.
//!
//! `cargo run --release` in this folder prints processor time and wall time of one pass, as medians over turns, and
//! `-- --json FILE` writes them to a file as well. On an adapter that is a program on the processor, such as Mesa's
//! lavapipe, processor time is the work done, whatever else the machine does.

mod burn;
mod own;
mod report;
mod task;
mod turns;

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use tilefold::{Backend, Device};

use crate::report::{Record, Row};
use crate::task::Task;
use crate::turns::Contender;

/// Rows, length, heads, channels. Logits of the last one are 128 MiB, all that lavapipe binds at once: burn keeps them in
/// one piece.
const SHAPES: [[usize; 4]; 2] = [[16, 256, 4, 32], [8, 1024, 4, 32]];

#[derive(Parser)]
#[command(about = "tilefold's wgpu backend beside burn-wgpu on one adapter")]
struct Arguments {
    /// Timed passes of each; the median counts.
    #[arg(long, default_value_t = 11)]
    turns: usize,
    /// Rows, length, heads and channels, such as 16,256,4,32; may be given several times.
    #[arg(long = "shape", value_name = "N,L,H,D", value_parser = shape)]
    shapes: Vec<[usize; 4]>,
    /// Writes what was measured to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.turns > 0, "--turns must be at least 1");
    let device = Device::open("wgpu").context("tilefold finds no device")?;
    let peer = burn::Adapter::open()?;
    let name = &device.info().name;
    println!("tilefold: {name} ({})", device.info().arch);
    println!("burn:     {} ({}, {})", peer.name, peer.driver, peer.compiler);
    ensure!(
        *name == peer.name,
        "they are on different adapters; CUBECL_WGPU_DEFAULT_DEVICE=Cpu or DiscreteGpu(0) chooses burn's"
    );
    let mut record = Record::new(&device, &peer, arguments.turns);
    for shape in if arguments.shapes.is_empty() { &SHAPES[..] } else { &arguments.shapes } {
        let task = Task::new(*shape)?;
        for gradients in [false, true] {
            let row = measure(&device, &peer, &task, gradients, arguments.turns)?;
            println!("{}", row.table());
            record.rows.push(row);
        }
    }
    if let Some(file) = &arguments.json {
        record.write(file)?;
    }
    Ok(())
}

fn shape(text: &str) -> Result<[usize; 4]> {
    let sizes = text.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>()?;
    sizes.try_into().map_err(|_| anyhow!("four sizes are wanted"))
}

fn measure(device: &Device, peer: &burn::Adapter, task: &Task, gradients: bool, turns: usize) -> Result<Row> {
    let own: Box<dyn Contender> = Box::new(own::Launched::new(device, task, gradients)?);
    let mut contenders = vec![("tilefold".to_owned(), own)];
    contenders.extend(peer.contenders(task, gradients));
    let (idle_share, outcomes) = turns::run(task, contenders, turns);
    Ok(Row::new(task.shape, gradients, idle_share, outcomes))
}
