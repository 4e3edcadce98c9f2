//! `cargo xtask kernels check`: no spills, enough warps, and the instructions that the plan counts on.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use comfy_table::{Cell, CellAlignment, ContentArrangement, Row, Table};
use rayon::prelude::*;
use tilefold_core::DType;
use tilefold_emulator_nvrtc::tool;
use tilefold_kernels::{Scores, Vendor};

use super::compile::{Compiled, machine_code, to_oldest_ptx};
use super::resources::Arch;
use super::{Batch, Chosen};
use crate::clang::Clang;
use crate::command::output;
use crate::cuda;
use crate::report::Count;

/// Compiles kernels and prints a table; an error lists everything that is wrong.
pub(crate) fn check(chosen: &Chosen) -> Result<Count> {
    cuda::fetch()?;
    let mut wrong = Vec::new();
    for batch in chosen.batches()? {
        wrong.extend(check_batch(&batch)?);
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(Count::one())
}

/// The same for one vendor: what is wrong.
fn check_batch(Batch { entries, archs }: &Batch) -> Result<Vec<String>> {
    let start = Instant::now();
    let compiled = machine_code(entries, archs)?;
    let nvidia = archs.iter().any(|arch| arch.vendor == Vendor::Nvidia);
    if nvidia {
        to_oldest_ptx(entries).context("NVRTC 12.0 cannot compile a kernel")?;
    }
    println!("{}", table(&compiled, archs));
    let mut wrong: Vec<String> = compiled.iter().flat_map(resource_complaints).collect();
    let missing = compiled.par_iter().map(missing_instructions).collect::<Result<Vec<_>>>()?;
    wrong.extend(missing.into_iter().flatten());
    let names: Vec<&str> = archs.iter().map(|arch| arch.name).collect();
    println!(
        "{} kernels for {} with {}, in {:.0} s",
        entries.len(),
        names.join(", "),
        if nvidia { "NVRTC 13.5, to PTX with 12.0".to_owned() } else { Clang::get()?.name() },
        start.elapsed().as_secs_f64()
    );
    Ok(wrong)
}

/// Resident warps of a sub-partition below which latency is not hidden, whatever the loop: by type and head dimension.
///
/// Wide heads keep their sums in registers and get fewer; f32 has two numbers for each operand of a product.
///
/// On AMD, O of 64 channels and more leaves room for one wave of a SIMD, which loads a tile ahead.
fn least_warps(scores: &Scores, vendor: Vendor) -> f64 {
    match (scores.dtype, scores.depth) {
        (_, 40..) if vendor == Vendor::Amd => 1.0,
        (DType::F32, 0..=64) => 2.0,
        (DType::F32, _) => 0.5,
        (_, 0..=64) => 2.0,
        _ => 1.0,
    }
}

/// Warps of a sub-partition for kernels that only move data.
const LEAST_WARPS_OF_MOVES: f64 = 8.0;

fn resource_complaints(compiled: &Compiled<'_>) -> Vec<String> {
    let Compiled { entry, arch, resources, .. } = compiled;
    let kernel = &entry.kernel;
    let mut wrong = Vec::new();
    let mut complain = |what: String| wrong.push(format!("{} for {}: {what}", kernel.name, arch.name));
    if resources.spilled_bytes + resources.stack_bytes > 0 {
        complain(format!("{} bytes spilled, {} bytes of stack", resources.spilled_bytes, resources.stack_bytes));
    }
    if resources.spilled_scalars > 0 {
        complain(format!("{} scalar registers spilled", resources.spilled_scalars));
    }
    let warps = warps(compiled);
    // A block of one warp or less is a small problem's, or serial: blocks limit it, not registers.
    let least = entry.scores.as_ref().map_or(LEAST_WARPS_OF_MOVES, |scores| least_warps(scores, arch.vendor));
    if warps < least && kernel.block_threads > arch.warp {
        complain(format!("{warps} warps of a sub-partition are resident, {least} are wanted"));
    }
    wrong
}

/// Instructions of the matrix units, of ldmatrix and of asynchronous copies, where they are expected.
fn missing_instructions(compiled: &Compiled<'_>) -> Result<Vec<String>> {
    let Compiled { entry, arch, path, .. } = compiled;
    let Some(scores) = &entry.scores else { return Ok(Vec::new()) };
    let (code, expected) = match arch.vendor {
        Vendor::Nvidia => {
            let nvdisasm = tool("nvdisasm")?;
            let command =
                [nvdisasm.to_str(), Some("-c"), path.to_str()].map(|word| word.context("a path that is no text"));
            let [program, option, file] = command;
            let code = output(&[program?, option?, file?])?;
            let ldmatrix = scores.dtype != DType::F32;
            let expected = vec![("HMMA.", true), ("LDSM.", ldmatrix), ("LDGSTS.", scores.async_copies)];
            (String::from_utf8_lossy(&code).into_owned(), expected)
        }
        Vendor::Amd => (Clang::get()?.disassembly(path)?, vec![(matrix_instruction(scores.dtype), true)]),
    };
    let absent = expected.into_iter().filter(|(op, wanted)| *wanted && !code.contains(op));
    Ok(absent.map(|(op, _)| format!("{} for {}: no {op}", entry.kernel.name, arch.name)).collect())
}

/// AMD's matrix product of 32 rows.
fn matrix_instruction(dtype: DType) -> &'static str {
    if dtype == DType::F32 { "v_mfma_f32_32x32x2" } else { "v_mfma_f32_32x32x8" }
}

/// One line for each kernel of attention, one for each file of the others with the most registers and fewest warps.
fn table(compiled: &[Compiled<'_>], archs: &[Arch]) -> Table {
    let mut groups: BTreeMap<(bool, &str), Vec<&Compiled<'_>>> = BTreeMap::new();
    for each in compiled {
        let attention = each.entry.scores.is_some();
        let name = if attention { &each.entry.kernel.name } else { each.entry.kernel.entry };
        groups.entry((attention, name)).or_default().push(each);
    }
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    let of_archs = archs.iter().flat_map(|arch| [arch.name, "warps"]);
    table.set_header(["shared"].into_iter().chain(of_archs).chain(["spilled", "kernels", "registers and warps of"]));
    for ((_, name), all) in groups {
        let most = |field: fn(&Compiled<'_>) -> u32| all.iter().map(|one| field(one)).max().unwrap_or(0);
        let mut row = Row::new();
        row.add_cell(number(most(|one| one.entry.kernel.dynamic_shared_bytes)));
        for arch in archs {
            let of_arch = || all.iter().filter(|one| one.arch.name == arch.name);
            row.add_cell(number(of_arch().map(|one| one.resources.registers).max().unwrap_or(0)));
            row.add_cell(number(of_arch().map(|one| warps(one)).fold(f64::INFINITY, f64::min)));
        }
        row.add_cell(number(most(|one| one.resources.spilled_bytes)));
        row.add_cell(number(all.len() / archs.len()));
        row.add_cell(Cell::new(name));
        table.add_row(row);
    }
    table
}

fn warps(compiled: &Compiled<'_>) -> f64 {
    let kernel = &compiled.entry.kernel;
    compiled.resources.warps(compiled.arch, kernel.block_threads, kernel.dynamic_shared_bytes)
}

pub(super) fn number(value: impl ToString) -> Cell {
    Cell::new(value.to_string()).set_alignment(CellAlignment::Right)
}
