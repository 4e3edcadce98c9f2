//! `tilefold demo`: the four Evoformer attentions on a real alignment, then the paper's own size, each checked.

mod alignment;
mod block;
mod bound;
mod check;
mod features;
mod memory;
mod paper;
mod picture;
mod report;

use std::path::{Path, PathBuf};

use anyhow::Result;
use indicatif::ProgressBar;
use tilefold::Backend;

use crate::global::Global;
use crate::out_file::OutFile;
use crate::output::{Outcome, say, say_json};
use crate::system::Machine;
use alignment::Alignment;
use report::Report;

/// The alignment used when none is named: the seed of Pfam family PF00069, protein kinases.
const ALIGNMENT: &[u8] = include_bytes!("../../examples/data/PF00069_seed.sto");
const ALIGNMENT_NAME: &str = "PF00069_seed.sto (Pfam, protein kinases)";

/// Name of the picture in a folder.
const PICTURE: &str = "tilefold-demo.svg";

/// Options of `demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Alignment in Stockholm, A3M or FASTA form [default: a Pfam seed alignment that is part of the program]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Leaves out the paper's own size (5120 x 384, 12.08 GB of half-precision logits), which takes gigabytes and seconds
    #[arg(long)]
    no_paper_size: bool,
    /// Folder or .svg file for the picture
    #[arg(long, default_value = ".", value_name = "PATH")]
    out: PathBuf,
    /// Prints JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Runs everything, prints, draws.
pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let picture = OutFile::new(&picture_path(&args.out), "--out")?;
    let alignment = match &args.file {
        Some(file) => Alignment::read(file)?,
        None => Alignment::from_bytes(ALIGNMENT, ALIGNMENT_NAME)?,
    };
    let device = global.open()?;
    let source = args.file.as_ref().map_or_else(|| ALIGNMENT_NAME.to_owned(), |file| file.display().to_string());
    let machine = Machine::now();
    let mut report = Report::new(source, &alignment, device.info(), &machine);
    if !args.json {
        say(&report.head())?;
    }
    // Without a thread that keeps it turning: starting one panics where the system refuses it.
    let progress = ProgressBar::new_spinner();
    report.cases = block::run(&device, &alignment, &progress)?;
    if !args.no_paper_size {
        paper::run(&device, &alignment, &progress, &mut report)?;
    }
    progress.finish_and_clear();
    report.finish(picture.path());
    if args.json {
        say_json(&report)?
    } else {
        report.print()?
    }
    picture.write(&picture::draw(&report)?)?;
    if !args.json {
        say(&format!("picture: {}", report.picture))?;
    }
    Ok(if report.passed { Outcome::Passed } else { Outcome::Failed })
}

/// The file to draw into.
fn picture_path(out: &Path) -> PathBuf {
    let is_file = out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("svg"));
    if is_file { out.to_owned() } else { out.join(PICTURE) }
}
