//! Text for people and JSON for programs: results on stdout, everything else on stderr.

use std::io::{self, ErrorKind, Write};

use anyhow::{Context, Result};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Attribute, Cell, CellAlignment, ContentArrangement, Table};
use serde::Serialize;

/// How a command that ran to its end ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Everything asked for was done, every check passed.
    Passed,
    /// A check failed; the output says which.
    Failed,
}

/// Writes a line of results.
///
/// A reader that went away, as `head` does, is no error: the command goes on, and its exit code says how it ended.
pub(crate) fn say(text: &str) -> Result<()> {
    match writeln!(io::stdout().lock(), "{text}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to stdout"),
    }
}

/// Writes a line that is no result. A closed stderr is no reason to stop.
pub(crate) fn warn(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Writes one JSON value.
pub(crate) fn say_json(value: &impl Serialize) -> Result<()> {
    say(&serde_json::to_string_pretty(value).context("cannot write the result as JSON")?)
}

/// A table with a bold head; columns after `text_columns` are numbers and stand right.
pub(crate) fn table(head: &[&str], text_columns: usize) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(head.iter().map(|title| Cell::new(title).add_attribute(Attribute::Bold)));
    for column in table.column_iter_mut().skip(text_columns) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Bytes with three significant digits and a decimal unit: `12.1 GB`.
pub(crate) fn bytes(count: f64) -> String {
    const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let (mut value, mut unit) = (count, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        (value, unit) = (value / 1e3, unit + 1);
    }
    format!("{} {}", digits(value), UNITS[unit])
}

/// Bytes that the system told, or did not.
pub(crate) fn known_bytes(count: Option<u64>) -> String {
    count.map_or_else(|| "unknown".to_owned(), |count| bytes(as_f64(count)))
}

/// Three significant digits, without an exponent.
pub(crate) fn digits(value: f64) -> String {
    match value.abs() {
        size if size >= 99.95 => format!("{value:.0}"),
        size if size >= 9.995 => format!("{value:.1}"),
        0.0 => "0".to_owned(),
        _ => format!("{value:.2}"),
    }
}

/// A byte count as f64, for estimates.
#[allow(clippy::cast_precision_loss, reason = "for display; 53 bits are plenty")]
pub(crate) fn as_f64(count: impl TryInto<u64>) -> f64 {
    count.try_into().map_or(f64::INFINITY, |count| count as f64)
}

/// Sizes joined by ` x `.
pub(crate) fn shape(sizes: &[usize]) -> String {
    sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        let cases =
            [(0.0, "0 B"), (17.0, "17.0 B"), (999.0, "999 B"), (12_080_000_000.0, "12.1 GB"), (999_600.0, "1.00 MB")];
        for (count, expected) in cases {
            assert_eq!(bytes(count), expected);
        }
        assert_eq!([known_bytes(Some(17)), known_bytes(None)], ["17.0 B", "unknown"]);
        assert_eq!(digits(0.054), "0.05");
        assert_eq!(digits(1234.5), "1234");
    }
}
