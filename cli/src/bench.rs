//! `tilefold bench`: times named workloads or a shape, forward and backward.

mod measure;
mod plot;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use tilefold::{AttentionProblem, Backend, Device, Precision};
use tilefold_benches::{Pass, Workload, definitions, find};

use crate::global::Global;
use crate::list;
use crate::out_file::OutFile;
use crate::output::{Outcome, as_f64, bytes, digits, known_bytes, say, say_json, shape, table};
use measure::{Entry, Plan, measure};

/// Timed when no workload is named: enough to see what a machine does, in seconds.
const DEFAULT_WORKLOADS: [&str; 2] = ["small", "msa-row-initial"];

/// Convention of the GFLOP/s column; printed below the table.
const CONVENTION: &str = "GFLOP/s counts the matrix products: 4·rows·heads·seqlen²·head_dim forward, 10 backward, 14 both; \
masked keys count as work.\npeak memory: most bytes this process held while it ran, operands included.";

/// Options of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Workloads by name; `--list` shows them
    #[arg(value_name = "WORKLOAD")]
    workloads: Vec<String>,
    /// Lists the workloads and ends
    #[arg(long)]
    list: bool,
    /// Times rows,seqlen,heads,head_dim with a pair bias and a key mask instead
    #[arg(long, value_delimiter = ',', value_name = "N,L,H,D", conflicts_with = "workloads")]
    shape: Vec<usize>,
    /// Sequence lengths to time, instead of the workload's own
    #[arg(long, value_delimiter = ',', value_name = "L")]
    lengths: Vec<usize>,
    /// Dtypes; tf32 is f32 with products of tf32 [default: those of the workload]
    #[arg(long, value_delimiter = ',', value_parser = list::dtype)]
    dtype: Vec<Precision>,
    /// Parts of a training step
    #[arg(long, value_delimiter = ',', value_enum, default_value = "forward,backward,both")]
    pass: Vec<PassName>,
    /// Timed runs of each
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    repeats: u32,
    /// Runs before the first timed one
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=1000))]
    warmup: u32,
    /// Draws time against length into an SVG file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Prints JSON instead of the table, or writes it to a file as well (`--json=FILE`; the `=` is needed)
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-", require_equals = true)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum PassName {
    Forward,
    Backward,
    Both,
}

#[derive(Serialize)]
struct Record<'a> {
    version: &'static str,
    device: String,
    model: &'a str,
    arch: &'a str,
    /// `None` where the device does not tell.
    threads: Option<usize>,
    entries: &'a [Entry],
}

/// Times what is asked for.
pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let to_stdout = args.json.as_deref() == Some(Path::new("-"));
    if args.list {
        list_workloads(to_stdout)?;
        return Ok(Outcome::Passed);
    }
    let json = args.json.as_deref().filter(|_| !to_stdout).map(|path| OutFile::new(path, "--json")).transpose()?;
    let plot = args.plot.as_deref().map(|path| OutFile::new(path, "--plot")).transpose()?;
    let device = global.open()?;
    ensure!(
        !device.info().is_virtual,
        "{} is virtual ({}): its times say nothing about a GPU; choose another with --device",
        device.info().id,
        device.info().name
    );
    let plans = args.plans(&device)?;
    let entries = measure(&device, &plans, args.repeats, args.warmup)?;
    let record = Record::new(&device, &entries);
    if to_stdout {
        say_json(&record)?;
    } else {
        print(&entries)?;
    }
    if let Some(file) = json {
        file.write(&serde_json::to_string_pretty(&record)?)?;
    }
    if let Some(file) = plot {
        file.write(&plot::draw(&entries)?)?;
    }
    Ok(Outcome::Passed)
}

impl Args {
    /// Every (workload, dtype) to run, in the order asked for.
    fn plans(&self, device: &Device) -> Result<Vec<Plan>> {
        let mut plans = Vec::new();
        for workload in self.chosen()? {
            for precision in self.precisions(&workload)? {
                ensure!(
                    device.info().dtypes.contains(&precision.dtype),
                    "{} does not compute in {precision}; choose another with --dtype",
                    device.info().id
                );
                let plan = Plan { workload: workload.clone(), precision, passes: self.passes() };
                // Found out now, not after the workloads before it.
                AttentionProblem::new(workload.spec(precision, true)).with_context(|| plan.name())?;
                plans.push(plan);
            }
        }
        Ok(plans)
    }

