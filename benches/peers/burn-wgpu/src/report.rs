//! What was measured, as a table and as a record.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;
use tilefold::{Backend, Device};

use crate::burn::Adapter;
use crate::turns::{Measured, Outcome};

/// A whole measurement.
#[derive(Serialize)]
pub(crate) struct Record {
    device: String,
    driver: String,
    burn_wgpu: &'static str,
    burn_backend: String,
    turns: usize,
    pub(crate) rows: Vec<Row>,
}

/// One shape and pass.
#[derive(Serialize)]
pub(crate) struct Row {
    shape: [usize; 4],
    backward: bool,
    /// The least processor time of burn's ways over tilefold's: how much less tilefold takes.
    cpu_ratio: Option<f64>,
    /// The same of wall time.
    wall_ratio: Option<f64>,
    /// What waiting threads took of one processor.
    idle_share: f64,
    outcomes: Vec<Outcome>,
}

impl Record {
    pub(crate) fn new(device: &Device, peer: &Adapter, turns: usize) -> Self {
        let info = device.info();
        let (device, driver, burn_backend) = (info.name.clone(), info.arch.clone(), peer.compiler.clone());
        Self { device, driver, burn_wgpu: locked_version("burn-wgpu"), burn_backend, turns, rows: Vec::new() }
    }

    pub(crate) fn write(&self, file: &Path) -> Result<()> {
        let text = format!("{}\n", serde_json::to_string_pretty(self)?);
        fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
    }
}

impl Row {
    /// `outcomes`: tilefold's first.
    pub(crate) fn new(shape: [usize; 4], backward: bool, idle_share: f64, outcomes: Vec<Outcome>) -> Self {
        let ratio = |time: fn(&Outcome) -> Option<f64>| {
            let (own, peers) = outcomes.split_first()?;
            Some(peers.iter().filter_map(time).min_by(f64::total_cmp)? / time(own)?)
        };
        let (cpu_ratio, wall_ratio) = (ratio(Outcome::cpu_ms), ratio(Outcome::wall_ms));
        Self { shape, backward, cpu_ratio, wall_ratio, idle_share, outcomes }
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let [rows, length, heads, channels] = self.shape;
        let pass = if self.backward { "forward and backward" } else { "forward" };
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED);
        let header = ["", "processor ms", "over tilefold", "wall ms", "first, wall ms", "error"];
        table.set_header(header.map(str::to_owned));
        let own = self.outcomes.first().and_then(Outcome::cpu_ms);
        for Outcome { name, result } in &self.outcomes {
            table.add_row(match result {
                Measured::Times { cpu_ms, wall_ms, first_ms, error_share } => vec![
                    name.clone(),
                    format!("{cpu_ms:.1}"),
                    own.map_or_else(String::new, |own| format!("{:.2}", cpu_ms / own)),
                    format!("{wall_ms:.1}"),
                    format!("{first_ms:.0}"),
                    format!("{error_share:.2}"),
                ],
                Measured::Failed { failed } => vec![name.clone(), format!("failed: {failed}")],
            });
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let idle = 100.0 * self.idle_share;
        format!("\n{rows} x {length} x {heads} x {channels}, {pass}; waiting takes {idle:.0} % of a processor\n{table}")
    }
}

/// The version of a package that this program was built with.
fn locked_version(package: &str) -> &'static str {
    let mut lines = include_str!("../Cargo.lock").lines();
    lines.find(|line| *line == format!("name = \"{package}\""));
    lines.next().and_then(|line| line.split('"').nth(1)).unwrap_or("unknown")
}
