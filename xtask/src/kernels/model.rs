//! `cargo xtask kernels model`: what hot loops cost by `benches/static`, held against the record.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};
use comfy_table::{Cell, ContentArrangement, Row, Table};
use serde::{Deserialize, Serialize};
use tilefold_emulator_nvrtc::cuda_folder;
use tilefold_kernels::{Pass, Scores, Vendor, Walk};

use super::check::number;
use super::compile::{Compiled, machine_code};
use super::record::{Costs, Record};
use super::resources::Arch;
use super::workload::{Workload, workloads};
use super::{Batch, Chosen, QUICK_HEAD_DIMS};
use crate::clang::Clang;
use crate::command::output;
use crate::report::Count;
use crate::{cuda, setup};

const PROGRAM: &str = "benches/static/pipes.py";
/// The architecture whose scheduling the replay knows.
const REPLAYED: &str = "sm_80";
/// What NVIDIA's numbers in the record are of.
const COMPILER: &str = "NVRTC 13.5.37";

/// What the program is asked about one kernel.
#[derive(Serialize)]
struct Job<'a> {
    file: &'a str,
    arch: &'a str,
    kernel: &'a str,
    tile_q: usize,
    tile_k: usize,
    walk: &'a str,
    warps: usize,
    products: usize,
    depth: usize,
    shared_bytes: u32,
    backward: bool,
    replay: bool,
    workloads: Vec<&'a Workload>,
}

/// What it answers.
#[derive(Deserialize)]
struct Answer {
    unpriced: Vec<String>,
    #[serde(flatten)]
    costs: Costs,
    /// Products in the loop over products that the tile needs.
    matrix_work: Option<f64>,
    floors: BTreeMap<String, Floor>,
}

/// Times of one workload: of this code by its busiest pipe, and what no code can beat.
#[derive(Clone, Copy, Deserialize)]
struct Floor {
    floor_ms: f64,
    ideal_ms: f64,
}

/// One kernel and what is known of it.
struct Modelled<'a> {
    compiled: &'a Compiled<'a>,
    answer: Answer,
}

/// Models the followed kernels and prints what comes out; compares with the record, or writes it.
pub(crate) fn model(chosen: &Chosen, record: bool, replay: bool) -> Result<Count> {
    cuda::fetch()?;
    setup::programs(&[("python3", "python3")])?;
    for mut batch in chosen.batches()? {
        batch.entries.retain(|entry| entry.followed);
        if !batch.entries.is_empty() {
            model_batch(&batch, record, replay)?;
        }
    }
    Ok(Count::one())
}

/// The same for one vendor.
fn model_batch(Batch { entries, archs }: &Batch, record: bool, replay: bool) -> Result<()> {
    let compiled = machine_code(entries, archs)?;
    let modelled = ask(&compiled, &workloads()?, replay)?;
    println!("{}", table(&modelled));
    println!("\ncycles of a sub-partition for 1024 scores; a model, see benches/static/README.md\n");
    println!("{}", floors(&modelled));
    println!("\nstatic floor: milliseconds of a launch by the bound; ideal: what no code can beat");
    for arch in archs {
        let of_arch = modelled.iter().filter(|one| one.compiled.arch.name == arch.name);
        let costs: BTreeMap<String, Costs> =
            of_arch.map(|one| (one.compiled.entry.kernel.name.clone(), one.answer.costs.clone())).collect();
        if record { write(*arch, costs)? } else { compare(arch.name, &costs)? }
    }
    let unpriced: Vec<_> = modelled.iter().flat_map(|one| &one.answer.unpriced).collect();
    ensure!(unpriced.is_empty(), "benches/static/cost.py has no price for {unpriced:?}");
    Ok(())
}

fn write(arch: Arch, costs: BTreeMap<String, Costs>) -> Result<()> {
    let mut record = Record::read(arch.name)?;
    record.compiler = match arch.vendor {
        Vendor::Nvidia => COMPILER.to_owned(),
        Vendor::Amd => Clang::get()?.name(),
    };
    for (name, mut costs) in costs {
        // A run without replays keeps what was replayed.
        let before = record.kernels.get(&name).and_then(|before| before.replay);
        costs.replay = costs.replay.or(before);
        record.kernels.insert(name, costs);
    }
    record.write(arch.name)
}

