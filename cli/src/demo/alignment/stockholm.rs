//! Stockholm 1.0: `name residues` lines, wrapped into blocks or not, ended by `//`.
//!
//! Markup (`#=GF`, `#=GS`, `#=GC`, `#=GR`) and comments are skipped. A name seen again after a blank line continues
//! its row; seen again before one, it is an error. One file holds one alignment: a second one is an error, since
//! taking the first in silence would hide the others.

use std::collections::HashMap;

use super::AlignmentError;
use super::record::Record;

/// How a Stockholm file starts (its version follows).
pub(super) const HEADER: &str = "# STOCKHOLM";

/// Reads the rows of the one alignment in `text`, in order of first appearance.
pub(super) fn records(text: &str, file: &str) -> Result<Vec<Record>, AlignmentError> {
    let mut rows = Rows::default();
    let mut last_line = 0;
    let mut lines = text.lines().enumerate().map(|(index, line)| (index + 1, line.trim_end()));
    for (number, line) in lines.by_ref().skip_while(|(_, line)| !line.starts_with(HEADER)).skip(1) {
        last_line = number;
        if line.trim_start() == "//" {
            end_of_file(lines, file)?;
            return Ok(rows.records);
        } else if line.is_empty() {
            rows.end_block();
        } else if line.starts_with(HEADER) {
            return Err(AlignmentError::MoreThanOneAlignment { file: file.to_owned(), line: number });
        } else if !line.starts_with('#') {
            rows.add(line, file, number)?;
        }
    }
    Err(AlignmentError::MissingTerminator { file: file.to_owned(), line: last_line.max(1) })
}

/// Checks that only blank lines follow the terminator.
fn end_of_file<'a>(mut lines: impl Iterator<Item = (usize, &'a str)>, file: &str) -> Result<(), AlignmentError> {
    match lines.find(|(_, line)| !line.is_empty()) {
        Some((line, _)) => Err(AlignmentError::MoreThanOneAlignment { file: file.to_owned(), line }),
        None => Ok(()),
    }
}

/// The rows read so far, and which of them the current block has given.
#[derive(Default)]
struct Rows {
    records: Vec<Record>,
    index_of: HashMap<String, usize>,
    /// Row index to line, for the current block only.
    in_block: HashMap<usize, usize>,
}

impl Rows {
    fn end_block(&mut self) {
        self.in_block.clear();
    }

    /// Adds one `name residues` line.
    fn add(&mut self, line: &str, file: &str, number: usize) -> Result<(), AlignmentError> {
        let (name, residues) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        if name.is_empty() {
            return Err(AlignmentError::NoName { file: file.to_owned(), line: number });
        }
        if residues.trim().is_empty() {
            return Err(AlignmentError::NoResidues { file: file.to_owned(), line: number, name: name.to_owned() });
        }
        let row = self.row(name, number);
        if let Some(first_line) = self.in_block.insert(row, number) {
            return Err(AlignmentError::DuplicateName {
                file: file.to_owned(),
                line: number,
                name: name.to_owned(),
                first_line,
            });
        }
        let first_column = name.chars().count() + 1;
        self.records[row].extend(residues, file, number, first_column)
    }

    /// Index of the row called `name`, made if it is new.
    fn row(&mut self, name: &str, number: usize) -> usize {
        if let Some(&row) = self.index_of.get(name) {
            return row;
        }
        let row = self.records.len();
        self.records.push(Record::new(name, number));
        self.index_of.insert(name.to_owned(), row);
        row
    }
}
