//! `tilefold genome`: a small language model of a genome, trained on sequences that are split over ranks, and held against one
//! rank.

mod compare;
mod job;
mod memory;
mod report;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use tilefold::Backend;
use tilefold::comm::{Communicator, Rank, on_threads};
use tilefold_models::genslm::{AttentionKind, Config, MlpKind, Positions, Tokens};

use crate::global::Global;
use crate::output::{Outcome, say_json};
use job::Job;
use report::Report;

/// How long a rank waits for others: one of them may be computing the whole sequence alone.
const DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// Largest of any size: beyond all genomes' codons, and small enough that products of two are numbers.
const MAX_SIZE: usize = 1 << 31;

/// Options of `genome`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Each rank is a thread with one core (more with --threads), or, with --mpi in a build with the feature `mpi`, a process:
  mpirun -n 4 tilefold genome examples/data/NC_000932.fna --mpi")]
pub(crate) struct Args {
    /// Genome in FASTA form
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Ranks the sequence is split over
    #[arg(long, default_value_t = 4, value_parser = size)]
    ranks: usize,
    /// Steps of training, each on the next sequences of the genome
    #[arg(long, default_value_t = 24, value_parser = size)]
    steps: usize,
    /// Codons of a sequence, over all ranks
    #[arg(long, default_value_t = 8192, value_parser = size)]
    tokens: usize,
    /// Sequences of a step
    #[arg(long, default_value_t = 1, value_parser = size)]
    batch: usize,
    /// Transformer layers
    #[arg(long, default_value_t = 2, value_parser = size)]
    layers: usize,
    /// Channels of a token
    #[arg(long, default_value_t = 128, value_parser = size)]
    hidden: usize,
    /// Heads of attention
    #[arg(long, default_value_t = 4, value_parser = size)]
    heads: usize,
    /// How the model knows where a codon stands: rotated queries and keys, a slope for each head, or a table split over ranks
    #[arg(long, value_enum, default_value = "rope")]
    positions: PositionsName,
    /// How attention goes over ranks: keys go round, or sequence and heads are exchanged
    #[arg(long, value_enum, default_value = "ring")]
    attention: AttentionName,
    /// How the MLP goes over ranks: each its positions, or each a part of the hidden channels
    #[arg(long, value_enum, default_value = "replicated")]
    mlp: MlpName,
    /// Learning rate of Adam
    #[arg(long, default_value_t = 3e-3)]
    rate: f32,
    /// Trains only: no run over one and two ranks to hold loss and gradients against
    #[arg(long)]
    no_compare: bool,
    /// Every process of this MPI job is a rank
    #[arg(long, conflicts_with = "ranks")]
    mpi: bool,
    /// Prints JSON instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum PositionsName {
    Rope,
    Alibi,
    Learned,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum AttentionName {
    Ring,
    Ulysses,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum MlpName {
    Replicated,
    Tensor,
}

fn size(text: &str) -> Result<usize, String> {
    let size = text.parse().ok().filter(|size| (1..=MAX_SIZE).contains(size));
    size.ok_or_else(|| format!("expected a number from 1 to {MAX_SIZE}"))
}

impl Args {
    fn config(&self) -> Config {
        Config {
            layers: self.layers,
            hidden: self.hidden,
            heads: self.heads,
            mlp_hidden: self.hidden.saturating_mul(4),
            seqlen: self.tokens,
            batch: self.batch,
            positions: match self.positions {
                PositionsName::Rope => Positions::Rope,
                PositionsName::Alibi => Positions::Alibi,
                PositionsName::Learned => Positions::Learned,
            },
            attention: match self.attention {
                AttentionName::Ring => AttentionKind::Ring,
                AttentionName::Ulysses => AttentionKind::Ulysses,
            },
            mlp: match self.mlp {
                MlpName::Replicated => MlpKind::Replicated,
                MlpName::Tensor => MlpKind::Tensor,
            },
        }
    }
}

/// Trains, compares, prints.
pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let tokens = Tokens::read(&args.file)?;
    let job = Job {
        config: args.config(),
        tokens: &tokens,
        file: args.file.display().to_string(),
        steps: args.steps,
        rate: args.rate,
        compares: !args.no_compare,
        says: !args.json,
    };
    let report = if args.mpi { as_process(&job, global)? } else { as_threads(&job, args.ranks, global)? };
    let Some(report) = report else { return Ok(Outcome::Passed) };
    if args.json {
        say_json(&report)?;
    } else {
        report.print()?;
    }
    Ok(if report.passed { Outcome::Passed } else { Outcome::Failed })
}

/// Every rank a thread of this process.
fn as_threads(job: &Job<'_>, ranks: usize, global: &Global) -> Result<Option<Report>> {
    if ranks > memory::MAX_RANKS {
        bail!("--ranks: expected at most {} threads, got {ranks}", memory::MAX_RANKS);
    }
    let reports = on_threads(ranks, |comm| as_rank(job, comm, global, ranks)).into_iter();
    let mut reports =
        reports.map(|report| report.map_err(|_| anyhow!("a rank panicked"))?).collect::<Result<Vec<_>>>()?;
    Ok(reports.swap_remove(0))
}

/// This process a rank of its MPI job.
#[cfg(feature = "mpi")]
fn as_process(job: &Job<'_>, global: &Global) -> Result<Option<Report>> {
    as_rank(job, Communicator::mpi()?, global, 1)
}

#[cfg(not(feature = "mpi"))]
fn as_process(_: &Job<'_>, _: &Global) -> Result<Option<Report>> {
    bail!("--mpi: this program was built without MPI; build it with `--features mpi`")
}

/// One rank of so many in this process, on threads of its own, so that time and memory are its own.
fn as_rank(job: &Job<'_>, comm: Communicator, global: &Global, ranks_here: usize) -> Result<Option<Report>> {
    let slot = if comm.world_size() <= memory::MAX_RANKS { comm.rank() } else { 0 };
    let threads = rayon::ThreadPoolBuilder::new()
        .num_threads(global.threads.map_or(1, usize::from))
        .start_handler(move |_| memory::enter(slot))
        .build()
        .context("cannot start the threads of a rank")?;
    threads.install(move || {
        comm.set_deadline(DEADLINE)?;
        let device = global.open()?;
        job.check_fits(ranks_here)?;
        let stream = device.stream()?;
        job.run(Rank { comm: &comm, device: &device, stream: &stream }, slot)
    })
}