    fn chosen(&self) -> Result<Vec<Workload>> {
        let named = if self.shape.is_empty() {
            let names: Vec<&str> = match self.workloads.as_slice() {
                [] => DEFAULT_WORKLOADS.to_vec(),
                names => names.iter().map(String::as_str).collect(),
            };
            names.into_iter().map(find).collect::<Result<Vec<_>, _>>().with_context(|| match &self.json {
                Some(_) => "`tilefold bench --list` shows them all; JSON goes to a file with --json=FILE",
                None => "`tilefold bench --list` shows them all",
            })?
        } else {
            vec![of_shape(list::shape(&self.shape)?)]
        };
        if self.lengths.is_empty() {
            return Ok(named);
        }
        let at = |workload: &Workload, seqlen| Workload { seqlen, seqlen_k: None, ..workload.clone() };
        let named: Vec<_> = match self.shape.as_slice() {
            // One name for all lengths, so that they make one line of a plot.
            [rows, _, heads, head_dim] => {
                let name = format!("{rows}xLx{heads}x{head_dim}");
                named.into_iter().map(|workload| Workload { name: name.clone(), ..workload }).collect()
            }
            _ => named,
        };
        Ok(named.iter().flat_map(|workload| self.lengths.iter().map(|&seqlen| at(workload, seqlen))).collect())
    }

    fn precisions(&self, workload: &Workload) -> Result<Vec<Precision>> {
        if self.dtype.is_empty() {
            let parsed: Result<Vec<_>, String> = workload.dtypes.iter().map(|name| list::dtype(name)).collect();
            return parsed.map_err(|error| anyhow::anyhow!("workload {}: {error}", workload.name));
        }
        Ok(self.dtype.clone())
    }

    fn passes(&self) -> Vec<Pass> {
        let named = |pass: &PassName| match pass {
            PassName::Forward => Pass::Forward,
            PassName::Backward => Pass::Backward,
            PassName::Both => Pass::Both,
        };
        self.pass.iter().map(named).collect()
    }
}

/// A shape of the user's own: shared pair bias, key mask.
fn of_shape([rows, seqlen, heads, head_dim]: [usize; 4]) -> Workload {
    Workload {
        name: format!("{rows}x{seqlen}x{heads}x{head_dim}"),
        rows,
        seqlen,
        seqlen_k: None,
        heads,
        head_dim,
        causal: false,
        pair_bias: true,
        key_mask: true,
        dtypes: vec!["f32".into(), "bf16".into()],
        compare: false,
        source: "command line".into(),
    }
}

fn list_workloads(json: bool) -> Result<()> {
    let all = definitions()?;
    if json {
        return say_json(&all.iter().map(|workload| &workload.name).collect::<Vec<_>>());
    }
    let mut lines = table(&["workload", "source", "rows", "seqlen", "heads", "head_dim"], 2);
    for Workload { name, source, rows, seqlen, heads, head_dim, .. } in &all {
        let sizes = [rows, seqlen, heads, head_dim].map(ToString::to_string);
        lines.add_row([name.clone(), source.clone()].into_iter().chain(sizes));
    }
    say(&lines.to_string())
}

fn print(entries: &[Entry]) -> Result<()> {
    let head =
        ["workload", "rows x L x H x D", "dtype", "pass", "median ms", "min ms", "GFLOP/s", "workspace", "peak memory"];
    let mut lines = table(&head, 4);
    for entry in entries {
        lines.add_row([
            entry.workload.clone(),
            shape(&entry.shape),
            entry.dtype.clone(),
            entry.pass.clone(),
            digits(entry.median_ms),
            digits(entry.min_ms),
            digits(entry.gflops),
            bytes(as_f64(entry.workspace_bytes)),
            known_bytes(entry.peak_bytes),
        ]);
    }
    say(&lines.to_string())?;
    say(CONVENTION)?;
    // A run is of one device.
    entries.first().map_or(Ok(()), |entry| say(&format!("times: the {}'s clock.", entry.clock)))
}

impl<'a> Record<'a> {
    fn new(device: &'a Device, entries: &'a [Entry]) -> Self {
        let info = device.info();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            device: info.id.to_string(),
            model: &info.name,
            arch: &info.arch,
            threads: (info.parallelism > 0).then_some(info.parallelism),
            entries,
        }
    }
}
