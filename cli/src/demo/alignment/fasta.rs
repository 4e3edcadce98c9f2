//! FASTA and A3M: `>name description`, then residues on any number of lines.
//!
//! Lines that start with `#` are comments (A3M writers put sizes there). Names may repeat: one hit of a search can
//! bring several rows.

use super::AlignmentError;
use super::record::Record;

/// How a record starts.
pub(super) const RECORD_START: char = '>';

/// Reads every record of `text`, whose first line of content starts one.
pub(super) fn records(text: &str, file: &str) -> Result<Vec<Record>, AlignmentError> {
    let mut records: Vec<Record> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let (line, number) = (line.trim_end(), index + 1);
        if let Some(header) = line.strip_prefix(RECORD_START) {
            let name = header.split_whitespace().next();
            let name = name.ok_or_else(|| AlignmentError::NoName { file: file.to_owned(), line: number })?;
            records.push(Record::new(name, number));
        } else if line.starts_with('#') || line.is_empty() {
            continue;
        } else if let Some(record) = records.last_mut() {
            record.extend(line, file, number, 0)?;
        }
    }
    match records.iter().find(|record| record.symbols.is_empty()) {
        Some(Record { name, line, .. }) => {
            Err(AlignmentError::NoResidues { file: file.to_owned(), line: *line, name: name.clone() })
        }
        None => Ok(records),
    }
}
