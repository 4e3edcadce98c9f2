//! Draws time against length, forward and backward apart, one line for each workload and dtype.

use anyhow::Result;

use super::measure::Entry;
use crate::chart::{Chart, Line};
use crate::output::as_f64;

/// An SVG's text.
pub(super) fn draw(entries: &[Entry]) -> Result<String> {
    let panels = ["forward", "backward", "both"]
        .into_iter()
        .map(|pass| (pass, lines(entries, pass)))
        .filter(|(_, lines)| !lines.is_empty())
        .map(|(pass, lines)| Chart { title: title(pass).to_owned(), x: "sequence length", y: "milliseconds", lines });
    crate::chart::draw(&panels.collect::<Vec<_>>())
}

fn title(pass: &str) -> &str {
    match pass {
        "both" => "forward and backward",
        pass => pass,
    }
}

fn lines(entries: &[Entry], pass: &str) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for entry in entries.iter().filter(|entry| entry.pass == pass) {
        let label = format!("{} {}", entry.workload, entry.dtype);
        let point = (as_f64(entry.shape[1]), entry.median_ms);
        match lines.iter_mut().find(|line| line.label == label) {
            Some(line) => line.points.push(point),
            None => lines.push(Line { label, points: vec![point] }),
        }
    }
    lines.iter_mut().for_each(|line| line.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    lines
}