fn compare(arch: &str, costs: &BTreeMap<String, Costs>) -> Result<()> {
    let record = Record::read(arch)?;
    let wrong: Vec<String> = costs
        .iter()
        .flat_map(|(name, costs)| {
            let complaints = costs.complaints(record.kernels.get(name));
            complaints.into_iter().map(move |complaint| format!("{name} for {arch}: {complaint}"))
        })
        .collect();
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// Runs the program once for all kernels.
fn ask<'a>(compiled: &'a [Compiled<'a>], workloads: &[Workload], replay: bool) -> Result<Vec<Modelled<'a>>> {
    let with_scores: Vec<_> = compiled.iter().filter_map(|one| Some((one, one.entry.scores.as_ref()?))).collect();
    let jobs = with_scores.iter().map(|&(one, scores)| job(one, scores, workloads, replay));
    let jobs = jobs.collect::<Result<Vec<_>>>()?;
    let path = cuda_folder().join("jobs.json");
    fs::write(&path, serde_json::to_string(&jobs)?).with_context(|| format!("cannot write {}", path.display()))?;
    let (tools, file) = (cuda_folder().join("tools"), path.to_str().context("a path that is no text")?);
    let tools = format!("TILEFOLD_CUDA_TOOLS={}", tools.display());
    let answers = output(&["env", &tools, "python3", PROGRAM, "--jobs", file])?;
    let answers: Vec<Answer> = serde_json::from_slice(&answers).context("cannot read what pipes.py prints")?;
    ensure!(answers.len() == jobs.len(), "{} answers to {} jobs", answers.len(), jobs.len());
    let pairs = with_scores.into_iter().zip(answers);
    Ok(pairs.map(|((compiled, _), answer)| Modelled { compiled, answer }).collect())
}

fn job<'a>(one: &'a Compiled<'_>, scores: &Scores, workloads: &'a [Workload], replay: bool) -> Result<Job<'a>> {
    let kernel = &one.entry.kernel;
    let fits = |work: &&Workload| {
        let causal = kernel.name.contains(" positions");
        let pair = kernel.name.contains("=pieces");
        let mask = kernel.name.contains(" key_mask");
        work.head_dim == scores.head_dim && (work.causal, work.pair_bias, work.key_mask) == (causal, pair, mask)
    };
    Ok(Job {
        file: one.path.to_str().context("a path that is no text")?,
        arch: one.arch.name,
        kernel: kernel.entry,
        tile_q: scores.tile_q,
        tile_k: scores.tile_k,
        walk: match scores.walk {
            Walk::Keys => "keys",
            Walk::Queries => "queries",
            Walk::Rows => "rows",
        },
        warps: scores.warps,
        products: scores.products,
        depth: scores.depth,
        shared_bytes: kernel.dynamic_shared_bytes + one.resources.static_shared_bytes,
        backward: scores.pass != Pass::Forward,
        replay: replay && one.arch.name == REPLAYED && QUICK_HEAD_DIMS.contains(&scores.head_dim),
        workloads: workloads.iter().filter(fits).collect(),
    })
}

/// A line for each kernel and architecture.
fn table(modelled: &[Modelled<'_>]) -> Table {
    let mut table = empty();
    table.set_header([
        "arch",
        "bound",
        "pipe",
        "replay",
        "instructions",
        "matrix work",
        "registers",
        "spills",
        "warps",
        "kernel",
    ]);
    for Modelled { compiled, answer } in modelled {
        let costs = &answer.costs;
        let mut row = Row::new();
        row.add_cell(Cell::new(compiled.arch.name)).add_cell(number(format!("{:.0}", costs.bound)));
        row.add_cell(Cell::new(&costs.pipe));
        row.add_cell(number(costs.replay.map_or_else(String::new, |replay| format!("{replay:.0}"))));
        row.add_cell(number(format!("{:.0}", costs.instructions)));
        row.add_cell(number(answer.matrix_work.map_or_else(String::new, |work| format!("{work:.2}"))));
        row.add_cell(number(costs.registers)).add_cell(number(costs.spills)).add_cell(number(costs.warps));
        row.add_cell(Cell::new(&compiled.entry.kernel.name));
        table.add_row(row);
    }
    table
}

/// A line for each workload, architecture and pass.
fn floors(modelled: &[Modelled<'_>]) -> Table {
    let mut table = empty();
    table.set_header(["workload", "arch", "static floor", "ideal", "kernel"]);
    let mut rows: Vec<_> = modelled
        .iter()
        .flat_map(|one| one.answer.floors.iter().map(move |(name, floor)| (name, one, *floor)))
        .collect();
    rows.sort_by_key(|&(name, one, _)| (name, one.compiled.arch.name));
    for (name, one, floor) in rows {
        let mut row = Row::new();
        row.add_cell(Cell::new(name)).add_cell(Cell::new(one.compiled.arch.name));
        row.add_cell(number(format!("{:.3}", floor.floor_ms)));
        // The ideal floor of a backward pass is that of both its kernels together.
        row.add_cell(number(format!("{:.3}", floor.ideal_ms)));
        row.add_cell(Cell::new(&one.compiled.entry.kernel.name));
        table.add_row(row);
    }
    table
}

fn empty() -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table
}
